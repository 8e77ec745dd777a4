"""The pictures of one pass: of requests that agree in size and sampling, denoised together."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from pixart.checkpoint.load import OpenedTransformer
from pixart.device import free_memory, return_cached
from pixart.graphs.capture import GraphError
from pixart.model.transformer import PixArt
from pixart.pipeline.captions import CaptionStore
from pixart.pipeline.decoding import decode
from pixart.pipeline.graphs import PictureGraphs
from pixart.pipeline.request import Drawn, Request
from pixart.sampler.cuda_graphs import CudaGraphs
from pixart.sampler.denoiser import PictureDenoiser
from pixart.sampler.loop import Captions, Progress, initial_noise, sample, seed_generators
from pixart.sampler.schedulers import Scheduler
from pixart.text.encoder import PromptEmbeddings
from pixart.vae.autoencoder import VAE, Tiled


@dataclass(frozen=True)
class Hooks:
    """What is called while pictures are drawn: see `Pipeline.draw_many`."""

    callback: Callable[[Progress], object] | None
    cancel: Callable[[], bool] | None
    encoding: Callable[[str], object] | None
    decoding: Tiled | None


class Parts(Protocol):
    """What of a `Pipeline` pictures are drawn with."""

    opened: OpenedTransformer
    vae: VAE
    device: torch.device
    captions: CaptionStore
    graphs: PictureGraphs

    @property
    def transformer(self) -> PixArt: ...

    @property
    def multiple(self) -> int: ...

    def solver(self, name: str | None) -> Scheduler: ...


@dataclass(frozen=True)
class Pass:
    """A pass of `pipe` over a group of resolved requests."""

    pipe: Parts
    group: list[Request]
    hooks: Hooks

    def draw(self) -> Iterator[Drawn]:
        pipe, group, like = self.pipe, self.group, self.group[0]
        assert like.height and like.width
        batched = like.batched
        if batched is None:
            batched = self._fits_batched(like.height, like.width)
        seconds: dict[str, float] = {}
        with timed(seconds, "denoise"):
            graphs = pipe.graphs.of_size(like.height, like.width)
            latents = None
            try:
                latents = self._denoise(batched, graphs)
            except GraphError as error:
                pipe.graphs.give_up(error)
            if (
                latents is None
            ):  # outside of the handler, which holds all tensors of the failed step
                # From the first step on, so that the picture has the bits of any without.
                graphs = None
                return_cached(pipe.device)
                latents = self._denoise(batched, graphs)
        seconds["denoise"] /= len(group)
        for request, latent in zip(group, latents.split(1), strict=True):
            with timed(seconds, "decode"):
                pipe.vae.to(pipe.device)
                image, tile = decode(pipe.vae, latent, request, self.hooks.decoding)
            settings = replace(request, batched=batched, tile=tile)
            yield Drawn(image, settings, dict(seconds), len(group), graphs is not None)

    def _denoise(self, batched: bool, graphs: CudaGraphs | None) -> torch.Tensor:
        """The latents (B, C, h, w) of a pass."""
        pipe, like, side = self.pipe, self.group[0], self.pipe.vae.downsample
        assert like.height and like.width
        generators = seed_generators(request.seed for request in self.group)
        shape = (pipe.opened.config.in_channels, like.height // side, like.width // side)
        return sample(
            self._denoiser(graphs),
            initial_noise(shape, generators, pipe.device),
            pipe.solver(like.scheduler),
            like.steps,
            guidance=like.guidance,
            guidance_interval=like.guidance_interval or (0.0, 1.0),
            batched=batched,
            generators=generators,
            callback=self.hooks.callback,
            cancel=self.hooks.cancel,
        )

    def _denoiser(self, graphs: CudaGraphs | None) -> PictureDenoiser:
        pipe, group = self.pipe, self.group
        pairs = [pipe.captions.pair(request.prompt, request.negative) for request in group]
        conditional, unconditional = map(list, zip(*pairs, strict=True))
        prompts: dict[Captions, PromptEmbeddings] = {
            "conditional": PromptEmbeddings.concatenate(conditional),
            "unconditional": PromptEmbeddings.concatenate(unconditional),
            "both": PromptEmbeddings.concatenate([*unconditional, *conditional]),
        }
        height, width = group[0].height, group[0].width
        assert height and width
        return PictureDenoiser(pipe.transformer, prompts, height, width, pipe.device, graphs)

    def _fits_batched(self, height: int, width: int) -> bool:
        """Whether both halves of guidance fit into free memory at once: a block holds about 16
        tensors of its width per token (qkv, the MLP's hidden layer, fp32 temporaries)."""
        pipe, config = self.pipe, self.pipe.opened.config
        tokens = len(self.group) * height * width // pipe.multiple**2
        size = pipe.transformer.dtype.itemsize
        return 2 * tokens * config.hidden_size * 16 * size < free_memory(pipe.device) / 2


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
