"""The pictures of one pass: of requests that agree in size and sampling, denoised together."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from pixart.checkpoint.load import OpenedTransformer
from pixart.device import free_memory, return_cached
from pixart.graphs.capture import GraphError
from pixart.model.transformer import PixArt
from pixart.pipeline.captions import CaptionStore
from pixart.pipeline.controls import Controls
from pixart.pipeline.decoding import NotFinitePicture, decode
from pixart.pipeline.editing import cover, make_canvas, to_unit
from pixart.pipeline.fast import step_reuse
from pixart.pipeline.graphs import PictureGraphs
from pixart.pipeline.inputs import Inputs
from pixart.pipeline.limits import parse_blocks
from pixart.pipeline.request import Drawn, Request, passes
from pixart.pipeline.stages import Stage, stages_of
from pixart.pipeline.upscale import COARSE
from pixart.plans.schedule import KVSchedule
from pixart.sampler.cuda_graphs import CudaGraphs
from pixart.sampler.denoiser import PictureControl, PictureDenoiser, StepReuse
from pixart.sampler.guidance import Captions
from pixart.sampler.loop import (
    Cancelled,
    Denoiser,
    Progress,
    Start,
    initial_noise,
    sample,
    seed_generators,
)
from pixart.sampler.mesh import Mesh
from pixart.sampler.schedulers import Scheduler
from pixart.sampler.windows import Windows
from pixart.text.encoder import PromptEmbeddings
from pixart.vae.autoencoder import VAE, Tiled, to_images
from pixart.vae.strips import Strips

if TYPE_CHECKING:
    from PIL.Image import Image


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
    controls: Controls
    attention: str | None
    mesh: Mesh | None

    @property
    def memory(self) -> int | None: ...

    @property
    def transformer(self) -> PixArt: ...

    @property
    def multiple(self) -> int: ...

    def solver(self, name: str | None) -> Scheduler: ...

    def prepare(
        self,
        prompts: Sequence[str],
        progress: Callable[[str], object] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> None: ...


def draw_all(
    pipe: Parts, requests: list[Request], batch: int, hooks: Hooks, inputs: Inputs
) -> Iterator[Drawn]:
    """The pictures of resolved requests in their order: all prompts first, then pass by pass. batch: at
    most, of a pass."""
    before: dict[str, float] = {}
    with timed(before, "text"):
        texts = [text for request in requests for text in (request.prompt, request.negative)]
        hooks = _prepared(pipe, texts, hooks)
    for group in passes(requests, batch):
        if hooks.cancel is not None and hooks.cancel():
            raise Cancelled("cancelled before a picture")
        with timed(before, "load"):
            pipe.transformer.to(pipe.device)
        for drawn in Pass(pipe, group, hooks, inputs).draw():
            yield replace(drawn, seconds=before | drawn.seconds)
            before = dict.fromkeys(before, 0.0)


def _prepared(pipe: Parts, texts: Sequence[str], hooks: Hooks) -> Hooks:
    """Encode prompts. Returns the hooks of what follows, where the processes of a mesh stop at the same step, or
    the others would wait; before it each asks as often as it has something to encode."""
    mesh, cancel, is_cancelled = pipe.mesh, hooks.cancel, False
    try:
        pipe.prepare(texts, hooks.encoding, cancel)
    except Cancelled:
        if mesh is None:
            raise
        is_cancelled = True
    if mesh is None:
        return hooks
    return replace(
        hooks, cancel=lambda: mesh.any(is_cancelled or (cancel is not None and cancel()))
    )


class Pass:
    """A pass of `pipe` over a group of resolved requests, which differ in prompts and seeds alone.

    What a request leaves to free memory is settled here, for all of its stages alike, so that a picture
    drawn again takes the same way.
    """

    def __init__(self, pipe: Parts, group: list[Request], hooks: Hooks, inputs: Inputs) -> None:
        self._pipe, self._hooks, self._inputs, self._count = pipe, hooks, inputs, len(group)
        like = group[0]
        self._stages = stages_of(like, pipe.multiple)
        self._seen = max((stage.seen for stage in self._stages), key=math.prod)
        batched, tile = like.batched, like.tile
        self._splits_guidance = pipe.mesh is not None and pipe.mesh.guidance > 1
        if self._splits_guidance:
            batched = False  # each half has a call of its own
        elif batched is None:
            batched = self._fits_batched(*self._seen)
        if like.image or like.upscale or like.control_image or pipe.mesh is not None:
            pipe.vae.to(pipe.device)
            tile = pipe.vae.choose_tile(self._stages[-1].height, self._stages[-1].width, tile)
        if pipe.mesh is not None:
            tile = _smallest(pipe.mesh, tile)
        self._group = [replace(request, batched=batched, tile=tile) for request in group]
        self._canvas = make_canvas(like, inputs) if like.image else None
        self._fault: NotFinitePicture | None = None

    def draw(self) -> Iterator[Drawn]:
        """The pictures; NotFinitePicture is raised after those before it."""
        pipe, shared = self._pipe, dict[str, float]()
        graphs = pipe.graphs.of_size(*self._seen)
        latents = None
        try:
            latents = self._denoise_all(graphs, shared)
        except GraphError as error:
            pipe.graphs.give_up(error)
        if latents is None:  # outside of the handler, which holds all tensors of the failed step
            # From the first step on, so that the picture has the bits of any without.
            graphs = None
            return_cached(pipe.device)
            latents = self._denoise_all(graphs, shared)
        shared = {stage: taken / self._count for stage, taken in shared.items()}
        self._begin()
        for request, latent in zip(self._group, latents.split(1), strict=True):
            seconds = dict(shared)
            with timed(seconds, "decode"):
                pixels, tile = self._decode(latent, request, self._hooks.decoding)
                is_edited = self._canvas is not None and request.upscale is None
                image = self._finish(pixels) if is_edited else to_images(pixels)[0]
            digests = self._inputs.digests(request)
            request = replace(request, tile=tile)
            yield Drawn(image, request, seconds, self._count, graphs is not None, digests)
        if self._fault is not None:
            raise self._fault

    def _denoise_all(self, graphs: CudaGraphs | None, seconds: dict[str, float]) -> torch.Tensor:
        """The latents (B, C, h, w) of the last stage."""
        like, pipe = self._group[0], self._pipe
        generators = seed_generators(request.seed for request in self._group)
        counts = [
            stage.count_steps(pipe.solver(like.scheduler), like.schedule) for stage in self._stages
        ]
        latents = None
        for number, stage in enumerate(self._stages):
            smaller = None
            if latents is not None:
                with timed(seconds, "decode"):
                    smaller = self._decode_small(latents, self._stages[number - 1])
                generators = generators[: len(smaller)]
            elif self._canvas is not None and like.only_enlarges:
                smaller = [self._canvas.image]
            start = None
            if smaller is not None or self._canvas is not None:
                with timed(seconds, "encode"):
                    start = self._larger(smaller, stage) if smaller else self._start(stage)
            with timed(seconds, "denoise"):
                report = self._report(sum(counts[:number]), sum(counts))
                latents = self._denoise(stage, start, generators, graphs, report)
        assert latents is not None
        return latents

    def _denoise(
        self,
        stage: Stage,
        start: Start | None,
        generators: list[torch.Generator],
        graphs: CudaGraphs | None,
        report: Callable[[Progress], object] | None,
    ) -> torch.Tensor:
        denoiser = self._denoiser(stage, graphs)  # controls are encoded there
        self._begin()
        return self._sample(denoiser, stage, start, generators, report)

    def _sample(
        self,
        denoise: Denoiser,
        stage: Stage,
        start: Start | None,
        generators: list[torch.Generator],
        report: Callable[[Progress], object] | None,
    ) -> torch.Tensor:
        pipe, like, side = self._pipe, self._group[0], self._pipe.vae.downsample
        shape = (pipe.opened.config.in_channels, stage.height // side, stage.width // side)
        return sample(
            denoise,
            # The second stage goes on in the streams of the first.
            initial_noise(shape, generators, pipe.device),
            pipe.solver(like.scheduler),
            like.schedule,
            guidance=stage.guidance,
            start=start,
            batched=bool(like.batched) or self._splits_guidance,
            generators=generators,
            callback=report,
            cancel=self._hooks.cancel,
        )

    def _start(self, stage: Stage) -> Start | None:
        """The picture of the request, of which all or a part is drawn anew."""
        assert self._canvas is not None and stage.strength is not None
        if stage.strength == 1 and not stage.is_masked:
            return None
        pipe = self._pipe
        self._begin()
        latents = self._encode(self._canvas.tensor(pipe.multiple))
        redraw = self._canvas.redraw(pipe.multiple, pipe.vae.downsample)
        redraw = None if redraw is None else redraw.to(pipe.device)
        return Start(latents.expand(len(self._group), -1, -1, -1), stage.strength, redraw)

    def _larger(self, pictures: "list[Image]", stage: Stage) -> Start | None:
        """Pictures made as large as the stage: one for all, or one for each."""
        assert stage.strength is not None
        if stage.strength == 1:
            return None
        self._begin()
        enlarged = [cover(picture, stage.height, stage.width) for picture in pictures]
        latents = torch.cat([self._encode(to_unit(np.asarray(one))) for one in enlarged])
        coarse = min(COARSE, *latents.shape[2:])
        return Start(latents.expand(len(self._group), -1, -1, -1), stage.strength, coarse=coarse)

    def _encode(self, image: torch.Tensor) -> torch.Tensor:
        """(1, 3, H, W) to latents. The mean of the posterior, no sample of it: a picture begins with the
        same latents whatever its seed, and with no noise but the sampler's."""
        if self._hooks.cancel is not None and self._hooks.cancel():
            raise Cancelled("cancelled before a picture was encoded")
        self._pipe.vae.to(self._pipe.device)
        tile, strips = self._group[0].tile, self._strips
        latents = self._pipe.vae.encode(image, sample=False, tile=tile, strips=strips)
        return latents.to(self._pipe.device)

    def _decode_small(self, latents: torch.Tensor, stage: Stage) -> "list[Image]":
        """The pictures of a stage before they are made larger, up to the first that is not finite."""
        pictures: list[Image] = []
        self._begin()
        for request, latent in zip(self._group, latents.split(1), strict=True):
            try:
                pixels, _ = self._decode(latent, request, None)
            except NotFinitePicture as fault:
                if not pictures:
                    raise
                self._fault, self._group = fault, self._group[: len(pictures)]
                break
            pictures.append(to_images(pixels)[0] if stage.is_larger else self._finish(pixels))
        return pictures

    def _begin(self) -> None:
        """On a CPU, give back what the stage before took for activations: glibc keeps it, and this one would take
        its own on top."""
        if self._pipe.device.type == "cpu":
            return_cached(self._pipe.device)

    def _finish(self, pixels: torch.Tensor) -> "Image":
        """The picture of the first stage."""
        return to_images(pixels)[0] if self._canvas is None else self._canvas.compose(pixels)

    def _decode(
        self, latent: torch.Tensor, request: Request, progress: Tiled | None
    ) -> tuple[torch.Tensor, int | bool]:
        self._pipe.vae.to(self._pipe.device)
        return decode(self._pipe.vae, latent, request, progress, self._strips)

    @property
    def _strips(self) -> Strips | None:
        return None if self._pipe.mesh is None else self._pipe.mesh.strips

    def _report(self, done: int, total: int) -> Callable[[Progress], object] | None:
        """The callback of a stage that comes after so many steps, of so many in all."""
        callback = self._hooks.callback
        if callback is None:
            return None
        return lambda one: callback(replace(one, step=done + one.step, total=total))

    def _denoiser(self, stage: Stage, graphs: CudaGraphs | None) -> Denoiser:
        pipe, group = self._pipe, self._group
        pairs = [pipe.captions.pair(request.prompt, request.negative) for request in group]
        conditional, unconditional = map(list, zip(*pairs, strict=True))
        prompts: dict[Captions, PromptEmbeddings] = {
            "conditional": PromptEmbeddings.concatenate(conditional),
            "unconditional": PromptEmbeddings.concatenate(unconditional),
            "both": PromptEmbeddings.concatenate([*unconditional, *conditional]),
        }
        blocks, size = group[0].pag_blocks, (stage.height, stage.width)
        denoiser = PictureDenoiser(
            pipe.transformer, prompts, *size, pipe.device, graphs,
            perturbed=parse_blocks(blocks) if blocks else (),
            controls=self._controls(stage), mesh=pipe.mesh, kv_schedule=self._kv_schedule(),
            reuse=self._reuse(),
        )  # fmt: skip
        if stage.seen == size:
            return denoiser
        height, width = stage.seen
        side, patch = pipe.vae.downsample, pipe.opened.config.patch_size
        cancel = self._hooks.cancel
        return Windows(denoiser, height // side, width // side, multiple=patch, cancel=cancel)

    def _reuse(self) -> StepReuse | None:
        like = self._group[0]
        return step_reuse(like, self._pipe.solver(like.scheduler))

    def _kv_schedule(self) -> KVSchedule | None:
        text = self._group[0].kv_schedule
        return None if text is None else KVSchedule.parse(text)

    def _controls(self, stage: Stage) -> list[PictureControl]:
        pipe, like = self._pipe, self._group[0]
        solver = pipe.solver(like.scheduler)
        return pipe.controls.of_stage(
            like, stage, self._inputs, pipe.vae, solver, pipe.attention, pipe.mesh
        )

    def _fits_batched(self, height: int, width: int) -> bool:
        """Whether both halves of guidance fit into free memory at once: a block holds at most about 16
        tensors of its width per token (qkv, the MLP's hidden layer, fp32 temporaries)."""
        pipe, config = self._pipe, self._pipe.opened.config
        tokens = self._count * height * width // pipe.multiple**2
        size = pipe.transformer.dtype.itemsize
        free = free_memory(pipe.device) if pipe.memory is None else pipe.memory
        if pipe.mesh is not None:  # all make the same calls
            free, tokens = pipe.mesh.least(free), -(-tokens // pipe.mesh.tokens)
        return 2 * tokens * config.hidden_size * 16 * size < free / 2


def _smallest(mesh: Mesh, tile: int | bool | None) -> int | bool:
    """The tile of the process that has least memory."""
    whole = 2**31
    least = mesh.least(whole if tile is False or tile is None else int(tile))
    return False if least == whole else least


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds what the block takes to a stage."""
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
