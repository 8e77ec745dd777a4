"""How long a call keeps the host busy: operators and a model under a stub of the CUDA driver.

On a GPU's machine too: the process that measures it sees no GPU.
"""

from collections.abc import Callable

from bench import host, suite
from bench.measure.results import Row

Report = Callable[[Row], None]


@suite.at_each(host.PART, ("operators", "model"), host.cases, smoke=(host.OURS, "torch"))
def bench_host(row: Row, report: Report) -> None:
    report(row)
