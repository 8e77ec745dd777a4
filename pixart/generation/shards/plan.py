"""What is in which tar, of a list of any length: read twice, and never held.

The first time every line is checked and the place noted at which each tar begins; the second time the lines
of a tar are read when it is to be drawn. So a plan is small, and a task has all that its tar needs.
"""

import os
import stat
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from pixart import process
from pixart.generation.drafts import OWN, Drafts, Job, given_lines
from pixart.generation.jobs import check_control, check_early, checked_sweeps
from pixart.generation.options import Options
from pixart.generation.prompts import Line, naming, scan
from pixart.generation.shards.place import ShardNames, names_of
from pixart.pipeline.limits import ALPHA, PICTURES
from pixart.pipeline.request import checked

SIZE = 1000  # pictures of a tar
MOST = 10**9  # pictures of a run: keys have nine digits
_KNOWN = 10_000  # combinations of the others that are remembered


@dataclass(frozen=True)
class ShardTask:
    """One tar: all that is needed to draw it, where the list itself is not at hand.

    number: of the tar, from 0. name: of its file. first: the index of its first picture. count: of its
    pictures. lines: what they are made of. skipped: pictures of the first line that are in the tar before.
    """

    number: int
    name: str
    first: int
    count: int
    lines: tuple[Line, ...]
    skipped: int

    def jobs(self, drafts: Drafts) -> list[Job]:
        """Its pictures. ValueError names a line that none can be made of."""
        start = self.first - self.skipped
        found: list[Job] = []
        for line in self.lines:
            wanted = range(self.first - start, self.first + self.count - start)
            found += drafts.jobs(line, start, wanted)
            start += drafts.per_line
        return found


@dataclass(frozen=True)
class ShardPlan:
    """pictures: of all tars. size: pictures of each but the last. names: of the tars, and where they go."""

    pictures: int
    size: int
    names: ShardNames
    drafts: Drafts = field(repr=False)
    _source: "_Source" = field(repr=False)

    def __len__(self) -> int:
        """How many tars there are."""
        return -(-self.pictures // self.size)

    def tasks(self, numbers: Iterable[int] | None = None) -> Iterator[ShardTask]:
        """Those of all tars, or of these, each read when it is asked for. ValueError if the list has changed
        meanwhile."""
        for number in range(len(self)) if numbers is None else numbers:
            first = number * self.size
            count = min(self.size, self.pictures - first)
            line, skipped = divmod(first, self.drafts.per_line)
            lines = -(-(skipped + count) // self.drafts.per_line)
            found = self._source.read(number, line, lines)
            yield ShardTask(number, self.names.name(number), first, count, found, skipped)

    def examples(self) -> Iterator[Job]:
        """A job of each kind that the lines ask for: what a model can say of one it can say of all that differ
        in prompts, seeds and pictures alone. A kind may come twice."""
        for line in self._source.examples():
            yield from self.drafts.examples(line)


def plan_shards(options: Options) -> ShardPlan:
    """Check every line as far as that is possible without a model, and find where tars begin. Takes some 20
    seconds for a million lines. ValueError names the line, or the option that cannot be meant with tars."""
    check_options(options)
    names, sweeps = names_of(options), checked_sweeps(options)
    size = SIZE if options.shard_size is None else options.shard_size
    drafts = Drafts(options, sweeps)
    if options.prompts is None:
        source = _Source(None, tuple(given_lines(options, sweeps)))
    else:
        source = _Source(options.prompts)
    new = _NewKinds(options, drafts)
    check_early(
        options, (job for line in source.scan(size, drafts, new) for job in drafts.examples(line))
    )
    return ShardPlan(source.count * drafts.per_line, size, names, drafts, source)


def check_options(options: Options) -> None:
    """ValueError for an option that tars cannot be drawn with."""
    size = options.shard_size
    if size is not None and not 1 <= size <= MOST:
        raise ValueError(f"--shard-size must be from 1 to {MOST:,} pictures, got {size:,}")
    kept_out = {
        "--from-image": (options.from_image, "draws single pictures again"),
        "--grid": (options.grid, "is a sheet of few pictures"),
        "--preview": (options.preview, "shows single pictures"),
        "--taesd": (options.taesd, "is for --preview"),
    }
    for name, (value, why) in kept_out.items():
        if value:
            raise ValueError(f"{name} must be left out where tars are written: it {why}")
    is_alone = process.place()[1] == 1 and options.processes is None
    if options.parallel not in ("auto", *(() if is_alone else ("pictures",))):
        raise ValueError(
            f"--parallel must be left out where tars are written, got {options.parallel}: each process draws "
            "tars of its own"
        )
    if options.seed == "random":
        raise ValueError(
            "--seed must be a number where tars are written, got random: another process, or this one when it "
            "goes on, must draw the same pictures"
        )
    if options.quality is not None and options.format in (None, "png"):
        raise ValueError(
            "--quality must be left out for .png, which loses nothing; give --format jpg or webp"
        )


class _NewKinds:
    """Checks lines, thoroughly one of each kind: settings other than prompts, seeds and pictures."""

    def __init__(self, options: Options, drafts: Drafts) -> None:
        self._options, self._drafts = options, drafts
        self._seed = int(options.seed or 0)
        self._known = lru_cache(maxsize=_KNOWN)(self._check_kind)
        self._line = Line({})

    def is_new(self, line: Line) -> bool:
        """ValueError, with its place, for a line that cannot be drawn."""
        self._line, before = line, self._known.cache_info().misses
        with naming(line.place):
            self._known(_kind_of(line.values))
            for name in OWN:
                if name in line.values:
                    checked(name, line.values[name])
            checked("seed", line.values.get("seed", self._seed) + self._options.num_images - 1)
            for picture in _pictures_of(line.values):
                if not os.path.isfile(picture):
                    raise ValueError(f"{picture}: must be a picture's file, there is none")
        return self._known.cache_info().misses > before

    def _check_kind(self, kind: Any) -> None:
        for job in self._drafts.examples(self._line):
            check_control(self._options, job.request)


def _kind_of(values: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for lines of which every check but those of `_NewKinds` finds the same."""
    kind: list[Any] = [bool(str(values.get("prompt", "")).strip())]
    for name, value in values.items():
        if name in OWN:
            kind.append((name, value is None))
        elif name in PICTURES:
            kind.append((name, value if name == "mask" and value == ALPHA else _how_many(value)))
        elif name != "name":
            kind.append((name, repr(value)))
    return tuple(kind)


def _how_many(value: Any) -> int | None:
    return len(value) if isinstance(value, tuple) else None if value is None else 1


def _pictures_of(values: dict[str, Any]) -> Iterator[str]:
    for name in PICTURES:
        value = values.get(name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and (name, one) != ("mask", ALPHA):
                yield one


@dataclass
class _Source:
    """Lines of a file, or of options. count: of all. starts: where the lines of each tar begin, a byte and the
    number of a line. kinds: the same of the lines that are examples. state: of the file, by which another is
    known."""

    path: Path | None
    given: tuple[Line, ...] = ()
    count: int = 0
    _starts: "array[int]" = field(default_factory=lambda: array("Q"))
    _kinds: "array[int]" = field(default_factory=lambda: array("Q"))
    _state: tuple[int, ...] = ()

    def scan(self, size: int, drafts: Drafts, new: _NewKinds) -> Iterator[Line]:
        """Go over all lines, and yield one of each kind."""
        tars = 0  # that have begun
        for offset, number, line in self._lines():
            if new.is_new(line):
                self._kinds.extend((offset, number))
                yield line
            self.count += 1
            while tars * size < self.count * drafts.per_line:
                self._starts.extend((offset, number))
                tars += 1
            if self.count * drafts.per_line > MOST:
                raise ValueError(
                    f"a run must be of at most {MOST:,} pictures, got more; split the list"
                )
        if not self.count:
            raise ValueError(f"{self.path}: holds no prompt")

    def read(self, tar: int, line: int, count: int) -> tuple[Line, ...]:
        """The lines of a tar. line: the number of the first among all that hold a prompt."""
        if self.path is None:
            return self.given[line : line + count]
        offset, number = self._starts[2 * tar : 2 * tar + 2]
        found = tuple(self._at(offset, number, count))
        if len(found) < count:
            raise self._changed()
        return found

    def examples(self) -> Iterator[Line]:
        for start in range(0, len(self._kinds), 2):
            if self.path is None:
                yield self.given[self._kinds[start]]
            else:
                yield from self._at(self._kinds[start], self._kinds[start + 1], 1)

    def _lines(self) -> Iterator[tuple[int, int, Line]]:
        if self.path is None:
            yield from ((number, number, line) for number, line in enumerate(self.given))
            return
        with self._open() as stream:
            self._state = self._state_of(stream)
            yield from scan(stream, self.path)

    def _at(self, offset: int, number: int, count: int) -> list[Line]:
        assert self.path is not None
        with self._open() as stream:
            if self._state_of(stream) != self._state:
                raise self._changed()
            stream.seek(offset)
            return [line for _, _, line in islice(scan(stream, self.path, number), count)]

    def _open(self) -> BinaryIO:
        assert self.path is not None
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise ValueError(
                    f"{self.path}: must be a file where tars are written, got a folder, a pipe or a device: it "
                    "is read more than once"
                )
            return self.path.open("rb")
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror})") from error

    def _state_of(self, stream: BinaryIO) -> tuple[int, ...]:
        found = os.fstat(stream.fileno())
        return found.st_size, found.st_mtime_ns

    def _changed(self) -> ValueError:
        return ValueError(
            f"{self.path}: has changed since it was first read; start again, with a list that stays as it is"
        )
