"""Latents of prompts, drawn by settings that a plan could have, and the calls of the transformer on the way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pixart.cost import forward_flops
from pixart.pipeline.fast import step_reuse
from pixart.pipeline.request import Request
from pixart.plans.reuse import BlockReuse
from pixart.plans.schedule import KVSchedule
from pixart.sampler.denoiser import PictureDenoiser, StepReuse
from pixart.sampler.guidance import Captions
from pixart.sampler.loop import initial_noise, sample, seed_generators
from pixart.sampler.walk import Walk
from pixart.text.encoder import PromptEmbeddings

if TYPE_CHECKING:
    from pixart.pipeline.text_to_image import Pipeline


@dataclass(frozen=True)
class Scene:
    """What is drawn."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """How it is drawn; scheduler: None for the pipeline's own, which has no name."""

    scheduler: str | None
    steps: int
    guidance: float
    interval: tuple[float, float]
    schedule: KVSchedule | None = None
    timesteps: tuple[int, ...] | None = None
    reuse: BlockReuse | None = None

    @classmethod
    def of(cls, request: Request) -> "Settings":
        """Of a resolved request."""
        assert request.steps is not None and request.guidance is not None
        text, interval = request.kv_schedule, request.guidance_interval or (0.0, 1.0)
        schedule = None if text is None else KVSchedule.parse(text)
        return cls(
            request.scheduler,
            request.steps,
            request.guidance,
            interval,
            schedule,
            request.timesteps,
            None if request.reuse_blocks is None else BlockReuse.parse(request.reuse_blocks),
        )

    def request(self, scene: Scene, height: int, width: int) -> Request:
        """That draws a scene so."""
        return Request(
            scene.prompt, seed=scene.seed, height=height, width=width, steps=self.steps,
            timesteps=self.timesteps, guidance=self.guidance, guidance_interval=self.interval,
            scheduler=self.scheduler,
            kv_schedule=None if self.schedule is None else str(self.schedule),
            reuse_blocks=None if self.reuse is None else str(self.reuse), batched=True,
        )  # fmt: skip

    def with_schedule(self, schedule: KVSchedule | None) -> "Settings":
        return replace(self, schedule=schedule)


@dataclass(frozen=True)
class Call:
    """One evaluation of a scene. latents: (B, C, h, w), B 2 for both captions. output: (B, C or 2C, h, w)."""

    denoiser: PictureDenoiser
    latents: Tensor
    timestep: Tensor
    captions: Captions
    output: Tensor

    @torch.no_grad()
    def again(self, schedule: KVSchedule) -> Tensor:
        """Its output where blocks merge by a schedule."""
        self.denoiser.kv_schedule = schedule
        try:
            return self.denoiser(self.latents, self.timestep, self.captions)
        finally:
            self.denoiser.kv_schedule = None


class Studio:
    """A pipeline at one size."""

    def __init__(self, pipe: "Pipeline", height: int, width: int) -> None:
        self.pipe, self.height, self.width = pipe, height, width

    def latents(self, scene: Scene, settings: Settings) -> Tensor:
        """(1, C, h, w) that the settings reach."""
        reuse = None
        if settings.reuse is not None:
            solver = self.pipe.solver(settings.scheduler)
            reuse = step_reuse(settings.request(scene, self.height, self.width), solver)
        return self._sample(self._denoiser(scene, settings.schedule, reuse), scene, settings)

    def calls(self, scene: Scene, settings: Settings) -> list[Call]:
        """The evaluations of a scene without a schedule, all blocks computed, in their order."""
        denoiser, calls = self._denoiser(scene, None), []

        def recorded(latents: Tensor, timesteps: Tensor, captions: Captions, /) -> Tensor:
            output = denoiser(latents, timesteps, captions)
            calls.append(Call(denoiser, latents, timesteps, captions, output))
            return output

        self._sample(recorded, scene, settings)
        return calls

    def walk(self, settings: Settings) -> Walk:
        """The evaluations that the settings make."""
        return Walk(self.pipe.solver(settings.scheduler), settings.timesteps or settings.steps)

    def cost(self, settings: Settings, scene: Scene) -> int:
        """FLOPs of the transformer for a scene's picture, its captions once encoded."""
        config, multiple = self.pipe.opened.config, self.pipe.multiple
        grid, (start, end) = (self.height // multiple, self.width // multiple), settings.interval
        texts = self.pipe.caption_tokens(scene.prompt)
        total, depth = 0, config.depth
        counter = None if settings.reuse is None else settings.reuse.counter(depth)
        for step, each in enumerate(self.walk(settings).evaluations, 1):
            ratios: tuple[int, ...] = ()
            if settings.schedule is not None:
                ratios = settings.schedule.ratios(float(each.timestep), config)
            is_guided = settings.guidance > 1 and start <= each.share < end
            halves = ("conditional", "unconditional")[: 2 if is_guided else 1]
            blocks = depth if counter is None else counter(step, halves)
            for text in texts[: len(halves)]:
                total += forward_flops(
                    config, grid, text, encoded=True, kv_ratios=ratios, blocks=blocks
                )
        return total

    def _sample(
        self, denoiser: Callable[[Tensor, Tensor, Captions], Tensor], scene: Scene, how: Settings
    ) -> Tensor:
        pipe, side = self.pipe, self.pipe.vae.downsample
        shape = (pipe.opened.config.in_channels, self.height // side, self.width // side)
        generators = seed_generators([scene.seed])
        return sample(
            denoiser,
            initial_noise(shape, generators, pipe.device),
            pipe.solver(how.scheduler),
            how.timesteps or how.steps,
            guidance=how.guidance,
            guidance_interval=how.interval,
            generators=generators,
        )

    @torch.no_grad()
    def _denoiser(
        self, scene: Scene, schedule: KVSchedule | None, reuse: StepReuse | None = None
    ) -> PictureDenoiser:
        pipe = self.pipe
        conditional, unconditional = pipe.captions.pair(scene.prompt, "")
        prompts: dict[Captions, PromptEmbeddings] = {
            "conditional": conditional,
            "unconditional": unconditional,
            "both": PromptEmbeddings.concatenate([unconditional, conditional]),
        }
        size = (self.height, self.width)
        return PictureDenoiser(
            pipe.transformer, prompts, *size, pipe.device, kv_schedule=schedule, reuse=reuse
        )
