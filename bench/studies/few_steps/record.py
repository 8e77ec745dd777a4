"""What is kept of a row while it is drawn: the verdict on every picture, case by case."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.studies.few_steps.cases import caption
from pixart.files import CheckpointError, digest, read_json, write_bytes

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Verdict:
    """Of one picture. held, of: statements of its caption. purity: share of pixels near a colour of the world."""

    held: int
    of: int
    purity: float


@dataclass
class Record:
    """FOLDER/ROW.json. about: of the row. run: what measured it last, as `results.started` has it, and how many
    seconds all took. verdicts: by kind, a list for each column, case 0 first."""

    file: Path
    name: str
    about: dict[str, Any]
    run: dict[str, Any]
    captions: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, Columns] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, name: str, about: dict[str, Any], run: dict[str, Any]) -> "Record":
        """What is there already, for `run` to go on with. ValueError if it was drawn otherwise."""
        file = folder / f"{_slug(name)}.json"
        if not file.exists():
            return cls(file, name, about, {**run, "seconds": 0.0})
        kept = cls.read(file)
        changed = [key for key in ("settings", "weights") if kept.about.get(key) != about[key]]
        if kept.name != name:
            changed.insert(0, "name")
        if changed or any(
            kept.captions[kind] != _of_captions(kind, kept) for kind in kept.verdicts
        ):
            raise ValueError(
                f"--out must hold verdicts on the same pictures, but {file} was drawn with other "
                f"{changed[0] if changed else 'captions'}; choose another --out or another name"
            )
        return cls(
            file, name, about, {**run, "seconds": kept.run["seconds"]}, kept.captions, kept.verdicts
        )

    @classmethod
    def read(cls, file: Path) -> "Record":
        """CheckpointError for a file of something else."""
        kept = read_json(file)
        try:
            return cls(
                file, *(kept[key] for key in ("name", "about", "run", "captions", "verdicts"))
            )
        except KeyError as error:
            raise CheckpointError(
                f"{file}: must hold verdicts of this study, got no {error}"
            ) from None

    @property
    def key(self) -> tuple[str, str]:
        """Which run it is of."""
        return self.run["command"], self.run["date"]

    def count(self, kind: str) -> int:
        """Cases that are done."""
        return len(self.verdicts.get(kind, {}).get("held", ()))

    def add(self, kind: str, found: Iterable[Verdict], seconds: float) -> None:
        """The verdicts on the next cases, which took so long."""
        columns = self.verdicts.setdefault(kind, {"held": [], "of": [], "purity": []})
        for one in found:
            columns["held"].append(one.held)
            columns["of"].append(one.of)
            columns["purity"].append(round(one.purity, 4))
        self.captions[kind] = _of_captions(kind, self)
        self.run["seconds"] = round(self.run["seconds"] + seconds, 1)
        kept = {"name": self.name, "about": self.about, "run": self.run}
        kept |= {"captions": self.captions, "verdicts": self.verdicts}
        # Not flushed to the disk: a pass is drawn again sooner than the disk answers where much is written.
        write_bytes(self.file, json.dumps(kept).encode(), durable=False)


def records(folder: Path) -> list[Record]:
    """All that a folder holds."""
    return [Record.read(file) for file in sorted(folder.glob("*.json"))]


def _of_captions(kind: str, record: Record) -> str:
    """Which captions the verdicts are on."""
    asked: Sequence[str] = [caption(kind, number) for number in range(record.count(kind))]
    return digest("\n".join(asked).encode())


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)
