"""prompts.jsonl, read and written: lines of Prompt's fields. A .txt of one prompt a line is read too."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pixart.evaluation.store.entries import Prompt
from pixart.files import CheckpointError, parse_json, printable, read_bounded, write_bytes

MAX_BYTES = 2**30  # of a file
MAX_LINE = 2**20  # bytes: questions about a picture are a few kB
MAX_ID = 200  # bytes: a folder's name, with room for what stands before and behind it
MAX_SIDE = 2**16
_KEYS = ("id", "prompt", "set", "category", "reference", "meta", "size")
_WINDOWS = set('<>:"|?*')


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in its order. ValueError names the line for what is no prompt, an id that is
    no name for a folder, and an id that is there twice."""
    try:
        content = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix.lower() == ".txt":
        prompts = _plain(path, content)
    else:
        lines = enumerate(content.splitlines(), start=1)
        prompts = [_prompt(f"{path} line {k}", line) for k, line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: must hold prompts, it holds none")
    first: dict[str, int] = {}
    for number, prompt in enumerate(prompts, start=1):
        before = first.setdefault(prompt.id.casefold(), number)  # one folder to some disks
        if before != number:
            raise ValueError(
                f"{path}: ids must be unique, prompts {before} and {number} both have "
                f"{printable(prompt.id)!r}"
            )
    return prompts


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write a file that `read_prompts` reads, aside and renamed."""
    write_bytes(path, as_lines(prompts))


def as_lines(prompts: Iterable[Prompt]) -> bytes:
    """The contents of prompts.jsonl: what is left out has its default."""
    lines = []
    for prompt in prompts:
        values = {name: value for name, value in asdict(prompt).items() if value not in ("", None)}
        if not prompt.meta:
            values.pop("meta", None)
        values["prompt"] = prompt.prompt
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8")


def check_id(name: str, value: str) -> None:
    """ValueError unless an id is a name for a folder on every system: it leads nowhere else."""
    is_name = (
        value.isprintable()
        and value == value.strip()
        and not value.startswith(".")
        and not value.endswith(".")
        and not set(value) & {"/", "\\", *_WINDOWS}
        and 0 < len(value.encode("utf-8", "surrogatepass")) <= MAX_ID
    )
    if not is_name:
        raise ValueError(
            f"{name}: id must be a word for a folder's name, without / and \\ and of at most {MAX_ID} "
            f"bytes, got {printable(value, 100)!r}"
        )


def check_size(name: str, size: str) -> tuple[int, int]:
    """(width, height) of "WIDTHxHEIGHT". ValueError for anything else."""
    sides = size.split("x")
    if len(sides) == 2 and all(one.isascii() and one.isdigit() and len(one) < 6 for one in sides):
        width, height = map(int, sides)
        if 1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE:
            return width, height
    raise ValueError(
        f"{name}: size must be WIDTHxHEIGHT in pixels, such as 1024x1024, got {size!r}"
    )


def _plain(path: Path, content: bytes) -> list[Prompt]:
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: must be UTF-8 text") from None
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith("#")]
    return [Prompt(f"{number:05d}", line) for number, line in enumerate(kept)]


def _prompt(name: str, line: bytes) -> Prompt:
    values = parse_json(line, name, MAX_LINE, unique=True)
    if not isinstance(values, dict):
        raise ValueError(f"{name}: must be a JSON object, got a {type(values).__name__}")
    for key in ("id", "prompt"):
        if key not in values:
            raise ValueError(f"{name}: must have {key}, it has {', '.join(values) or 'nothing'}")
    if unknown := [key for key in values if key not in _KEYS]:
        raise ValueError(
            f"{name}: knows {', '.join(_KEYS)}, got {printable(unknown[0])!r}; what single metrics need "
            "is in meta"
        )
    if isinstance(values["id"], int) and not isinstance(values["id"], bool):
        values["id"] = f"{values['id']:05d}"
    for key in ("id", "prompt", "set", "category"):
        if not isinstance(values.get(key, ""), str):
            raise ValueError(f"{name}: {key} must be text, got {_brief(values[key])}")
    for key in ("reference", "size"):
        if not isinstance(values.get(key), str | None):
            raise ValueError(f"{name}: {key} must be text, got {_brief(values[key])}")
    meta = values.get("meta") or {}
    if not isinstance(meta, dict):
        raise ValueError(f"{name}: meta must be a JSON object, got {_brief(meta)}")
    if not _is_finite(meta):
        raise ValueError(f"{name}: meta must hold finite numbers, it has NaN or infinity")
    check_id(name, values["id"])
    if values.get("size") is not None:
        check_size(name, values["size"])
    if values.get("reference") is not None:
        _check_reference(name, values["reference"])
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name}: must be text that UTF-8 can write, it is not") from None
    return Prompt(**{**values, "meta": meta})


def _check_reference(name: str, reference: str) -> None:
    parts = Path(reference).parts
    if Path(reference).is_absolute() or ".." in parts or "\0" in reference or not parts:
        raise ValueError(
            f"{name}: reference must be a file below the reference folder, got {printable(reference)!r}"
        )


def _brief(value: object) -> str:
    return printable(repr(value), 60)


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
