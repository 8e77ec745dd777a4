"""What is kept of an experiment while it goes on: the verdicts of every setting, case by case."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure.results import Row
from pixart.files import read_json, write_json

Columns = dict[str, list[Any]]


@dataclass
class Record:
    """FOLDER/NAME.json. run: what measured it last, as `results.started` has it, and how many seconds all
    took. steps: of every picture; verdicts: by setting, a list for each column, case 0 first."""

    file: Path
    steps: int
    run: dict[str, Any]
    verdicts: dict[str, Columns] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, name: str, steps: int, run: dict[str, Any]) -> "Record":
        """What is there already, for `run` to go on with. ValueError if it was drawn with other steps."""
        file = folder / f"{name}.json"
        if not file.exists():
            return cls(file, steps, run)
        kept = cls.read(file)
        if kept.steps != steps:
            raise ValueError(
                f"--steps must be {kept.steps}, as {file} was drawn, got {steps}; choose another --out"
            )
        return cls(file, steps, {**run, "seconds": kept.run["seconds"]}, kept.verdicts)

    @classmethod
    def read(cls, file: Path) -> "Record":
        kept = read_json(file)
        return cls(file, kept["steps"], kept["run"], kept["verdicts"])

    def count(self, setting: str) -> int:
        """Cases that are done."""
        return len(next(iter(self.verdicts.get(setting, {}).values()), ()))

    def add(self, setting: str, found: Sequence[dict[str, Any]], seconds: float) -> None:
        """The verdicts of the next cases, which took so long."""
        columns = self.verdicts.setdefault(setting, {name: [] for name in found[0]})
        for verdict in found:
            for name, value in verdict.items():
                columns[name].append(_plain(value))
        self.run["seconds"] = round(self.run["seconds"] + seconds, 1)
        write_json(self.file, {"steps": self.steps, "run": self.run, "verdicts": self.verdicts})


def _plain(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    return None if value is None else round(float(value), 4)


def row(part: str, setting: str, columns: Columns, side: int) -> Row:
    """A row of results: of each column how many are true of how many, or its quantiles."""
    figures = {name: _figure(values) for name, values in columns.items()}
    return {
        "id": f"{part}/{setting}",
        "part": part,
        "what": part,
        "variant": setting,
        "shape": {"size": str(side), "batch": 1, "tokens": (side // 16) ** 2},
        "dtype": "float32",
        "status": "measured",
        "cases": len(next(iter(columns.values()))),
        "figures": figures,
    }


def _figure(values: Sequence[Any]) -> dict[str, Any]:
    """None stands where there was nothing to see."""
    seen = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in seen):
        return {"true": sum(seen), "of": len(seen)}
    quantiles = np.quantile(seen, (0.5, 0.95, 1.0)).round(4).tolist()
    return {
        "mean": round(float(np.mean(seen)), 4),
        **dict(zip(("median", "p95", "most"), quantiles, strict=True)),
        "of": len(seen),
    }
