"""Denoising steps as CUDA graphs: see pixart.graphs.recordings."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from torch import Tensor, nn

from pixart.graphs.recordings import Recordings
from pixart.model.blocks import EncodedCaption
from pixart.model.control import Control
from pixart.model.transformer import PixArt


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
    ) -> Tensor:
        """The transformer's prediction, as a tensor that later calls leave alone.

        caption: the same object is taken to be the same caption, and so are a control's encoded hint and
        caption. Raises pixart.graphs.capture.GraphError.
        """

        def step(moving: list[Tensor], steady: list[Tensor]) -> Tensor:
            latents, timesteps, *sizes = moving
            given = iter(steady)
            seen = _refilled(caption, given)
            steering = [_refilled_control(control, given) for control in controls]
            return transformer(
                latents, timesteps, seen, None, *sizes, perturbed=perturbed, controls=steering
            )

        moving, steady = [latents, timesteps, *sizes], [*caption.tensors]
        for control in controls:
            assert control.caption is not None
            steady += [control.hint, *control.caption.tensors]
        key = (caption.lengths is not None, tuple(perturbed), tuple(one.scale for one in controls))
        # All whose weights the recording reads.
        networks = [control.network for control in controls]
        model = nn.ModuleList([transformer, *networks]) if networks else transformer
        # The model forgets position tables when it has met many grids; a recording reads them.
        tables = transformer.position_tables.tables
        return self._recordings(
            model, step, moving, steady, key=key, holds=lambda: [*tables.values()]
        )

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
