"""What the command line says on standard error: remarks, warnings and progress bars."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Voice:
    """Remarks and progress bars on standard error; silent when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, text: str) -> None:
        if not self.quiet:
            from tqdm import tqdm

            tqdm.write(" ".join(text.split()), file=sys.stderr)  # above a bar, not into it

    def bar(self, stage: str, total: int | None = None) -> "Bar":
        return Bar(stage, total, self.quiet)


class _Remarks(logging.Handler):
    def __init__(self, say: Voice) -> None:
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())


@contextmanager
def voiced(say: Voice) -> Iterator[None]:
    """Let warnings and the notes of our own modules speak with one voice, a line each."""

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if category is UserWarning:  # others are for programmers
            say(f"warning: {message}")

    logger, handler = logging.getLogger("pixart"), _Remarks(say)
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before[0])
            logger.propagate = before[1]


class Bar:
    """The progress of one stage. total: None until the first `reach` says it."""

    def __init__(self, stage: str, total: int | None, quiet: bool) -> None:
        self._stage, self._quiet = stage, quiet
        self._bar: Any = None
        if total is not None:
            self._start(total)

    def _start(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, desc=self._stage, disable=self._quiet, leave=False, file=sys.stderr
        )

    def __enter__(self) -> "Bar":
        return self

    def advance(self, _: object = None) -> None:
        self._bar.update()

    def reach(self, done: int, total: int) -> None:
        if self._bar is None:
            self._start(total)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()
