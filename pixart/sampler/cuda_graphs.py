"""Denoising steps as CUDA graphs: see pixart.graphs.recordings."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from torch import Tensor, nn

from pixart.graphs.recordings import Recordings
from pixart.model.blocks import EncodedCaption
from pixart.model.control import Control
from pixart.model.transformer import PixArt, Reuse


class CudaGraphs:
    """Denoising steps of transformers, replayed where they were met before.

    A step of XL/2 is some 400 launches; up to 512 px a GPU is done with each before the CPU has sent the
    next. Recordings live as long as this object, the last 8 of them.
    """

    def __init__(self) -> None:
        self._recordings = Recordings()

    def __call__(
        self,
        transformer: PixArt,
        latents: Tensor,
        timesteps: Tensor,
        caption: EncodedCaption,
        sizes: tuple[Tensor, ...],
        perturbed: Collection[int] = (),
        controls: Sequence[Control] = (),
        kv_ratios: tuple[int, ...] = (),
        reuse: Reuse | None = None,
    ) -> Tensor:
        """The transformer's prediction, as a tensor that later calls leave alone.

        caption: the same object is taken to be the same caption, and so are a control's encoded hint and
        caption. Raises pixart.graphs.capture.GraphError.
        """

        keeps = reuse is not None and reuse.change is None

        def step(moving: list[Tensor], steady: list[Tensor]) -> tuple[Tensor, ...]:
            latents, timesteps, *sizes = moving
            own = None
            if reuse is not None:
                own = Reuse(reuse.first, None if keeps else sizes.pop())
            given = iter(steady)
            seen = _refilled(caption, given)
            steering = [_refilled_control(control, given) for control in controls]
            more = {"perturbed": perturbed, "controls": steering, "kv_ratios": kv_ratios}
            output = transformer(latents, timesteps, seen, None, *sizes, reuse=own, **more)
            if own is None or not keeps:
                return (output,)
            assert own.change is not None
            return output, own.change

        moving, steady = [latents, timesteps, *sizes], [*caption.tensors]
        if reuse is not None and reuse.change is not None:
            moving.append(reuse.change)
        for control in controls:
            assert control.caption is not None
            steady += [control.hint, *control.caption.tensors]
        scales = tuple(one.scale for one in controls)
        reused = None if reuse is None else (reuse.first, keeps)
        key = (caption.lengths is not None, tuple(perturbed), scales, kv_ratios, reused)
        # All whose weights the recording reads.
        networks = [control.network for control in controls]
        model = nn.ModuleList([transformer, *networks]) if networks else transformer
        # The model forgets position tables when it has met many grids; a recording reads them.
        tables = transformer.position_tables.tables
        output, *change = self._recordings(
            model, step, moving, steady, key=key, holds=lambda: [*tables.values()]
        )
        if reuse is not None and keeps:
            [reuse.change] = change
        return output

    def clear(self) -> None:
        """Forget all recordings and give their memory back."""
        self._recordings.clear()


def _refilled(caption: EncodedCaption, tensors: Iterator[Tensor]) -> EncodedCaption:
    """A caption of the same kind, of the next tensors."""
    return caption.with_tensors(list(islice(tensors, len(caption.tensors))))


def _refilled_control(control: Control, tensors: Iterator[Tensor]) -> Control:
    assert control.caption is not None
    hint = next(tensors)
    return replace(control, hint=hint, caption=_refilled(control.caption, tensors))
