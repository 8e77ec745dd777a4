"""Folders side by side: what each is called, the rows of their table, and what is common to all."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pixart.evaluation.metric import Estimate
from pixart.evaluation.report.folder import Evaluated, Judged, Paper
from pixart.evaluation.report.markup import shortened
from pixart.files import without_controls

LONGEST = 80  # letters of a model's name


@dataclass(frozen=True)
class Number:
    """A row of the table. ours: by folder, None where one has no such number."""

    metric: Judged
    name: str
    ours: tuple[Estimate | None, ...]
    paper: Paper | None


def label(metric: str, name: str) -> str:
    """A number's name where metrics stand together: two may have a number called alike."""
    return name if name.startswith(metric) else f"{name} of {metric}"


def numbers_of(folders: Sequence[Evaluated]) -> list[Number]:
    """All numbers of all folders: metrics in the order in which they first come."""
    rows = []
    for metric in metrics_of(folders).values():
        names = dict.fromkeys(
            name
            for one in folders
            if metric.name in one.metrics
            for name in one.metrics[metric.name].values
        )
        for name in sorted(names, key=lambda name: name != metric.main):
            ours = tuple(
                one.metrics[metric.name].values.get(name) if metric.name in one.metrics else None
                for one in folders
            )
            rows.append(Number(metric, name, ours, metric.paper.get(name)))
    return rows


def metrics_of(folders: Sequence[Evaluated]) -> dict[str, Judged]:
    """The first folder's metric of each name."""
    found: dict[str, Judged] = {}
    for one in folders:
        for name, metric in one.metrics.items():
            found.setdefault(name, metric)
    return found


def names_of(folders: Sequence[Evaluated]) -> list[str]:
    """Of the columns: the models where they differ, else the folders."""
    models = [one.model for one in folders]
    names = models if len(set(models)) == len(models) else [one.name for one in folders]
    return [shortened(name, LONGEST) for name in names]


def ways(row: Number, names: Sequence[str]) -> dict[str, list[str]]:
    """How a number was made, in sentences, and whose was made so."""
    found: dict[str, list[str]] = {}
    for name, one in zip(names, row.ours, strict=True):
        if one is not None:
            notes = "".join(f" {sentence(note)}" for note in one.notes)
            found.setdefault(f"{one.method}, n = {one.n:,}.{notes}", []).append(name)
    return found


def command_of(one: Evaluated) -> str:
    """The command that makes the folder again, on one line as it is typed. One process's share of the
    work is left out: all of it is wanted."""
    return without_controls(_command(one))


def _command(one: Evaluated) -> str:
    words = one.folder.run.get("command")
    if isinstance(words, str):
        return words
    if isinstance(words, list) and words:
        texts = [str(word) for word in words]
        kept, skip = [], False
        for word in texts:
            if not skip and not word.startswith("--shard"):
                kept.append(word)
            skip = word == "--shard" and not skip
        return shlex.join([*_program(kept[0]), *kept[1:]])
    words = ["python", "-m", "pixart.evaluate", "run", str(one.protocol.get("name", "PROTOCOL"))]
    return shlex.join([*words, "--model", one.model, "--output", one.name])


def _program(first: str) -> list[str]:
    """How the command is called, of the path that its process was started with."""
    path = PurePath(first.replace("\\", "/"))
    if path.name == "evaluate.py":
        return ["python", "-m", "pixart.evaluate"]
    return ["python", "-m", "pixart"] if path.name == "__main__.py" else [path.name]


def flattened(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """(name, value) of everything in nested settings, in order: a.b for what lies inside."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += flattened(value, f"{before}{name}.")
        elif isinstance(value, list | tuple):
            rows.append((f"{before}{name}", "; ".join(map(_word, value)) or "none"))
        else:
            rows.append((f"{before}{name}", _word(value)))
    return rows


def sentence(note: str) -> str:
    """A note that begins and ends as a sentence does."""
    note = note.strip()
    note = note[:1].upper() + note[1:]
    return note if note.endswith((".", "!", "?")) else f"{note}."


def _word(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_word(inner)}" for name, inner in value.items())
    return str(value) if value != "" else "empty"
