"""Training the transformer on prepared features: what a step sees, its loss, and how it is judged.

All that chance decides about a sample (caption, posterior noise, timestep, noise, dropout) comes
from a generator of (seed, stage, step, place in the batch), whichever process computes it.
"""

import logging
import random
from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixart.checkpoint.load import empty_model
from pixart.checkpoint.save import save_transformer
from pixart.config import PixArtConfig
from pixart.dataset.batches import FeatureDataset
from pixart.dataset.buckets import epoch_plan
from pixart.diffusion import add_noise, training_loss
from pixart.distributed import mean_over_processes, own, rank, share, world_size
from pixart.lora.adapters import add_lora, merge_lora, save_lora
from pixart.model.transformer import PixArt
from pixart.training.batch import Sample, draw_timestep, stack, whole_state
from pixart.training.plan import forward_flops
from pixart.training.previews import draw_pictures
from pixart.training.stage import Stage

logger = logging.getLogger("pixart")


class DenoisingTask:
    """A Task of pixart.training.trainer: the published loss of a PixArt on a FeatureDataset.

    Raises ValueError for data that do not fit the model or the stage.
    """

    def __init__(
        self,
        model: PixArt,
        stage: Stage,
        dataset: FeatureDataset,
        device: torch.device,
        *,
        prior: FeatureDataset | None = None,
        pipeline: Any = None,
    ) -> None:
        self.model: nn.Module = model
        self.transformer, self.stage, self.device = model, stage, device
        self.dataset, self.prior, self.pipeline = dataset, prior, pipeline
        model.gradient_checkpointing = stage.checkpoint_blocks
        # Captions are dropped here, where the draw does not depend on the number of processes.
        model.y_embedder.dropout_prob = 0.0
        self.scale = _scaling_factor(dataset, stage)
        _check_buckets(dataset, stage)
        dataset.check_captions(dict(stage.data.captions))
        _check_fit(dataset, model)
        if prior is not None:
            _scaling_factor(prior, stage)
            _check_fit(prior, model)
            _check_prior(prior, dataset)
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

    def load(self, step: int, parts: int) -> list[Sample]:
        """This process's samples of a step, in parts."""
        plan_length = len(self._plan(0))
        batch = self._plan(step // plan_length)[step % plan_length]
        places = own(list(enumerate(batch)))
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
            bucket: self.stage.batch.of(self._tokens_of(bucket), world_size())
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

    def _sample(self, step: int, place: int, index: int) -> Sample:
        return self._draw(self.dataset, index, f"{step}/{place}", 1.0)

    def _prior_sample(self, step: int, place: int, bucket: tuple[int, int]) -> Sample:
        assert self.prior is not None
        rng = random.Random(f"{self.stage.seed}/{self.stage.name}/prior/{step}/{place}")
        candidates = [i for i, other in enumerate(self.prior.buckets) if other == bucket]
        weight = self.stage.data.prior_weight
        return self._draw(self.prior, rng.choice(candidates), f"prior/{step}/{place}", weight)

    def _draw(self, data: FeatureDataset, index: int, place: str, weight: float) -> Sample:
        rng = random.Random(f"{self.stage.seed}/{self.stage.name}/{place}")
        captions = dict(self.stage.data.captions) if data is self.dataset else None
        one = data.batch([index], rng, captions)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        posterior = torch.randn(one.mean.shape, generator=generator)
        # Features of a T5 that reads further than this model was made for are cut.
        length = min(one.mask.shape[1], self.config.model_max_length)
        features, mask = one.features[:, :length], one.mask[:, :length]
        if torch.rand(1, generator=generator) < self.stage.data.caption_dropout:
            features = self._null_table[:length].to(features.dtype).unsqueeze(0)
        return Sample(
            latents=(one.mean + one.std * posterior) * self.scale,
            noise=torch.randn(one.mean.shape, generator=generator),
            timesteps=draw_timestep(self.stage.timestep_mean, generator),
            features=features,
            mask=mask,
            size=one.size,
            aspect_ratio=one.aspect_ratio,
            weight=torch.tensor([weight]),
        )

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

    def losses(self, model: nn.Module, part: Sample) -> dict[str, Tensor]:
        part = part.to(self.device)
        sizes = (part.size, part.aspect_ratio) if self.config.micro_condition else ()

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            with self.stage.autocast(self.device):
                return model(x_t, t, part.features, part.mask, *sizes)

        terms = training_loss(
            denoise,
            part.latents,
            part.timesteps,
            part.noise,
            prediction_type=self.stage.prediction,
            min_snr=self.stage.min_snr,
        )
        loss = (terms.loss * part.weight).mean()
        return {"loss": loss, "mse": terms.mse.mean(), "vb": terms.vb.mean()}

    def flops(self, part: Sample) -> float:
        # Reports take a step as three forward passes. Frozen weights have no gradient: it is two.
        share = 2 / 3 if self.stage.lora.rank else 1
        return share * len(part) * forward_flops(self.config, self.tokens(part) // len(part))

    def images(self, part: Sample) -> int:
        return len(part)

    def tokens(self, part: Sample) -> int:
        latent = part.latents.shape[2] * part.latents.shape[3]
        return len(part) * latent // self.config.patch_size**2

    # What comes of it.

    def export(self, folder: Path) -> None:
        """FOLDER/transformer in diffusers' layout, and FOLDER/model.safetensors with its config; both
        with adapters merged, which are in FOLDER/lora too."""
        state = whole_state(self.model)
        if rank() != 0:
            return
        whole, lora = empty_model(self.config), self.stage.lora
        if lora.rank:
            add_lora(whole, lora.rank, lora.alpha, lora.targets)
        whole.load_state_dict(state, assign=True)
        if lora.rank:
            save_lora(whole, folder / "lora")
            merge_lora(whole)
        whole.null_caption_stored = getattr(self.transformer, "null_caption_stored", True)  # type: ignore[assignment]
        save_transformer(whole, folder / "transformer", format="diffusers")
        save_transformer(whole, folder / "model.safetensors")

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """The mean squared error on held-out images, if there are any, at fixed timesteps and noise,
        and pictures."""
        values = {}
        if self.held_out:
            values = {f"mse@{t}": self._held_out_loss(t) for t in self.stage.validation.timesteps}
            values["loss"] = sum(values.values()) / len(values)
        if self.pipeline is not None:
            with self.stage.autocast(self.device):
                draw_pictures(self.pipeline, self.stage, folder / f"step-{step:08d}")
        return values

    def _held_out_loss(self, timestep: int) -> float:
        world, count = world_size(), len(self.held_out)
        total = torch.zeros((), device=self.device)
        # A model that is cut among processes runs in all of them or in none: where images run out, a
        # process repeats one that does not count.
        for place in range(rank(), count + -count % world, world):
            index = self.held_out[place % count]
            sample = self._draw(self.dataset, index, f"validation/{index}", 1.0)
            fixed = Sample(
                **{one.name: getattr(sample, one.name) for one in fields(Sample)}
                | {"timesteps": torch.tensor([timestep])}
            )
            mse = self.losses(self.model, fixed)["mse"].float()
            if place < count:
                total += mse
        return float(mean_over_processes(total) * world / count)


def _scaling_factor(dataset: FeatureDataset, stage: Stage) -> float:
    stored = dataset.scaling_factor
    if stored is not None and abs(stored - stage.vae_scale) > 1e-6:
        raise ValueError(
            f"vae_scale must be that of the VAE that made the data, {stored}, got {stage.vae_scale}"
        )
    return stage.vae_scale


def _check_buckets(dataset: FeatureDataset, stage: Stage) -> None:
    shapes = sorted(set(dataset.buckets) - {(stage.resolution, stage.resolution)})
    if shapes and not stage.aspect:
        raise ValueError(
            f"aspect must be true for data in buckets, got {shapes[0][0]}×{shapes[0][1]}; give "
            "--aspect, or prepare the data with --square"
        )


def _check_prior(prior: FeatureDataset, dataset: FeatureDataset) -> None:
    if lacking := sorted(set(dataset.buckets) - set(prior.buckets)):
        height, width = lacking[0]
        raise ValueError(
            f"data.prior must have a picture in every bucket of the data, got none of "
            f"{height}×{width}; prepare both with --square"
        )


def _check_fit(dataset: FeatureDataset, model: PixArt) -> None:
    one = dataset.batch([0], random.Random(0))
    pairs = (
        ("latent channels", one.mean.shape[1], model.config.in_channels),
        ("caption channels", one.features.shape[2], model.config.caption_channels),
    )
    for name, given, expected in pairs:
        if given != expected:
            raise ValueError(f"data must have {expected} {name} for this model, got {given}")
