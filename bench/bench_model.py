"""One denoising step and one training step of the transformer, dense and compressed, against the
model of diffusers with the same weights, eager and compiled; and what compression saves of a step."""

from collections.abc import Callable

from bench import saving, suite
from bench.measure.worker import Case
from bench.workloads import models, sizes

SIZES = sizes.MODEL_SIZES[suite.device().type]
Report = Callable[[suite.Row], None]


def _denoise(size: str) -> list[Case]:
    # At 4K the launches that a graph spares are nothing.
    return [models.denoise(size, graphs=suite.device().type == "cuda" and size != "4k")]


@suite.at_each(SIZES, _denoise)
def bench_denoising(rows: dict[str, suite.Row], variant: str, report: Report) -> None:
    report(rows[variant])


@suite.at_each(SIZES, lambda size: [models.train(size)])
def bench_training_step(rows: dict[str, suite.Row], variant: str, report: Report) -> None:
    report(rows[variant])


@suite.at_each(SIZES, lambda size: [saving.case(size)])
def bench_kv_compression_saving(rows: dict[str, suite.Row], variant: str, report: Report) -> None:
    report(rows[variant])
