"""Small picture files for the tests of training data, good ones and bad ones."""

import io
import json
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
