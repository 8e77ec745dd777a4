"""One denoising step and one training step of the transformer, dense and compressed, against the
model of diffusers with the same weights, eager and compiled; and what compression saves of a step."""

from collections.abc import Callable

from bench import saving, suite
from bench.measure.case import Case
from bench.measure.results import Row
from bench.workloads import models, sizes
from bench.workloads.models import OURS, THEIRS

SIZES = sizes.MODEL_SIZES[suite.device().type]
MERGED = sizes.Compression().variant
Report = Callable[[Row], None]


def _denoise(size: str) -> list[Case]:
    # At 4K the launches that a graph spares are nothing.
    return [models.denoise(size, graphs=suite.device().type == "cuda" and size != "4k")]


@suite.at_each("steps", SIZES, _denoise, smoke=(OURS, MERGED, THEIRS))
def bench_denoising(row: Row, report: Report) -> None:
    report(row)


@suite.at_each("steps", SIZES, lambda size: [models.train(size)], smoke=(OURS, THEIRS))
def bench_training_step(row: Row, report: Report) -> None:
    report(row)


@suite.at_each("saving", SIZES, lambda size: [saving.case(size)], smoke=(MERGED,))
def bench_kv_compression_saving(row: Row, report: Report) -> None:
    report(row)
