"""Which pictures of a pipeline are drawn by replaying recorded steps, and what becomes of those that
cannot be."""

import warnings
from typing import Literal

import torch

from pixart.device import check_cuda_graph
from pixart.graphs.capture import GraphError
from pixart.sampler.cuda_graphs import CudaGraphs

CudaGraphChoice = bool | Literal["auto"]
# Pixels of a picture up to which "auto" records. A step of XL/2 is then some 10 ms of an H200, about what
# the CPU takes to launch it; above, the GPU is the slower one whatever the CPU does, and memory counts more.
AUTO_PIXELS = 1024 * 1024


class PictureGraphs:
    """The recordings of a pipeline. ValueError where the device cannot make any and they are wanted.

    wanted: True for every picture, False for none, "auto" on a CUDA device for those of up to
    AUTO_PIXELS, until a step cannot be recorded. is_shared: other processes draw the same pictures, which
    exchange what a recording cannot hold: "auto" is then none.
    """

    def __init__(
        self, wanted: CudaGraphChoice, device: torch.device, is_shared: bool = False
    ) -> None:
        check_cuda_graph(wanted, device)
        if is_shared:
            if wanted is True:
                raise ValueError(
                    "cuda_graph must be left out where processes draw a picture together, got True: a "
                    "recording cannot hold what they exchange"
                )
            wanted = False
        self.is_asked_for = wanted is True
        self._graphs = CudaGraphs() if wanted and device.type == "cuda" else None

    def of_size(self, height: int, width: int) -> CudaGraphs | None:
        """What draws a picture of so many pixels; None if the steps are launched as ever."""
        return self._graphs if self.is_asked_for or height * width <= AUTO_PIXELS else None

    def give_up(self, error: GraphError) -> None:
        """After a step that cannot be recorded: do without from now on and say why, once; raise the
        error where recordings were asked for."""
        if self.is_asked_for:
            raise error
        self.clear()
        self._graphs = None
        warnings.warn(f"{error.reason}: drawing without CUDA graphs", stacklevel=2)

    def clear(self) -> None:
        """Give the recordings' memory back; what is drawn next is recorded anew."""
        if self._graphs is not None:
            self._graphs.clear()
