"""What a run has saved to go on from: a state is whole or it is not there.

    DIRECTORY/latest              the name of the newest whole state
    DIRECTORY/step-00001200/      tensors in the distributed format, progress.json, exports

Everything is written beside its final name, flushed to the disk and renamed, and `latest` comes last:
a process killed at any moment leaves the old state or the new one, never half of one. The
distributed format (torch.distributed.checkpoint) opens on any number of processes.
"""

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from pixart.distributed import barrier, rank, world_size
from pixart.files import publish, read_json, write_bytes, write_json

_PROGRESS = "progress.json"
_TENSORS = "state"


class StateSaveError(RuntimeError):
    """Training state could not be written; what was saved before is still there."""


def save_state(
    directory: Path,
    step: int,
    tensors: dict[str, dict[str, Any]],
    progress: dict[str, Any],
    *,
    keep: int = 2,
    spare: Path | None = None,
    export: Callable[[Path], None] | None = None,
) -> Path:
    """Write `tensors` (sharded or not, called by all processes) and `progress` (plain values).

    export writes what else belongs to the state into the folder that it is given; called by all
    processes as well. Older states are deleted but for the last `keep` and `spare`. Raises
    StateSaveError; the states that were there stay.
    """
    # A place whose name all processes know.
    aside, final = directory / f".step-{step:08d}.tmp", directory / f"step-{step:08d}"
    try:
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        barrier()
        with _alone():
            dcp.save(tensors, checkpoint_id=aside / _TENSORS, no_dist=world_size() == 1)
        if export is not None:
            export(aside)
        barrier()
        if rank() == 0:
            write_json(aside / _PROGRESS, {**progress, "step": step}, indent=2)
            publish(aside, final)
            write_bytes(directory / "latest", f"{final.name}\n".encode())
    except (OSError, dcp.api.CheckpointException) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(aside, ignore_errors=True)
        last = latest_state(directory)
        kept = f"the last good state is {last}" if last else "there is no earlier state"
        reason = _disk_error(error)
        raise StateSaveError(f"{final}: cannot be written ({reason}); {kept}") from error
    if rank() == 0:
        _prune(directory, keep, spared=(final, spare))
    return final


def _disk_error(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or str(error)


def _prune(directory: Path, keep: int, spared: tuple[Path | None, ...]) -> None:
    # All processes have written their part of a save that is published: what is left under another
    # step's name is of a run that was killed in its midst.
    stale = [
        path
        for kind in (".step-*.old", ".step-*.tmp", ".latest.*")
        for path in directory.glob(kind)
    ]
    kept = [path.resolve() for path in spared if path is not None]
    old = [path for path in sorted(directory.glob("step-*")) if path.resolve() not in kept]
    for path in (*old[: max(len(old) - keep + 1, 0)], *stale):
        shutil.rmtree(path, ignore_errors=True)


def latest_state(directory: Path) -> Path | None:
    """The newest whole state of a stage, or None before the first."""
    try:
        path = directory / (directory / "latest").read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    # Killed while it was being replaced: what it replaces is there, under another name.
    replaced = sorted(directory.glob(f".{path.name}*.old"))
    for place in (path, *replaced):
        if (place / _PROGRESS).exists():
            return place
    raise ValueError(f"{directory / 'latest'} must name a saved state, got {path.name!r}")


def read_progress(state: Path) -> dict[str, Any]:
    """What save_state was given as `progress`, and "step"."""
    try:
        return read_json(state / _PROGRESS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{state} must be a saved state, got no {_PROGRESS} in it") from error


def load_average(state: Path, model: nn.Module) -> None:
    """Give a model the averaged weights of a state of the same stage or one like it; those of its last
    step where no average was kept."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not read_progress(state).get("averaged", True):
        tensors = {"model": model.state_dict()}
        load_tensors(state, tensors)
        model.load_state_dict(tensors["model"])
        return
    average = {name: torch.empty_like(p) for name, p in numbered(trained)}
    load_tensors(state, {"ema": average})
    with torch.no_grad():
        for parameter, value in zip(trained, average.values(), strict=True):
            parameter.copy_(value)


def numbered(tensors: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names for a list of tensors."""
    return ((f"{index:05d}", tensor) for index, tensor in enumerate(tensors))


def load_tensors(state: Path, tensors: dict[str, dict[str, Any]]) -> None:
    """Fill `tensors`, which have the sizes and the sharding of this run, from a state."""
    try:
        with _alone():
            dcp.load(tensors, checkpoint_id=state / _TENSORS, no_dist=world_size() == 1)
    except dcp.api.CheckpointException as error:
        raise ValueError(
            f"{state} must hold what this stage trains ({_disk_error(error)}); give another "
            "--output, or the settings that it was made with"
        ) from error


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process is no mistake that a user must be warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
