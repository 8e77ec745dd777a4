"""Small picture files for the tests of training data, good ones and bad ones."""

import io
import json
import struct
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def png(height: int = 60, width: int = 80, seed: int = 0) -> bytes:
    """A smooth picture, so that scaling it does not depend on single pixels."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return encoded(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def corrupt_png() -> bytes:
    content = bytearray(png())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    return bytes(content)


def write(file: Path, content: bytes | str | object) -> Path:
    """Bytes and text as they are, anything else as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        file.write_text(text, encoding="utf-8")
    return file


def folder(root: Path, count: int = 3, **sizes: int) -> Path:
    """`count` good pictures, 0.png with its caption in 0.txt and so on."""
    for number in range(count):
        write(root / f"{number}.png", png(seed=number, **sizes))
        write(root / f"{number}.txt", f"caption of picture {number}")
    return root


def icc_profile(space: str, white: bytes, tags: dict[str, bytes]) -> bytes:
    """An ICC profile of version 2 (ICC.1:2001-04), for displays or, if it has a table, for printers.

    space: of the picture, four letters. tags: their contents by their four letters.
    """
    tags = {"desc": _description(), "cprt": b"text\0\0\0\0none\0", "wtpt": white, **tags}
    place, table, content = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name.encode() + struct.pack(">II", place + len(content), len(data))
        content += data + b"\0" * (-len(data) % 4)
    kind, connected = (b"prtr", b"Lab ") if "A2B0" in tags else (b"mntr", b"XYZ ")
    head = struct.pack(">I4sI", place + len(content), b"none", 0x02100000) + kind + space.encode()
    head += connected + struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    return head + white[8:] + bytes(48) + table + content


def _description() -> bytes:
    return b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(4 + 4 + 2 + 1 + 67)


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(value * 256))


D50 = (0.9642, 1.0, 0.8249)
# Red, green and blue of Adobe RGB (1998) under D50, as its profiles have them, and its gamma.
WIDE = np.array(
    [[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]]
)
WIDE_GAMMA = 563 / 256


def wide_profile() -> bytes:
    """Of a space with more colours than sRGB."""
    colours = {f"{name}XYZ": _xyz(*values) for name, values in zip("rgb", WIDE, strict=True)}
    curves = {f"{name}TRC": _gamma(WIDE_GAMMA) for name in "rgb"}
    return icc_profile("RGB ", _xyz(*D50), colours | curves)


def grey_profile(gamma: float) -> bytes:
    return icc_profile("GRAY", _xyz(*D50), {"kTRC": _gamma(gamma)})


def ink_profile(lab: dict[tuple[int, ...], tuple[int, int, int]]) -> bytes:
    """Of CMYK. lab: what full inks give, (1, 0, 0, 0) for cyan alone; white or black where absent."""
    steps = bytes(range(256))
    nodes = b""
    for inks in product((0, 1), repeat=4):
        lightness, a, b = lab.get(inks, (0 if any(inks) else 100, 0, 0))
        nodes += bytes((round(lightness * 2.55), a + 128, b + 128))
    identity = struct.pack(">9i", *(65536 if k % 4 == 0 else 0 for k in range(9)))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + steps * 4 + nodes + steps * 3
    return icc_profile("CMYK", _xyz(*D50), {"A2B0": table})


def srgb_of_xyz(xyz: np.ndarray) -> list[int]:
    """Levels in sRGB of XYZ under D50 (IEC 61966-2-1, its primaries adapted by Bradford)."""
    red_green_blue = np.array(
        [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169],
         [0.0139322, 0.0971045, 0.7141733]]
    )  # fmt: skip
    linear = np.linalg.solve(red_green_blue, xyz).clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return [round(level * 255) for level in curved]


def srgb_of_lab(lightness: float, a: float, b: float) -> list[int]:
    """Levels in sRGB of CIELAB under D50."""
    middle = (lightness + 16) / 116
    roots = np.array([middle + a / 500, middle, middle - b / 200])
    cubes = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29))
    return srgb_of_xyz(cubes * np.array(D50))
