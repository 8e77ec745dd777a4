"""How far a command is, on standard error: a bar where somebody watches, a line now and then in a log.

Nothing here fails: where standard error is closed, broken or full, there is silence.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Entry = TypeVar("Entry")

# Seconds between two lines in a log, doubled from the first to the last; and between two looks of a bar.
FIRST_SECONDS, LAST_SECONDS, LOOK_SECONDS = 5.0, 60.0, 0.2


class Bar:
    """`prepare: 3 of 12, 41 s left`: before a bar on a terminal, in lines elsewhere; silent if quiet.

    what: what is done. total: of it, None if nobody knows. done: what was done before, which says
    nothing about how long the rest takes.
    """

    def __init__(
        self, what: str, total: float | None = None, *, done: float = 0, quiet: bool = False
    ) -> None:
        self.what, self.total, self.done, self.note = what, total, done, ""
        self._before, self._started = done, time.monotonic()
        self._wait = FIRST_SECONDS
        self._due = self._started + self._wait
        self._bar: Any = None
        self._is_quiet = quiet
        if not quiet and _is_watched():
            self._bar = _open_bar(total)
            self._due = self._started

    def reach(self, done: float, note: str | None = None) -> None:
        """So much is done; parts of one count for the time left. note: what stands behind."""
        self.done = done
        if note is not None:
            self.note = note
        if not self._is_quiet and time.monotonic() >= self._due:
            self._show()

    def advance(self, count: float = 1, note: str | None = None) -> None:
        """So much more is done."""
        self.reach(self.done + count, note)

    def text(self) -> str:
        """What is shown, as of now."""
        of = f"{int(self.done):,}" + (f" of {int(self.total):,}" if self.total else "")
        gone, new = time.monotonic() - self._started, self.done - self._before
        parts = [f"{self.what}: {of}"]
        if self.total and new > 0:
            parts.append(f"{duration(gone / new * max(0, self.total - self.done))} left")
        return ", ".join(filter(None, [*parts, self.note]))

    def _show(self) -> None:
        if self._bar is None:
            say(self.text())
            self._wait = min(2 * self._wait, LAST_SECONDS)
            self._due = time.monotonic() + self._wait
            return
        self._due = time.monotonic() + LOOK_SECONDS
        self._bar.n = min(self.done, self.total or self.done)
        try:
            self._bar.set_description_str(self.text())
        except OSError:  # the terminal is gone
            self._is_quiet = True

    def close(self) -> None:
        """Take the bar away."""
        bar, self._bar = self._bar, None
        self._is_quiet = True
        if bar is not None:
            try:
                bar.close()
            except OSError:
                bar.disable = True

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def counted(
    entries: Iterable[Entry], what: str, total: float | None = None, *, quiet: bool = False
) -> Iterator[Entry]:
    """The entries, with a Bar for how many were worked on."""
    with Bar(what, total, quiet=quiet) as bar:
        for entry in entries:
            yield entry
            bar.advance()


def say(text: str) -> None:
    """Print a line on standard error, above a bar where there is one."""
    line = " ".join(text.split())
    try:
        if _is_watched():
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)
        elif sys.stderr is not None:  # print would take standard output then
            print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # the reader is gone, the disk is full, or it was closed
        return


def duration(seconds: float) -> str:
    """Seconds in words: 41 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _is_watched() -> bool:
    """Whether standard error is a terminal."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def _open_bar(total: float | None) -> Any:
    from tqdm import tqdm

    shape = "{desc} |{bar}|" if total else "{desc}"
    return tqdm(
        total=total, bar_format=shape, leave=False, file=sys.stderr, dynamic_ncols=True, smoothing=0
    )
