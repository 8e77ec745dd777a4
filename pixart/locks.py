"""Locks that end with their processes, and folders that are held: by whom is said to those who come
second."""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pixart.files import CheckpointError, printable, read_json, write_bytes

HELD = ".held"  # in a folder that processes work in: a file and a lock of each
_TRIES = 100  # to make a lock in a folder that others remove
RENEWED, BELIEVED = 30.0, 300.0  # seconds between signs of life, and those that one is good for


class Occupied(ValueError):
    """Another process works in a folder: one line with its host and pid, and the way out."""


@contextmanager
def claimed(lock: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock; if another does, waits for it or gives False.

    A lock ends with its process however that ends, so that no work stays claimed by the dead.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    for attempt in range(_TRIES):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.acquire(timeout=-1 if wait else 0)
            break
        except Timeout:
            yield False
            return
        except (FileExistsError, FileNotFoundError):  # the folder went with another's lock just now
            if attempt == _TRIES - 1:
                raise
    try:
        yield True
    finally:
        held.release()


@contextmanager
def occupied(folder: Path, work: str, *, shared: str | None = None) -> Iterator[Path]:
    """Hold a folder until the end of the block; yields the file that says so, of a name that is nowhere
    else. Raises Occupied, with host and pid, where another does.

    work: what is done there, in words, for those that are refused. shared: processes that give the
    same text hold a folder together, with None each holds it alone.

    The lock of a process of this machine opens when that ends, however it ends, and its place is
    taken over. Some shared disks keep locks to each machine: one of another machine that looks open is
    believed for five minutes after its last sign of life, of which there is one every half minute.
    """
    own = folder / HELD / f"{secrets.token_hex(8)}.json"
    over = threading.Event()
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_leave, own, new)
        _join(own, work, shared, stack)
        renewing = threading.Thread(target=_renew, args=(own, over), daemon=True)
        stack.callback(renewing.join)
        stack.callback(over.set)
        renewing.start()
        yield own


def _join(own: Path, work: str, shared: str | None, stack: contextlib.ExitStack) -> None:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _boot(),
        "machine": _machine(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "work": work,
        "shared": shared,
    }
    # One after the other, or two that come at once would refuse each other.
    with claimed(own.with_name("joining"), wait=True):
        stack.enter_context(claimed(own.with_suffix(".lock"), wait=True))
        # Before looking at others, and not after: also where locks do not reach other machines.
        write_bytes(own, json.dumps(holder).encode(), durable=False)
        for other in sorted(own.parent.glob("*.json")):
            if other == own:
                continue
            values = _holder(other)
            if not _is_alive(other, values, own.stat().st_mtime):
                _remove_claim(other)
            elif shared is None or values.get("shared") != shared:
                raise Occupied(_refusal(other, values))


def _boot() -> str:
    """The same in all containers of a machine, whose locks see each other, and another after a boot."""
    return _line_of("/proc/sys/kernel/random/boot_id") or socket.gethostname()


def _machine() -> str:
    """The same after a boot; containers may have none, or that of all others of their image."""
    return _line_of("/etc/machine-id")


def _line_of(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""


def _holder(claim: Path) -> dict[str, Any]:
    try:
        return read_json(claim)
    except CheckpointError:  # gone, or damaged
        return {}


def _is_alive(claim: Path, holder: Mapping[str, Any], now: float) -> bool:
    """now: by the clock of the disk, as the claim's own times are."""
    with claimed(claim.with_suffix(".lock"), wait=False) as is_open:
        if not is_open:
            return True
    has_booted = bool(_machine()) and holder.get("machine") == _machine()
    is_here = has_booted and holder.get("host") == socket.gethostname()
    try:
        return (
            not (is_here or holder.get("boot") == _boot())
            and claim.stat().st_mtime > now - BELIEVED
        )
    except FileNotFoundError:
        return False


def _refusal(claim: Path, holder: Mapping[str, Any]) -> str:
    def said(name: str, otherwise: str) -> str:
        return printable(str(holder.get(name, otherwise)), 100)

    who = f"pid {said('pid', 'unknown')} on {said('host', 'an unknown host')}"
    return (
        f"{claim.parent.parent}: is held by {who}, {said('work', 'at work')} since "
        f"{said('since', 'an unknown time')}; wait for it, give another folder, or delete "
        f"{claim} if that process is dead"
    )


def _renew(claim: Path, over: threading.Event) -> None:
    while not over.wait(RENEWED):
        with contextlib.suppress(OSError):  # a disk that is away for a while
            os.utime(claim)


def _remove_claim(claim: Path) -> None:
    # Windows removes no file that is open elsewhere.
    for path in (claim, claim.with_suffix(".lock")):
        with contextlib.suppress(OSError):
            path.unlink()


def _leave(own: Path, new: Sequence[Path]) -> None:
    """Take away what this process has put there, and after the last the folder; new ones too, if nothing
    came of them."""
    _remove_claim(own)
    with contextlib.suppress(OSError):
        if [path.name for path in own.parent.iterdir()] == ["joining"]:
            own.with_name("joining").unlink()
            for path in (own.parent, *new):
                path.rmdir()
