"""What a study has found so far: results.json, which is written whole after every run and is all that a
later start reads."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from pixart.device import processor_name, usable_cores
from pixart.files import CheckpointError, read_json, write_json
from pixart.scalability.study.fits import measurements
from pixart.scalability.study.plan import SHOWN, VERSION, Run, Scale, identity

RESULTS, PICTURES = "results.json", "pictures"
KEYS = {
    "identity",
    "parameters",
    "forward_flops",
    "steps",
    "levels",
    "marks",
    "accuracy",
    "cpu_seconds",
    "processor",
}
LIBRARIES = ("torch", "diffusers", "numpy")


class Store:
    """The finished runs of a folder."""

    def __init__(self, folder: Path, scale: Scale, runs: Sequence[Run]) -> None:
        self.folder, self.scale, self.planned = folder, scale, list(runs)
        self.seconds = 0.0  # of all starts
        self.trained = _trained()  # where and when the last run was
        self.finished: dict[str, dict[str, Any]] = {}
        if (folder / RESULTS).exists():
            self._take_up(read_json(folder / RESULTS))

    @property
    def pictures(self) -> Path:
        return self.folder / PICTURES

    @property
    def missing(self) -> list[Run]:
        return [run for run in self.planned if run.name not in self.finished]

    def add(self, found: dict[str, Any], seconds: float) -> None:
        """Keep a finished run. seconds: since this start began, or since the last call."""
        self.finished[found["name"]] = found
        self.seconds += seconds
        self.trained = _trained()
        self.write()

    def write(self) -> None:
        order = [run.name for run in self.planned if run.name in self.finished]
        results = {
            "version": VERSION,
            "scale": asdict(self.scale),
            **self.trained,
            "seconds": round(self.seconds),
            "missing": [run.name for run in self.missing],
            "measurements": measurements(self.finished, self.scale.pool),
            "runs": [self.finished[name] for name in order],
        }
        write_json(self.folder / RESULTS, results, indent=1)

    def _take_up(self, results: dict[str, Any]) -> None:
        """Runs of these settings; others are trained again."""
        path = self.folder / RESULTS
        told = {"version": results.get("version"), "scale": results.get("scale")}
        mine = {
            "version": VERSION,
            "scale": {**asdict(self.scale), "levels": list(self.scale.levels)},
        }
        if told != mine:
            raise ValueError(f"{path} is of another study; name another --output, or remove it")
        wanted = {run.name: identity(run, self.scale) for run in self.planned}
        try:
            for one in results["runs"]:
                name = one["name"]
                if absent := KEYS - one.keys():
                    raise KeyError(f"{name} has no {min(absent)}")
                if one["identity"] == wanted.get(name) and self._has_pictures(name):
                    self.finished[name] = one
            self.seconds = float(results["seconds"])
            if self.finished:
                self.trained = {key: results[key] for key in self.trained}
            # Both are written again with every further run: what cannot be is found out now.
            json.dumps(self.finished, ensure_ascii=False).encode()
            measurements(self.finished, self.scale.pool)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(
                f"{path} is not what a study wrote ({error!r}); remove it, or name another --output"
            ) from error

    def _has_pictures(self, name: str) -> bool:
        return name not in SHOWN or (self.pictures / picture_name(name)).is_file()


def picture_name(run: str) -> str:
    """The file of a run's pictures, in the folder of pictures."""
    return f"{run.replace(',', '').replace(' ', '-')}.png"


def _trained() -> dict[str, Any]:
    return {"date": datetime.now(timezone.utc).date().isoformat(), "machine": machine()}


def machine() -> dict[str, Any]:
    """What the study ran on."""
    return {
        "processor": processor_name(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }
