"""The average of the weights over the steps, which is what is shown and exported."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pixart.distributed import local


class EMA:
    """Averages of parameters in fp32, cut among processes as they are.

    decay: 0.9999 remembers some 10,000 steps; early ones count less, see `update`.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be from 0 to below 1, got {decay}")
        self.parameters = list(parameters)
        self.decay = decay
        self.tensors = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take up the parameters after a step, counted from 0."""
        # Early on a long average would mostly remember the start.
        decay = min(self.decay, (1 + step) / (10 + step))
        values = [local(p.detach()).float() for p in self.parameters]
        torch._foreach_lerp_([local(tensor) for tensor in self.tensors], values, 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters hold their averages inside, and their own values again afterwards."""
        own = [p.detach().clone() for p in self.parameters]
        try:
            _assign(self.parameters, self.tensors)
            yield
        finally:
            _assign(self.parameters, own)


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        local(parameter).copy_(local(value))
