"""The parts of bench.gpu that are about single operators."""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bench.measure import machine, timing, tuning
from bench.measure.worker import Case, Context
from bench.workloads import accuracy, peers
from bench.workloads import sizes as shapes
from bench.workloads.operators import Inputs, Workload, differentiable, output_gradients, outputs_of

ELEMENTWISE = (
    ("gate_add_modulate", "gated"),
    ("gate_add_modulate", "plain"),
    ("modulate", ""),
    ("gate_add", ""),
)
SIZES = ("4k", "2k", "1k", "512")  # the numbers that matter most come first


def correctness(tiny: bool) -> list[Case]:
    """Every operator, forward and backward, against fp64 at the real shapes."""
    sizes = (shapes.TINY,) if tiny else SIZES
    small = shapes.TINY if tiny else "1k"
    works = _checked((1,), sizes, torch.bfloat16)
    works += [Workload("compress_kv", small, batch=2, ratio=ratio) for ratio in (3, 4)]
    works += [
        work for dtype in (torch.float16, torch.float32) for work in _checked((2,), (small,), dtype)
    ]
    works += _checked((2, 4), sizes, torch.bfloat16)
    return [Case(work.name, partial(_check, work)) for work in works]


def _checked(batches: Sequence[int], sizes: Sequence[str], dtype: torch.dtype) -> list[Workload]:
    return [
        Workload(operator, size, kind, batch, dtype)
        for batch in batches
        for size in sizes
        for operator, kind in _operators("self", "compressed", "cross", "masked")
        if batch > 1 or kind != "masked"
    ]


def _operators(*attentions: str) -> list[tuple[str, str]]:
    kinds = [("flash_attention", kind) for kind in attentions]
    return [*kinds, ("compress_kv", ""), *ELEMENTWISE]


def _check(work: Workload, context: Context) -> None:
    inputs = work.inputs(context.device)
    truth = accuracy.oracle(work, inputs, backward=True)
    eager = accuracy.errors(accuracy.results(work.reference, inputs, True), truth)
    row = _describe(work) | {"variant": "ours", "errors_eager": eager}
    if reason := context.crashed("ours"):
        context.row(**row, status=reason)
        return
    context.announce("ours")
    tuning.forget()
    made = accuracy.results(work.ours, inputs, True)
    errors = accuracy.errors(made, truth)
    context.row(
        **row,
        status="measured",
        errors=errors,
        passed=accuracy.within(errors, eager, work.dtype),
        repeatable=accuracy.same(made, accuracy.results(work.ours, inputs, True)),
        config=tuning.chosen(),
    )


def operators(tiny: bool) -> list[Case]:
    """Every operator in turn with its peers, forward and backward."""
    if tiny:
        works = [Workload(op, shapes.TINY, kind) for op, kind in _operators("self", "masked")]
        return compared([*works, Workload("project_kv", shapes.TINY)], hurried=True)
    large, small = SIZES[:2], SIZES[2:]
    rest = [("compress_kv", ""), *ELEMENTWISE]
    works = [Workload("flash_attention", "4k", "self")]
    works += [Workload(operator, size, kind) for size in large for operator, kind in rest]
    works += [Workload("flash_attention", "4k", kind) for kind in ("compressed", "cross")]
    works += [
        Workload("flash_attention", size, kind)
        for size in SIZES[1:]
        for kind in ("self", "compressed", "cross")
    ]
    works += [Workload("project_kv", size) for size in ("4k", "1k")]
    works += [Workload(operator, size, kind) for size in small for operator, kind in rest]
    works += [Workload("flash_attention", size, "masked", 2) for size in ("1k", "4k")]
    works += [Workload("compress_kv", "2k", ratio=ratio) for ratio in (3, 4)]
    return compared(works, hurried=True)


def compared(works: Sequence[Workload], *, hurried: bool) -> list[Case]:
    """Each in turn with its peers, forward and backward. hurried: what compiles for seconds at every
    shape does so at few."""
    return [
        Case(
            f"{work.name}/{'backward' if backward else 'forward'}",
            partial(_compare, work, backward, hurried),
            tuple(peers.variants(work)),
        )
        for work in works
        for backward in (False, True)
        if not (backward and work.operator == "project_kv")  # folded for inference only
    ]


def _compare(work: Workload, backward: bool, hurried: bool, context: Context) -> None:
    begin = time.time()
    copies = timing.copies_to_pass_cache(work.bytes(backward), context.device)
    sets = [work.inputs(context.device, seed) for seed in range(copies)]
    truth = accuracy.oracle(work, sets[0], backward)
    calls: dict[str, list[timing.Call]] = {}
    errors: dict[str, dict[str, float]] = {}
    statuses: dict[str, str | None] = {}
    tuning.forget()
    for name, variant in context.choose(peers.variants(work)).items():
        statuses[name] = context.crashed(name) or (_too_slow(name, work) if hurried else None)
        if statuses[name]:
            continue
        context.announce(name)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                errors[name] = _first_errors(variant, sets[0], truth, backward)
            calls[name] = [_call(variant, inputs, backward) for inputs in sets]
        except peers.Unavailable as reason:
            statuses[name] = str(reason)
        except Exception as error:  # a peer may fail in any way
            statuses[name] = failed(error, said)
            timing.survive(error, context.device)
    configs = {"ours": tuning.chosen()}
    times = timing.measure(
        calls, context.device, seconds=context.seconds, announce=context.announce
    )
    clocks = context.clocks.since(begin)
    for name, status in statuses.items():
        row = _describe(work) | {"direction": "backward" if backward else "forward"}
        row |= {"variant": name, "errors": errors.get(name), "config": configs.get(name) or None}
        is_ours = name == "ours"
        row |= {"agrees": accuracy.plausible(errors.get(name, {}), work.dtype, is_ours=is_ours)}
        rates = work.flops(backward), work.bytes(backward)
        row |= measured(
            status or times[name], context, *rates, work.dtype, copies=copies, clocks=clocks
        )
        context.row(**row)


def _too_slow(name: str, work: Workload) -> str | None:
    if name == "flex" and (work.kind != "self" or work.resolution in ("2k", "512")):
        return "not measured: compiles for seconds at every shape"
    return None


def failed(error: Exception, said: Sequence[warnings.WarningMessage] = ()) -> str:
    # PyTorch says in warnings why a backend is not viable.
    reasons = [str(warning.message).split(" (Triggered internally")[0] for warning in said]
    return "failed: " + "; ".join([f"{type(error).__name__}: {error}", *reasons])[:1000]


def _first_errors(
    variant: peers.Variant, inputs: Inputs, truth: accuracy.Oracle, backward: bool
) -> dict[str, float]:
    """Of the first call, which compiles and tunes."""
    with torch.set_grad_enabled(backward):
        call = variant(inputs)
        made = accuracy.results(lambda **_: call(), inputs, backward)
    return accuracy.errors(made, truth)


def _call(variant: peers.Variant, inputs: Inputs, backward: bool) -> Callable[[], Any]:
    if not backward:
        with torch.no_grad():
            call = variant(inputs)
        return torch.no_grad()(call)
    outputs = outputs_of(variant(inputs)())
    wanted, gradients = list(differentiable(inputs).values()), output_gradients(outputs)
    return partial(torch.autograd.grad, outputs, wanted, gradients, retain_graph=True)


def measured(
    result: timing.Timing | Exception | str,
    context: Context,
    flops: int,
    moved: int,
    dtype: torch.dtype = torch.bfloat16,
    **rest: Any,
) -> dict[str, Any]:
    """The part of a row that says how fast, and how near to what this machine can do at most. dtype:
    of the products that `flops` counts."""
    if isinstance(result, str):
        return {"status": result}
    if isinstance(result, Exception):
        return {"status": failed(result)}
    rates: dict[str, float] = {}
    if flops:
        peak = machine.product_rate(context.peaks, dtype)
        rates |= {"flops": flops, "flops_per_second": flops / result.median}
        rates["share_of_matmul"] = flops / result.median / peak
    if moved:
        rates |= {"bytes": moved, "bytes_per_second": moved / result.median}
        rates["share_of_copy"] = moved / result.median / context.peaks["copy"]["per_second"]
    return {"status": "measured", **result._asdict(), **rates, **rest}


def _describe(work: Workload) -> dict[str, Any]:
    names = {"operator": work.operator, "kind": work.kind, "resolution": work.resolution}
    return names | {"shape": work.shape, "dtype": str(work.dtype).removeprefix("torch.")}


def backends(tiny: bool) -> list[Case]:
    """Which GPU kernels a call really launched, by the backend that was asked for.

    A part of its own, after those that time: a profiler may leave something behind.
    """
    work = Workload("flash_attention", shapes.TINY if tiny else "1k", "self")
    return [Case(work.name, partial(_profile, work))]


def _profile(work: Workload, context: Context) -> None:
    inputs = work.inputs(context.device)
    for name, variant in peers.variants(work).items():
        if context.crashed(name):
            continue
        for backward in (False, True):
            context.announce(name)
            try:
                call = _call(variant, inputs, backward)
                kernels = _launched(call, context.device)
            except Exception as error:  # told by the comparison
                timing.survive(error, context.device)
                continue
            direction = "backward" if backward else "forward"
            row = _describe(work) | {"variant": name, "direction": direction}
            context.row(**row, status="measured", kernels=kernels)


def _launched(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Names and microseconds of the longest kernels, or operations on a CPU, of one call."""
    activity = torch.profiler.ProfilerActivity
    call()
    timing.synchronize(device)
    wanted = activity.CUDA if device.type == "cuda" else activity.CPU
    with torch.profiler.profile(activities=[wanted]) as profile:
        call()
        timing.synchronize(device)
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, own))
    return {event.key[:160]: getattr(event, own) for event in events[:4] if getattr(event, own)}


def tuned(tiny: bool) -> list[Case]:
    """Each configuration of the autotune lists by itself, over sizes; then what tuning had chosen."""
    sizes = (shapes.TINY,) if tiny else ("4k", "1k", "2k")
    works = [
        Workload(operator, size, kind)
        for size in sizes
        for operator, kind in _operators("self", "compressed")
    ]
    sweeps = [
        Case(
            f"{work.name}/{'backward' if backward else 'forward'}", partial(_sweep, work, backward)
        )
        for work in works
        for backward in (False, True)
    ]
    return [*sweeps, Case("winners", _tell_winners)]


def _sweep(work: Workload, backward: bool, context: Context) -> None:
    inputs = work.inputs(context.device)
    variant = peers.variants(work)["ours"]
    call = _call(variant, inputs, backward)
    tuning.forget()
    call()
    launched = [tuner for tuner in tuning.used() if len(tuner.configs) > 1]
    chosen = tuning.chosen()
    if not launched:
        context.row(**_describe(work), status="not measured: nothing here is tuned")
    for tuner in launched:
        kernel = tuning.kernel_name(tuner)
        configs = {tuning.describe(config): config for config in tuner.configs}
        calls = {
            name: [_pinned(call, tuner, config)]
            for name, config in configs.items()
            if not context.crashed(name)
        }
        times = timing.measure(
            calls, context.device, seconds=context.seconds / 3, announce=context.announce
        )
        for name in configs:
            row = _describe(work) | {"direction": "backward" if backward else "forward"}
            row |= {"kernel": kernel, "config": name, "chosen": name == chosen[kernel]}
            result = context.crashed(name) or times[name]
            context.row(**row, **measured(result, context, 0, 0))


def _pinned(call: Callable[[], Any], tuner: Any, config: Any) -> Callable[[], Any]:
    def pinned_call() -> Any:
        with tuning.pinned({tuner: config}):
            return call()

    return pinned_call


def _tell_winners(context: Context) -> None:
    for winner in tuning.winners():
        context.row(**winner, status="measured")
