"""`clean`: what a set of pictures is like, before anything of it is left out.

Every picture is measured once and judged by nothing; then those that show the same are found, and a line
for each is written. With `keep`, what an expression would leave is counted rule by rule, as `prepare
--keep` leaves it. What it wrote beside the lines lets a stopped run go on.
"""

import inspect
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.dataset import measurement_store as store
from pixart.dataset.annotations import finite, in_order
from pixart.dataset.duplicates import THUMBNAIL, find_groups, hashes, represented, thumbnail
from pixart.dataset.expression import (
    NUMBER,
    TEXT,
    TRUTH,
    Rule,
    check_names,
    is_name,
    parse_rules,
)
from pixart.dataset.funnel import UNREADABLE, Funnel
from pixart.dataset.images import ImageError
from pixart.dataset.measurement_store import Measured, identity_of
from pixart.dataset.measurements import (
    KINDS,
    is_whole,
    main_caption,
    measure,
    measure_captions,
    open_measured,
)
from pixart.dataset.rejects import Overview, write_overview
from pixart.dataset.samples import Item, Rejected, Sample, writable
from pixart.dataset.scoring import load_scorer
from pixart.files import CheckpointError, written_aside
from pixart.progress import counted

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

THREADS = 4  # that read and measure pictures
# What is known of a picture when all are measured.
OF_THE_SET = {"phash": TEXT, "duplicate": TRUTH, "duplicate_of": TEXT}
_OF_THE_STORE = ("id", "at", "scored")


@dataclass(frozen=True)
class ScorerName:
    """A function of the user's, by its name in lines and its place, MODULE:FUNCTION."""

    name: str
    place: str

    def open(self) -> "Scorer":
        """ValueError if there is none."""
        function = load_scorer(self.place)
        return Scorer(self.name, self.place, function, _takes_two(function))


@dataclass(frozen=True)
class Scorer(ScorerName):
    """One that is imported. of_caption: whether it is given the caption too."""

    function: Callable[..., Any]
    of_caption: bool

    def open(self) -> "Scorer":
        return self

    def score(self, image: "Image", caption: str) -> float:
        """Raises ImageError for whatever goes wrong."""
        try:
            given = (image, caption) if self.of_caption else (image,)
            value = float(self.function(*given))
        except (Exception, SystemExit) as error:  # a function of the user's may raise anything
            raise ImageError(f"{self.name} raises {type(error).__name__}: {error}") from error
        return finite(value, self.name)


@dataclass(frozen=True)
class Unread(Rejected):
    """A sample that cannot be measured. key: the sample's, by which others know it."""

    key: str


@dataclass
class Cleaning:
    """new: pictures that were measured now; known: from earlier runs; scored: those of them that got further
    scores. failures: what could not be scored."""

    new: int = 0
    known: int = 0
    scored: int = 0
    failures: list[Rejected] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    places: "array[int]" = field(default_factory=lambda: array("q"))


@dataclass(frozen=True)
class Task:
    """What is to be measured. item: None where there is nothing to do. of: its identity, None of what was
    rejected. known: its line, where that lacks scores alone."""

    item: Item | None
    of: int | None
    known: dict[str, Any] | None = None


@dataclass(frozen=True)
class Opened:
    """A picture that was measured. thumbnail: None where it is kept. failures: of scorers."""

    line: dict[str, Any]
    thumbnail: bytes | None
    failures: Sequence[Rejected] = ()


# What becomes of each task, in their order, behind its identity; None of those with nothing to do.
Work = Callable[[Iterable[Task]], Iterator[tuple[int | None, Opened | Rejected | None]]]


def open_scorers(names: Sequence[str]) -> list[Scorer]:
    """The functions that `name_scorers` names. ValueError for what is none."""
    return [scorer.open() for scorer in name_scorers(names)]


def name_scorers(names: Sequence[str]) -> list[ScorerName]:
    """What "MODULE:FUNCTION" or "NAME=MODULE:FUNCTION" names; the name is the function's where none is
    given. Imports nothing. ValueError for a name that is taken."""
    scorers: list[ScorerName] = []
    for given in names:
        name, equals, place = given.rpartition("=")
        name = name if equals else place.rpartition(":")[2]
        taken = {*KINDS, *OF_THE_SET, UNREADABLE, "path", *_OF_THE_STORE, "min", "max"}
        taken |= {scorer.name for scorer in scorers}
        if not is_name(name) or name in taken:
            reason = "is taken" if name in taken else "is no name"
            raise ValueError(
                f"--scorer must be NAME=MODULE:FUNCTION, {name!r} {reason}, got {given!r}"
            )
        scorers.append(ScorerName(name, place))
    return scorers


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether a function must be given two arguments."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some that are written in C
        return False
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in places and p.default is p.empty]
    return len(needed) == 2


def rules_of(keep: str | None, scorers: Sequence[ScorerName], output: Path) -> list[Rule]:
    """The rules of an expression, which may name scores of earlier runs into `output` too. ValueError for one
    that cannot be, before anything is measured."""
    if keep is None:
        return []
    rules = parse_rules(keep)
    scores = {scorer.name for scorer in scorers} | store.scores_in(output.with_suffix(""))
    check_names(rules, KINDS | OF_THE_SET | dict.fromkeys(scores, NUMBER))
    return rules


def check_folder(output: Path, source: str) -> None:
    """Refuse an output of which the folder beside it would be the source, or holds something else."""
    folder = output.with_suffix("")
    if "://" not in source and folder.resolve() == Path(source).expanduser().resolve():
        raise ValueError(f"output must have another name than the source, its folder is {folder}")
    if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
        raise ValueError(f"output must have a free folder beside it, {folder} holds something else")


def _is_ours(folder: Path) -> bool:
    # A process that was killed at once leaves its lock and nothing else.
    return (folder / store.LINES).is_file() or {one.name for one in folder.iterdir()} <= {
        store.LOCK
    }


def clean(
    source: Callable[[], Iterable[Item]],
    output: Path,
    scorers: Sequence[ScorerName] = (),
    rules: Sequence[Rule] = (),
    workers: int = THREADS,
    work: Work | None = None,
) -> str:
    """Measure what `source()` gives and write `output`, with an overview in the folder of its name without
    the suffix. work: as `measuring` makes it of these scorers; None is that in this process, in so many threads.
    Returns what was done, in words, with the funnel where there are rules."""
    folder = output.with_suffix("")
    work = work or open_measuring(scorers, workers)
    with store.opened(folder, THUMBNAIL, is_whole) as measured:
        done = _measure(source(), measured, scorers, work)
        lines = _Lines(measured, done)
        check_names(rules, KINDS | OF_THE_SET | dict.fromkeys(lines.scores, NUMBER))
        funnel, overview = Funnel(rules), Overview()
        with written_aside(output) as aside, aside.open("wb") as file:
            for line in counted(lines, "write"):
                file.write(json.dumps(line).encode() + b"\n")
                overview.take(line, funnel.take(line))
        write_overview(folder, overview, funnel, source, done.failures)
    return _summary(done, lines, output, funnel)


def _summary(done: Cleaning, lines: "_Lines", output: Path, funnel: Funnel) -> str:
    earlier = f", {done.known} before" if done.known else ""
    earlier += f" ({done.scored} given to scorers now)" if done.scored else ""
    failed = f", {len(done.failures)} could not be scored" if done.failures else ""
    where = writable(str(output.with_suffix("") / "README.md"))
    said = (
        f"{done.new} pictures measured{earlier}, {len(done.rejected)} rejected, "
        f"{lines.duplicates} duplicates{failed}: see {where}"
    )
    return f"{funnel.table()}\n{said}" if funnel.rules else said


def _measure(
    items: Iterable[Item], measured: Measured, scorers: Sequence[ScorerName], work: Work
) -> Cleaning:
    done = Cleaning()
    wanted = [(scorer.name, scorer.place) for scorer in scorers]
    coming: set[int] = set()
    refused: dict[int, Rejected] = {}

    def tasks() -> Iterator[Task]:
        for item in items:
            if isinstance(item, Rejected):
                yield Task(item, None)
                continue
            of = identity_of(item)
            # Asked here and not by who measures: the file has one place that is read from.
            line = measured.get(of) if wanted else None
            is_known = of in measured.places and not (line and store.lacks(line, wanted))
            # Of one that is listed twice, the second waits for what becomes of the first.
            if is_known or of in coming:
                yield Task(None, of)
            else:
                coming.add(of)
                yield Task(item, of, line)

    for of, result in counted(work(tasks()), "clean"):
        if of is None:
            assert isinstance(result, Rejected)
            done.rejected.append(result)
            continue
        if result is None:
            result = refused.get(of)
        coming.discard(of)
        if isinstance(result, Rejected):
            refused[of] = result
            done.rejected.append(result)
            continue
        if result is None:
            if of not in measured.places:  # its first was lost elsewhere, with which the run ends
                continue
            done.known += 1
        else:
            measured.add(result.line, result.thumbnail)
            done.failures += result.failures
            is_new = result.thumbnail is not None
            done.new += is_new
            done.known += not is_new
            done.scored += not is_new
        done.places.append(measured.places[of])
    return done


def open_measuring(scorers: Sequence[ScorerName], workers: int) -> Work:
    """The work of scorers by their names. ValueError if one is none."""
    return measuring([scorer.open() for scorer in scorers], workers)


def known_in(output: Path, scorers: Sequence[ScorerName]) -> Callable[[Sample], bool]:
    """What tells whether a picture is measured and scored already; nothing is written."""
    wanted = [(scorer.name, scorer.place) for scorer in scorers]
    known = store.known_in(output.with_suffix(""), THUMBNAIL, is_whole, wanted)
    return lambda sample: identity_of(sample) in known


def measured_by(work: Work) -> Callable[[Sequence[Sample]], Iterator[Opened | Rejected | None]]:
    """What becomes of pictures that nothing is known of."""

    def measure(samples: Sequence[Sample]) -> Iterator[Opened | Rejected | None]:
        for _, result in work(Task(sample, identity_of(sample)) for sample in samples):
            yield result

    return measure


def measuring(scorers: Sequence[Scorer] = (), workers: int = THREADS) -> Work:
    """From tasks to what becomes of them. workers: threads that read and measure; scorers work one after the
    other, as functions of users may not share threads."""

    def work(tasks: Iterable[Task]) -> Iterator[tuple[int | None, Opened | Rejected | None]]:
        for task, result in in_order(partial(_opened, bool(scorers)), tasks, workers):
            if isinstance(result, tuple):
                opened, image = result
                result = _scored(opened, image, task.item, scorers)
            yield task.of, result

    return work


def _opened(
    scored: bool, task: Task
) -> "tuple[Task, tuple[Opened, Image | None] | Rejected | None]":
    """Read and measure; with the line that is known, only read. The picture, where it is to be scored.
    Raises nothing over a picture."""
    item, known = task.item, task.known
    if item is None or isinstance(item, Rejected):
        return task, item
    try:
        image, said = open_measured(item.read())
        if known is not None:
            return task, (Opened(known, None), image)
        line = {"id": task.of, "path": item.key, **said, **measure(image)}
        line |= measure_captions(item.captions)
        small = thumbnail(image)
        line["phash"] = f"{int(hashes(small[None], only_whole=True)[0, 0]):016x}"
        return task, (Opened(line, small.tobytes()), image if scored else None)
    except (ImageError, CheckpointError) as error:
        return task, Unread(item.path, str(error), item.key)
    except OSError as error:
        reason = f"unreadable file: {error.strerror or error}"
        return task, Unread(item.path, reason, item.key)


def _scored(opened: Opened, image: "Image | None", item: Any, scorers: Sequence[Scorer]) -> Opened:
    """With the scores that its line lacks."""
    line = {**opened.line, "scored": dict(opened.line.get("scored", {}))}
    missing = store.lacks(line, [(scorer.name, scorer.place) for scorer in scorers])
    failures = []
    for scorer in scorers:
        if scorer.name not in missing or image is None:
            continue
        line["scored"][scorer.name] = scorer.place
        try:
            line[scorer.name] = scorer.score(image, main_caption(item.captions))
        except ImageError as error:
            line[scorer.name] = None
            failures.append(Rejected(item.path, str(error)))
    return Opened(line, opened.thumbnail, failures)


class _Lines:
    """What is written of each picture, in the order of the source; read once."""

    def __init__(self, measured: Measured, done: Cleaning) -> None:
        import numpy as np

        self.measured, self.done = measured, done
        self.scores: dict[str, str] = {}  # by name what gave them, those of earlier runs too
        self.size = np.zeros((len(done.places), 4), np.int64)
        at = np.zeros(len(done.places), np.int64)
        for number, place in enumerate(done.places):
            line = measured.at(place)
            at[number] = line["at"]
            for name, by in line.get("scored", {}).items():
                if self.scores.setdefault(name, by) != by:
                    raise ValueError(
                        f"{name} must be by one function, it is by {self.scores[name]} and by {by}: a run with "
                        f"another was stopped; add --scorer {name}=MODULE:FUNCTION, which scores them all"
                    )
            self.size[number] = (
                line["width"] * line["height"],
                line["captions"] > 0,
                line["bytes"],
                -number,
            )
        self.view = _Rows(measured.view(), at)
        # With most pixels, then one with a caption, then of most bytes, then the first.
        order = np.lexsort(self.size.T[::-1])[::-1]
        groups = find_groups(self.view)  # type: ignore[arg-type]  # rows are all that it asks for
        self.largest = represented(self.view, groups, order)  # type: ignore[arg-type]
        self.duplicates = int((self.largest != np.arange(len(at))).sum())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, place in enumerate(self.done.places):
            line = self.measured.at(place)
            largest = int(self.largest[number])
            first = None if largest == number else self.measured.at(self.done.places[largest])
            values = {key: line.get(key) for key in ("path", *KINDS, *self.scores)}
            yield {
                **values,
                "phash": line["phash"],
                "duplicate": first is not None,
                "duplicate_of": first and first["path"],
            }
        for item in self.done.rejected:
            yield {"path": getattr(item, "key", item.path), UNREADABLE: item.reason}


class _Rows:
    """Rows of a table in a file, in another order."""

    def __init__(self, table: "np.ndarray", at: "np.ndarray") -> None:
        self.table, self.at = table, at

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, which: Any) -> "np.ndarray":
        return self.table[self.at[which]]
