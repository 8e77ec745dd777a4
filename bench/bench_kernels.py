"""The operators, forward and backward, against every peer that is installed."""

from collections.abc import Callable, Sequence
from functools import partial

from bench import suite
from bench.measure.worker import Case
from bench.workloads import comparisons, sizes
from bench.workloads.operators import Workload

SIZES = sizes.OPERATOR_SIZES[suite.device().type]
Report = Callable[[suite.Row], None]


def _cases(operator: str, kinds: Sequence[str], size: str) -> list[Case]:
    return comparisons.compared([Workload(operator, size, kind) for kind in kinds], hurried=False)


@suite.at_each(SIZES, partial(_cases, "flash_attention", ("self", "compressed", "cross")))
def bench_attention(rows: dict[str, suite.Row], variant: str, report: Report) -> None:
    report(rows[variant])


@suite.at_each(SIZES, partial(_cases, "compress_kv", ("",)))
def bench_compress_kv(rows: dict[str, suite.Row], variant: str, report: Report) -> None:
    report(rows[variant])


@suite.at_each(SIZES, partial(_cases, "modulate", ("",)))
def bench_modulate(rows: dict[str, suite.Row], variant: str, report: Report) -> None:
    report(rows[variant])


@suite.at_each(SIZES, partial(_cases, "gate_add_modulate", ("gated", "plain")))
def bench_gate_add_modulate(rows: dict[str, suite.Row], variant: str, report: Report) -> None:
    report(rows[variant])
