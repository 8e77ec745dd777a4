"""Training on several processes under torchrun, on one machine or many; alone, all of it is idle.

Two processes of one thread beat one process of two threads on a CPU: a small model spends much of
its step in operations that one thread does.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Literal, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pixart.dataset.buckets import Item, share
from pixart.model.transformer import PixArt


def connect(device: torch.device) -> None:
    """Join the processes that torchrun started, if it did, and take this process's own GPU."""
    if "RANK" not in os.environ or distributed.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave(code: int) -> NoReturn:
    """Exit. Under torchrun without Python's own shutdown: Gloo's threads, which nothing ends while
    a model that was cut among processes lives, may release their last tensors then, and releasing
    one in a Python that shuts down aborts the process (pytorch/pytorch#179291)."""
    if "RANK" not in os.environ:
        sys.exit(code)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own(batch: Sequence[Item]) -> list[Item]:
    """The part of a batch that this process takes. Raises ValueError if it is not even."""
    return share(batch, rank(), world_size())


def barrier() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def parallelise(model: nn.Module, how: Literal["ddp", "fsdp"]) -> nn.Module:
    """The module to call in place of `model`, whose gradients are averages over the processes.

    ddp: each process holds everything. fsdp: weights, gradients and states are cut among the
    processes (FSDP2, block by block); `model` itself is changed. Alone, both leave it as it is.
    """
    if world_size() == 1:
        return model
    if how == "ddp":
        on_gpu = next(model.parameters()).is_cuda
        # Blocks that a recipe leaves untouched (a text encoder's last token) have no gradient.
        return DistributedDataParallel(
            model, device_ids=[torch.cuda.current_device()] if on_gpu else None
        )
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (world_size(),))
    for child in model.modules():
        if isinstance(child, PixArt):
            for block in child.blocks:
                # Not the block itself: its table is read with all others, before any block runs.
                fully_shard([block.attn, block.cross_attn, block.mlp], mesh=mesh)  # type: ignore[list-item]
    fully_shard(model, mesh=mesh)
    return model


@contextlib.contextmanager
def gradients_later(model: nn.Module, later: bool) -> Iterator[None]:
    """Keep gradients to oneself where `later`: parts of a step before the last need no exchange."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not later)
        yield
    elif isinstance(model, DistributedDataParallel) and later:
        with model.no_sync():
            yield
    else:
        yield


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor cut among processes that lies here, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a small tensor, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values /= world_size()
    return values


def max_over_processes(value: float, device: torch.device) -> float:
    """The largest that a process has."""
    if not distributed.is_initialized():
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return float(largest)


def any_process(wish: bool, device: torch.device) -> bool:
    """Whether some process wishes so: all must stop at the same step."""
    return bool(max_over_processes(float(wish), device))
