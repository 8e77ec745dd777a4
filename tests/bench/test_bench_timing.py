"""The loop that times variants in turn; clocks, graphs and backlogs on a GPU that is played."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from bench_context import CPU, quick

from bench.measure import timing
from bench.measure.case import Ready, Unavailable, Verdict, time_variants


def _absent() -> Ready:
    raise Unavailable("not installed: no module")


def _broken() -> Ready:
    raise KeyError("peer")


def test_variants_are_timed_in_turn_and_back() -> None:
    met: list[str] = []
    context = quick()
    context.least_rounds = 3
    builders = {name: partial(Ready, [partial(met.append, name)]) for name in "abc"}
    time_variants(context, builders)
    assert met == [*"abc", *"abc", *"cba", *"abc"]  # a first call of each, then three rounds


def test_who_is_absent_fails_or_disagrees_is_told_and_the_others_are_timed() -> None:
    called: list[str] = []

    def judge(ready: Mapping[str, Ready]) -> dict[str, Verdict]:
        assert not called, "nothing is timed before its results are compared"
        return {
            name: Verdict({"out0": one.result}, "fp64", one.result < 0.1)
            for name, one in ready.items()
        }

    def build(name: str, error: float) -> Ready:
        return Ready([partial(called.append, name)], 4, 2, error, {"peak_bytes": 7})

    builders = {
        "ours": partial(build, "ours", 0.01),
        "absent": _absent,
        "broken": _broken,
        "wrong": partial(build, "wrong", 0.5),
        "unwanted": _broken,
    }
    found = time_variants(quick("ours", "absent", "broken", "wrong"), builders, judge)
    assert {name: row["status"] for name, row in found.items()} == {
        "ours": "measured",
        "absent": "not installed: no module",
        "broken": "failed: KeyError: 'peer'",
        "wrong": "computes something else: out0 is 0.5 from that of fp64",
    }
    assert set(called) == {"ours"} and "seconds" not in found["wrong"]
    ours = found["ours"]
    assert ours["errors"] == {"out0": 0.01} and ours["errors_from"] == "fp64"
    seconds = ours["seconds"]
    assert (ours["flops"], ours["bytes"], ours["peak_bytes"], seconds["count"]) == (4, 2, 7, 5)
    assert ours["share_of_copy"] == pytest.approx(2 / seconds["median"] / 1e12)


def test_a_variant_that_ended_an_earlier_process_does_not_run_again() -> None:
    context = quick()
    crash = {"event": "crash", "part": "", "case": "", "variant": "ours", "reason": "died"}
    context.history = [crash]
    assert time_variants(context, {"ours": _broken}) == {"ours": {"status": "died"}}


def test_timing_gives_a_failing_variant_its_error_and_takes_inputs_in_turn() -> None:
    def fail() -> None:
        raise KeyError("peer")

    calls: list[int] = []
    variants = {"bad": [fail], "good": [lambda: calls.append(0), lambda: calls.append(1)]}
    results = timing.measure(variants, CPU, seconds=0, least_rounds=4)
    assert list(results) == ["bad", "good"] and isinstance(results["bad"], KeyError)
    assert isinstance(results["good"], timing.Timing) and results["good"].reps == 4
    assert calls == [0, 1, 0, 1, 0]  # one warm-up, then the sets of inputs in turn


class FakeCuda:
    """A GPU whose calls take what `spend` says, on a clock of its own; graphs replay calls.

    now: when it will be idle. host: the host's clock, which runs ahead until they synchronise.
    """

    def __init__(self) -> None:
        self.now = self.host = 0.0
        self.captured: list[float] | None = None
        self.slept: list[int] = []

    def spend(self, seconds: float, launch: float = 0.0) -> None:
        if self.captured is None:
            self.host += launch
            self.now = max(self.now, self.host) + seconds
        else:
            self.captured.append(seconds)

    def synchronize(self, *device: Any) -> None:
        self.host = max(self.host, self.now)

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.when = 0.0

            def record(self) -> None:
                self.when = max(fake.now, fake.host)

            def elapsed_time(self, other: "Event") -> float:
                return 1e3 * (other.when - self.when)

        class Graph:
            work: list[float]

            def replay(self) -> None:
                fake.now += sum(self.work)

        @contextmanager
        def capture(graph: Any, stream: Any) -> Iterator[None]:
            fake.captured = []
            try:
                yield
            finally:
                graph.work, fake.captured = fake.captured, None

        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        for name in ("Stream", "current_stream", "default_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda: "stream")
        monkeypatch.setattr(torch.cuda, "_sleep", self.slept.append, raising=False)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(timing, "cache_bytes", lambda device: 0)
        monkeypatch.setattr(timing, "_scratch", lambda device: torch.empty(1))


def test_short_calls_are_timed_in_a_graph_and_long_ones_behind_a_backlog(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda()
    fake.replace(monkeypatch)

    def refuses_capture() -> None:
        assert fake.captured is None
        fake.spend(2e-5)

    variants: dict[str, list[timing.Call]] = {
        "short": [partial(fake.spend, 2e-5), partial(fake.spend, 4e-5)],
        "long": [partial(fake.spend, 2e-3)],
        "refuses capture": [refuses_capture],
    }
    results = timing.measure(variants, torch.device("cuda"), seconds=0, least_rounds=3)
    assert all(isinstance(result, timing.Timing) for result in results.values())
    found = {name: (round(r.median, 9), r.method) for name, r in results.items()}  # type: ignore[union-attr]
    assert found == {
        "short": (3e-5, "graph"),
        "long": (2e-3, "events"),
        "refuses capture": (2e-5, "events"),
    }
    assert fake.slept
    fake.slept.clear()
    results = timing.measure(
        variants, torch.device("cuda"), seconds=0, least_rounds=3, with_host=True
    )
    assert {r.method for r in results.values()} == {"events with host"}  # type: ignore[union-attr]
    assert not fake.slept


def test_with_the_host_a_call_takes_the_same_after_a_long_neighbour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda()
    fake.replace(monkeypatch)
    variants = {
        "bound by the GPU": [partial(fake.spend, 5e-3, launch=1e-4)],
        "bound by launches": [partial(fake.spend, 1e-4, launch=1e-3)],
    }
    results = timing.measure(
        variants, torch.device("cuda"), seconds=0, least_rounds=4, with_host=True
    )
    for name, expected in (("bound by the GPU", 5.1e-3), ("bound by launches", 1.1e-3)):
        result = results[name]
        assert isinstance(result, timing.Timing)
        assert result.samples == pytest.approx([expected] * 4)


def test_a_broken_context_ends_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*device: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(timing.DeviceLost, match="first"):
        timing.survive(KeyError("first"), torch.device("cuda"))
