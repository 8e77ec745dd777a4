"""A worker, in a process of Ray's: it holds what was opened once, and answers with what that makes of an item."""

import importlib.util
import logging
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pixart
from pixart.command import exit_code, message_of
from pixart.files import fingerprint_files


def library() -> tuple[str, str]:
    """The version of this library, and a digest of its code, which differs within a version where it is
    worked on."""
    files: dict[str, Path] = {}
    for name in ("pixart", "pixart_kernels"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
        files |= {f"{name}/{p.relative_to(root).as_posix()}": p for p in sorted(root.rglob("*.py"))}
    return pixart.__version__, fingerprint_files(files)


@dataclass(frozen=True)
class Answer:
    """Of a worker. said: what its logs and warnings said. trace: where the error was raised."""

    result: Any = None
    error: BaseException | None = None
    trace: str = ""
    said: tuple[tuple[int, str], ...] = ()


class Worker:
    """Holds what `open_worker` opened, and answers with what it makes of an item."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._work: Callable[[Any], Any] | None = None

    def version(self) -> tuple[str, tuple[str, str]]:
        """Name of its machine, and what the library is there."""
        return socket.gethostname(), library()

    def open(self, open_worker: Callable[[], Callable[[Any], Any]]) -> Answer:
        def opened() -> None:
            import torch

            torch.set_num_threads(self._threads)
            self._work = open_worker()

        return _answered(opened, f" (on {socket.gethostname()})")

    def do(self, item: Any) -> Answer:
        work = self._work
        assert work is not None
        return _answered(lambda: work(item))


def _answered(work: Callable[[], Any], where: str = "") -> Answer:
    """An exception comes as a value: Ray would wrap it in its own."""
    with _overheard() as said:
        try:
            return Answer(work(), said=tuple(said))
        except BaseException as error:
            trace = traceback.format_exc()
            return Answer(None, _portable(error, where), trace, tuple(said))


def _portable(error: BaseException, where: str) -> BaseException:
    """The error, if it survives pickling as it is; else one of the same meaning."""
    message = f"{message_of(error)}{where}"
    if where and exit_code(error) is not None:
        error.args = (message,)
    try:
        # Made anew of what its class says, as pickle would.
        copied = deepcopy(error)
        if type(copied) is type(error) and message_of(copied) == message_of(error):
            return error
    except Exception:  # whatever a class of somebody's does there
        pass
    return _Elsewhere(message, exit_code(error))


class _Elsewhere(RuntimeError):
    """What was raised in a worker and does not come over as it is."""

    def __init__(self, message: str, code: int | None) -> None:
        super().__init__(message, code)
        self.exit_code = code

    def __str__(self) -> str:
        return str(self.args[0])


class Trace(Exception):
    """Where in a worker an error was raised, as its cause."""


@contextmanager
def _overheard() -> Iterator[list[tuple[int, str]]]:
    """What our logs and users' warnings say, with their levels."""
    said: list[tuple[int, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.levelno, record.getMessage()))

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if category is UserWarning:  # others are for programmers
            said.append((logging.WARNING, f"warning: {message}"))

    logger, listener = logging.getLogger("pixart"), Listener()
    logger.setLevel(logging.INFO)
    logger.addHandler(listener)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield said
        finally:
            logger.removeHandler(listener)
