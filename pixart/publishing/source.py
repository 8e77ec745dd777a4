"""What is published: the pipeline of a run, and what its state tells about how it was trained."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixart.config import EMBEDDED
from pixart.files import listed
from pixart.pipeline.directory import INDEX
from pixart.releases import release_named
from pixart.training.stage import PREVIOUS, RANDOM
from pixart.training.state import latest_state, read_progress

STATE = re.compile(r"step-\d{8,}")
# As their repositories' cards say on the hub; of the others nobody has looked.
LICENSES = {
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "openrail++",
    "PixArt-alpha/PixArt-XL-2-1024-MS": "openrail++",
}
_LICENSE_OF_EMBEDDED = "apache-2.0"  # of this repository, which holds it
_HEADER = 2**16  # characters of a card that its YAML header is looked for in
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Base:
    """What a model was made from. name: for people. hub_id: if it is on the hub. license: its identifier on
    the hub, None if nobody says it."""

    name: str
    hub_id: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Source:
    """A pipeline to publish.

    pipeline: what `Pipeline.from_pretrained` takes. base: None if nobody says it. settings: of the
    training stage, by dotted names; empty for what is no training state. step: of that state.
    """

    pipeline: str
    base: Base | None
    stage: str = ""
    step: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    data_digests: Mapping[str, Any] = field(default_factory=dict)

    @property
    def license(self) -> str | None:
        """What a card in the pipeline's own folder says."""
        return license_in(Path(self.pipeline) / "README.md")


def find_source(model: str) -> Source:
    """The pipeline that --model names: a run's folder, a stage's, a state, or anything that
    `pixart generate --model` takes. ValueError for a run that does not say which."""
    path = Path(model)
    if model == EMBEDDED or release_named(model) is not None or not path.is_dir():
        return Source(model, base_of(model))
    state = _state_in(path)
    if state is None:
        return Source(model, None if (path / INDEX).is_file() else base_of(model))
    place = next((p for p in (state, state / "pipeline") if (p / INDEX).is_file()), None)
    if place is None:
        raise ValueError(
            f"{state}: holds a transformer and no whole pipeline; train with --pipeline, or put the parts "
            "together and name that folder"
        )
    progress = read_progress(state)
    begun = progress.get("begun") or {}
    fields = begun.get("fields")
    settings = fields if isinstance(fields, dict) else {}
    digests = begun.get("data")
    return Source(
        str(place),
        _base_of_state(state, settings),
        str(progress.get("stage") or state.parent.name),
        progress["step"],
        settings,
        digests if isinstance(digests, dict) else {},
    )


def _state_in(path: Path) -> Path | None:
    """The state that a folder is or leads to; None if it has nothing to do with training."""
    if (path / "progress.json").is_file():
        return path
    if path.name == "pipeline" and (path.parent / "progress.json").is_file():
        return path.parent
    if (path / INDEX).is_file():
        return None
    state = latest_state(path)
    if state is not None:
        return state
    stages = [folder for folder in sorted(path.iterdir()) if _has_states(folder)]
    if len(stages) > 1:
        raise ValueError(
            f"{path}: holds {len(stages)} stages; name one of {listed(map(str, stages))}"
        )
    return latest_state(stages[0]) if stages else None


def _has_states(folder: Path) -> bool:
    return folder.is_dir() and any(STATE.fullmatch(one.name) for one in folder.iterdir())


def _base_of_state(state: Path, settings: Mapping[str, Any]) -> Base | None:
    start = settings.get("start")
    if start == PREVIOUS:
        starts = set(_starts_beside(state.resolve().parent.parent))
        start = starts.pop() if len(starts) == 1 else None
    if not isinstance(start, str) or not start:
        return None
    return Base("random weights") if start == RANDOM else base_of(start)


def _starts_beside(run: Path) -> Iterator[str]:
    """What the stages of a run start from, but for those that go on from another."""
    for folder in sorted(run.iterdir()):
        if not _has_states(folder):
            continue
        newest = max(one for one in folder.iterdir() if STATE.fullmatch(one.name))
        try:
            begun = read_progress(newest).get("begun") or {}
        except ValueError:  # nothing is trained with it: what it cannot say is not told
            continue
        start = (begun.get("fields") or {}).get("start")
        if isinstance(start, str) and start != PREVIOUS:
            yield start


def base_of(name: str) -> Base:
    """What is known of a model by its name: the embedded one, a release, a hub id, a folder with a card."""
    if name == EMBEDDED:
        return Base("the embedded model of pixart-fast", license=_LICENSE_OF_EMBEDDED)
    release = release_named(name)
    if release is not None:
        return Base(release.place, release.hub_id, LICENSES.get(release.hub_id))
    path = Path(name)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        said = license_in(folder / "README.md")
        return Base(path.name, license=said)
    hub_id = name if _HUB_ID.fullmatch(name) else None
    return Base(name, hub_id, LICENSES.get(name))


def license_in(card: Path) -> str | None:
    """The `license` of a model card's YAML header, None if there is none."""
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        header = re.match(r"---\n(.*?)\n---\n", file.read(_HEADER), re.DOTALL)
    said = header and re.search(r"^license: *[\"']?([\w.+-]+)[\"']? *$", header[1], re.MULTILINE)
    return said[1] if said else None
