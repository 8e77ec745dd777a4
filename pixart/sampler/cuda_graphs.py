"""Denoising steps as CUDA graphs: see pixart.graphs.recordings."""

from torch import Tensor

from pixart.graphs.recordings import Recordings
from pixart.model.blocks import EncodedCaption
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
    ) -> Tensor:
        """The transformer's prediction, as a tensor that later calls leave alone.

        caption: the same object is taken to be the same caption. Raises pixart.graphs.capture.GraphError.
        """

        def step(moving: list[Tensor], steady: list[Tensor]) -> Tensor:
            latents, timesteps, *sizes = moving
            return transformer(latents, timesteps, caption.with_tensors(steady), None, *sizes)

        moving, masked = [latents, timesteps, *sizes], caption.lengths is not None
        # The model forgets position tables when it has met many grids; a recording reads them.
        tables = transformer.position_tables.tables
        return self._recordings(
            transformer, step, moving, caption.tensors, key=masked, holds=lambda: [*tables.values()]
        )

    def clear(self) -> None:
        """Forget all recordings and give their memory back."""
        self._recordings.clear()
