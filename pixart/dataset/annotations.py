"""What was found out about the pictures of a source, beside it: captions and scores, a line each.

    {"path": KEY, "captions": {"long": "A small cactus ..."}}
    {"path": KEY, "score": 6.1}

KEY is the sample's, so that one file serves folders, indices and shards. Lines are appended as they
come; a run that was stopped goes on behind the last whole line.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pixart.addresses import without_secrets
from pixart.dataset.images import ImageError, decode
from pixart.dataset.samples import (
    PROMPT,
    CaptionError,
    Item,
    Rejected,
    Sample,
    captions_of,
    checked,
    writable,
)
from pixart.files import (
    MAX_INDEX,
    CheckpointError,
    check_text,
    parse_json,
    read_bounded,
    write_json,
)
from pixart.locks import claimed
from pixart.progress import counted

if TYPE_CHECKING:
    from PIL.Image import Image

Line = dict[str, Any]
# Raises ImageError for a picture that it cannot take.
Annotate = Callable[["Image"], Line]
Work = Callable[[Iterable[Item]], Iterator[Line | Rejected]]


@dataclass
class Tally:
    """new: lines written now; known: found from an earlier run."""

    new: int = 0
    known: int = 0
    rejected: list[Rejected] = field(default_factory=list)

    def summary(self, done: str, output: Path) -> str:
        """A sentence on pictures that are `done`, such as "scored"."""
        earlier = f", {self.known} before" if self.known else ""
        where = f": see {writable(str(_report(output)))}" if self.rejected else ""
        return f"{self.new} pictures {done}{earlier}, {len(self.rejected)} rejected{where}"


def annotate(
    items: Iterable[Item],
    output: Path,
    annotate_one: Annotate,
    is_known: Callable[[Mapping[str, Any]], bool],
    workers: int = 1,
) -> Tally:
    """`write_lines` with what annotates pictures in this process; workers: at a time."""
    return write_lines(items, output, annotating(annotate_one, workers), is_known)


def annotating(annotate_one: Annotate, workers: int = 1) -> Work:
    """From items to lines, in their order; what cannot be used is Rejected. workers: pictures at a time."""

    def run(item: Item) -> Line | Rejected:
        if isinstance(item, Rejected):
            return item
        try:
            return {"path": item.key, **annotate_one(decode(item.read()))}
        except (ImageError, CheckpointError, OSError) as error:
            return Rejected(item.path, str(error))

    return lambda items: in_order(run, items, workers)


def write_lines(
    items: Iterable[Item],
    output: Path,
    work: Work,
    is_known: Callable[[Mapping[str, Any]], bool],
) -> Tally:
    """Append a line to `output` for every sample that has none for which is_known holds.

    work: as `annotating` makes it, here or elsewhere. Pictures that cannot be used are listed in
    `output` with the suffix .report.json, and the others go on.
    """
    tally = Tally()
    with _appending(output) as (lines, append):
        known = {line["path"] for line in lines if is_known(line)}

        def todo() -> Iterator[Item]:
            for item in items:
                if isinstance(item, Sample) and item.key in known:
                    tally.known += 1
                else:
                    yield item

        for result in counted(work(todo()), output.name):
            if isinstance(result, Rejected):
                tally.rejected.append(result)
            else:
                append(result)
                tally.new += 1
    rejected = [{"path": r.path, "reason": r.reason} for r in tally.rejected]
    write_json(_report(output), {"rejected": rejected}, indent=1)
    return tally


def _report(output: Path) -> Path:
    return output.with_suffix(".report.json")


def in_order(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """work(item) of every item, in order, with at most 2·workers of them taken in advance."""
    waiting: list[Any] = []
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            # Not pool.map, which takes all items at once: the whole source would wait in memory.
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 2 * workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        # Who stops early, by Ctrl-C too, waits for nothing that is at work: a server may take minutes.
        pool.shutdown(wait=False, cancel_futures=True)


def annotated(
    items: Iterable[Item],
    *,
    prompt: str | None = None,
    captions: Sequence[Path] = (),
    scores: Path | None = None,
    min_score: float | None = None,
) -> Iterable[Item]:
    """The items with one prompt for all, the captions of files, and only those that score enough.
    ValueError for scores without a minimum, or the other way round."""
    if (scores is None) != (min_score is None):
        raise ValueError("--scores and --min-score must be given together, got one of them")
    if prompt is not None:
        items = with_prompt(items, prompt)
    if captions:
        items = with_captions(items, captions)
    if scores is not None and min_score is not None:
        items = with_scores(items, scores, min_score)
    return items


def with_captions(items: Iterable[Item], files: Sequence[Path]) -> Iterator[Item]:
    """The items with the captions of annotation files beside their own; same names are replaced."""
    captions: dict[str, dict[str, str]] = {}
    faults: dict[str, str] = {}
    for file in files:
        for line in read_lines(file):
            try:
                captions.setdefault(line["path"], {}).update(captions_of(line))
            except CaptionError as error:
                faults[line["path"]] = f"{file.name}: {error}"
    unused = set(captions)
    for item in items:
        if isinstance(item, Sample) and item.key in captions:
            unused.discard(item.key)
            if fault := faults.get(item.key):
                yield Rejected(item.path, fault)
                continue
            together = {**item.captions, **captions[item.key]}
            item = checked(item.path, replace(item, captions=together))
        yield item
    if unused:
        first = without_secrets(sorted(unused)[0])
        yield Rejected(first, f"{len(unused)} annotated paths are not in the source")


def with_prompt(items: Iterable[Item], text: str) -> Iterable[Item]:
    """The items with one caption "prompt" for all, as for pictures of one subject."""
    if not text.strip():
        raise ValueError(f"prompt must not be empty, got {text!r}")
    check_text("prompt", text)
    return (
        replace(item, captions={**item.captions, PROMPT: text})
        if isinstance(item, Sample)
        else item
        for item in items
    )


def with_scores(items: Iterable[Item], file: Path, minimum: float) -> Iterator[Item]:
    """The items whose score is at least `minimum`; the others are rejected."""
    scores = {line["path"]: line.get("score") for line in read_lines(file)}
    for item in items:
        if isinstance(item, Sample):
            score = scores.get(item.key)
            if not isinstance(score, int | float) or not math.isfinite(score):
                item = Rejected(item.path, f"no score in {file.name}")
            elif score < minimum:
                item = Rejected(item.path, f"score {score:.4g} is below {minimum:g}")
        yield item


def check_output(output: Path, source: str) -> None:
    """Refuse a file that would be taken for the source's index."""
    if output.suffix != ".jsonl":
        raise ValueError(f"output must be a .jsonl file, got {output}")
    if "://" not in source and Path(source).resolve() in output.resolve().parents:
        raise ValueError(f"output must not be inside the source, got {output}")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of an annotation file, but for a last one that broke off. Raises ValueError for a
    file that is none."""
    try:
        # Not splitlines, which also cuts at U+2028 and its like within a caption.
        lines = read_bounded(file, MAX_INDEX).decode("utf-8", "surrogateescape").split("\n")
    except FileNotFoundError:
        raise ValueError(f"{file} must be an annotation file, there is none") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    parsed = [_parsed(line) for line in lines]
    if parsed[-1] is None:
        del parsed[-1]
    for number, values in enumerate(parsed, 1):
        if values is None:
            line = lines[number - 1][:80]
            raise ValueError(f"{file}:{number} must be an object with a path, got {line!r}")
    return [values for values in parsed if values is not None]


def finite(value: float, what: str) -> float:
    """Raises ImageError for what no line can hold."""
    if not math.isfinite(value):
        raise ImageError(f"{what} must be finite, got {value}")
    return value


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        values = parse_json(line, "line")
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("path"), str) else None


@contextmanager
def _appending(
    output: Path,
) -> Iterator[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """The lines that a file holds and a function that adds one. No other process may do so.

    The lock stays beside the file: whoever removes one takes it from under those who wait for it.
    """
    with claimed(output.with_name(f".{output.name}.lock"), wait=False) as mine:
        if not mine:
            raise ValueError(f"output must be free, another process writes {output}")
        is_new = not output.exists()
        with output.open("a+b") as file, _without_rest(output if is_new else None):
            lines = read_lines(output)
            _end_last_line(file)

            def append(values: dict[str, Any]) -> None:
                # In ASCII, with escapes: a path that is no UTF-8 holds lone surrogates, which have
                # no encoding.
                file.write(json.dumps(values).encode() + b"\n")
                # A process that dies loses no line; what a machine may lose is cheap to make again.
                file.flush()

            yield lines, append
            os.fsync(file.fileno())


@contextmanager
def _without_rest(new: Path | None) -> Iterator[None]:
    """A file that is new and still empty when an error ends the block goes with it."""
    try:
        yield
    except BaseException:
        if new is not None and not new.stat().st_size:
            new.unlink()
        raise


def _end_last_line(file: IO[bytes]) -> None:
    """Cut off a line that broke off, end one that only lacks its newline."""
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    if _parsed(content[start:].decode(errors="replace")) is None:
        file.truncate(start)
    elif start < len(content):
        file.write(b"\n")
