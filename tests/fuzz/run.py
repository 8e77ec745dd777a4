"""Try damaged files on a reader: what comes of each must be success, or one line that names the file."""

import os
import resource
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from targets import TARGETS, damage, silence

from pixart.command import message_of, one_line

MOST_SECONDS = 5.0  # of CPU time: a mutant takes some hundredths
MOST_BYTES = 3 << 30  # more than before: what a file says must not decide how much is taken


class TooSlow(BaseException):
    """Not an Exception, which a reader might take for damage."""


@dataclass(frozen=True)
class Fault:
    """A mutant that ended otherwise than it should."""

    target: str
    seed: int
    how: str
    what: str

    def __str__(self) -> str:
        return f"{self.target}, {self.how}: {self.what}\n  again: {self.again}"

    @property
    def again(self) -> str:
        return f"python tests/fuzz --target {self.target} --seed {self.seed}"


def try_seeds(target: str, seeds: Iterable[int], folder: Path, kept: Path) -> Iterator[Fault]:
    """The faults among the mutants of these seeds. folder: to work in; kept: where the files of a
    fault go."""
    sample = folder / "sample"
    sample.mkdir(parents=True)
    place = TARGETS[target].make(sample).relative_to(sample)
    work = folder / "mutant"
    for seed in seeds:
        shutil.copytree(sample, work)
        how = damage(target, seed, work)
        what = outcome(target, work / place, how)
        if what:
            shutil.copytree(work, kept / f"{target}-{seed}", dirs_exist_ok=True)
            yield Fault(target, seed, how, what)
        shutil.rmtree(work)


def outcome(target: str, place: Path, how: str) -> str:
    """What is wrong with the way in which a file is read, "" if nothing."""
    names = {place.name, place.stem, Path(how.partition(" by ")[0]).name}
    try:
        with silence(), _bounds():
            TARGETS[target].read(place)
    except TooSlow:
        return f"took more than {MOST_SECONDS:.0f} s of CPU time"
    except AssertionError as error:
        return f"read, but {error}"
    except Exception as error:
        message = message_of(error)
        if not (isinstance(error, ValueError | OSError) or hasattr(error, "exit_code")):
            return f"{type(error).__name__}: {message[:300]}"
        if not any(name in one_line(message) for name in names):
            return f"names no file: {type(error).__name__}: {message[:300]}"
    return ""


@contextmanager
def _bounds() -> Iterator[None]:
    """Of CPU time and memory; of time only in the main thread."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = (
        int(Path("/proc/self/statm").read_text().split()[0])
        if os.path.exists("/proc/self/statm")
        else 0
    )
    most = pages * resource.getpagesize() + MOST_BYTES if pages else limits[0]
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
