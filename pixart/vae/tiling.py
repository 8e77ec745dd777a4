"""The VAE's encoder and decoder in pieces: the whole image's result in a fraction of its memory.

Cutting an image into tiles and blending the results shows: group normalisation takes its mean and
variance from the tile, so that tones change from tile to tile however wide the overlap. Here the
network is cut as well, into stages of one residual block (with the up- or downsampling beside it).
A stage's tiles overlap by `HALO` pixels, more than its convolutions reach, and share the statistics
of the whole image, which a first pass over the tiles collects: what comes out is what the whole
image would have given, but for rounding. There is no seam to hide.

Cost: a stage computes its first convolution again for every normalisation after it, about twice
the arithmetic of the whole image; in between, one stage's input and output are kept whole, wherever
the caller wants them (a GPU's image may wait in host memory). The middle block, with its attention
over all positions, runs whole: its tensors are as small as the latents.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALO = 4  # input pixels; an upsampling, a residual block and a convolution reach 3, and it is even


@dataclass(frozen=True)
class Stage:
    """Modules that run one after the other; `enlarges` when they begin by doubling the sides."""

    modules: tuple[nn.Module, ...]
    enlarges: bool = False


@dataclass(frozen=True)
class Tile:
    """A stretch of one axis: [start, stop) is read, of which [core_start, core_stop) is kept.

    The methods take the number of pixels that the stretch has at a tensor's resolution.
    """

    start: int
    stop: int
    core_start: int
    core_stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def core(self, pixels: int) -> slice:
        """The kept part within a tensor of the stretch."""
        return self._slice(pixels, self.start)

    def place(self, pixels: int) -> slice:
        """The kept part within a tensor of the whole axis."""
        return self._slice(pixels, 0)

    def scaled(self, length: int, pixels: int) -> int:
        """A length along the axis at that resolution."""
        return length * pixels // (self.stop - self.start)

    def _slice(self, pixels: int, origin: int) -> slice:
        edges = (self.core_start - origin, self.core_stop - origin)
        return slice(*(self.scaled(edge, pixels) for edge in edges))


Run = Callable[[Tile, Tile], Tensor]
Part = tuple[int, Tensor, Tensor]  # pixels, and mean and variance of each group in them


@dataclass(frozen=True)
class Band:
    """The rows [start, stop) of a picture of `height` rows, in x (1, C, rows, W) from row `first` on, with HALO
    rows on both sides where there are any."""

    x: Tensor
    first: int
    start: int
    stop: int
    height: int


class _Collected(Exception):
    """A normalisation has seen its input: the rest of the stage need not run."""


class SharedNorms:
    """The group normalisations of a stage, in the order in which they run, while it is tiled. others: turns
    the statistics of what is here into those of all processes."""

    def __init__(self, stage: Stage, others: Callable[..., list[Part]] | None = None) -> None:
        self._others = others
        modules = [child for module in stage.modules for child in module.modules()]
        self.norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
        self._collecting: nn.GroupNorm | None = None
        self._parts: list[Part] = []
        self._tile: tuple[Tile, Tile]
        self._known: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put these normalisations in the place of the modules' own, for a while."""
        for norm in self.norms:
            norm.forward = self._bound(norm)  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            for norm in self.norms:
                # It hides the method of the class, which is called again from here on.
                del norm.forward

    def collect(self, norm: nn.GroupNorm, run: Run, grid: list[tuple[Tile, Tile]]) -> None:
        """Run every tile up to `norm` and give it the statistics of all their cores together."""
        self._collecting, self._parts = norm, []
        for self._tile in grid:
            with suppress(_Collected):
                run(*self._tile)
        self._collecting = None
        known = _combined(self._parts)
        if self._others is not None:
            known = _combined(self._others(*known))
        self._known[norm] = known[1:]

    def _bound(self, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if norm is self._collecting:
                self._see(norm, x)
                raise _Collected
            mean, variance = (s.repeat_interleave(x.shape[1] // len(s)) for s in self._known[norm])
            weight, bias = norm.weight.to(mean.dtype), norm.bias.to(mean.dtype)
            # With its statistics given, a group normalisation is a batch normalisation.
            return F.batch_norm(x, mean, variance, weight, bias, eps=norm.eps)

        return forward

    def _see(self, norm: nn.GroupNorm, x: Tensor) -> None:
        rows, columns = self._tile
        core = x[..., rows.core(x.shape[2]), columns.core(x.shape[3])]
        # A sum over a whole image, which 16 bits cannot hold.
        wide = torch.promote_types(x.dtype, torch.float32)
        groups = core.to(wide).reshape(norm.num_groups, -1)
        variance, mean = torch.var_mean(groups, 1, correction=0)
        self._parts.append((groups.shape[1], mean, variance))


def _combined(parts: list[Part]) -> Part:
    """The statistics of all together."""
    pixels, means, variances = zip(*parts, strict=True)
    share = means[0].new_tensor(pixels)[:, None] / sum(pixels)  # (parts, 1)
    mean = (share * torch.stack(means)).sum(0)
    # The variance of all is what is within parts plus what is among their means.
    spread = torch.stack(variances) + (torch.stack(means) - mean) ** 2
    return sum(pixels), mean, (share * spread).sum(0)


def decoder_stages(decoder: Any) -> list[Stage]:
    """What follows the decoder's middle block."""
    stages = []
    before: tuple[nn.Module, ...] = ()
    for block in decoder.up_blocks:
        for resnet in _plain_resnets(block):
            stages.append(Stage((*before, resnet), enlarges=bool(before)))
            before = ()
        before = tuple(block.upsamplers or ())
    last = (decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)
    return [*stages, Stage((*before, *last), enlarges=bool(before))]


def encoder_stages(encoder: Any) -> list[Stage]:
    """What comes before the encoder's middle block."""
    stages = []
    before: tuple[nn.Module, ...] = (encoder.conv_in,)
    for block in encoder.down_blocks:
        *resnets, last = _plain_resnets(block)
        for resnet in resnets:
            stages.append(Stage((*before, resnet)))
            before = ()
        stages.append(Stage((*before, last, *(block.downsamplers or ()))))
        before = ()
    return stages


def run_whole(stage: Stage, x: Tensor) -> Tensor:
    for module in stage.modules:
        is_residual = hasattr(module, "norm1")
        x = module(x, None) if is_residual else module(x)  # None: no time embedding
    return x


def run_tiled(
    stages: list[Stage],
    x: Tensor,
    tile: int,
    device: torch.device,
    advance: Callable[[], object] | None = None,
    *,
    is_sample: bool = False,
) -> Tensor:
    """The stages on x (1, C, H, W): about `tile` by `tile` pixels at a time visit `device`.

    What lies between two stages stays where x is. advance: called after each visit. is_sample: one tile of each
    stage alone visits, which needs the memory of all, and gives no picture.
    """
    for stage in stages:
        x = _run_stage(stage, x, tile, device, advance or (lambda: None), is_sample)
    return x


def run_band(
    stage: Stage,
    band: Band,
    tile: int,
    others: Callable[..., list[Part]],
    advance: Callable[[], object],
) -> Tensor:
    """A stage on a band of a picture whose other bands other processes have: the rows that come of its own.
    others: see SharedNorms."""
    grid = _grid(stage, band.height, band.x.shape[3], tile, band.start, band.stop)

    def run(rows: Tile, columns: Tile) -> Tensor:
        read = slice(rows.start - band.first, rows.stop - band.first)
        advance()
        return run_whole(stage, band.x[:, :, read, columns.start : columns.stop])

    shared = SharedNorms(stage, others)
    with shared.installed():
        for norm in shared.norms:
            shared.collect(norm, run, grid)
        lines: dict[int, list[Tensor]] = {}
        for rows, columns in grid:
            part = run(rows, columns)
            height, width = part.shape[2:]
            kept = part[..., rows.core(height), columns.core(width)]
            lines.setdefault(rows.start, []).append(kept)
    return torch.cat([torch.cat(line, 3) for line in lines.values()], 2)


def count_band_passes(stages: list[Stage], rows: int, width: int, tile: int) -> int:
    """How many tiles `run_band` visits in all decoder stages, from so many rows on."""
    passes = 0
    for stage in stages:
        passes += len(_grid(stage, rows, width, tile)) * (len(SharedNorms(stage).norms) + 1)
        if stage.enlarges:
            rows, width = 2 * rows, 2 * width
    return passes


def count_passes(stages: list[Stage], height: int, width: int, tile: int) -> int:
    """How many visits `run_tiled` makes for decoder stages on height by width positions."""
    passes = 0
    for stage in stages:
        grid = _grid(stage, height, width, tile)
        passes += len(grid) * (len(SharedNorms(stage).norms) + 1) if len(grid) > 1 else 1
        if stage.enlarges:
            height, width = 2 * height, 2 * width
    return passes


def _grid(
    stage: Stage, height: int, width: int, tile: int, start: int = 0, stop: int | None = None
) -> list[tuple[Tile, Tile]]:
    """The tiles of the rows [start, stop) of a picture."""
    side = tile // 2 if stage.enlarges else tile
    bands = _tiles(height, side, start, stop)
    return [(rows, columns) for rows in bands for columns in _tiles(width, side)]


def _run_stage(
    stage: Stage,
    x: Tensor,
    tile: int,
    device: torch.device,
    advance: Callable[[], object],
    is_sample: bool,
) -> Tensor:
    grid = _grid(stage, x.shape[2], x.shape[3], tile)
    if len(grid) == 1:
        x = run_whole(stage, x.to(device)).to(x.device)
        advance()
        return x
    if is_sample:
        grid = [max(grid, key=lambda one: one[0].length * one[1].length)]

    def run(rows: Tile, columns: Tile) -> Tensor:
        part = x[:, :, rows.start : rows.stop, columns.start : columns.stop]
        try:
            return run_whole(stage, part.to(device))
        finally:
            advance()

    shared = SharedNorms(stage)
    out: Tensor | None = None
    with shared.installed():
        for norm in shared.norms:
            shared.collect(norm, run, grid)
        for rows, columns in grid:
            part = run(rows, columns)
            height, width = part.shape[2:]
            if out is None:
                sides = rows.scaled(x.shape[2], height), columns.scaled(x.shape[3], width)
                out = x.new_empty(1, part.shape[1], *sides)
            kept = part[..., rows.core(height), columns.core(width)]
            out[..., rows.place(height), columns.place(width)] = kept.to(out.device)
    assert out is not None
    return out


def _tiles(length: int, side: int, start: int = 0, stop: int | None = None) -> list[Tile]:
    """As few stretches of [start, stop) of an axis as the side allows, of nearly equal even length."""
    stop = length if stop is None else stop
    count = -(-(stop - start) // side)
    # Even: a downsampling then takes the same pairs of pixels as in the whole image.
    step = -(-(stop - start) // (2 * count)) * 2
    cores = [(s, min(s + step, stop)) for s in range(start, stop, step)]
    return [Tile(max(s - HALO, 0), min(e + HALO, length), s, e) for s, e in cores]


def _plain_resnets(block: Any) -> list[nn.Module]:
    if getattr(block, "attentions", None):
        raise ValueError(f"tiling must have blocks without attention, got {type(block).__name__}")
    return list(block.resnets)
