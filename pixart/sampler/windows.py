"""A picture denoised in overlapping windows (MultiDiffusion, arXiv:2302.08113), for sizes that a model
was not trained for."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pixart.sampler.guidance import Captions
from pixart.sampler.loop import Cancelled, Denoiser


class Windows:
    """A `Denoiser` of any size from one of a size of its own.

    At every step each window of (height, width) latents is denoised as if it were a picture, with
    positions of its own and the same captions and timesteps; the prediction is the mean of them, weighted
    by a raised cosine that is largest in the middle of a window and above 0 everywhere in it. Windows are
    spread evenly, overlap by `overlap` of their side at least, and begin and end at multiples of
    `multiple` latents. One after the other, so that memory is that of one: with "both" captions a window
    has both halves in it. A picture no larger than a window is denoised as it is, to the bit.
    denoise: if it has a method crop(rows, columns, (height, width)), a window is denoised by what that
    returns for its part of latents so large.
    cancel: asked between two windows as well; when it returns True, `Cancelled` is raised.
    """

    def __init__(
        self,
        denoise: Denoiser,
        height: int,
        width: int,
        *,
        overlap: float = 0.25,
        multiple: int = 2,
        cancel: Callable[[], bool] | None = None,
    ) -> None:
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise ValueError(
                f"window must be a multiple of {multiple} latents high and wide, got {height} x {width}"
            )
        if not 0 <= overlap <= 0.75:
            raise ValueError(f"overlap must be from 0 to 0.75 of a window, got {overlap}")
        self._denoise, self._size, self._overlap = denoise, (height, width), overlap
        self._multiple, self._cancel = multiple, cancel
        self._known: dict[tuple[int, int, torch.device], list[tuple[slice, slice, Tensor]]] = {}

    def __call__(self, latents: Tensor, timesteps: Tensor, captions: Captions, /) -> Tensor:
        height, width = latents.shape[-2:]
        windows = self._windows(height, width, latents.device)
        if len(windows) == 1:
            return self._denoise(latents, timesteps, captions)
        total: Tensor | None = None
        for number, (rows, columns, weight) in enumerate(windows):
            if number and self._cancel is not None and self._cancel():
                raise Cancelled(f"cancelled at timestep {float(timesteps[0]):g}")
            denoise = self._denoiser_of(rows, columns, (height, width))
            window = latents[..., rows, columns].contiguous()
            part = denoise(window, timesteps, captions).float()
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
            total[..., rows, columns] += weight * part
        assert total is not None
        return total

    def _windows(
        self, height: int, width: int, device: torch.device
    ) -> list[tuple[slice, slice, Tensor]]:
        """Rows, columns and weights (rows, columns) of each window; made once, not at every step."""
        key = (height, width, device)
        if key not in self._known:
            rows, columns = (
                _spread(whole, side, self._overlap, self._multiple)
                for whole, side in zip((height, width), self._size, strict=True)
            )
            self._known[key] = [
                (row, column, torch.outer(down, across).to(device))
                for row, down in zip(rows, _weights(height, rows), strict=True)
                for column, across in zip(columns, _weights(width, columns), strict=True)
            ]
        return self._known[key]

    def _denoiser_of(self, rows: slice, columns: slice, whole: tuple[int, int]) -> Denoiser:
        """Of a window: what has hints and sizes of the whole picture gives one with those of the part."""
        crop = getattr(self._denoise, "crop", None)
        return self._denoise if crop is None else crop(rows, columns, whole)


def _spread(whole: int, side: int, overlap: float, multiple: int) -> list[slice]:
    """Windows of a side along an axis, the first and last at its ends."""
    if whole <= side:
        return [slice(0, whole)]
    stride = max(multiple, math.floor((1 - overlap) * side / multiple) * multiple)
    steps = math.ceil((whole - side) / stride)
    # Rounded down, so that no two are further apart than the stride.
    starts = [(step * (whole - side) // (steps * multiple)) * multiple for step in range(steps)]
    return [slice(start, start + side) for start in (*starts, whole - side)]


def _weights(whole: int, windows: list[slice]) -> list[Tensor]:
    """The weights of each window along an axis, which add up to 1 at every place."""
    side = windows[0].stop - windows[0].start
    cosine = torch.sin(math.pi * (torch.arange(side, dtype=torch.float64) + 0.5) / side) ** 2
    total = torch.zeros(whole, dtype=torch.float64)
    for window in windows:
        total[window] += cosine
    return [(cosine / total[window]).float() for window in windows]
