"""`pytest bench`: on a GPU at the real shapes, on a CPU at shapes that finish; `-m smoke` is short."""

import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench import suite
from bench.measure import machine, timing, worker
from bench.workloads import comparisons

SECONDS = 1.0  # to time the variants of a case, all together
CONTEXT: pytest.StashKey[worker.Context] = pytest.StashKey()
UNMEASURED: pytest.StashKey[list[suite.Row]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[UNMEASURED] = []


@pytest.fixture(scope="session")
def context(request: pytest.FixtureRequest) -> Iterator[worker.Context]:
    with worker.readied(suite.device()):
        context = worker.Context(suite.device())
        is_timed = not request.config.getoption("benchmark_disable")
        context.seconds = SECONDS if is_timed else 0
        context.peaks = machine.peaks(suite.device(), tiny=False)
        request.config.stash[CONTEXT] = context
        yield context


@pytest.fixture(scope="session")
def timed(request: pytest.FixtureRequest, context: worker.Context) -> Callable[[Any], Any]:
    return suite.timed_once(context, request.session.items)


@pytest.fixture
def rows(request: pytest.FixtureRequest, timed: Callable[[Any], Any]) -> dict[str, suite.Row]:
    """By variant, what timing one case has found. (Of a wider scope, pytest would tear it down
    between the variants, for they are parametrized with it.)"""
    try:
        return timed(request.param)
    except timing.DeviceLost as error:
        pytest.exit(f"the GPU's context is broken, nothing can follow: {error}", returncode=1)
    except Exception as error:
        row = {
            "variant": request.node.callspec.params["variant"],
            "status": comparisons.failed(error),
        }
        request.config.stash[UNMEASURED].append(suite.outcome(request.node, row))
        raise


@pytest.fixture
def report(
    request: pytest.FixtureRequest,
    benchmark: Any,
    record_property: Callable[[str, object], None],
) -> Callable[[suite.Row], None]:
    """Make a benchmark of a row."""

    def report(row: suite.Row) -> None:
        if row["status"] != "measured" or row["agrees"] is False:
            request.config.stash[UNMEASURED].append(suite.outcome(request.node, row))
        suite.report(benchmark, row)
        record_property("rate", suite.rate(row))

    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if CONTEXT not in config.stash:
        return
    terminalreporter.section("rates")
    for name, peak in config.stash[CONTEXT].peaks.items():
        unit, scale = ("GB/s", 1e9) if name == "copy" else ("TFLOP/s", 1e12)
        terminalreporter.write_line(
            f"peak of this machine, {name}: {peak['per_second'] / scale:.3g} {unit}"
        )
    for done in terminalreporter.stats.get("passed", []):
        if line := dict(done.user_properties).get("rate"):
            terminalreporter.write_line(f"{done.nodeid.split('::')[1]}: {line}")


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info |= suite.machine_info()
    machine_info.pop("node", None)  # whose machine it is concerns nobody


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info |= suite.commit_info()


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    """The command, what has no time, and what was measured about the machine meanwhile."""
    output_json["command"] = shlex.join(["pytest", *config.invocation_params.args])
    output_json["unmeasured"] = config.stash[UNMEASURED]
    if CONTEXT in config.stash:
        context = config.stash[CONTEXT]
        output_json |= {"peaks": context.peaks, "clocks": context.clocks.since(0)}
