"""The models of a folder of training runs: a row of a table each, such as those of `train kv-convert`.

FOLDER/NAME/STAGE/latest        names the newest state of a run, "step-00005000"
FOLDER/NAME/STAGE/step-00005000/model.safetensors
"""

import re
from dataclasses import dataclass
from pathlib import Path

from pixart.files import read_bounded

_LATEST = re.compile(r"step-\d{8,20}")


@dataclass(frozen=True)
class Variant:
    """A transformer to draw with in a pipeline. name: of the run's folder, with the stage where it has
    several."""

    name: str
    transformer: Path


def find_variants(folder: Path) -> list[Variant]:
    """The newest transformer of every run below a folder, in order of their names. ValueError where there is
    none, or where a run names a state that is not there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of training runs")
    places = sorted({*folder.glob("latest"), *folder.glob("*/latest"), *folder.glob("*/*/latest")})
    stages = [place.parent for place in places if place.is_file()]
    if not stages:
        raise ValueError(
            f"{folder}: must hold training runs, NAME/STAGE/latest, it holds none; a single model is --model"
        )
    runs = [stage.parent for stage in stages]
    return [
        Variant(_name(folder, stage, runs.count(stage.parent) > 1), _newest(stage))
        for stage in stages
    ]


def _name(folder: Path, stage: Path, several: bool) -> str:
    parts = stage.relative_to(folder).parts
    if not parts:
        return folder.resolve().name
    return "/".join(parts) if several or len(parts) == 1 else parts[0]


def _newest(stage: Path) -> Path:
    name = read_bounded(stage / "latest", 1000).decode("utf-8", "replace").strip()
    if not _LATEST.fullmatch(name):
        raise ValueError(
            f"{stage / 'latest'}: must name a state like step-00005000, got {name[:80]!r}"
        )
    path = stage / name / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: is not there, but {stage / 'latest'} names it")
    return path
