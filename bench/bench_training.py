"""Images per second and peak memory of training, keeping all activations and checkpointed."""

from collections.abc import Callable

from bench import suite
from bench.measure.results import Row
from bench.workloads import models, sizes

SIZES = sizes.MODEL_SIZES[suite.device().type]


@suite.at_each("steps", SIZES, lambda size: [models.train_both_ways(size)])
def bench_training(row: Row, report: Callable[[Row], None]) -> None:
    report(row)
