"""Training on several processes under torchrun, on one machine or many; alone, all of it is idle.

Two processes of one thread beat one process of two threads on a CPU: a small model spends much of
its step in operations that one thread does.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pixart.distributed import world_size
from pixart.model.control import ControlNet
from pixart.model.transformer import PixArt


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
        for block in _blocks_of(child):
            # Not the block itself: its table is read with all others, before any block runs.
            fully_shard([block.attn, block.cross_attn, block.mlp], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _blocks_of(module: nn.Module) -> list[Any]:
    """Those of a transformer, or of a control's copies."""
    if isinstance(module, PixArt):
        return list(module.blocks)
    if isinstance(module, ControlNet):
        return [block.copied_block for block in module.control_blocks]
    return []


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
