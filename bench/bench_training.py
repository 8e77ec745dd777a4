"""Images per second and peak memory of training, keeping all activations and checkpointed."""

from collections.abc import Callable

from bench import suite
from bench.workloads import models, sizes


@suite.at_each(sizes.MODEL_SIZES[suite.device().type], lambda size: [models.train_both_ways(size)])
def bench_training(
    rows: dict[str, suite.Row], variant: str, report: Callable[[suite.Row], None]
) -> None:
    report(rows[variant])
