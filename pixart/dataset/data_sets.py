"""Data sets as `statistics` takes them: a source, or what `prepare` filled, with files of captions and scores."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixart.addresses import without_secrets
from pixart.dataset.annotations import read_lines, with_captions
from pixart.dataset.features import indices_of
from pixart.dataset.options import Prepare
from pixart.dataset.samples import Item, Rejected, Sample
from pixart.dataset.sources import open_source
from pixart.dataset.verify import settings_of

SCORES = ("aesthetic", "score")  # by which a score is known, the first that is there


@dataclass(frozen=True)
class DataSet:
    """items: once, from the start. scores: by a sample's key."""

    items: Iterable[Item]
    scores: Mapping[str, float]


def open_data_set(
    place: str, score: str | None, items_of: Callable[[Prepare], Iterable[Item]]
) -> DataSet:
    """A data set by its place, SOURCE or SOURCE+FILE+FILE ... score: what of the files is its score, None
    for the first of SCORES. items_of: the items that a prepare read. Raises ValueError for what is none."""
    source, files = _split(place)
    lines = {file: read_lines(file) for file in files}
    folder = Path(source).expanduser()
    if "://" not in source and any(folder.glob("index-*.json")):
        items: Iterable[Item] = _prepared(folder, items_of)
        lines |= _prepared_scores(folder)
    else:
        items = open_source(source)
    # Of `clean` they are a number.
    has_captions = [
        file
        for file in files
        if any("captions" in line and not isinstance(line["captions"], int) for line in lines[file])
    ]
    if has_captions:
        items = with_captions(items, has_captions)
    return DataSet(items, _scores(lines, score))


def names_of(places: Sequence[str]) -> list[str]:
    """What data sets are called in a table: the last part of each one's source, or all of its place where
    two share that."""
    sources = [without_secrets(_split(place)[0]).rstrip("/") for place in places]
    short = [source.rpartition("/")[2] or source for source in sources]
    return [
        name if short.count(name) == 1 else without_secrets(place)
        for name, place in zip(short, places, strict=True)
    ]


def _split(place: str) -> tuple[str, list[Path]]:
    """A source and the files behind its pluses; a place with a plus in its own name is taken whole."""
    if "://" not in place and Path(place).expanduser().exists():
        return place, []
    source, *files = place.split("+")
    for file in files:
        if not file.endswith(".jsonl"):
            raise ValueError(
                f"data must have .jsonl files behind a +, as caption, filter and clean write, got {file!r}"
            )
    return source, [Path(file).expanduser() for file in files]


def _scores(lines: Mapping[Path, list[dict[str, Any]]], score: str | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in (score,) if score else SCORES:
        for file, of in lines.items():
            found |= {
                line["path"]: _score(line[name], name, file)
                for line in of
                if line.get(name) is not None  # `clean` writes None where its scorer failed
            }
        if found:
            return found
    if score:
        where = (
            f"of {', '.join(map(str, lines))}" if lines else "of a file behind a +, there is none"
        )
        raise ValueError(f"score must be a number {where}, got {score!r}")
    return found


def _score(value: Any, name: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{file}: {name} must be a finite number, got {value!r}")
    return float(value)


def _prepared(directory: Path, items_of: Callable[[Prepare], Iterable[Item]]) -> Iterator[Item]:
    """The samples that a folder has features of, at any resolution, each once, with those of its captions
    that are features there: their text is read from the source again."""
    seen: set[str] = set()
    for resolution, index in indices_of(directory).items():
        names = {one["path"]: set(one["captions"]) for one in index["samples"]}
        with _settings(directory, resolution) as made_by:
            for item in items_of(made_by):
                if isinstance(item, Sample) and item.path in names and item.path not in seen:
                    seen.add(item.path)
                    texts = {k: text for k, text in item.captions.items() if k in names[item.path]}
                    yield replace(item, captions=texts)
        for path in sorted(names.keys() - seen):
            seen.add(path)
            yield Rejected(path, "prepared, but no longer in its source")


def _prepared_scores(directory: Path) -> dict[Path, list[dict[str, Any]]]:
    """The lines of the files of scores that a folder was prepared with."""
    lines: dict[Path, list[dict[str, Any]]] = {}
    for resolution in indices_of(directory):
        with _settings(directory, resolution) as made_by:
            if made_by.scores:
                lines[made_by.scores] = read_lines(made_by.scores)
    return lines


@contextmanager
def _settings(directory: Path, resolution: int) -> Iterator[Prepare]:
    """What prepared a resolution, in its working directory. ValueError where that is not known."""
    with ExitStack() as stack:
        try:
            made_by = stack.enter_context(settings_of(directory, resolution, None))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{directory} holds features, not captions, and its source is not known; give the source"
            ) from error
        yield made_by
