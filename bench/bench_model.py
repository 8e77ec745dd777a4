"""One denoising step and one training step of the transformer, dense and compressed, against the
model of diffusers with the same weights, eager and compiled; and what compression saves of a step."""

from collections.abc import Callable

from bench import saving, shapes, steps, suite
from bench.worker import Case

SIZES = shapes.MODEL_SIZES[suite.device().type]
Report = Callable[[suite.Row], None]


def _denoise(size: str) -> list[Case]:
    # At 4K the launches that a graph spares are nothing.
    return [steps.denoise(size, graphs=suite.device().type == "cuda" and size != "4k")]


@suite.at_each(SIZES, _denoise)
def bench_denoising(rows: dict[str, suite.Row], variant: str, report: Report) -> None:
    report(rows[variant])


@suite.at_each(SIZES, lambda size: [steps.train(size)])
def bench_training_step(rows: dict[str, suite.Row], variant: str, report: Report) -> None:
    report(rows[variant])


@suite.at_each(SIZES, lambda size: [saving.case(size)])
def bench_kv_compression_saving(rows: dict[str, suite.Row], variant: str, report: Report) -> None:
    report(rows[variant])
