"""What a folder of results is about, written down when it is begun: a folder holds one thing alone."""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pixart import __version__
from pixart.evaluation.prompt_sets.files import as_lines
from pixart.evaluation.protocols.protocol import Protocol
from pixart.evaluation.protocols.strict_values import build
from pixart.evaluation.running import results as kept
from pixart.evaluation.store.entries import Prompt
from pixart.evaluation.store.folders import pictures_in
from pixart.files import printable, read_json, write_bytes, write_json
from pixart.locks import claimed

LOCKS = ".locks"
# Of protocol.json: what says how the numbers were made of the pictures, and not what the pictures are.
_OF_SCORES = {
    "id", "title", "metrics", "reference", "reference_digest", "files", "changes", "paper", "differs",
}  # fmt: skip


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the lines of prompts.jsonl."""
    return hashlib.sha256(as_lines(prompts)).hexdigest()


def write_record(
    output: Path, prompts: Sequence[Prompt], record: Mapping[str, Any], *, draws: bool
) -> None:
    """Write prompts.jsonl and protocol.json, or find that the folder is about the same. ValueError, with
    what differs, if it is about something else. draws: whether pictures are about to be drawn there."""
    with claimed(output / LOCKS / "record.lock", wait=True):
        file = output / kept.PROTOCOL
        if file.is_file():
            _check_same(output, kept.read_record(file), record)
        elif draws and (output / kept.IMAGES).is_dir() and pictures_in(output / kept.IMAGES):
            raise ValueError(
                f"{output / kept.IMAGES}: holds pictures that no evaluation drew; name another --output, or "
                "score them with --images"
            )
        if not (output / kept.PROMPTS).is_file():
            write_bytes(output / kept.PROMPTS, as_lines(prompts))
        if not file.is_file():
            write_json(file, record, indent=2)


def _check_same(output: Path, before: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    names = [name for name in {**before, **record} if name not in _OF_SCORES]
    differs = [name for name in names if before.get(name) != record.get(name)]
    if not differs:
        return
    name = differs[0]
    was, asked = (printable(str(one.get(name)), 100) for one in (before, record))
    if isinstance(before.get(name), dict) and isinstance(record.get(name), dict):
        inner = {**before[name], **record[name]}
        name, key = (
            f"{name}.{{}}",
            next(k for k in inner if before[name].get(k) != record[name].get(k)),
        )
        was, asked = (printable(str(one[differs[0]].get(key)), 100) for one in (before, record))
        name = name.format(key)
    raise ValueError(
        f"{output}: holds an evaluation of {before.get('name')} with {name} {was}, asked is {asked}; name "
        "another --output"
    )


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Write results and pages one process after the other."""
    with claimed(output / LOCKS / "results.lock", wait=True):
        yield


def protocol_of(record: Mapping[str, Any]) -> Protocol:
    """The protocol that a protocol.json is of; with the paper's table. CheckpointError or
    ValueError for a file that does not say one."""
    own = {one.name for one in fields(Protocol) if one.init}
    made: Protocol = build(Protocol, {name: record[name] for name in own if name in record})
    changes = record.get("changes", [])
    if not isinstance(changes, list) or not all(isinstance(one, str) for one in changes):
        raise ValueError(f"changes must be a list of texts, got {printable(str(changes), 100)}")
    object.__setattr__(made, "changes", tuple(changes))
    return made


def note_run(output: Path, **facts: Any) -> None:
    """Add to run.json: who worked here, with what, and when."""
    with claimed(output / LOCKS / "run.lock", wait=True):
        file = output / kept.RUN
        before = read_json(file) if file.is_file() else {}
        write_json(file, {"version": 1, **before, **machine(), **facts}, indent=2)


def machine() -> dict[str, Any]:
    """This process: command, library, versions, machine, time."""
    packages = ("torch", "numpy", "pillow", "transformers", "diffusers", "safetensors")
    return {
        "command": sys.argv,
        "library": f"pixart {__version__}",
        "versions": {"python": platform.python_version(), **dict(map(_version, packages))},
        "machine": {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> tuple[str, str | None]:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return package, None
