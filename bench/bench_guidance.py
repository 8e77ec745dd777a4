"""What each way to guide costs in a denoising step of the embedded model, as ratios to classifier-free
guidance alone."""

from collections.abc import Callable

from bench import suite
from bench.measure.results import Row
from bench.workloads import guidance


@suite.at_each("guidance", ("128", "512"), lambda size: [guidance.case(size)])
def bench_guidance(row: Row, report: Callable[[Row], None]) -> None:
    report(row)
