"""The embedded world's few steps: a student that learns on drawn captions (tdm), or drawn scenes (lcm).

Whole captions nearly decide the picture, which then one step draws; it is short ones, that many pictures
fit, which few steps are hard for: `data.short`.
"""

import random
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixart.distributed import share
from pixart.pipeline.directory import open_directory
from pixart.training.batch import TrainingSample, drawn_data_problems, stack
from pixart.training.parallel import groups, own, sharing_problems
from pixart.training.plan import distilling_plan
from pixart.training.problems import attempt, problems_of
from pixart.training.run import Run
from pixart.training.scenes import (
    DOWNSAMPLE,
    draw_caption,
    draw_sample,
    drawing_problems,
    drawn_sizes,
    token_conditions,
)
from pixart.training.stage import DISTILLED, DIT, LCM, PREVIOUS, RANDOM, TDM, ResolvedStage, Stage
from pixart.training.starts import add_adapters, add_compression, start_is_here
from pixart.training.tasks.distilling import (
    Captions,
    Distilled,
    Walked,
    begin_distilled,
    distilled_flops,
    distilled_losses,
    distilling_problems,
    export_student,
    sample_of,
    teacher_problems,
    walked,
)
from pixart.training.tasks.shapes import (
    SPIECE,
    Pair,
    ShapesTask,
    open_text_encoder,
    start_folder,
)


def check(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the fields of a stage that distils on drawn captions."""
    yield from distilling_problems(stage)
    yield from drawn_data_problems(stage, "scenes", "sizes", "short")
    yield from drawing_problems(stage)
    if stage.pipeline:
        yield (
            f"pipeline must be empty where trains is {stage.trains} and data are drawn, got "
            f"{stage.pipeline}: T5 and VAE are those of the start"
        )


def check_files(stage: ResolvedStage, run: Run) -> Iterator[str]:
    """Yield what a stage needs and is not there, or does not fit it."""
    yield from teacher_problems(stage, run)
    is_else = stage.start in (PREVIOUS, RANDOM) or stage.start.startswith(DIT)
    if not is_else and start_is_here(stage):
        yield from problems_of(lambda: start_folder(stage))
    model, lines = attempt(lambda: run.known_model(stage))
    yield from lines
    if model is not None:
        yield from problems_of(lambda: add_adapters(stage, model))
        yield from sharing_problems(stage, model.config, drawn_sizes(stage))


def plan(stage: ResolvedStage, run: Run) -> str:
    """Say in words and a table what a stage will cost."""
    return distilling_plan(stage, run)


def build(stage: ResolvedStage, run: Run) -> "ShapesDistilling":
    """Make the task as the stage begins."""
    folder = _folder(stage, run)
    text_encoder = open_text_encoder(folder).to(run.device)
    task = ShapesDistilling(begin_distilled(stage, run), text_encoder, stage, folder)
    add_compression(stage, task)
    return task


def _folder(stage: Stage, run: Run) -> Path:
    """The pipeline whose T5 and VAE the student has: they do not change."""
    while stage.start == PREVIOUS and run.before(stage).trains in DISTILLED:
        stage = run.before(stage)
    if stage.start == PREVIOUS:
        return run.previous(stage) / "pipeline"
    return open_directory(stage.start, True)


class ShapesDistilling(ShapesTask):
    """A Task of pixart.training.trainer: a student on drawn captions or scenes, and what teaches it.

    folder: the pipeline whose T5 reads the captions and whose other parts the exported one has.
    """

    exported = ""  # a checkpoint is a pipeline itself

    def __init__(
        self, distilled: Distilled, text_encoder: Any, stage: ResolvedStage, folder: Path
    ) -> None:
        pair = Pair(distilled.student, text_encoder.requires_grad_(False))
        super().__init__(pair, stage, folder / SPIECE, None)
        self.distilled, self.folder = distilled, folder
        self.model = distilled

    def load(self, step: int, parts: int) -> list[Any]:
        if self.stage.trains == LCM:
            return super().load(step, parts)
        sizes = self.stage.data.sizes or (self.stage.resolution,)
        size = sizes[step % len(sizes)]
        images = self.stage.drawn_images(size, groups(self.stage) * parts)
        rngs = own(self.stage.rngs(step, images), self.stage)
        samples = [self._sample(rng, size) for rng in rngs]
        return [walked(self.stage, step, stack(share(samples, n, parts))) for n in range(parts)]

    def _sample(self, rng: random.Random, size: int) -> TrainingSample:
        """What tdm sees of a caption: noise in the place of a picture."""
        side, channels = size // DOWNSAMPLE, self.transformer.config.in_channels
        return draw_caption(rng, self.tokenizer, (channels, side, side), self.stage)

    def losses(self, model: nn.Module, part: Any) -> dict[str, Tensor]:
        part = part.to(self.device)
        return distilled_losses(model, part, self._captions(sample_of(part)), self.stage)

    @property
    def device(self) -> torch.device:
        return next(self.text_encoder.parameters()).device

    @torch.no_grad()
    def _captions(self, sample: TrainingSample) -> Captions:
        ids, mask = token_conditions(sample)
        features = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        null = self._null.expand(len(sample), -1, -1)
        return Captions(features, mask, null, mask.new_ones(null.shape[:2]))

    @cached_property
    def _null(self) -> Tensor:
        """What the empty caption is read as, (1, L, D)."""
        ids = torch.tensor([self.tokenizer.encode("")], device=self.device)
        return self.text_encoder(input_ids=ids).last_hidden_state

    def images(self, part: Any) -> int:
        return len(part)

    def tokens(self, part: Any) -> int:
        return super().tokens(sample_of(part))

    def flops(self, part: Any) -> float:
        tokens = self.tokens(part) // len(part)
        return distilled_flops(self.stage, self.distilled, tokens, part)

    def export(self, folder: Path) -> None:
        """FOLDER is a whole pipeline, drawn in the steps that it was distilled for."""
        export_student(self.model, self.stage, self.transformer, folder, self.folder)

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """The losses on what is the same every time, those of tdm at each step of the walk; pictures, drawn
        as a user would draw them, and what metrics say of others."""
        measured = self._draw_pictures(folder / f"step-{step:08d}")
        stage, side = self.stage, self.stage.resolution
        rngs = [random.Random(f"validation/{k}") for k in range(stage.validation.images)]
        if stage.trains == TDM:
            sample = stack([self._sample(rng, side) for rng in rngs])
            walk = stage.distil.walk
            parts: list[Any] = [Walked(sample, walk, place, True) for place in range(len(walk))]
        else:
            parts = [stack([draw_sample(rng, self.tokenizer, side, stage) for rng in rngs])]
        with torch.no_grad():
            found = [self.losses(self.model, part) for part in parts]
        means = {name: sum(float(one[name]) for one in found) / len(found) for name in found[0]}
        return means | measured
