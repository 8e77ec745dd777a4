"""A recipe in a directory: DIRECTORY/STAGE holds what each stage has reached.

Stages run one after the other; a stage that starts from the previous one takes the averaged weights
of its newest state. What a stage leaves open is taken from its start and its data.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from pixart.config import EMBEDDED, PixArtConfig
from pixart.dataset.batches import CaptionDataset, FeatureDataset, open_captions
from pixart.dataset.features import holds_prompts
from pixart.distributed import rank
from pixart.files import read_json
from pixart.model.transformer import PixArt
from pixart.pipeline.directory import open_directory
from pixart.releases import release_named
from pixart.training.batch import LATENT
from pixart.training.problems import attempt
from pixart.training.stage import (
    CONTROLNET,
    DIT,
    DRAWN,
    OPEN,
    PREVIOUS,
    RANDOM,
    ResolvedStage,
    Stage,
)
from pixart.training.starts import Start, open_start, start_is_here, weightless_model
from pixart.training.state import latest_state, read_progress
from pixart.training.trackers import TrackerName
from pixart.weights import resolve

_SETTINGS = ("scheduler/*.json", "vae/*.json")

logger = logging.getLogger("pixart")


@dataclass
class Run:
    """Stages of a recipe, in order, trained in a directory on one device per process: what tasks ask
    about their surroundings. `pixart.training.execute` trains them."""

    directory: Path
    stages: Sequence[Stage]
    device: torch.device
    save_every: int = 500
    keep: int = 2
    trackers: tuple[TrackerName, ...] = ()
    quiet: bool = False
    log_every: int = 20
    start_from: Path | None = None
    """A state to go on from instead of a stage's newest."""
    accepted: tuple[str, ...] = ()
    """Names of fields that may be others than a state was trained with."""
    to_come: frozenset[str] = frozenset()
    """Stages that will be trained before the one that is looked at: their states need not be there."""
    resolutions: dict[Any, ResolvedStage] = field(default_factory=dict, repr=False)
    start_configs: dict[Any, PixArtConfig | None] = field(default_factory=dict, repr=False)
    """What was found out, also for `dataclasses.replace`: a stage asks for all that come before it."""
    _datasets: dict[Any, FeatureDataset] = field(default_factory=dict, init=False, repr=False)
    _prompts: dict[str, CaptionDataset] = field(default_factory=dict, init=False, repr=False)
    _starts: dict[Any, Start] = field(default_factory=dict, init=False, repr=False)
    _logged: set[str] = field(default_factory=set, init=False, repr=False)

    # The stages, and the states that they have reached.

    def stage(self, name: str) -> Stage:
        """A stage, its batches sized for the processes that it began with: a step means the same images
        to any number of them."""
        stage = next(stage for stage in self.stages if stage.name == name)
        if stage.batch.tokens is None or stage.batch.multiple is not None:
            return stage
        state = self.state(stage)
        begun = None if state is None else read_progress(state).get("batch_unit")
        return replace(stage, batch=replace(stage.batch, multiple=begun))

    def has(self, name: str) -> bool:
        """Whether a stage has this name."""
        return any(stage.name == name for stage in self.stages)

    def folder(self, name: str) -> Path:
        return self.directory / name

    def state(self, stage: Stage) -> Path | None:
        """The state that a stage goes on from, None where it begins."""
        return self.start_from or latest_state(self.folder(stage.name))

    def is_finished(self, stage: Stage) -> bool:
        state = latest_state(self.folder(stage.name))
        if state is None:
            return False
        reached = read_progress(state)
        out_of_time = stage.hours is not None and reached["seconds"] >= stage.hours * 3600
        return reached["step"] >= stage.steps or out_of_time

    def is_over(self, stage: Stage) -> bool:
        """Whether nothing of a stage is left to train: it is finished, and no other state was named."""
        return self.start_from is None and self.is_finished(stage)

    def before(self, stage: Stage) -> Stage:
        """The stage before this one in the recipe."""
        position = [other.name for other in self.stages].index(stage.name)
        if position == 0:
            raise ValueError(
                f"stage {stage.name} is the first and cannot start from the previous one; "
                "give --start"
            )
        return self.stages[position - 1]

    def origin(self, stage: Stage) -> Stage:
        """The stage that says what a stage starts from: itself, but for a control that goes on from the
        previous one's, whose base is that one's."""
        is_further = stage.trains == CONTROLNET and stage.start == PREVIOUS
        if is_further and stage.name != self.stages[0].name:
            before = self.before(stage)
            return self.origin(before) if before.trains == CONTROLNET else stage
        return stage

    def newest(self, name: str) -> Path:
        """The newest state of a stage. Raises ValueError where it has none."""
        state = latest_state(self.folder(name))
        if state is None:
            raise ValueError(
                f"stage {name} must be trained first, {self.folder(name)} has no saved state"
            )
        return state

    def previous(self, stage: Stage) -> Path:
        """The newest state of the stage before this one in the recipe."""
        return self.newest(self.before(stage).name)

    def expect_previous(self, stage: Stage) -> None:
        """Raise ValueError unless the stage before has a state, or will have one."""
        if self.before(stage).name not in self.to_come:
            self.previous(stage)

    # What they need, opened once for all who look at it.

    def dataset(self, source: str, resolution: int) -> FeatureDataset:
        """Prepared features. Raises ValueError where there are none."""
        key = source, resolution
        if key not in self._datasets:
            self._datasets[key] = FeatureDataset(source, resolution)
        return self._datasets[key]

    def captions(self, stage: ResolvedStage) -> CaptionDataset:
        """The captions that a stage learns from, with pictures or without. Raises ValueError where there are
        none."""
        source = stage.data.source
        if not holds_prompts(Path(source)):
            return self.dataset(source, stage.resolution)
        if source not in self._prompts:
            self._prompts[source] = open_captions(source)
        return self._prompts[source]

    def start(self, stage: Stage) -> Start | None:
        """What a transformer starts from; None for random weights, and for what is not here yet: a
        stage to come, or on the hub. Raises ValueError for what cannot be opened."""
        stage = self.origin(stage)
        if stage.start == RANDOM or not start_is_here(stage):
            return None
        previous = None
        if stage.start == PREVIOUS:
            before = self.before(stage)
            if not before.trains_transformer or before.name in self.to_come:
                return None
            previous = self.newest(before.name)
        key = stage.start, previous, stage.max_length, stage.pipeline
        if key not in self._starts:
            self._starts = {key: open_start(stage, previous)}  # one at a time: some are loaded
        return self._starts[key]

    def knows_start(self, stage: Stage) -> bool:
        """Whether it is known what a stage starts from: not, where that would have to be downloaded first
        and must not be. XL/2 is planned with instead, and nothing said about it."""
        stage = self.origin(stage)
        if stage.start != PREVIOUS:
            return stage.start == RANDOM or start_is_here(stage)
        before = self.before(stage)
        return before.name not in self.to_come or self.knows_start(before)

    def forget(self) -> None:
        """Let go of all that was opened or found out."""
        self.resolutions.clear()
        self.start_configs.clear()
        self._datasets.clear()
        self._prompts.clear()
        self._starts.clear()

    # What a stage will be.

    def model(self, stage: ResolvedStage) -> PixArt:
        """The transformer that a stage will train, its adapters aside, without memory for its weights.
        Raises ValueError where its start cannot be opened, or changed as the stage wants."""
        return weightless_model(stage, self._start_config(stage))

    def known_model(self, stage: ResolvedStage) -> PixArt | None:
        """The same; None where the start is not known."""
        return self.model(stage) if self.knows_start(stage) else None

    def planned(self, stage: ResolvedStage) -> PixArt:
        """The same, also before its start is there: XL/2 of the stage's resolution is planned with."""
        model, _ = attempt(lambda: self.model(stage))
        return weightless_model(stage, None) if model is None else model

    def _start_config(self, stage: Stage) -> PixArtConfig | None:
        key = self._key(stage)
        if key not in self.start_configs:
            self.start_configs[key] = self._read_start_config(stage)
        return self.start_configs[key]

    def _read_start_config(self, stage: Stage) -> PixArtConfig | None:
        start = self.start(stage)
        if start is not None:
            return start.config
        stage = self.origin(stage)
        before = self.before(stage) if stage.start == PREVIOUS else None
        if before is None or not before.trains_transformer:
            return None
        return self.planned(self.resolved(before)).config

    def resolved(self, stage: Stage) -> ResolvedStage:
        """The stage with what it leaves open, as its data, its pipeline or its start say it."""
        key = self._key(stage)
        if key not in self.resolutions:
            self.resolutions[key] = self._resolve(stage)
        return self.resolutions[key]

    def _key(self, stage: Stage) -> tuple[Any, ...]:
        """What is known of a stage depends on which of those before it are still to come."""
        names = (other.name for other in self.stages)
        before = takewhile(lambda name: name != stage.name, names)
        return stage, self.to_come.intersection(before)

    def _resolve(self, stage: Stage) -> ResolvedStage:
        left = {name for name in OPEN if getattr(stage, name) is None}
        values: dict[str, Any] = {}
        for name, value, source in self._known(stage) if left else ():
            if name in left:
                values[name] = value
                left.remove(name)
                self.say(f"stage {stage.name}: {name} {value}, as {source} says")
            if not left:
                break
        return stage.resolved(**values)

    def say(self, line: str) -> None:
        """Log a line, once."""
        if line not in self._logged and rank() == 0:
            self._logged.add(line)
            logger.info("%s", line)

    def _known(self, stage: Stage) -> Iterator[tuple[str, Any, str]]:
        """Field, value and who says so, the surest first. What cannot be opened says nothing here: it is
        complained of where it is needed."""
        if stage.data.source != DRAWN:
            yield from self._data_say(stage)
        if self.has(stage.pipeline):
            state = latest_state(self.folder(stage.pipeline))
            if state is not None:
                yield from _folder_says(state, f"stage {stage.pipeline}")
        for source in (stage.pipeline, stage.start):
            if not self._is_outside(source):
                continue
            folder, _ = attempt(partial(_find_settings, source))
            if folder is not None:
                yield from _folder_says(folder, source)
        if stage.trains_transformer or stage.trains == CONTROLNET:
            config, _ = attempt(lambda: self._start_config(stage))
            if config is not None:
                yield "resolution", config.input_size * LATENT, "the start"
                yield "max_length", config.model_max_length, "the start"
        if stage.start == PREVIOUS and stage.name != self.stages[0].name:
            before = self.resolved(self.before(stage))
            yield from ((name, getattr(before, name), f"stage {before.name}") for name in OPEN)

    def _data_say(self, stage: Stage) -> Iterator[tuple[str, Any, str]]:
        resolution, held = stage.resolution, _resolutions(Path(stage.data.source))
        if resolution is None and len(held) == 1:
            resolution = held[0]
            yield "resolution", resolution, stage.data.source
        if resolution is None or stage.vae_scale is not None:
            return
        data, _ = attempt(partial(self.dataset, stage.data.source, resolution))
        if data is not None and data.scaling_factor is not None:
            yield "vae_scale", data.scaling_factor, stage.data.source

    def _is_outside(self, source: str) -> bool:
        """Whether a start or a pipeline is somewhere else than in this run."""
        inside = source in ("", PREVIOUS, RANDOM) or self.has(source)
        return not inside and not source.startswith(DIT)


def _find_settings(source: str) -> Path:
    """A folder with the settings of a pipeline, or a checkpoint without any. A release that is a
    transformer alone has those of the pipeline that it belongs to."""
    if source == EMBEDDED:
        return open_directory(EMBEDDED, True)
    release = release_named(source)
    if release is not None and release.pipeline is not None:
        source = release.pipeline
    return resolve(source, allow_patterns=_SETTINGS)


def _folder_says(folder: Path, source: str) -> Iterator[tuple[str, Any, str]]:
    """What the files of a pipeline tell about how its model was trained."""
    scheduler, vae = folder / "scheduler" / "scheduler_config.json", folder / "vae" / "config.json"
    if scheduler.is_file():
        yield "prediction", read_json(scheduler).get("prediction_type", "epsilon"), source
    if vae.is_file() and (scale := read_json(vae).get("scaling_factor")) is not None:
        yield "vae_scale", scale, source


def _resolutions(folder: Path) -> list[int]:
    """Those that data were prepared at; none for the official layout, which does not say."""
    names = [file.stem.removeprefix("index-") for file in folder.glob("index-*.json")]
    return sorted(int(name) for name in names if name.isdigit())
