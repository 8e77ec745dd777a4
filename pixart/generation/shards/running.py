"""What `python -m pixart.generate --output tars/{shard:05d}.tar` does: the tars that fall to this process."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pixart import process
from pixart.generation.console import Console
from pixart.generation.dry_run import check_options as check_dry_run
from pixart.generation.dry_run import tell
from pixart.generation.options import Options
from pixart.generation.report import Report
from pixart.generation.shards.forecast import forecast_shards
from pixart.generation.shards.painter import ShardPainter, ShardResult
from pixart.generation.shards.part import Part
from pixart.generation.shards.place import said
from pixart.generation.shards.plan import ShardPlan, ShardTask, plan_shards
from pixart.generation.team import Team
from pixart.progress import Bar
from pixart.storage import Storage, open_storage


def generate_shards(options: Options, report: Report) -> None:
    """See to it that the tars of this process's part are there, and keep the report of them.

    Processes of torchrun meet, so that what is wrong is said once and one of them reports for all; with a RANK
    and a WORLD_SIZE alone, from whatever else starts processes, each is on its own."""
    team = Team.of(options) if process.is_one_of_many() else Team()
    options = team.options(options)
    console = Console(options.quiet)
    with console.with_libraries():  # before anything slow is imported: libraries log as they are
        from pixart.device import peak_memory

        report.peak_memory, report.shards = peak_memory, {}
        peak_memory()  # what it imports is imported now
        check_dry_run(options, team.count)
        if options.dry_run:
            options = replace(options, cache=False)  # which would be written
        team.meet(options)
        run = team.agreed(lambda: _opened(options, report, console))
        if options.dry_run:
            load = report.seconds["load"]
            found = forecast_shards(options, run.plan, run.painter, run.storage, team, load)
            tell(found, options, team, report)
            return
        for result in run.there:
            _note(result, run, report)
        if run.there:
            console.remark(
                f"{len(run.there)} of {len(run.own)} tars are there already; --overwrite draws them again"
            )
        process.at_work()
        with console.bar("tars", len(run.own), len(run.there)) as bar:
            for result in _draw(run, bar):
                _note(result, run, report)
                console.remark(said(run.storage, result.name))
        team.collect_shards(report)


@dataclass(frozen=True)
class _Run:
    """own: numbers of this process's tars. there: those that are there already."""

    plan: ShardPlan
    own: range
    painter: ShardPainter
    storage: Storage
    there: list[ShardResult]


def _opened(options: Options, report: Report, console: Console) -> _Run:
    """All that can be wrong is found here, before the first picture is drawn."""
    part = Part.here(options.shard)
    plan = plan_shards(options)
    storage = open_storage(plan.names.place, writing=not options.dry_run)
    check_others(plan, storage)
    painter = ShardPainter(options, console, report)
    painter.check(plan.examples())
    own = part.numbers(len(plan))
    tasks = () if options.overwrite else plan.tasks(own)
    there = [one for task in tasks if (one := painter.found(task, storage)) is not None]
    return _Run(plan, own, painter, storage, there)


def check_others(plan: ShardPlan, storage: Storage) -> None:
    """ValueError for a tar with a number behind the last of the plan, which readers would take for one of
    these."""
    for name in storage.names():
        number = plan.names.number(name)
        if number is not None and number >= len(plan):
            raise ValueError(
                f"{said(storage, name)}: is none of the {len(plan):,} tars that are asked for now; name another "
                "--output, or delete it"
            )


def _draw(run: _Run, bar: Bar) -> Iterator[ShardResult]:
    """The tars that are not there, as they are finished. Those that another process is at come last, when it
    is done with them or dead."""
    done, there = len(run.there), {result.number for result in run.there}
    left = [number for number in run.own if number not in there]
    for wait in (False, True):
        others = []
        for task in run.plan.tasks(left):
            watch = _Watch(bar, done, task)
            result = run.painter.draw(task, run.storage, wait=wait, watch=watch.look)
            if result is None:
                others.append(task.number)
                continue
            done += 1
            bar.reach(done, task.name)
            yield result
        left = others


@dataclass(frozen=True)
class _Watch:
    """How far the bar is within a tar."""

    bar: Bar
    before: int
    task: ShardTask

    def look(self, pictures: float, note: str) -> None:
        self.bar.reach(self.before + pictures / self.task.count, f"{self.task.name}: {note}")


def _note(result: ShardResult, run: _Run, report: Report) -> None:
    note = "drawn" if result.is_new else "there already"
    seconds = result.seconds if result.is_new else None
    report.add_shard(result.number, said(run.storage, result.name), result.pictures, note, seconds)
