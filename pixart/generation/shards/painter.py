"""Draws tars, one after another, with a pipeline that is opened once."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pixart.files import parse_json, read_json
from pixart.generation.console import Console
from pixart.generation.drafts import Drafts, Job, kind_of, without_own
from pixart.generation.jobs import checked_sweeps, with_inputs
from pixart.generation.opening import open_pipeline, remarks_on, resolved, warn_of_unknown_words
from pixart.generation.options import Options
from pixart.generation.prompts import naming
from pixart.generation.report import Report
from pixart.generation.shards.archive import HEAD, Mark, written_tar
from pixart.generation.shards.place import said
from pixart.generation.shards.plan import ShardTask
from pixart.generation.sources import Sources
from pixart.pipeline.decoding import NotFinitePicture
from pixart.pipeline.metadata import Metadata, opened_with
from pixart.pipeline.pictures import QUALITY, check_room, encode_picture
from pixart.pipeline.request import Drawn, passes
from pixart.sampler.loop import Progress
from pixart.storage import Storage

ENCODED = 1000  # pictures whose prompts are encoded ahead: T5-XXL's features are up to 2.4 MB each

Watch = Callable[[float, str], object]  # pictures of a tar that are done, and what is done now


@dataclass(frozen=True)
class ShardResult:
    """A tar that is there. number, name, pictures: of the task. is_new: whether it was drawn now. seconds: by
    stage."""

    number: int
    name: str
    pictures: int
    is_new: bool
    seconds: Mapping[str, float] = field(default_factory=dict)


class ShardPainter:
    """The pipeline of a process that draws tars. report: takes the seconds of opening it. Raises what
    `Pipeline.from_pretrained` raises."""

    def __init__(
        self, options: Options, console: Console | None = None, report: Report | None = None
    ) -> None:
        self._options, self._console = options, console or Console(quiet=True)
        opening = options if options.cache is not None else replace(options, cache=False)
        self.pipe = open_pipeline(opening, report or Report(), self._console)
        sweeps = checked_sweeps(options)
        self._drafts = Drafts(options, sweeps)
        self._format = options.format or "png"
        quality = None if self._format == "png" else options.quality or QUALITY
        self._asked = [
            self._drafts.settings, sweeps, options.num_images, self._format, quality, options.batch
        ]  # fmt: skip
        self._model = _digest(self._opened_from())
        self._said: set[str] = set()  # words

    def _opened_from(self) -> list[Any]:
        """What was opened, by name and by what was in its files then."""
        unset: tuple[Any, ...] = (None, False, "", [])
        asked = {k: v for k, v in self._drafts.model.items() if v not in unset and k != "device"}
        config = self._options.config and read_json(self._options.config)
        pipe = self.pipe
        return [asked, config, opened_with(pipe), pipe.weights, dict(pipe.scheduler_config)]

    def check(self, jobs: Iterable[Job]) -> None:
        """ValueError, with file and line, for the first that this model cannot draw."""
        found = (resolved(self.pipe, [job])[0] for job in jobs)
        for remark in remarks_on(self.pipe, found):
            self._console.remark(remark)

    def found(self, task: ShardTask, storage: Storage) -> ShardResult | None:
        """The tar, if it is there already. ValueError if it is another, or not whole."""
        return self._found(task, self._jobs(task), storage) if storage.exists(task.name) else None

    def draw(
        self, task: ShardTask, storage: Storage, *, wait: bool = True, watch: Watch | None = None
    ) -> ShardResult | None:
        """See to it that the tar is there: one that is, and was made of these very requests by this model, is
        kept. wait: for another process that draws it; without, None is returned.

        ValueError for a tar that is another, and for a picture that cannot be drawn, with file and line:
        there is no tar then. OSError where the disk is full. No half of a tar is left."""
        with storage.claimed(task.name, wait=wait) as is_ours:
            if not is_ours:
                return None
            jobs = self._jobs(task)
            if not self._options.overwrite and storage.exists(task.name):
                return self._found(task, jobs, storage)
            seconds: dict[str, float] = {}
            with storage.writing(task.name) as aside:
                self._write(aside, task, jobs, seconds, watch or (lambda *_: None))
            return ShardResult(task.number, task.name, task.count, is_new=True, seconds=seconds)

    def _jobs(self, task: ShardTask) -> list[Job]:
        sources = Sources()
        return [with_inputs(job, self._options, sources) for job in task.jobs(self._drafts)]

    def _mark(self, task: ShardTask, jobs: Sequence[Job]) -> Mark:
        lines = [line.values for line in task.lines]
        inputs = sorted({pair for job in jobs for pair in job.inputs.items()})
        asked = [task.first, task.count, task.skipped, lines, self._asked, inputs]
        return Mark(_digest([asked, self._taken(jobs)]), self._model, task.count)

    def _taken(self, jobs: Sequence[Job]) -> list[Any]:
        """What the model makes of each kind of request: plans, the model's own settings and preprocessors are
        known by it as they are now, whatever their names."""
        kinds, known = {kind_of(job.request): job for job in jobs}, self.pipe.weights.items()
        found = [without_own(one) for one in resolved(self.pipe, [*kinds.values()])]
        return [[one.to_dict(), dict(self.pipe.weights_of(one).items() - known)] for one in found]

    def _found(self, task: ShardTask, jobs: Sequence[Job], storage: Storage) -> ShardResult:
        wanted, found = self._mark(task, jobs), Mark.read(storage.head(task.name, HEAD))
        size = storage.size(task.name)
        if found == replace(wanted, length=size):
            return ShardResult(task.number, task.name, task.count, is_new=False)
        if found is None or found.layout != wanted.layout:
            what = "was not written by this version of pixart.generate"
        elif found.length != size:
            what = f"is not whole: it has {size:,} bytes of {found.length:,}"
        elif found.requests != wanted.requests:
            what = (
                "holds other pictures than are asked for now: the list, --shard-size, options, or what a plan or "
                "the model sets differ"
            )
        else:
            what = "was drawn by another model, or in other numbers"
        raise ValueError(
            f"{said(storage, task.name)}: {what}; name another --output, delete it, or let --overwrite draw it "
            "again"
        )

    def _write(
        self,
        path: Path,
        task: ShardTask,
        jobs: Sequence[Job],
        seconds: dict[str, float],
        watch: Watch,
    ) -> None:
        groups = self._groups(jobs)
        texts = dict.fromkeys(t for job in jobs for t in (job.request.prompt, job.request.negative))
        warn_of_unknown_words(self._options, texts, self._console, self._said)
        done = 0
        with written_tar(path, self._mark(task, jobs)) as tar:
            for job, drawn in self._drawn(groups, watch):
                started = time.perf_counter()
                for name, content in self._sample(job, drawn):
                    tar.add(name, content)
                spent = drawn.seconds | {"write": time.perf_counter() - started}
                for stage, count in spent.items():
                    seconds[stage] = seconds.get(stage, 0.0) + count
                done += 1
                watch(done, f"{done} of {task.count} pictures")

    def _groups(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Whole passes, of which the prompts are encoded together. All are checked before the first is
        drawn."""
        requests = resolved(self.pipe, jobs)
        for job, request in zip(jobs, requests, strict=True):
            said = Metadata(request, job.model, job.asked, job.asked_model, inputs=job.inputs)
            with naming(job.place):
                check_room(Path(f"picture.{self._format}"), said)
        return _blocks(jobs, [len(group) for group in passes(requests, self._options.batch)])

    def _drawn(self, groups: Iterable[list[Job]], watch: Watch) -> Iterator[tuple[Job, Drawn]]:
        before = 0
        for jobs in groups:
            watching = _Watching(watch, before)
            pictures = self.pipe.draw_many(
                [job.request for job in jobs],
                batch=self._options.batch,
                callback=watching.step,
                encoding=watching.encode,
                decoding=lambda *_: None,
            )
            for job in jobs:
                with _naming_all(job.place):
                    drawn = next(pictures)
                yield job, drawn
                watching.before += 1
            before = watching.before
            self.pipe.forget_prompts()

    def _sample(self, job: Job, drawn: Drawn) -> Iterator[tuple[str, bytes]]:
        """The members of a picture: itself, its caption, and the request that drew it."""
        key, metadata = (
            f"{job.index:09d}",
            Metadata.of(drawn, self.pipe, job.asked, job.asked_model),
        )
        named = {} if job.name is None else {"name": job.name}
        request = json.dumps({**parse_json(metadata.to_text(), key), **named})
        quality = self._options.quality
        yield f"{key}.{self._format}", encode_picture(drawn.image, metadata, self._format, quality)
        yield f"{key}.txt", job.request.prompt.encode()
        yield f"{key}.json", request.encode()


class _Watching:
    """Tells how far a block of pictures is. before: pictures of the tar that are done."""

    def __init__(self, watch: Watch, before: int) -> None:
        self._watch, self.before, self._encoded = watch, before, 0

    def encode(self, _: str) -> None:
        self._encoded += 1
        self._watch(self.before, f"{self._encoded} prompts encoded")

    def step(self, progress: Progress) -> None:
        self._watch(self.before, f"denoise {progress.step}/{progress.total}")


def _blocks(jobs: Sequence[Job], passes: Iterable[int]) -> Iterator[list[Job]]:
    """The jobs of consecutive passes, ENCODED at most unless one pass has more."""
    block: list[Job] = []
    start = 0
    for count in passes:
        if block and len(block) + count > ENCODED:
            yield block
            block = []
        block += jobs[start : start + count]
        start += count
    if block:
        yield block


@contextmanager
def _naming_all(place: str) -> Iterator[None]:
    try:
        with naming(place):
            yield
    except NotFinitePicture as error:
        raise NotFinitePicture(f"{place}: {error}" if place else str(error)) from error


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
