"""How long calls take: in turn with each other, with a cold cache, as medians with their spread.

On a GPU, events time a call behind a backlog of work, so that the host's own time stays out of it; a
call under 100 µs runs many times in one CUDA graph. Either way consecutive calls take different
inputs or find the L2 cache full of something else. On a CPU the wall clock times every call; what a
launch takes of the host is CPU time of its thread.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import cycle
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]
SHORT = 100e-6  # seconds, below which events would time the launch
SAMPLE = 1e-3  # seconds, of what is over too soon to be timed by itself
MOST_ROUNDS = 300


class Timing(NamedTuple):
    """Seconds of one call. method: "graph", "events", "events with host", "wall" or "thread"."""

    median: float
    p20: float
    p80: float
    reps: int
    method: str
    samples: tuple[float, ...]  # in the order in which they were taken

    def summary(self) -> dict[str, Any]:
        """For a row of results, which keeps no samples."""
        quantiles = {"median": self.median, "p20": self.p20, "p80": self.p80}
        return quantiles | {"count": self.reps, "method": self.method}


class DeviceLost(RuntimeError):
    """An earlier call broke the GPU's context: nothing more can run in this process."""


def measure(
    variants: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    seconds: float = 1.0,
    least_rounds: int = 5,
    with_host: bool = False,
    announce: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing | Exception]:
    """Time variants in turn for about `seconds`, at least `least_rounds` times each.

    variants: for each name, one call or the same call on several inputs. A variant that fails gets
    its exception and leaves the others alone. with_host counts the host's launch time as well, as
    whoever runs a whole model without a graph meets it. announce(name) comes before a first call.
    """
    results: dict[str, Timing | Exception] = {}
    samplers: dict[str, _Sampler] = {}
    for name, calls in variants.items():
        announce(name)
        try:
            samplers[name] = _sampler(calls, device, with_host)
        except Exception as error:  # a peer may fail in any way
            results[name] = survive(error, device)
    announce("")
    samples = _sample_in_turn(samplers, device, seconds, least_rounds)
    for name, sampler in samplers.items():
        results[name] = summarize(samples[name], sampler.method)
    return {name: results[name] for name in variants}


def survive(error: Exception, device: torch.device) -> Exception:
    """Return the error if the device still works after it; raise DeviceLost if not."""
    if isinstance(error, DeviceLost):
        raise error
    if device.type == "cuda":
        error.__traceback__ = None  # it would keep the tensors of a failed call alive
        gc.collect()
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            raise DeviceLost(str(error)) from error
    return error


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache; 0 on a CPU, where nothing here tries to empty it."""
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20


def copies_to_pass_cache(moved: int, device: torch.device) -> int:
    """How many sets of inputs and outputs, of `moved` bytes each, no cache can hold."""
    return min(64, math.ceil(4 * cache_bytes(device) / max(moved, 1))) or 1


def measure_host(
    variants: Mapping[str, Call], *, seconds: float = 1.0, least_rounds: int = 5
) -> dict[str, Timing]:
    """CPU seconds of this thread that calls take of the host, of variants in turn.

    For calls of microseconds: a sample is the mean of as many as take SAMPLE, and no garbage is
    collected meanwhile.
    """
    samplers: dict[str, _Sampler] = {
        name: _ThreadSampler([call]) for name, call in variants.items()
    }
    collects = gc.isenabled()
    gc.disable()
    try:
        samples = _sample_in_turn(samplers, torch.device("cpu"), seconds, least_rounds)
    finally:
        if collects:
            gc.enable()
    return {name: summarize(samples[name], sampler.method) for name, sampler in samplers.items()}


class _Sampler:
    """One variant. start() runs it, read() says how long that took once the device is idle."""

    method = "wall"

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = cycle(calls)
        next(self.calls)()
        self.elapsed = 0.0

    def start(self) -> None:
        call = next(self.calls)
        begin = time.perf_counter()
        call()
        self.elapsed = time.perf_counter() - begin

    def read(self) -> float:
        return self.elapsed


class _ThreadSampler(_Sampler):
    """Leaves out what other threads and processes do, but for the caches that they empty."""

    method = "thread"

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__(calls)
        self.count = 1
        self.start()
        self.count = max(1, round(SAMPLE / max(self.elapsed, 1e-7)))

    def start(self) -> None:
        call = next(self.calls)
        begin = time.thread_time()
        for _ in range(self.count):
            call()
        self.elapsed = (time.thread_time() - begin) / self.count


class _EventSampler(_Sampler):
    def __init__(self, calls: Sequence[Call], device: torch.device, with_host: bool) -> None:
        super().__init__(calls)
        self.with_host = with_host
        self.method = "events with host" if with_host else "events"
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch = _scratch(device)
        self.backlog = 0
        if not with_host:
            self.host_seconds, self.device_seconds = self._estimate(device)
            # The GPU waits for twice as long as the host needs; 2 cycles per ns is its fastest clock.
            self.backlog = int(min(2 * self.host_seconds, 0.02) * 2e9)

    def _estimate(self, device: torch.device) -> tuple[float, float]:
        trials = []
        for _ in range(2):
            torch.cuda.synchronize(device)
            begin = time.perf_counter()
            self.start()
            host_seconds = time.perf_counter() - begin
            torch.cuda.synchronize(device)
            trials.append((host_seconds, self.read()))
        return min(trials)

    def start(self) -> None:
        if self.backlog:
            torch.cuda._sleep(self.backlog)
        self.scratch.amax()  # reading leaves nothing in the cache that has yet to be written back
        if self.with_host:  # launches behind a neighbour's backlog would cost nothing
            torch.cuda.synchronize()
        self.begin.record()
        next(self.calls)()
        self.end.record()

    def read(self) -> float:
        return self.begin.elapsed_time(self.end) / 1e3


@cache
def _scratch(device: torch.device) -> torch.Tensor:
    return torch.zeros(max(64 << 20, cache_bytes(device)), device=device)  # 4 bytes each


class _GraphSampler(_Sampler):
    """All calls in one graph, in turn, as often as makes half a millisecond."""

    method = "graph"

    def __init__(self, calls: Sequence[Call], expected_seconds: float) -> None:
        # A backward pass runs on the stream of its forward pass: whoever times one has left the default
        # stream, which cannot be captured, before.
        stream = torch.cuda.current_stream()
        stream = torch.cuda.Stream() if stream == torch.cuda.default_stream() else stream
        self.repeats = math.ceil(5e-4 / (len(calls) * max(expected_seconds, 1e-6)))
        self.count = self.repeats * len(calls)
        for call in calls:  # compiling and lazy handles must not meet the capture
            call()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            # Kept until the end of the capture, or every call would write to the same cached memory.
            kept: list[Any] = [call() for _ in range(self.repeats) for call in calls]
        del kept
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self.begin.record()
        self.graph.replay()
        self.end.record()

    def read(self) -> float:
        return self.begin.elapsed_time(self.end) / 1e3 / self.count


def _sampler(calls: Sequence[Call], device: torch.device, with_host: bool) -> _Sampler:
    if device.type != "cuda":
        return _Sampler(calls)
    sampler = _EventSampler(calls, device, with_host)
    if with_host:
        return sampler
    is_short = sampler.device_seconds < SHORT
    waits_for_host = sampler.host_seconds > 0.8 * sampler.device_seconds
    if not (is_short or (waits_for_host and sampler.device_seconds < 10 * SHORT)):
        return sampler
    try:
        return _GraphSampler(calls, sampler.device_seconds)
    except Exception as error:  # what a peer does may not be allowed in a capture
        survive(error, device)
        return sampler


def _sample_in_turn(
    samplers: Mapping[str, _Sampler], device: torch.device, seconds: float, least_rounds: int
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    begin = time.perf_counter()
    for turn in range(MOST_ROUNDS if order else 0):
        if turn >= least_rounds and time.perf_counter() - begin > seconds:
            break
        for name in order:
            samplers[name].start()
        synchronize(device)
        for name in order:
            samples[name].append(samplers[name].read())
        order.reverse()  # nobody always comes after the same neighbour
    return samples


def summarize(samples: Sequence[float], method: str) -> Timing:
    """Of at least one sample."""
    ordered = sorted(samples)
    p20, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return Timing(statistics.median(ordered), p20, p80, len(ordered), method, tuple(samples))
