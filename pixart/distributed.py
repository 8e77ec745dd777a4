"""Several processes under torchrun, on one machine or many; alone, all of it is idle."""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from pixart.command import FAILURE, exit_code

if TYPE_CHECKING:  # its import takes a second, which a picture needs not wait
    from torch.distributed.tensor import DTensor

Item = TypeVar("Item")


def share(batch: Sequence[Item], rank: int, world: int) -> list[Item]:
    """The part of a batch that process `rank` of `world` takes; all parts are of one size.

    Raises ValueError if the batch cannot be shared evenly.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to {world - 1}, got {rank}")
    if len(batch) % world:
        raise ValueError(f"batch must be a multiple of the {world} processes, got {len(batch)}")
    part = len(batch) // world
    return list(batch[rank * part : (rank + 1) * part])


def connect(device: torch.device, timeout: timedelta | None = None) -> None:
    """Join the processes that torchrun started, if it did, and take this process's own GPU. timeout: how
    long one waits for the others, None for PyTorch's 10 or 30 minutes."""
    if "RANK" not in os.environ or distributed.is_initialized():
        return
    if device.type == "cuda":
        # Before the group: every process would otherwise take GPU 0.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timeout)


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
    """Number of this process among all, 0 where it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own(batch: Sequence[Item]) -> list[Item]:
    """The part of a batch that this process takes. Raises ValueError if it is not even."""
    return share(batch, rank(), world_size())


def barrier() -> None:
    """Wait until every process is here."""
    if distributed.is_initialized():
        distributed.barrier()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor cut among processes that lies here, or the tensor."""
    return tensor.to_local() if _is_cut(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is cut among processes, or the tensor. The gradient of the parts is the
    mean over the processes, as FSDP's is."""
    if not _is_cut(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def _is_cut(tensor: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(tensor, "device_mesh")


def cut_again(module: nn.Module) -> None:
    """Give back what FSDP left whole after the module's last forward, if it is a module of FSDP's.

    For weights that are read outside of their module's forward: FSDP would lose the gradient of one
    that is whole there (reshard_after_forward=False, and a forward without gradients before).
    """
    # FSDP adds a class to the module's; asked of the instance, each that has none would raise.
    if hasattr(type(module), "reshard"):
        module.reshard()  # type: ignore[operator]


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a small tensor, in place."""
    if distributed.is_initialized():
        # A sum, as Gloo makes no means.
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


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in some process: all must stop at the same step."""
    return bool(max_over_processes(float(flag), device))


def said_by_first(text: str) -> str:
    """What the first process says, up to 4,000 bytes of it, to all of them."""
    if not distributed.is_initialized():
        return text
    content = text.encode(errors="replace")[:4000] if rank() == 0 else b""
    sent = torch.zeros(4000, dtype=torch.uint8)
    sent[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else 0
    sent = sent.to(meeting_device())
    distributed.broadcast(sent, 0)
    return bytes(sent.tolist()).rstrip(b"\0").decode(errors="replace")


def together(work: Callable[[], Item]) -> Item:
    """What each process does by itself; where it fails in some, it fails in all of them: in the first of
    these with its own error, in the others with FailedElsewhere."""
    failure, result = None, None
    try:
        result = work()
    except Exception as error:
        if not distributed.is_initialized():
            raise
        failure = error
    code = 0 if failure is None else exit_code(failure) or FAILURE
    failed = [(number, code) for number, code in enumerate(gathered(code)) if code]
    if failure is not None and failed[0][0] == rank():
        raise failure
    if failed:
        raise FailedElsewhere(failed[0][1])
    return cast(Item, result)


class FailedElsewhere(RuntimeError):
    """Another process failed, and says why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process failed")
        self.exit_code = exit_code


def is_first_to_fail() -> bool:
    """Whether no other process has failed, of all that ask this when they fail; one that has not met the
    others yet is if it is number 0."""
    if not distributed.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        return bool(distributed.distributed_c10d._get_default_store().add("pixart/failed", 1) == 1)
    except RuntimeError:  # whoever keeps the count has left
        return False


def gathered(item: Item) -> list[Item]:
    """What each process has, by rank."""
    if not distributed.is_initialized():
        return [item]
    items: list[Any] = [None] * world_size()
    distributed.all_gather_object(items, item)
    return items


def meeting_device() -> torch.device:
    """Where tensors that are exchanged must be."""
    if distributed.is_initialized() and distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
