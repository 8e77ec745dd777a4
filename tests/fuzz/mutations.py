"""Damage to files: of bytes, and of what they say, packed again so that checksums hold."""

import copy
import io
import json
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**40, 1e308, float("nan"), float("inf"), "", "a", "\x00",
    "\ud800", "é" * 40, "../../x", "/etc/passwd", "x" * 70_000, "%s{0}{a}", [], {}, [[]], [None],
    {"": {}}, "nan", "1e999", -0.0, "\u2028\x1b[31m", [0] * 5000, "1", 0.5, 10**9, "float32",
)  # fmt: skip
DEEP, _OBJECT = "deep ", '{"a":'
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """One to four of: bits flipped, cut, spliced, repeated, zeroed, replaced by a number, filled in."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = rng.choice(_BYTES)(rng, content)
    return content


def _flipped(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(min(len(changed), rng.choice((1, 1, 2, 8, 64)))):
        changed[_place(rng, content)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.choice((0, 1, _place(rng, content), rng.randrange(len(content) + 1)))]


def _spliced(rng: random.Random, content: bytes) -> bytes:
    first, second = _place(rng, content), rng.randrange(len(content) + 1)
    return content[:first] + content[second:]


def _repeated(rng: random.Random, content: bytes) -> bytes:
    start, size = _place(rng, content), rng.choice((1, 16, 512, 4096))
    block = content[start : start + size]
    return content[:start] + block * rng.choice((2, 3, 40)) + content[start + size :]


def _overwritten(rng: random.Random, content: bytes) -> bytes:
    start, size = _place(rng, content), rng.choice((1, 4, 8, 64, 512))
    size = min(size, len(content) - start)
    fill = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return content[:start] + fill + content[start + size :]


def _numbered(rng: random.Random, content: bytes) -> bytes:
    kind = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q", "B"))
    number = rng.choice(NUMBERS) & (256 ** struct.calcsize(kind) - 1)
    start = _place(rng, content)
    return content[:start] + struct.pack(kind, number) + content[start + struct.calcsize(kind) :]


def _inserted(rng: random.Random, content: bytes) -> bytes:
    start = _place(rng, content)
    return content[:start] + rng.randbytes(rng.choice((1, 3, 16))) + content[start:]


_BYTES = (_flipped, _cut, _spliced, _repeated, _overwritten, _numbered, _inserted)


def _place(rng: random.Random, content: bytes) -> int:
    """Near the beginning more often: heads decide what the rest means."""
    most = max(len(content), 1)
    return rng.randrange(min(most, rng.choice((16, 256, 4096, most))))


def damaged_text(rng: random.Random, content: bytes) -> bytes:
    """Words and numbers replaced, lines moved, characters that do not belong."""
    text = content.decode("utf-8", "replace")
    words = [match.span() for match in re.finditer(r"[\w.+-]+", text)] or [(0, 0)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        start, end = rng.choice(words)
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:start] + _as_word(rng.choice(HOSTILE)) + text[end:]
        elif kind == 1:
            text = (
                text[:start] + rng.choice("{}[]:,\"'#&*!|>%@`\t\0\ufeff\ud800-?\n") + text[start:]
            )
        elif kind == 2:
            lines = text.split("\n")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = "\n".join(lines)
        else:
            text = text[:start] + rng.choice("[{(") * rng.choice((10, 3000)) + text[end:]
    return text.encode("utf-8", "surrogatepass")


def _as_word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def damaged_json(rng: random.Random, content: bytes) -> bytes:
    """A value exchanged, taken away, doubled, wrapped or nested deep; also one of another place."""
    values = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        values = _changed(rng, values)
    text = json.dumps(values)
    for depth in (900, 100_000):
        for opened, closed in (("[", "]"), ('{"a":', "}")):
            mark = json.dumps(f"{DEEP}{depth}{opened}")
            text = text.replace(mark, opened * depth + "1" + closed * depth)
    return text.encode()


def damaged_json_lines(rng: random.Random, content: bytes) -> bytes:
    lines = content.splitlines() or [b"{}"]
    number = rng.randrange(len(lines))
    lines[number] = damaged_json(rng, lines[number])
    return b"\n".join(lines)


def _changed(rng: random.Random, root: Any) -> Any:
    places = list(_places(root))
    if not places or rng.random() < 0.03:
        return copy.deepcopy(rng.choice(HOSTILE))
    holder, key = rng.choice(places)
    kind = rng.randrange(7)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = _deep(rng)
    elif kind == 2:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "__proto__", "\ud800", f"{key}x", "a" * 300))] = holder.pop(key)
    elif kind == 4 and isinstance(holder[key], int | float):
        value = holder[key]
        holder[key] = rng.choice(
            (-value, value * 1000, value + 1, float(value), str(value), 1 - value)
        )
    else:
        holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    return root


def _places(values: Any) -> "list[tuple[Any, Any]]":
    inner = (
        values.items()
        if isinstance(values, dict)
        else enumerate(values)
        if isinstance(values, list)
        else ()
    )
    found = [(values, key) for key, _ in inner]
    for key in [key for _, key in found]:
        found += _places(values[key])
    return found


def _deep(rng: random.Random) -> Any:
    is_list, depth = rng.random() < 0.5, rng.choice((3, 60, 70, 900, 100_000))
    if depth > 100:  # Python's own JSON does not write these
        return f"{DEEP}{depth}{'[' if is_list else _OBJECT}"
    value: Any = 1
    for _ in range(depth):
        value = [value] if is_list else {"a": value}
    return value


def damaged_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Another header in front of the same numbers, or other numbers: not finite among them."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + size], content[8 + size :]
    if rng.random() < 0.2 and len(data) >= 4:
        start = rng.randrange(len(data) // 4) * 4
        number = struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38, -0.0)))
        return content[:8] + header + data[:start] + number + data[start + 4 :]
    changed = damaged_json(rng, header)
    return struct.pack("<Q", len(changed)) + changed + data


def damaged_zip(rng: random.Random, content: bytes) -> bytes:
    """A member damaged, renamed or taken out, under right checksums."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w") as new:
        names = old.namelist()
        # What tells how to read the rest is a small part of it.
        small = [name for name in names if old.getinfo(name).file_size < 20_000]
        chosen, kind = rng.choice(small or names), rng.randrange(5)
        for name in names:
            inside = old.read(name)
            if name == chosen and kind == 0:
                continue
            if name == chosen and kind == 1:
                name = rng.choice(("", "../x", name + "x", "é", name.upper()))
            elif name == chosen:
                inside = damaged_bytes(rng, inside) if inside else b"\x80"
            new.writestr(name, inside)
    return packed.getvalue()


def damaged_png(rng: random.Random, content: bytes) -> bytes:
    """A chunk changed, moved, doubled or left out, with its checksum; texts with JSON as JSON."""
    chunks, place = [], 8
    while place + 8 <= len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += 12 + size
    number = rng.randrange(len(chunks))
    texts = [n for n, (kind, _) in enumerate(chunks) if kind in (b"tEXt", b"iTXt")]
    if texts and rng.random() < 0.7:
        number = rng.choice(texts)
    kind, inside = chunks[number]
    start = inside.find(b"{")
    if kind in (b"tEXt", b"iTXt") and start > 0 and rng.random() < 0.8:
        chunks[number] = kind, inside[:start] + damaged_json(rng, inside[start:])
    elif rng.random() < 0.6:
        chunks[number] = kind, damaged_bytes(rng, inside)
    elif rng.random() < 0.5:
        chunks.insert(rng.randrange(len(chunks)), chunks[number])
    else:
        del chunks[number]
    return content[:8] + b"".join(
        struct.pack(">I", len(inside))
        + kind
        + inside
        + struct.pack(">I", zlib.crc32(kind + inside))
        for kind, inside in chunks
    )


def damaged_tar(rng: random.Random, content: bytes) -> bytes:
    """A member renamed, of another kind, or with other bytes, under right checksums; or no end."""
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as old,
        tarfile.open(fileobj=packed, mode="w") as new,
    ):
        members = old.getmembers()
        chosen, change = rng.randrange(len(members)), rng.randrange(4)
        for number, member in enumerate(members):
            file = old.extractfile(member)
            inside = file.read() if file else b""
            if number == chosen and change == 0:
                member.name = rng.choice(
                    (
                        "",
                        ".",
                        "../../x.png",
                        "/abs.png",
                        "._a.png",
                        "a" * 300,
                        "a.png\n",
                        "é.png",
                        "x",
                    )
                )
            elif number == chosen and change == 1:
                member.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
                                          tarfile.CHRTYPE, tarfile.DIRTYPE, b"?"))  # fmt: skip
                member.linkname = rng.choice(("a", member.name, "/etc/passwd"))
            elif number == chosen:
                inside = damaged_bytes(rng, inside)
                member.size = len(inside)
            new.addfile(member, io.BytesIO(inside))
    whole = packed.getvalue()
    return whole if rng.random() < 0.7 else whole[: rng.randrange(len(whole)) // 512 * 512]
