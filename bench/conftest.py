"""`pytest bench`: on a GPU at the real shapes, on a CPU at shapes that finish; `-m smoke` is short.

--results FILE keeps all rows, with what they were measured on, as every other command does.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import suite
from bench.measure import case, machine, results, timing

SECONDS = 1.0  # to time the variants of a case, all together
RUN: pytest.StashKey[dict[str, Any]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "keep the rows in this file, beside earlier runs'"
    parser.addoption("--results", type=Path, metavar="FILE", help=about)


@pytest.fixture(scope="session")
def context(request: pytest.FixtureRequest) -> Iterator[case.Context]:
    config = request.config
    arguments = [str(argument) for argument in config.invocation_params.args]
    with case.readied(suite.device()):
        context = case.Context(suite.device())
        context.seconds = 0 if config.getoption("benchmark_disable") else SECONDS
        run = results.started("suite", arguments, suite.device())
        context.peaks = run["peaks"] = machine.peaks(suite.device(), tiny=False)
        config.stash[RUN] = run
        yield context


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if RUN in session.config.stash:
        run = session.config.stash[RUN]
        run["complete"] = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        results.save(session.config.getoption("results"), "suite", run)


@pytest.fixture(scope="session")
def timed(request: pytest.FixtureRequest, context: case.Context) -> Callable[[Any], Any]:
    return suite.timed_once(context, request.session.items)


@pytest.fixture
def row(request: pytest.FixtureRequest, timed: Callable[[Any], Any]) -> results.Row:
    """What timing a case has found of one of its variants. (Of a wider scope, pytest would tear it
    down between the variants, for they are parametrized with it.)"""
    bench, variant = request.param
    try:
        row = timed(bench)[variant]
    except timing.DeviceLost as error:
        pytest.exit(f"the GPU's context is broken, nothing can follow: {error}", returncode=1)
    request.config.stash[RUN]["rows"].append(row)
    return row


@pytest.fixture
def report(
    benchmark: Any, record_property: Callable[[str, object], None]
) -> Callable[[results.Row], None]:
    """Make a benchmark of a row."""

    def report(row: results.Row) -> None:
        suite.report(benchmark, row)
        record_property("rate", suite.rate(row))

    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if RUN not in config.stash:
        return
    terminalreporter.section("rates")
    for name, peak in config.stash[RUN]["peaks"].items():
        unit, scale = ("GB/s", 1e9) if name == "copy" else ("TFLOP/s", 1e12)
        terminalreporter.write_line(
            f"peak of this machine, {name}: {peak['per_second'] / scale:.3g} {unit}"
        )
    for done in terminalreporter.stats.get("passed", []):
        if line := dict(done.user_properties).get("rate"):
            terminalreporter.write_line(f"{done.nodeid.split('::')[1]}: {line}")
