"""From pictures to features and scores, a batch at a time; pictures are read in threads, one batch ahead."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pixart.evaluation.metric import Extractor, PictureMetric
from pixart.evaluation.prompt_sets.files import check_size
from pixart.evaluation.store.entries import Entry
from pixart.files import CheckpointError
from pixart.pictures import PictureError, open_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.evaluation.store.parts import Row

IMAGES, FEATURES = 8, 32  # entries of a batch: of whole pictures, and of what a network takes
THREADS = 8


class WrongSize(ValueError):
    """A picture of another size than its prompt asks for."""


def open_entry(entry: Entry) -> "Image":
    """The picture of an entry, RGB. PictureError if it cannot be read, WrongSize if it has another
    size than its prompt asks for."""
    image = open_rgb(entry.path, str(entry.path))
    if entry.prompt.size is not None:
        size = check_size(entry.key, entry.prompt.size)
        if image.size != size:
            got = "x".join(map(str, image.size))
            raise WrongSize(f"{entry.path}: must be {entry.prompt.size} pixels, got {got}")
    return image


def extracting(extractor: Extractor) -> "Callable[[Iterator[list[Entry]]], Iterator[list[Any]]]":
    """Computes features: (width,) or (rows, width) of each entry."""

    def load(entry: Entry) -> Any:
        return extractor.prepare(open_entry(entry), entry)

    def compute(batches: Iterator[list[Entry]]) -> Iterator[list[Any]]:
        for _, loaded in _loading(batches, load):
            good = [one for one in loaded if not isinstance(one, Exception)]
            values = iter(_checked(extractor, extractor(good), len(good)) if good else ())
            yield [one if isinstance(one, Exception) else next(values) for one in loaded]

    return compute


def _checked(extractor: Extractor, values: Any, count: int) -> Any:
    import numpy as np

    size = (
        (count, extractor.width)
        if extractor.rows == 1
        else (count, extractor.rows, extractor.width)
    )
    if values.shape != size:
        raise RuntimeError(f"{extractor.name}: features must be {size}, got {values.shape}")
    if not np.isfinite(values).all():
        raise RuntimeError(f"{extractor.name}: features must be finite, got NaN or infinity")
    return np.ascontiguousarray(values, np.float32)


def scoring(
    metric: PictureMetric, features: "Mapping[str, Row] | None"
) -> "Callable[[Iterator[list[Entry]]], Iterator[list[Any]]]":
    """Computes scores. features: of the metric's extractor by key, None where it looks at pictures."""

    def load(entry: Entry) -> Any:
        if features is None:
            return open_entry(entry)
        row = features[entry.key]
        return ValueError(row.error) if row.error else row.value

    def compute(batches: Iterator[list[Entry]]) -> Iterator[list[Any]]:
        for batch, loaded in _loading(batches, load):
            good = [
                (entry, one)
                for entry, one in zip(batch, loaded, strict=True)
                if not isinstance(one, Exception)
            ]
            scores = iter(_scores(metric, good))
            yield [one if isinstance(one, Exception) else next(scores) for one in loaded]

    return compute


def _scores(metric: PictureMetric, good: Sequence[tuple[Entry, Any]]) -> list[Any]:
    """A Score or a ValueError of each. Where a batch cannot be scored, each by itself: one picture must not
    take others with it."""
    import numpy as np

    if not good:
        return []
    entries, loaded = [entry for entry, _ in good], [one for _, one in good]
    try:
        if metric.extractor is None:
            scores = metric.score(entries, loaded, None)
        else:
            scores = metric.score(entries, None, np.stack(loaded))
    except ValueError as error:
        # Of the whole, not of a picture: weights that are missing or damaged.
        if hasattr(error, "exit_code") or isinstance(error, CheckpointError):
            raise
        return (
            [error] if len(good) == 1 else [one for each in good for one in _scores(metric, [each])]
        )
    if len(scores) != len(good):
        raise RuntimeError(f"{metric.name}: must give {len(good)} scores, got {len(scores)}")
    return list(scores)


def _loading(
    batches: Iterator[list[Entry]], load: Callable[[Entry], Any]
) -> Iterator[tuple[list[Entry], list[Any]]]:
    """Each batch with what is loaded of it, or why that is not to be had."""

    def attempt(entry: Entry) -> Any:
        try:
            return load(entry)
        except (PictureError, WrongSize) as error:
            return error

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        ahead: list[tuple[list[Entry], list[Future[Any]]]] = []
        try:
            for batch in batches:
                ahead.append((batch, [threads.submit(attempt, entry) for entry in batch]))
                if len(ahead) > 1:
                    before, futures = ahead.pop(0)
                    yield before, [future.result() for future in futures]
            for before, futures in ahead:
                yield before, [future.result() for future in futures]
        finally:
            threads.shutdown(cancel_futures=True)
