"""What the command line says on standard error: remarks, warnings and how far it is."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pixart import process
from pixart.generation.terminal import TerminalPicture
from pixart.progress import Bar, say

if TYPE_CHECKING:
    from PIL.Image import Image


class Console:
    """Remarks and bars on standard error; silent when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._picture: TerminalPicture | None = None

    def remark(self, text: str) -> None:
        if not self.quiet:
            if self._picture is not None:
                self._picture.leave()
            say(text)

    def show(self, image: "Image") -> None:
        """Show a picture above the bar, in the place of the last one if nothing was said since. Nothing
        where the terminal can show none."""
        if not self.quiet:
            self._picture = self._picture or TerminalPicture.on_standard_error()
            if self._picture is not None:
                self._picture.show(image)

    def bar(self, what: str, total: int, done: int = 0) -> Bar:
        return Bar(what, total, done=done, quiet=self.quiet)

    @contextmanager
    def with_libraries(self) -> Iterator[None]:
        """Let warnings and the log of our own modules come as remarks, a line each. Where it is quiet,
        nothing that libraries write to standard error gets there: some do as they are imported."""

        def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
            if category is UserWarning:  # others are for programmers
                self.remark(f"warning: {message}")

        logger, handler = logging.getLogger("pixart"), _Remarks(self)
        before = logger.level, logger.propagate
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
        with ExitStack() as stack:
            if self.quiet:
                stack.enter_context(_silence())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = show  # type: ignore[assignment]
            try:
                yield
            finally:
                logger.removeHandler(handler)
                logger.setLevel(before[0])
                logger.propagate = before[1]


class _Remarks(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.remark(record.getMessage())


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing reaches standard error, printed, logged or written by a library in C. What stops a command
    is an exception, which is printed afterwards."""
    before, level = sys.stderr, logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # handlers that were made before hold the old stream
    sys.stderr = _Nowhere()
    with _descriptor_to_nowhere():
        try:
            yield
        finally:
            sys.stderr = before
            logging.disable(level)


@contextmanager
def _descriptor_to_nowhere() -> Iterator[None]:
    try:
        kept = os.dup(2)
    except OSError:  # it was closed
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        process.ENDING.error_output = kept  # Ctrl-C is answered also now
        yield
    finally:
        os.dup2(kept, 2)
        process.ENDING.error_output = 2
        os.close(kept)


class _Nowhere(io.TextIOBase):
    """Never closed, as handlers that libraries make keep it."""

    def write(self, text: str, /) -> int:
        return len(text)


class RunBar:
    """How far a run is, in one line: prompts that are encoded, then `draw: 3 of 12, 41 s left`.

    texts: prompts to encode. passes: how many pictures each pass of the transformer draws. done: pictures
    that are there already.
    """

    DENOISED = 0.9  # of the work on a picture; the rest is decoding and writing

    def __init__(self, console: Console, texts: int, passes: Sequence[int], done: int) -> None:
        self._console, self._texts, self._passes = console, texts, list(passes)
        self._before = done  # pictures, before the pass that runs
        self._written = 0  # of that pass
        self._bar = console.bar("text", texts)

    def encode(self) -> None:
        """One more prompt is encoded; pictures follow the last."""
        self._bar.advance()
        if self._bar.done >= self._texts:
            self._bar.close()
            total = self._before + sum(self._passes)
            self._bar = self._console.bar("draw", total, self._before)
            self._bar.reach(self._before, "load transformer")

    def denoise(self, step: int, total: int) -> None:
        """So many steps of the pass that runs are done."""
        share = self.DENOISED * self._passes[0] * step / total
        self._bar.reach(self._before + share, f"denoise {step}/{total}")

    def note(self, text: str) -> None:
        """What is done now."""
        self._bar.reach(self._bar.done, text)

    def finish(self) -> None:
        """One more picture is written."""
        self._written += 1
        size = self._passes[0]
        share = self.DENOISED * size + (1 - self.DENOISED) * self._written
        if self._written < size:
            self._bar.reach(self._before + share)
            return
        self._before, self._written = self._before + size, 0
        self._passes.pop(0)
        self._bar.reach(self._before)

    def __enter__(self) -> "RunBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
