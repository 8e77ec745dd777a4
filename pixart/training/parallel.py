"""Data-parallel training under torchrun: each process draws its share of a batch, gradients are
averaged. Alone, everything here does nothing.

Two processes of one thread beat one process of two threads on a CPU: a model this small spends much
of its step in operations that one thread does.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def connect() -> None:
    """Join the processes that torchrun started, if it did."""
    if "RANK" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("gloo")


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def share_of(batch: int) -> int:
    """This process's part of a batch. Raises ValueError if the batch cannot be shared evenly."""
    if batch % world_size():
        raise ValueError(f"processes must divide the batch of {batch}, got {world_size()}")
    return batch // world_size()


def draw_number(step: int) -> int:
    """A number that no other process has at any step; the step itself for a single process."""
    return step * world_size() + rank()


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every gradient by its mean over the processes, in one exchange."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    parts = (flat / world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def any_process(wish: bool) -> bool:
    """Whether some process wishes so: all must stop at the same step."""
    if world_size() == 1:
        return wish
    flag = torch.tensor(float(wish))
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)
