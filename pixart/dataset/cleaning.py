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

# What is known of a picture when all are measured.
OF_THE_SET = {"phash": TEXT, "duplicate": TRUTH, "duplicate_of": TEXT}
_OF_THE_STORE = ("id", "at", "scored")


@dataclass(frozen=True)
class Scorer:
    """A function of the user's. place: MODULE:FUNCTION. of_caption: whether it is given the caption too."""

    name: str
    place: str
    function: Callable[..., Any]
    of_caption: bool

    def score(self, image: "Image", caption: str) -> float:
        """Raises ImageError for whatever goes wrong."""
        try:
            given = (image, caption) if self.of_caption else (image,)
            value = float(self.function(*given))
        except (Exception, SystemExit) as error:  # a function of the user's may raise anything
            raise ImageError(f"{self.name} raises {type(error).__name__}: {error}") from error
        return finite(value, self.name)


@dataclass
class Cleaning:
    """new: pictures that were measured now; known: from earlier runs. failures: what could not be scored."""

    new: int = 0
    known: int = 0
    failures: list[Rejected] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    places: "array[int]" = field(default_factory=lambda: array("q"))


def open_scorers(names: Sequence[str]) -> list[Scorer]:
    """The functions that "MODULE:FUNCTION" or "NAME=MODULE:FUNCTION" names; the name is the function's
    where none is given. ValueError for what is none, or a name that is taken."""
    scorers: list[Scorer] = []
    for given in names:
        name, equals, place = given.rpartition("=")
        function = load_scorer(place)
        name = name if equals else place.rpartition(":")[2]
        taken = {*KINDS, *OF_THE_SET, UNREADABLE, "path", *_OF_THE_STORE, "min", "max"}
        taken |= {scorer.name for scorer in scorers}
        if not is_name(name) or name in taken:
            reason = "is taken" if name in taken else "is no name"
            raise ValueError(
                f"--scorer must be NAME=MODULE:FUNCTION, {name!r} {reason}, got {given!r}"
            )
        scorers.append(Scorer(name, place, function, _takes_two(function)))
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


def rules_of(keep: str | None, scorers: Sequence[Scorer]) -> list[Rule]:
    """The rules of an expression. ValueError for one that cannot be, before anything is measured."""
    if keep is None:
        return []
    rules = parse_rules(keep)
    check_names(rules, KINDS | OF_THE_SET | {scorer.name: NUMBER for scorer in scorers})
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
    scorers: Sequence[Scorer] = (),
    rules: Sequence[Rule] = (),
    workers: int = 4,
) -> str:
    """Measure what `source()` gives and write `output`, with an overview in the folder of its name without
    the suffix. Returns what was done, in words, with the funnel where there are rules."""
    folder = output.with_suffix("")
    with store.opened(folder, THUMBNAIL, is_whole) as measured:
        done = _measure(source(), measured, scorers, workers)
        lines = _Lines(measured, done, scorers)
        funnel, overview = Funnel(rules), Overview()
        with written_aside(output) as aside, aside.open("wb") as file:
            for line in counted(lines, "write"):
                file.write(json.dumps(line).encode() + b"\n")
                overview.take(line, funnel.take(line))
        write_overview(folder, overview, funnel, source, done.failures)
    return _summary(done, lines, output, funnel)


def _summary(done: Cleaning, lines: "_Lines", output: Path, funnel: Funnel) -> str:
    earlier = f", {done.known} before" if done.known else ""
    failed = f", {len(done.failures)} could not be scored" if done.failures else ""
    where = writable(str(output.with_suffix("") / "README.md"))
    said = (
        f"{done.new} pictures measured{earlier}, {len(done.rejected)} rejected, "
        f"{lines.duplicates} duplicates{failed}: see {where}"
    )
    return f"{funnel.table()}\n{said}" if funnel.rules else said


def _measure(
    items: Iterable[Item], measured: Measured, scorers: Sequence[Scorer], workers: int
) -> Cleaning:
    done = Cleaning()
    wanted = [(scorer.name, scorer.place) for scorer in scorers]

    def listed() -> Iterator[Callable[[], Any]]:
        for item in items:
            of = None if isinstance(item, Rejected) else identity_of(item)
            # Asked here and not in a thread: the file has one place that is read from.
            line = measured.get(of) if of is not None and wanted else None
            if of in measured.places and not (line and store.lacks(line, wanted)):
                yield partial(_as_is, of)
            else:
                yield partial(_opened, item, of, line, bool(scorers))

    for result in counted(in_order(_call, listed(), workers), "clean"):
        if isinstance(result, Rejected):
            done.rejected.append(result)
            continue
        if isinstance(result, _Opened):
            _score(result, scorers, done)
            measured.add(result.line, result.thumbnail)
            done.new += 1
            result = result.line["id"]
        else:
            done.known += 1
        done.places.append(measured.places[result])
    return done


def _call(work: Callable[[], Any]) -> Any:
    return work()


def _as_is(of: int) -> int:
    return of


@dataclass
class _Opened:
    """A picture that was measured. thumbnail: None where it is kept. image: where it is to be scored."""

    sample: Sample
    line: dict[str, Any]
    thumbnail: bytes | None
    image: "Image | None"


def _opened(
    item: Item, of: int | None, known: dict[str, Any] | None, scored: bool
) -> "Rejected | _Opened":
    """Read and measure; with the line that is known, only read. Raises nothing over a picture."""
    if isinstance(item, Rejected):
        return item
    try:
        image, said = open_measured(item.read())
        if known is not None:
            return _Opened(item, known, None, image)
        line = {"id": of, "path": item.key, **said, **measure(image)}
        line |= measure_captions(item.captions)
        small = thumbnail(image)
        line["phash"] = f"{int(hashes(small[None], only_whole=True)[0, 0]):016x}"
        return _Opened(item, line, small.tobytes(), image if scored else None)
    except (ImageError, CheckpointError) as error:
        return Rejected(item.path, str(error))
    except OSError as error:
        return Rejected(item.path, f"unreadable file: {error.strerror or error}")


def _score(opened: _Opened, scorers: Sequence[Scorer], done: Cleaning) -> None:
    """Add the scores that a line lacks: one after the other, as functions of users may not share threads."""
    line, image = opened.line, opened.image
    missing = store.lacks(line, [(scorer.name, scorer.place) for scorer in scorers])
    line["scored"] = dict(line.get("scored", {}))
    for scorer in scorers:
        if scorer.name not in missing or image is None:
            continue
        line["scored"][scorer.name] = scorer.place
        try:
            line[scorer.name] = scorer.score(image, main_caption(opened.sample.captions))
        except ImageError as error:
            line[scorer.name] = None
            done.failures.append(Rejected(opened.sample.path, str(error)))


class _Lines:
    """What is written of each picture, in the order of the source; read once."""

    def __init__(self, measured: Measured, done: Cleaning, scorers: Sequence[Scorer]) -> None:
        import numpy as np

        self.measured, self.done, self.names = measured, done, [s.name for s in scorers]
        self.size = np.zeros((len(done.places), 4), np.int64)
        at = np.zeros(len(done.places), np.int64)
        for number, place in enumerate(done.places):
            line = measured.at(place)
            at[number] = line["at"]
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
            values = {key: line.get(key) for key in ("path", *KINDS, *self.names)}
            yield {
                **values,
                "phash": line["phash"],
                "duplicate": first is not None,
                "duplicate_of": first and first["path"],
            }
        for item in self.done.rejected:
            yield {"path": item.path, UNREADABLE: item.reason}


class _Rows:
    """Rows of a table in a file, in another order."""

    def __init__(self, table: "np.ndarray", at: "np.ndarray") -> None:
        self.table, self.at = table, at

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, which: Any) -> "np.ndarray":
        return self.table[self.at[which]]
