"""What `--engine ray` does: the tars of a run, each drawn whole by one worker of a Ray cluster."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from pixart import process
from pixart.cluster import Cluster, run_on_ray
from pixart.generation.console import Console
from pixart.generation.drafts import Job
from pixart.generation.options import Options
from pixart.generation.report import Report
from pixart.generation.shards.painter import ShardPainter, ShardResult
from pixart.generation.shards.part import Part
from pixart.generation.shards.place import said, writes_shards
from pixart.generation.shards.plan import ShardTask, plan_shards
from pixart.generation.shards.running import check_others
from pixart.storage import ABANDONED, Folder, Storage, open_storage

_SEEN = ".seen-"
_EXAMPLES = (
    1000  # jobs that a worker checks as it opens; each tar is checked again before it is drawn
)


def check_engine(options: Options) -> None:
    """ValueError for options that do nothing with --engine, or that it cannot do."""
    if options.engine != "ray":
        for name in ("address", "workers"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"--{name} must be given with --engine ray, got {value}")
        return
    if not writes_shards(options):
        raise ValueError(
            "--engine ray must be given with tars, --output tars/{shard:05d}.tar: a worker draws a tar whole, and "
            "loses nothing else when it is lost"
        )
    if process.is_one_of_many():
        raise ValueError(
            "--engine ray must be left out under torchrun: Ray starts the workers itself"
        )
    if options.processes is not None:
        raise ValueError(
            f"--processes must be left out with --engine ray, got {options.processes}; give --workers"
        )
    if options.device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--device must be cpu or cuda with --engine ray, got {options.device}: Ray gives each worker its GPU"
        )
    _cluster(options)


def without_cluster(options: Options) -> Options:
    """For --dry-run, which asks nothing of a cluster: workers are counted as processes that are not here."""
    return replace(options, engine="here", address=None, workers=None, processes=options.workers)


def generate_on_ray(options: Options, report: Report) -> None:
    """See to it that the tars are there, and keep the report of them."""
    console = Console(options.quiet)
    with console.with_libraries():
        report.shards = {}
        plan = plan_shards(options)
        storage = open_storage(plan.names.place)
        check_others(plan, storage)
        numbers = Part.here(options.shard).numbers(len(plan))
        examples = tuple(islice(plan.examples(), _EXAMPLES))
        process.at_work()
        with _seen(storage) as (shared, token):
            opener = _Opener(replace(options, quiet=True, json=False), shared, token, examples)
            tasks, there = plan.tasks(numbers), 0
            cluster = _as_many_as(_cluster(options), len(numbers))
            results = run_on_ray(tasks, opener, cluster, named=_name)
            with console.bar("tars", len(numbers)) as bar, closing(results):  # type: ignore[type-var]
                for result in results:
                    there += not result.is_new
                    _note(result, storage, report)
                    bar.advance(1, result.name)
                    if result.is_new:
                        console.remark(said(storage, result.name))
        if there:
            console.remark(
                f"{there} of {len(numbers)} tars were there already; --overwrite draws them again"
            )


def _cluster(options: Options) -> Cluster:
    gpus = {None: None, "cpu": 0.0, "cuda": 1.0}[options.device]
    return Cluster(options.address, options.workers, gpus)


def _as_many_as(cluster: Cluster, tars: int) -> Cluster:
    """With no worker more than there are tars: it would open the model for nothing."""
    if cluster.workers is None:
        return cluster
    return replace(cluster, workers=max(1, min(cluster.workers, tars)))


def _name(task: ShardTask) -> str:
    return task.name


def _note(result: ShardResult, storage: Storage, report: Report) -> None:
    note, seconds = ("drawn", result.seconds) if result.is_new else ("there already", None)
    report.add_shard(result.number, said(storage, result.name), result.pictures, note, seconds)


@contextmanager
def _seen(storage: Storage) -> Iterator[tuple[Storage, str]]:
    """The place as all machines name it, and the name of a file that is there for the time of the run: a
    machine that does not see it has a folder of its own there. "" in a store, which is the same to all."""
    if not isinstance(storage, Folder):
        yield storage, ""
        return
    shared, token = Folder(os.path.abspath(storage.place)), f"{_SEEN}{secrets.token_hex(8)}"
    is_new = not Path(shared.place).exists()
    for old in Path(shared.place).glob(f"{_SEEN}*"):  # of a run that was killed
        if time.time() - old.stat().st_mtime > ABANDONED:
            old.unlink(missing_ok=True)
    shared.write(token, b"")
    try:
        yield shared, token
    finally:
        (Path(shared.place) / token).unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):  # something was drawn
                Path(shared.place).rmdir()


class _Heard(Console):
    """Remarks go to the log, which a worker hands on."""

    def remark(self, text: str) -> None:
        logging.getLogger("pixart").info(text)


@dataclass(frozen=True)
class _Opener:
    """What a worker is opened with. token: of `_seen`. folder: in which relative paths lie."""

    options: Options
    storage: Storage
    token: str
    examples: tuple[Job, ...]
    folder: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.folder or os.getcwd())

    def __call__(self) -> Callable[[ShardTask], ShardResult]:
        """Raises what ShardPainter raises, and ValueError for a machine that does not see the folder."""
        with suppress(OSError):  # a machine without it has no relative path either
            os.chdir(self.folder)
        if self.token and not self.storage.exists(self.token):
            raise ValueError(
                f"--output must be a folder that all machines see, or s3://..., got {self.storage.place}, which "
                "is another here"
            )
        painter = ShardPainter(self.options, _Heard(quiet=True))
        painter.check(self.examples)
        return _Draw(painter, self.storage)


@dataclass(frozen=True)
class _Draw:
    painter: ShardPainter
    storage: Storage

    def __call__(self, task: ShardTask) -> ShardResult:
        result = self.painter.draw(task, self.storage)
        assert result is not None  # it waits for another process that draws this tar
        return result
