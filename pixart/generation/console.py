"""What the command line says on standard error: remarks, warnings and progress bars."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Console:
    """Remarks and progress bars on standard error; silent when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def remark(self, text: str) -> None:
        if not self.quiet:
            from tqdm import tqdm

            tqdm.write(" ".join(text.split()), file=sys.stderr)  # above a bar, not into it

    def bar(self, stage: str, total: int) -> Any:
        from tqdm import tqdm

        return tqdm(total=total, desc=stage, disable=self.quiet, leave=False, file=sys.stderr)

    @contextmanager
    def with_libraries(self) -> Iterator[None]:
        """Let warnings and the log of our own modules come as remarks, a line each. Where it is quiet,
        the log of libraries is off too: some write to standard error as they are imported."""

        def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
            if category is UserWarning:  # others are for programmers
                self.remark(f"warning: {message}")

        logger, handler = logging.getLogger("pixart"), _Remarks(self)
        before = logger.level, logger.propagate, logging.root.manager.disable
        if self.quiet:
            logging.disable(logging.ERROR)  # what stops a command is an exception, which is printed
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
                logging.disable(before[2])


class _Remarks(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.remark(record.getMessage())


class StageBar:
    """The bar of the stage that runs, one at a time on one line; the one before ends with it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._bar: Any = None

    def reach(self, stage: str, done: int, total: int) -> None:
        """The stage has done so much of its total."""
        if stage != self._stage:
            self.close()
            self._stage, self._bar = stage, self._console.bar(stage, total)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._stage, self._bar = "", None

    def __enter__(self) -> "StageBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
