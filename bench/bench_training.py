"""Images per second and peak memory of training, keeping all activations and checkpointed."""

from collections.abc import Callable

from bench import shapes, steps, suite


@suite.at_each(shapes.MODEL_SIZES[suite.device().type], lambda size: [steps.train_both_ways(size)])
def bench_training(
    rows: dict[str, suite.Row], variant: str, report: Callable[[suite.Row], None]
) -> None:
    report(rows[variant])
