"""Training the transformer on prepared features: what a step sees, its loss, and its validation.

All that chance decides about a sample (caption, posterior noise, timestep, noise, dropout) comes
from a generator of (seed, stage, step, place in the batch), whichever process computes it.
"""

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixart.checkpoint.load import empty_model
from pixart.checkpoint.save import save_transformer
from pixart.config import PixArtConfig
from pixart.cost import forward_flops
from pixart.dataset.batches import FeatureBatch, FeatureDataset
from pixart.dataset.buckets import epoch_plan
from pixart.diffusion import add_noise
from pixart.distributed import mean_over_processes, rank, share, world_size
from pixart.lora.adapters import add_lora, merge_lora, save_lora
from pixart.model.transformer import PixArt
from pixart.pipeline.text_to_image import Pipeline
from pixart.training.batch import (
    TrainingSample,
    diffusion_losses,
    draw_timestep,
    stack,
    whole_state,
)
from pixart.training.checkpoints import complete, other_parts
from pixart.training.measuring import Measuring
from pixart.training.parallel import groups, own
from pixart.training.plan import transformer_plan
from pixart.training.prepared import data_problems, prepared_problems, source_problems
from pixart.training.previews import draw_pictures
from pixart.training.problems import attempt, problems_of, refuse
from pixart.training.run import Run
from pixart.training.stage import PREVIOUS, RANDOM, ResolvedStage, Stage
from pixart.training.starts import (
    adapt,
    add_adapters,
    add_compression,
    check_null_caption,
    check_prediction,
    pipeline_is_here,
    pipeline_problems,
    set_null_caption,
    transformer_config,
)

logger = logging.getLogger("pixart")


def check(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the fields of a stage that trains a transformer on prepared features."""
    yield from prepared_problems(stage)
    if stage.validation.prompts and not stage.pipeline:
        yield "pipeline must be named to draw validation.prompts, got none; give --pipeline"
    if stage.lora.rank and stage.start == RANDOM:
        yield f"start must be a trained model with lora.rank {stage.lora.rank}"
    if stage.lora.rank and stage.kv_compress:  # what it adds would be frozen as it begins
        rule = "kv_compress must be empty, in a stage of its own,"
        yield f"{rule} with lora.rank {stage.lora.rank}"


def check_files(stage: ResolvedStage, run: Run) -> Iterator[str]:
    """Yield what is wrong with the start, the pipeline and the data that a stage names."""
    if stage.start == PREVIOUS:
        yield from problems_of(lambda: run.expect_previous(stage))
        before, _ = attempt(lambda: run.before(stage))
        if before is not None and not before.trains_transformer:
            yield f"start must be no {before.trains}, which stage {before.name} trains, got previous"
    model, lines = attempt(lambda: run.known_model(stage))
    yield from lines
    start, _ = attempt(lambda: run.start(stage))  # complained of above
    if model is not None:
        yield from problems_of(lambda: add_adapters(stage, model))
    if start is not None:
        yield from problems_of(lambda: check_null_caption(stage, start.null_caption_stored))
    if stage.pipeline and pipeline_is_here(stage):
        yield from pipeline_problems(stage, None if model is None else model.config)
    yield from source_problems(stage, run, None if model is None else model.config)


def plan(stage: ResolvedStage, run: Run) -> str:
    """Say in words and a table what a stage will cost."""
    return transformer_plan(stage, run)


def build(stage: ResolvedStage, run: Run) -> "DenoisingTask":
    """Make the task as the stage begins. T5 runs here, once."""
    data = run.dataset(stage.data.source, stage.resolution)
    prior = run.dataset(stage.data.prior, stage.resolution) if stage.data.prior else None
    start = run.start(stage)
    check_null_caption(stage, start is not None and start.null_caption_stored)
    model = PixArt(transformer_config(stage)) if start is None else adapt(start.load(), stage)
    pipe = open_pipeline(stage, model, run.device) if stage.pipeline else None
    model = model.to(run.device)
    parts = other_parts(stage, run, model.config)
    task = DenoisingTask(model, stage, data, run.device, prior=prior, pipeline=pipe, parts=parts)
    add_compression(stage, task)
    add_adapters(stage, model)
    return task


def open_pipeline(stage: ResolvedStage, model: PixArt, device: torch.device) -> Pipeline:
    """Open the pipeline that reads and draws for a stage, around the model that it trains."""
    # No graphs: previews are few, and training needs the memory.
    pipe = Pipeline.from_pretrained(
        stage.pipeline, transformer=model, device=device, dtype=torch.float32, cuda_graph=False
    )
    check_prediction(stage, stage.pipeline, pipe.scheduler_config)
    set_null_caption(model, pipe)
    pipe.prepare([*stage.validation.prompts, ""])
    return pipe


def export_transformer(
    state: dict[str, Tensor],
    config: PixArtConfig,
    stage: Stage,
    folder: Path,
    parts: Path | None,
    is_null_caption_stored: bool,
) -> None:
    """Write what a user opens, of a whole state dict: see `DenoisingTask.export`. Few steps that the config
    names are said by all of it. parts: of the pipeline that it becomes."""
    whole, lora = empty_model(config), stage.lora
    if lora.rank:
        add_lora(whole, lora.rank, lora.alpha, lora.targets)
    whole.load_state_dict(state, assign=True)
    if lora.rank:
        save_lora(whole, folder / "lora", few_step=config.few_step)
        merge_lora(whole)
    whole.null_caption_stored = is_null_caption_stored  # type: ignore[assignment]
    save_transformer(whole, folder / "transformer", format="diffusers")
    save_transformer(whole, folder / "model.safetensors")
    if parts is not None:
        complete(folder, parts, whole.config)


class DenoisingTask:
    """A Task of pixart.training.trainer: the published loss of a PixArt on a FeatureDataset.

    Raises ValueError for data that do not fit the model or the stage. is_steered: samples come with the
    pictures that steer them.
    """

    is_steered = False

    def __init__(
        self,
        model: PixArt,
        stage: ResolvedStage,
        dataset: FeatureDataset,
        device: torch.device,
        *,
        prior: FeatureDataset | None = None,
        pipeline: Any = None,
        parts: Path | None = None,
    ) -> None:
        self.parts = parts
        self.model: nn.Module = model
        self.transformer, self.stage, self.device = model, stage, device
        self.dataset, self.prior, self.pipeline = dataset, prior, pipeline
        model.gradient_checkpointing = stage.checkpoint_blocks
        # Captions are dropped here, where the draw does not depend on the number of processes.
        model.y_embedder.dropout_prob = 0.0
        refuse(data_problems(stage, dataset, prior, model.config))
        self.scale, self.measuring = stage.vae_scale, Measuring(stage, device)
        held_out = min(stage.validation.images, len(dataset) // 2) if stage.validation.every else 0
        order = random.Random(f"{stage.seed}/held out").sample(range(len(dataset)), len(dataset))
        self.held_out, self.trained = sorted(order[:held_out]), sorted(order[held_out:])
        if stage.validation.every and stage.validation.images and not held_out and rank() == 0:
            logger.warning(
                "stage %s: validation tells no loss, of one image none can be held out", stage.name
            )

    @property
    def config(self) -> PixArtConfig:
        return self.transformer.config

    # What a step sees.

    def load(self, step: int, parts: int) -> list[TrainingSample]:
        """The samples of a step for this process's group, in parts."""
        plan_length = len(self._plan(0))
        batch = self._plan(step // plan_length)[step % plan_length]
        places = own(list(enumerate(batch)), self.stage)
        samples = [self._sample(step, place, index) for place, index in places]
        if self.prior is not None:
            bucket = self.dataset.buckets[batch[0]]
            samples += [self._prior_sample(step, place, bucket) for place, _ in places]
        return [stack(share(samples, part, parts)) for part in range(parts)]

    def _plan(self, epoch: int) -> list[list[int]]:
        return self._plans(epoch)

    @cached_property
    def _plans(self) -> Any:
        buckets = [self.dataset.buckets[index] for index in self.trained]
        sizes = {
            bucket: self.stage.batch.of(self._tokens_of(bucket), groups(self.stage))
            for bucket in set(buckets)
        }

        @lru_cache(maxsize=2)
        def plan(epoch: int) -> list[list[int]]:
            batches = epoch_plan(buckets, sizes, seed=self.stage.seed, epoch=epoch)
            return [[self.trained[index] for index in batch] for batch in batches]

        return plan

    def _tokens_of(self, bucket: tuple[int, int]) -> int:
        side = 8 * self.config.patch_size
        return (bucket[0] // side) * (bucket[1] // side)

    def _sample(self, step: int, place: int, index: int) -> TrainingSample:
        return self._draw(self.dataset, index, f"{step}/{place}", 1.0)

    def _prior_sample(self, step: int, place: int, bucket: tuple[int, int]) -> TrainingSample:
        assert self.prior is not None
        rng = random.Random(f"{self.stage.seed}/{self.stage.name}/prior/{step}/{place}")
        candidates = [i for i, other in enumerate(self.prior.buckets) if other == bucket]
        weight = self.stage.data.prior_weight
        return self._draw(self.prior, rng.choice(candidates), f"prior/{step}/{place}", weight)

    def _draw(self, data: FeatureDataset, index: int, place: str, weight: float) -> TrainingSample:
        rng = random.Random(f"{self.stage.seed}/{self.stage.name}/{place}")
        captions = dict(self.stage.data.captions) if data is self.dataset else None
        one = data.batch([index], rng, captions, control=self.is_steered)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        posterior = torch.randn(one.mean.shape, generator=generator)
        # Features of a T5 that reads further than this model was made for are cut.
        length = min(one.mask.shape[1], self.config.model_max_length)
        features, mask = one.features[:, :length], one.mask[:, :length]
        if torch.rand(1, generator=generator) < self.stage.data.caption_dropout:
            features = self._null_table[:length].to(features.dtype).unsqueeze(0)
        return TrainingSample(
            latents=(one.mean + one.std * posterior) * self.scale,
            noise=torch.randn(one.mean.shape, generator=generator),
            timesteps=draw_timestep(self.stage.timestep_mean, generator),
            features=features,
            mask=mask,
            size=one.size,
            aspect_ratio=one.aspect_ratio,
            weight=torch.tensor([weight]),
            control=self.draw_control(one, generator),
        )

    def draw_control(self, one: FeatureBatch, generator: torch.Generator) -> Tensor | None:
        """The latents of what steers a sample: nothing does."""
        return None

    @cached_property
    def _null_table(self) -> Tensor:
        """The null caption. It is seen under the dropped caption's own mask, as when the published
        models were trained."""
        table = self.transformer.y_embedder.y_embedding
        return getattr(table, "full_tensor", lambda: table)().detach().cpu()

    def noised_batches(self, count: int, images: int = 4) -> Iterator[tuple[Tensor, ...]]:
        """Arguments of the model's forward as it meets them in training: what the first steps, of
        a run that is never trained, would begin with."""
        for number in range(count):
            batch = self._plan(0)[number % len(self._plan(0))][:images]
            samples = [
                self._draw(self.dataset, index, f"calibration/{number}/{place}", 1.0)
                for place, index in enumerate(batch)
            ]
            part = stack(samples).to(self.device)
            x_t = add_noise(part.latents, part.noise, part.timesteps)
            sizes = (part.size, part.aspect_ratio) if self.config.micro_condition else ()
            yield (x_t, part.timesteps, part.features, part.mask, *sizes)

    # Its loss.

    def losses(self, model: nn.Module, part: TrainingSample) -> dict[str, Tensor]:
        part = part.to(self.device)
        sizes = (part.size, part.aspect_ratio) if self.config.micro_condition else ()
        called = self.bind(model, part)
        terms = diffusion_losses(called, part, self.stage, part.features, part.mask, *sizes)
        loss = (terms.loss * part.weight).mean()
        return {"loss": loss, "mse": terms.mse.mean(), "vb": terms.vb.mean()}

    def bind(self, model: nn.Module, part: TrainingSample) -> Callable[..., Tensor]:
        """What is called in place of a model, on noised latents, timesteps, features, mask and sizes."""
        return model

    def flops(self, part: TrainingSample) -> float:
        # Reports take a step as three forward passes. Frozen weights have no gradient: it is two.
        share = 2 / 3 if self.stage.lora.rank else 1
        return share * len(part) * forward_flops(self.config, self.tokens(part) // len(part))

    def images(self, part: TrainingSample) -> int:
        return len(part)

    def tokens(self, part: TrainingSample) -> int:
        latent = part.latents.shape[2] * part.latents.shape[3]
        return len(part) * latent // self.config.patch_size**2

    # What comes of it.

    def export(self, folder: Path) -> None:
        """FOLDER/transformer in diffusers' layout, and FOLDER/model.safetensors with its config; both
        with adapters merged, which are in FOLDER/lora too. FOLDER is a whole pipeline where the other
        parts of one are known."""
        state = whole_state(self.model)
        if rank() == 0:
            is_stored = getattr(self.transformer, "null_caption_stored", True)
            export_transformer(state, self.config, self.stage, folder, self.parts, is_stored)

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """The mean squared error on held-out images, if there are any, at fixed timesteps and noise,
        pictures, and what metrics say of them."""
        values = {}
        if self.held_out:
            values = {f"mse@{t}": self._held_out_loss(t) for t in self.stage.validation.timesteps}
            values["loss"] = sum(values.values()) / len(values)
        if self.pipeline is not None:
            with self.stage.autocast(self.device):
                drawn = draw_pictures(self.pipeline, self.stage, folder / f"step-{step:08d}")
            values |= self.measuring(self.stage.validation.prompts, drawn)
        return values

    def _held_out_loss(self, timestep: int) -> float:
        world, count = world_size(), len(self.held_out)
        total = torch.zeros((), device=self.device)
        # A model that is cut among processes runs in all of them or in none: where images run out, a
        # process repeats one that does not count. Tokens are not shared: each has pictures of its own.
        for place in range(rank(), count + -count % world, world):
            index = self.held_out[place % count]
            sample = self._draw(self.dataset, index, f"validation/{index}", 1.0)
            fixed = TrainingSample(
                **{one.name: getattr(sample, one.name) for one in fields(TrainingSample)}
                | {"timesteps": torch.tensor([timestep])}
            )
            mse = self.losses(self.model, fixed)["mse"].float()
            if place < count:
                total += mse
        return float(mean_over_processes(total) * world / count)
