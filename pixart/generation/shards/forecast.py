"""`--dry-run` where tars are written: how many there are, and how long those take that are not there."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from pixart.generation.drafts import Job, kind_of, without_own
from pixart.generation.dry_run import Forecast, Planned, Tally, Tars, forecast, process_count
from pixart.generation.opening import resolved
from pixart.generation.options import Options
from pixart.generation.shards.painter import ENCODED, ShardPainter
from pixart.generation.shards.part import Part
from pixart.generation.shards.plan import ShardPlan
from pixart.generation.team import Team
from pixart.pipeline.request import Request
from pixart.storage import Storage


def forecast_shards(
    options: Options,
    plan: ShardPlan,
    painter: ShardPainter,
    storage: Storage,
    team: Team,
    load: float,
) -> Forecast:
    """Of the part that --shard names, or of all. Every line is read, and none is held. load: seconds that opening
    took. Under torchrun, all processes must call it."""
    from pixart.pipeline.parallel import Layout

    counted, tally = _Counted(options, plan, painter, storage), Tally()
    part, count = _whole_part(options, team), process_count(options, team)
    shares = [
        tally.share(counted.passes(part.shared(rank, count).numbers(len(plan))))
        for rank in range(count)
    ]
    tars = Tars(counted.tars_there, counted.left, plan.size)
    # Each process has a T5 for the prompts of its own tars.
    texts = max(len(share.texts) for share in shares)
    blocks = max(len(share.blocks) for share in shares)
    pipe, there = painter.pipe, counted.pictures_there
    return forecast(pipe, there, shares, tally, Layout(), team, load, texts, tars, blocks)


def _whole_part(options: Options, team: Team) -> Part:
    """What torchrun's processes share."""
    own = Part.here(options.shard)
    of = own.of // team.count
    return Part(own.number % of, of)


class _Counted:
    """Goes over the tars of one process after the other. left: how many each of them has to draw. A request
    is resolved once for all that differ in prompts and seed."""

    def __init__(
        self, options: Options, plan: ShardPlan, painter: ShardPainter, storage: Storage
    ) -> None:
        self._options, self._plan = options, plan
        self._painter, self._storage = painter, storage
        self.tars_there = self.pictures_there = 0
        self.left: list[int] = []
        self._blocks = 0  # in which prompts are encoded, of all tars before
        self._resolved: dict[tuple[Any, ...], Request] = {}

    def passes(self, numbers: range) -> Iterator[Planned]:
        """The passes of those of these tars that are not there."""
        self.left.append(0)
        for task in self._plan.tasks(numbers):
            if not self._options.overwrite and self._painter.found(task, self._storage):
                self.tars_there += 1
                self.pictures_there += task.count
                continue
            self.left[-1] += 1
            yield from self._of_tar(task.jobs(self._plan.drafts))

    def _of_tar(self, jobs: list[Job]) -> Iterator[Planned]:
        batch, done = self._options.batch, 0
        for key, run in groupby(jobs, lambda job: kind_of(job.request)):
            alike = list(run)
            if key not in self._resolved:
                [request] = resolved(self._painter.pipe, alike[:1])
                self._resolved[key] = without_own(request)
            for start in range(0, len(alike), batch):
                group = [job.request for job in alike[start : start + batch]]
                texts = [text for one in group for text in (one.prompt, one.negative)]
                block = self._blocks + done // ENCODED
                yield Planned(self._resolved[key], len(group), texts, block)
                done += len(group)
        self._blocks += -(-done // ENCODED)
