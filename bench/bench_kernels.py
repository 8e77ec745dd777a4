"""The operators, forward and backward, against every peer that is installed."""

from collections.abc import Callable

from bench import suite
from bench.measure.results import Row
from bench.workloads import comparisons, sizes

SIZES = sizes.OPERATOR_SIZES[suite.device().type]


@suite.at_each("operators", SIZES, lambda size: comparisons.operators([size]))
def bench_operators(row: Row, report: Callable[[Row], None]) -> None:
    report(row)
