"""What a run has saved to go on from: a state is whole or it is not there.

    DIRECTORY/latest              the name of the newest state
    DIRECTORY/step-00001200/      state/ with tensors, progress.json, exports, checksums.json

Everything is written beside its final name, flushed to the disk and renamed, and `latest` comes last:
a process killed at any moment leaves the old state or the new one, never half of one. What happens to
it later its checksums tell: the newest that is whole is taken. Tensors are in `chunks`, which open on
any number of processes.
"""

import contextlib
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pixart.distributed import any_process, meeting_device, rank, said_by_first
from pixart.files import (
    CheckpointWriteError,
    publish,
    read_bounded,
    read_json,
    sha256_of,
    write_bytes,
    write_json,
)
from pixart.training.chunks import checksum, fill, flatten, plans, read_chunks, write_chunks
from pixart.training.earlier_states import PARTS, PLAN, read_distributed

_PROGRESS = "progress.json"
_CHECKSUMS = "checksums.json"
_TENSORS = "state"
_LATEST = "latest"
_KINDS: dict[str, type] = {  # of what save_state is given as `progress`
    "stage": str,
    "step": int,
    "accepted": int,
    "skipped": int,
    "batch_unit": int,
    "mean_norm": float,
    "seconds": float,
    "averaged": bool,
    "scaler": dict,
    "lora": dict,
    "begun": dict,
    "best": dict,
}

logger = logging.getLogger("pixart")


def state_name(step: int) -> str:
    """The folder of a step's state, in that of its stage."""
    return f"step-{step:08d}"


class StateSaveError(RuntimeError):
    """Training state could not be written; what was saved before is still there."""


def save_state(
    directory: Path,
    step: int,
    tensors: dict[str, dict[str, Any]],
    progress: dict[str, Any],
    *,
    keep: int = 2,
    spare: Sequence[Path] = (),
    export: Callable[[Path], None] | None = None,
) -> Path:
    """Write `tensors` (sharded or not, called by all processes) and `progress` (plain values).

    export writes what else belongs to the state into the folder that it is given; called by all
    processes as well. Older states are deleted but for the last `keep` and those to `spare`. Raises
    StateSaveError; the states that were there stay.
    """
    # A place whose name all processes know.
    aside, final = directory / f".{state_name(step)}.tmp", directory / state_name(step)

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / _TENSORS).mkdir(parents=True)

    def end() -> None:
        write_json(aside / _PROGRESS, {**progress, "step": step}, indent=2)
        write_json(aside / _CHECKSUMS, _checksums(aside), indent=2)
        if final.is_symlink() or not final.is_dir():
            final.unlink(missing_ok=True)  # a folder takes the place of no file and no link
        publish(aside, final)
        write_bytes(directory / _LATEST, f"{final.name}\n".encode())

    try:
        _together(begin, first_only=True)
        _together(lambda: write_chunks(aside / _TENSORS, tensors))
        if export is not None:
            _together(lambda: export(aside))
        _together(end, first_only=True)
    except (OSError, RuntimeError, SafetensorError, CheckpointWriteError) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(aside, ignore_errors=True)
        last = next(iter(_candidates(directory)), None)
        kept = f"the last good state is {directory / last}" if last else "there is no earlier state"
        reason = getattr(error, "strerror", None) or str(error)
        raise StateSaveError(f"{final}: cannot be written ({reason}); {kept}") from error
    if rank() == 0:
        _prune(directory, keep, spared=(final, *spare))
    return final


def _together(work: Callable[[], None], first_only: bool = False) -> None:
    """Do a part of a save, and wait for all processes; where it fails in one, all of them raise."""
    failure: Exception | None = None
    try:
        if rank() == 0 or not first_only:
            work()
    except (OSError, RuntimeError, SafetensorError, CheckpointWriteError) as error:
        failure = error
    if any_process(failure is not None, meeting_device()):
        raise failure or RuntimeError("another process could not write its part")


def _checksums(state: Path) -> dict[str, Any]:
    """Of all files but those with tensors, whose plans have theirs, and those that are a pipeline's: T5
    alone has gigabytes, and is not this run's to vouch for."""
    files = (path for path in sorted(state.rglob("*")) if path.is_file() and not _is_linked(path))
    return {
        "files": {
            path.relative_to(state).as_posix(): checksum(path)
            for path in files
            if path.parent != state / _TENSORS or path.suffix == ".json"
        }
    }


def _is_linked(path: Path) -> bool:
    return path.is_symlink() or path.stat().st_nlink > 1


def _prune(directory: Path, keep: int, spared: Sequence[Path]) -> None:
    # All processes have written their part of a save that is published: what is left under another
    # step's name is of a run that was killed in its midst.
    stale = [
        path
        for kind in (".step-*.old", ".step-*.tmp", ".latest.*")
        for path in directory.glob(kind)
    ]
    # Not Path.resolve(), which a link to itself stops.
    kept = [os.path.realpath(path) for path in spared]
    old = [path for path in sorted(directory.glob("step-*")) if os.path.realpath(path) not in kept]
    for path in (*old[: max(len(old) - keep + 1, 0)], *stale):
        shutil.rmtree(path, ignore_errors=True)


def latest_state(directory: Path) -> Path | None:
    """The newest whole state of a stage, or None before the first; the same to all processes, which
    all must ask. Says which it passed over, and why. Raises ValueError where none is whole."""
    name = said_by_first(_choose(directory) if rank() == 0 else "")
    if name.startswith("!"):
        raise ValueError(name[1:])
    return directory / name if name else None


def _choose(directory: Path) -> str:
    """The name of the newest whole state, "" where none was saved, or "!" and what is wrong."""
    if (directory / _LATEST).is_dir():  # which no save could replace
        return f"!{directory / _LATEST} must be a file, got a folder; move it away"
    reasons: list[str] = []
    for name in _candidates(directory):
        reason = damage(directory / name)
        if reason is None:
            if reasons:
                _say(f"{'; '.join(reasons)}; going on from {directory / name}")
            return name
        reasons.append(f"{directory / name} is damaged ({reason})")
    if not reasons:
        return ""
    return f"!{'; '.join(reasons)}; there is no other state, give another --output to begin anew"


@cache
def _say(line: str) -> None:
    """Once, however often the state is looked for."""
    logger.warning("%s", line)


def newest_name(directory: Path) -> str | None:
    """What `latest` says, whole or not; None where it says nothing."""
    try:
        name = read_bounded(directory / _LATEST, 100).decode(errors="replace").strip()
    except (OSError, ValueError):  # a pipe, too, which would wait for a writer
        return None
    return name if re.fullmatch(r"step-\d{8,}", name) else None


def _candidates(directory: Path) -> list[str]:
    """Names of states to go on from, the best first: what `latest` says, then those before it. What a
    run has left that went on from an older one comes after it, and does not count."""
    saved = (
        re.fullmatch(r"\.?(step-(\d{8,}))(.*\.old)?", path.name) for path in _listed(directory)
    )
    # Killed while it was being replaced: what it replaces is there, under another name.
    found = sorted(((int(one[2]), not one[3], one[0]) for one in saved if one), reverse=True)
    newest = newest_name(directory)
    if newest is None:
        return [name for _, _, name in found]
    last = int(newest.removeprefix("step-"))
    names = [name for step, _, name in found if step <= last]
    return names if newest in names or any(newest in name for name in names) else [newest, *names]


def _listed(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_dir()]
    except OSError:  # no run is there yet
        return []


def check_whole(state: Path) -> None:
    """Raise ValueError for a state that is damaged, to all processes, which all must ask."""
    if reason := said_by_first((damage(state) or "") if rank() == 0 else ""):
        raise ValueError(f"{state} is damaged ({reason}); go on from another one")


def damage(state: Path) -> str | None:
    """Why a state cannot be gone on from: a file that is missing, cut or changed. None where it is
    whole; of one that was saved without checksums, as far as can be told."""
    try:
        if _is_earlier(state):
            read_distributed(state / _TENSORS)
        else:
            for path in (state / _TENSORS).glob("*"):
                if path.name == PLAN or path.suffix == PARTS:
                    return f"{_TENSORS}/{path.name} was not saved with it"
            sums = _sums(state / _CHECKSUMS)
            if state / _PROGRESS not in sums:
                return f"{_CHECKSUMS} does not name {_PROGRESS}"
            if strange := [path for path in plans(state / _TENSORS) if path not in sums]:
                return f"{_TENSORS}/{strange[0].name} was not saved with it"
            _check_files(sums)
            for plan in (path for path in sums if path.parent == state / _TENSORS):
                _check_files(_sums(plan))
        read_progress(state)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return " ".join(str(error).split()).replace(f"{state}/", "")
    return None


def _is_earlier(state: Path) -> bool:
    return not (state / _CHECKSUMS).is_file() and (state / _TENSORS / PLAN).is_file()


def _sums(manifest: Path) -> dict[Path, Any]:
    """Size and SHA-256 of files beside one that says them."""
    files = read_json(manifest).get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{manifest}: files must be a JSON object")
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{manifest}: files must lie beside it, got {name!r}")
    return {manifest.parent / name: values for name, values in files.items()}


def _check_files(sums: Mapping[Path, Any]) -> None:
    for path, said in sums.items():
        if not path.is_file():  # nor a pipe, which would wait for a writer
            raise ValueError(f"{path} is missing")
        now = path.stat()
        if not isinstance(said, dict) or said.get("bytes") != now.st_size:
            raise ValueError(f"{path} has another size than when it was saved")
        if said.get("sha256") != _digest(path, now.st_size, now.st_mtime_ns, now.st_ino):
            raise ValueError(f"{path} has changed since it was saved")


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, changed: int, inode: int) -> str:
    """Read once, however often a state is looked at."""
    return sha256_of(path)


def read_progress(state: Path) -> dict[str, Any]:
    """What save_state was given as `progress`, and "step". Raises ValueError for what it did not write."""
    path = state / _PROGRESS
    if not path.is_file():
        raise ValueError(f"{state} must be a saved state, got no {_PROGRESS} in it")
    values = read_json(path)
    if "step" not in values:
        raise ValueError(f"{path}: must say the step, it does not")
    for name, kind in _KINDS.items():
        value: Any = values.get(name)
        is_number = kind in (int, float) and isinstance(value, int | float) and value >= 0
        fits = is_number and type(value) is not bool and math.isfinite(value)
        if kind is int:
            fits = fits and type(value) is int
        elif kind is not float:
            fits = isinstance(value, kind)
        if name in values and not fits:
            raise ValueError(f"{path}: {name} must be of type {kind.__name__}, got {value!r:.60}")
    return values


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
    folder = state / _TENSORS
    try:
        with contextlib.ExitStack() as stack:
            saved = read_distributed(folder) if _is_earlier(state) else read_chunks(folder, stack)
            fill(flatten(tensors), saved, folder)
    except ValueError as error:
        raise ValueError(
            f"{state} must hold what this stage trains ({error}); give another --output, or the "
            "settings that it was made with"
        ) from error
