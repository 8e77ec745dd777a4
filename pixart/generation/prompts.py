"""Files of prompts: .txt with one a line, .jsonl with an object a line."""

from pathlib import Path
from typing import Any

from pixart.files import parse_json
from pixart.pipeline.request import SETTINGS, Request, check_keys


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The lines of a .txt or .jsonl file as {"prompt": ..., ...}; empty lines are passed over."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    # Not splitlines, which also cuts where JSON allows it, at U+2028.
    numbered = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path}: holds no prompt")
    if path.suffix.lower() == ".json":
        raise ValueError(f"{path}: must be text, a prompt a line, or .jsonl, an object a line")
    if path.suffix.lower() == ".jsonl":
        return [_read_line(path, number, line) for number, line in numbered]
    return [{"prompt": line} for _, line in numbered]


def _read_line(path: Path, number: int, line: str) -> dict[str, Any]:
    values = parse_json(line, f"{path}, line {number}")
    if not isinstance(values, dict) or not values.get("prompt"):
        raise ValueError(f'{path}, line {number}: must be an object with a "prompt"')
    try:
        check_keys(values, ("name", "version", *SETTINGS))  # from_dict checks the version
        if not isinstance(values.get("name", ""), str):
            raise ValueError(f"name must be text, got {values['name']!r}")
        Request.from_dict({name: value for name, value in values.items() if name != "name"})
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    return values
