"""Few steps of any PixArt: a student that learns on cached captions (tdm), or on prepared pictures (lcm).

tdm sees no pictures, so prompts alone are enough (`pixart data prompts`); of prepared pictures it reads the
captions and takes their buckets.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from pixart.dataset.batches import CaptionDataset, FeatureDataset
from pixart.dataset.features import holds_prompts
from pixart.distributed import share
from pixart.pipeline.text_to_image import Pipeline
from pixart.resolution import aspect_ratios
from pixart.training.batch import LATENT, TrainingSample, noise_sample, stack, unread_data
from pixart.training.checkpoints import other_parts
from pixart.training.measuring import Measuring
from pixart.training.parallel import groups, own, sharing_problems
from pixart.training.plan import distilling_plan
from pixart.training.prepared import caption_problems, prepared_problems, source_problems
from pixart.training.previews import draw_pictures
from pixart.training.problems import attempt, problems_of, refuse
from pixart.training.run import Run
from pixart.training.stage import LCM, TDM, ResolvedStage, Stage
from pixart.training.starts import (
    add_adapters,
    add_compression,
    check_null_caption,
    pipeline_is_here,
    pipeline_problems,
    set_null_caption,
)
from pixart.training.tasks.distilling import (
    Captions,
    Distilled,
    Walked,
    begin_distilled,
    distilled_flops,
    distilled_losses,
    distilling_problems,
    export_student,
    few_step_of,
    sample_of,
    teacher_problems,
    teacher_start,
    walked,
)
from pixart.training.tasks.transformer import DenoisingTask, open_pipeline


def check(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the fields of a stage that distils on cached features."""
    yield from distilling_problems(stage)
    yield from prepared_problems(stage)
    yield from unread_data(stage, "prior", "prior_weight")
    if stage.validation.prompts and not stage.pipeline:
        yield "pipeline must be named to draw validation.prompts, got none; give --pipeline"
    if stage.trains == TDM and stage.kv_start == "calibrated":
        yield (
            f"kv_start must be mean or random where trains is {TDM}, got calibrated: there are no pictures to "
            "calibrate with"
        )


def check_files(stage: ResolvedStage, run: Run) -> Iterator[str]:
    """Yield what is wrong with the start, the teacher, the pipeline and the data that a stage names."""
    yield from teacher_problems(stage, run)
    model, lines = attempt(lambda: run.known_model(stage))
    yield from lines
    config = None if model is None else model.config
    if model is not None:
        yield from problems_of(lambda: add_adapters(stage, model))
    yield from problems_of(lambda: check_null(stage, run))
    if stage.pipeline and pipeline_is_here(stage):
        yield from pipeline_problems(stage, config)
    if stage.trains == LCM or not holds_prompts(Path(stage.data.source)):
        yield from source_problems(stage, run, config)
        return
    data, lines = attempt(lambda: run.captions(stage))
    yield from lines
    if data is not None:
        yield from caption_problems(stage, data, config)
    if config is not None:
        yield from sharing_problems(stage, config, buckets_of(stage, data))


def check_null(stage: Stage, run: Run) -> None:
    """Refuse to guide by, or to train on, a null caption that nobody knows."""
    opened, _ = attempt(lambda: (run.start(stage), teacher_start(stage, run)))
    stored = [one.null_caption_stored for one in opened or () if one is not None]
    check_null_caption(stage, all(stored))
    if stage.distil.guidance != 1 and not (stage.pipeline or all(stored)):
        raise ValueError(
            f"distil.guidance must be 1 for a teacher without its null caption, got {stage.distil.guidance:g}; "
            "give --pipeline, whose T5 makes it"
        )


def plan(stage: ResolvedStage, run: Run) -> str:
    """Say in words and a table what a stage will cost."""
    return distilling_plan(stage, run)


def build(stage: ResolvedStage, run: Run) -> "Matched | Agreed":
    """Make the task as the stage begins. T5 runs here, once."""
    distilled = begin_distilled(stage, run)
    student = distilled.student
    student.config = replace(student.config, few_step=few_step_of(stage))  # as it is drawn
    pipe = None
    if stage.pipeline:
        pipe = open_pipeline(stage, student, run.device)
        for model in (distilled.teacher, getattr(distilled, "fake", student)):
            set_null_caption(model, pipe)
    parts = other_parts(stage, run, student.config)
    task: Matched | Agreed
    if stage.trains == LCM:
        data = run.dataset(stage.data.source, stage.resolution)
        task = Agreed(distilled, stage, data, run.device, pipeline=pipe, parts=parts)
    else:
        captions = run.captions(stage)
        task = Matched(distilled, stage, captions, run.device, pipeline=pipe, parts=parts)
    add_compression(stage, task)
    return task


def buckets_of(stage: ResolvedStage, data: CaptionDataset | None) -> list[tuple[int, int]]:
    """Height and width in pixels of what tdm draws: those of the pictures that captions come with, each as often;
    without any all of the resolution's."""
    if isinstance(data, FeatureDataset):
        return data.buckets
    square = (stage.resolution, stage.resolution)
    return sorted(set(aspect_ratios(stage.resolution).values())) if stage.aspect else [square]


class Agreed(DenoisingTask):
    """A Task of pixart.training.trainer: latent consistency on a FeatureDataset."""

    def __init__(
        self,
        distilled: Distilled,
        stage: ResolvedStage,
        dataset: FeatureDataset,
        device: torch.device,
        *,
        pipeline: Pipeline | None = None,
        parts: Path | None = None,
    ) -> None:
        super().__init__(distilled.student, stage, dataset, device, pipeline=pipeline, parts=parts)
        self.distilled = distilled
        self.model = distilled

    def losses(self, model: nn.Module, part: TrainingSample) -> dict[str, Tensor]:
        part = part.to(self.device)
        return distilled_losses(model, part, captions_of(part, self.distilled), self.stage)

    def flops(self, part: TrainingSample) -> float:
        tokens = self.tokens(part) // len(part)
        return distilled_flops(self.stage, self.distilled, tokens, part)

    def export(self, folder: Path) -> None:
        export_student(self.model, self.stage, self.transformer, folder, self.parts)


class Matched:
    """A Task of pixart.training.trainer: trajectory distribution matching on a CaptionDataset."""

    def __init__(
        self,
        distilled: Distilled,
        stage: ResolvedStage,
        dataset: CaptionDataset,
        device: torch.device,
        *,
        pipeline: Pipeline | None = None,
        parts: Path | None = None,
    ) -> None:
        self.model: nn.Module = distilled
        self.distilled, self.transformer = distilled, distilled.student
        self.stage, self.dataset, self.device = stage, dataset, device
        self.pipeline, self.parts = pipeline, parts
        refuse(caption_problems(stage, dataset, self.transformer.config))
        self.measuring = Measuring(stage, device)
        self.buckets = buckets_of(stage, dataset)
        held_out = min(stage.validation.images, len(dataset) // 2) if stage.validation.every else 0
        order = random.Random(f"{stage.seed}/held out").sample(range(len(dataset)), len(dataset))
        self.held_out, self.trained = sorted(order[:held_out]), sorted(order[held_out:])

    # What a step sees.

    def load(self, step: int, parts: int) -> list[Walked]:
        """Captions of a step for this process's group, in parts; all of its pictures are of one bucket."""
        stage = self.stage
        bucket = random.Random(f"{stage.seed}/{stage.name}/{step}/bucket").choice(self.buckets)
        images = stage.batch.of(self._tokens_of(bucket), groups(stage))
        rngs = own(stage.rngs(step, images), stage)
        samples = [self._sample(rng, rng.choice(self.trained), bucket) for rng in rngs]
        return [walked(stage, step, stack(share(samples, n, parts))) for n in range(parts)]

    def _tokens_of(self, bucket: tuple[int, int]) -> int:
        side = LATENT * self.transformer.config.patch_size
        return (bucket[0] // side) * (bucket[1] // side)

    def _sample(self, rng: random.Random, index: int, bucket: tuple[int, int]) -> TrainingSample:
        stage, config = self.stage, self.transformer.config
        features = self.dataset.caption(index, rng, dict(stage.data.captions))
        # Features of a T5 that reads further than this model was made for are cut.
        features = features[: config.model_max_length]
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        if torch.rand(1, generator=generator) < stage.data.caption_dropout:
            features = self._null_table[: len(features)].to(features.dtype)
        shape = (config.in_channels, bucket[0] // LATENT, bucket[1] // LATENT)
        return noise_sample(features[None], shape, stage.timestep_mean, generator)

    @cached_property
    def _null_table(self) -> Tensor:
        return null_table(self.distilled).cpu()

    # Its losses.

    def losses(self, model: nn.Module, part: Walked) -> dict[str, Tensor]:
        part = part.to(self.device)
        captions = captions_of(sample_of(part), self.distilled)
        return distilled_losses(model, part, captions, self.stage)

    def flops(self, part: Walked) -> float:
        tokens = self.tokens(part) // len(part)
        return distilled_flops(self.stage, self.distilled, tokens, part)

    def images(self, part: Walked) -> int:
        return len(part)

    def tokens(self, part: Walked) -> int:
        height, width = part.sample.latents.shape[2:]
        return len(part) * height * width // self.transformer.config.patch_size**2

    # What comes of it.

    def export(self, folder: Path) -> None:
        """As of DenoisingTask; all of it says in which steps it is drawn."""
        export_student(self.model, self.stage, self.transformer, folder, self.parts)

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """The losses on held-out captions at each step of the walk, with the same noise every time; pictures as a
        user would draw them, and what metrics say of them."""
        values = self._held_out_losses() if self.held_out else {}
        if self.pipeline is not None:
            with self.stage.autocast(self.device):
                drawn = draw_pictures(self.pipeline, self.stage, folder / f"step-{step:08d}")
            values |= self.measuring(self.stage.validation.prompts, drawn)
        return values

    def _held_out_losses(self) -> dict[str, float]:
        """Every process computes all: a model that is cut among them runs in all of them or in none."""
        stage, sums = self.stage, dict[str, float]()
        bucket = (stage.resolution, stage.resolution)
        walk = stage.distil.walk
        for index in self.held_out:
            rng = random.Random(f"{stage.seed}/{stage.name}/validation/{index}")
            sample = self._sample(rng, index, bucket)
            for place in range(len(walk)):
                found = self.losses(self.model, Walked(sample, walk, place, True))
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        return {name: total / len(self.held_out) / len(walk) for name, total in sums.items()}

    def noised_batches(self, count: int) -> Iterator[tuple[Tensor, ...]]:
        raise NotImplementedError  # a rule of `check`


def null_table(distilled: Distilled) -> Tensor:
    """The null caption, (L, D), of the teacher, which no process has a part of."""
    return distilled.teacher.y_embedder.y_embedding.detach()


def captions_of(sample: TrainingSample, distilled: Distilled) -> Captions:
    """What models take for a sample on their device. The teacher sees the null caption under the prompt's own
    mask, as when the published models were trained."""
    length = sample.features.shape[1]
    null = null_table(distilled)[:length].to(sample.features).expand_as(sample.features)
    sizes = (sample.size.float(), sample.aspect_ratio)
    is_told = distilled.student.config.micro_condition
    return Captions(sample.features, sample.mask, null, sample.mask, sizes if is_told else ())
