"""From a prompt to a PNG file, stage by stage: with the embedded model, and on a GPU at the published
sizes as well; and what starting costs."""

from collections.abc import Callable

from bench import suite
from bench.measure.results import Row
from bench.workloads import pictures

Report = Callable[[Row], None]


@suite.at_each(
    "pictures", pictures.MODELS[suite.device().type], lambda model: [pictures.picture(model)]
)
def bench_picture(row: Row, report: Report) -> None:
    report(row)


@suite.at_each("start", ("once",), lambda size: [pictures.start()])
def bench_startup(row: Row, report: Report) -> None:
    report(row)
