"""Training on several processes under torchrun, on one machine or many; alone, all of it is idle.

A batch is shared among groups of processes. With ddp and fsdp each process is a group by itself; with
fsdp+sequence `sequence` neighbours by rank are one: they learn from the same pictures, each from its own
rows of their tokens (pixart.model.exchange), while weights are cut among all processes as ever.

Each of a group computes the loss of whole pictures, from the prediction that all of them put together. What
reaches its weights is the gradient of its own tokens, times the processes of the group. So the mean over
all processes, which FSDP makes, is the mean over the groups: nothing is left to correct, and rows that
do not come out even weigh as they should.

Two processes of one thread beat one process of two threads on a CPU: a small model spends much of
its step in operations that one thread does.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pixart.config import PixArtConfig
from pixart.distributed import rank, share, world_size
from pixart.model.control import ControlNet
from pixart.model.exchange import TokenExchange, rows_together, split_rows
from pixart.model.transformer import PixArt
from pixart.training.problems import problems_of
from pixart.training.stage import SEQUENCE, Parallel, Stage

Item = TypeVar("Item")


def groups(stage: Stage) -> int:
    """Among how many groups of processes a stage's batches are shared. ValueError where `sequence` does
    not divide the processes."""
    world, size = world_size(), stage.sequence
    if world % size:
        raise ValueError(
            f"sequence must divide the number of processes, {world}, got {size}; start {size}, or a "
            "multiple of it, by torchrun or launch.sh"
        )
    return world // size


def own(batch: Sequence[Item], stage: Stage) -> list[Item]:
    """The part of a batch that this process's group takes. ValueError if it is not even."""
    return share(batch, rank() // stage.sequence, groups(stage))


def sequence_problems(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with how many processes are to share tokens, whatever trains."""
    if stage.parallel != SEQUENCE and stage.sequence != 1:
        yield f"sequence is for parallel {SEQUENCE} only, got {stage.sequence} with {stage.parallel}"
    elif stage.parallel == SEQUENCE and stage.sequence == 1:
        yield (
            f"sequence must be at least 2 with parallel {SEQUENCE}, got 1; give --sequence, how many "
            "processes share the tokens of a picture"
        )
    else:
        yield from problems_of(lambda: groups(stage))


def sharing_problems(
    stage: Stage, config: PixArtConfig, sizes: Iterable[tuple[int, int]]
) -> Iterator[str]:
    """Yield why pictures of these heights and widths, in pixels, have not enough tokens or the model not
    enough heads for a stage's `sequence`."""
    if stage.sequence == 1:
        return
    if stage.sequence > config.num_heads:
        yield (
            f"sequence must be at most the {config.num_heads} heads of the model's attention, "
            f"got {stage.sequence}"
        )
    height, width = min(sizes)
    try:
        together = rows_together([config.kv_compression])
        split_rows(height // (8 * config.patch_size), stage.sequence, together)
    except ValueError as error:
        yield f"sequence must suit all pictures, got {stage.sequence} and {height}×{width}: {error}"


class SharedTokens(nn.Module):
    """A model that is called as without, and shares the tokens of its pictures meanwhile."""

    def __init__(self, model: nn.Module, exchange: TokenExchange) -> None:
        super().__init__()
        self.model, self.exchange = model, exchange

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.model(*arguments, exchange=self.exchange)


def parallelise(model: nn.Module, how: Parallel, sequence: int = 1) -> nn.Module:
    """The module to call in place of `model`, whose gradients are averages over the processes.

    ddp: each process holds everything. fsdp: weights, gradients and states are cut among the
    processes (FSDP2, block by block); `model` itself is changed. fsdp+sequence: so they are, and each
    `sequence` processes share the tokens of their pictures; `model` takes an `exchange`. Alone, all leave
    it as it is.
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
    # What modules return may be views (attention's whole tokens, pictures put together of patches). FSDP warns
    # that nothing may be added to such a one in place; nothing is.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for child in model.modules():
        for block in _blocks_of(child):
            # Not the block itself: its table is read with all others, before any block runs.
            fully_shard([block.attn, block.cross_attn, block.mlp], mesh=mesh)
    fully_shard(model, mesh=mesh)
    if how != SEQUENCE:
        return model
    shape = (world_size() // sequence, sequence)
    grouped = init_device_mesh(device, shape, mesh_dim_names=("groups", "sequence"))
    return SharedTokens(model, TokenExchange(grouped.get_group("sequence")))


def _blocks_of(module: nn.Module) -> list[Any]:
    """Those of a transformer, or of a control's copies."""
    if isinstance(module, PixArt):
        return list(module.blocks)
    if isinstance(module, ControlNet):
        return [block.copied_block for block in module.control_blocks]
    return []


@contextlib.contextmanager
def gradients_later(model: nn.Module, later: bool) -> Iterator[None]:
    """Keep gradients to oneself where `later`: parts of a step before the last need no exchange of them."""
    if isinstance(model, SharedTokens):
        model = model.model
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not later)
        yield
    elif isinstance(model, DistributedDataParallel) and later:
        with model.no_sync():
            yield
    else:
        yield
