"""Single operators: whether they are right, and how fast beside their peers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bench.measure import table, timing
from bench.measure.case import MEASURED, Case, Context, Ready, Verdict, time_variants
from bench.measure.results import Row
from bench.workloads import accuracy, sizes
from bench.workloads.operators import OPERATORS, Workload
from bench.workloads.operators.workload import (
    Inputs,
    Variant,
    compiles,
    differentiable,
    output_gradients,
    outputs_of,
)

DIRECTIONS = {False: "forward", True: "backward"}


def correctness(at: Sequence[str] = sizes.GPU_SIZES, *, few: bool = False) -> list[Case]:
    """Every operator, forward and backward, against fp64 at the real shapes; the first at each size
    come first. few: in bf16 only, and no further calls."""
    small = "1k" if "1k" in at else at[0]
    works = _checked((1,), at, torch.bfloat16)
    if not few:
        for operator in OPERATORS.values():
            works += [work._replace(size=small) for work in operator.checked(operator)]
        for dtype in (torch.float16, torch.float32):
            works += _checked((2,), (small,), dtype)
    works += _checked((2, 4), at, torch.bfloat16)
    return [Case(work.name, partial(_check, work)) for work in works]


def _checked(batches: Sequence[int], at: Sequence[str], dtype: torch.dtype) -> list[Workload]:
    return [
        Workload(operator, size, kind, batch, dtype)
        for batch in batches
        for size in at
        for operator in OPERATORS.values()
        if operator.has_backward
        for kind in (*operator.kinds, *(operator.batched if batch > 1 else ()))
    ]


def _check(work: Workload, context: Context) -> None:
    inputs = work.inputs(context.device)
    truth = accuracy.oracle(work, inputs, backward=True)
    eager = accuracy.errors(accuracy.results(work.operator.reference, inputs, True), truth)
    row = describe(work) | {"errors_eager": eager}
    if reason := context.crashed("ours"):
        context.row("ours", reason, **row)
        return
    context.announce("ours")
    table.forget_launches()
    made = accuracy.results(work.operator.ours, inputs, True)
    errors = accuracy.errors(made, truth)
    again = accuracy.results(work.operator.ours, inputs, True)
    context.row(
        "ours",
        **row,
        errors=errors,
        errors_from="fp64",
        passed=accuracy.within(errors, eager, work.dtype),
        repeatable=accuracy.same(made, again),
        config=table.launched(),
    )


def operators(at: Iterable[str]) -> list[Case]:
    """Every operator in turn with its peers, forward and backward."""
    works = [
        Workload(operator, size, kind)
        for size in at
        for operator in OPERATORS.values()
        for kind in operator.kinds
    ]
    return compared(works)


def further() -> list[Case]:
    """The calls of operators that are compared at few sizes."""
    return compared([work for operator in OPERATORS.values() for work in operator.more(operator)])


def compared(works: Iterable[Workload]) -> list[Case]:
    return [
        Case(
            f"{work.name}/{DIRECTIONS[backward]}",
            partial(_compare, work, backward),
            tuple(work.variants()),
        )
        for work in works
        for backward in DIRECTIONS
        if work.operator.has_backward or not backward
    ]


def _compare(work: Workload, backward: bool, context: Context) -> None:
    copies = timing.copies_to_pass_cache(work.bytes(backward), context.device)
    sets = [work.inputs(context.device, seed) for seed in range(copies)]
    truth = accuracy.oracle(work, sets[0], backward)

    def build(variant: Variant) -> Ready:
        table.forget_launches()
        errors = _first_errors(variant, sets[0], truth, backward)
        calls = [call_of(variant, inputs, backward) for inputs in sets]
        facts = {"copies": copies, "config": table.launched() or None}
        return Ready(calls, work.flops(backward), work.bytes(backward), errors, facts)

    builders = {
        name: partial(build, variant) for name, variant in work.variants(context.hurried).items()
    }
    judge = partial(_judge, work.dtype)
    slow = [name for name in builders if compiles(name)]
    found = time_variants(context, builders, judge, dtype=work.dtype, compiling=slow)
    for name, row in found.items():
        context.row(name, **describe(work, backward), **row)


def _judge(dtype: torch.dtype, ready: Mapping[str, Ready]) -> dict[str, Verdict]:
    return {
        name: Verdict(
            one.result,
            "fp64",
            accuracy.plausible(one.result, dtype, is_ours=name == "ours"),
        )
        for name, one in ready.items()
    }


def _first_errors(
    variant: Variant, inputs: Inputs, truth: accuracy.Oracle, backward: bool
) -> dict[str, float]:
    """Of the first call, which compiles and tunes."""
    with torch.set_grad_enabled(backward):
        call = variant(inputs)
        made = accuracy.results(lambda **_: call(), inputs, backward)
    return accuracy.errors(made, truth)


def call_of(variant: Variant, inputs: Inputs, backward: bool) -> Callable[[], Any]:
    if not backward:
        with torch.no_grad():
            call = variant(inputs)
        return torch.no_grad()(call)
    outputs = outputs_of(variant(inputs)())
    wanted, gradients = list(differentiable(inputs).values()), output_gradients(outputs)
    return partial(torch.autograd.grad, outputs, wanted, gradients, retain_graph=True)


def describe(work: Workload, backward: bool | None = None) -> Row:
    way = "" if backward is None else DIRECTIONS[backward]
    what = " ".join(word for word in (work.operator.name, work.kind, way) if word)
    return {"what": what, "shape": work.shape, "dtype": work.dtype_name}


def backends(at: str = "1k") -> list[Case]:
    """Which GPU kernels a call really launched, by the backend that was asked for. After all that is
    timed: a profiler may leave something behind."""
    work = Workload(OPERATORS["flash_attention"], at, "self")
    return [Case(work.name, partial(_profile, work))]


def _profile(work: Workload, context: Context) -> None:
    inputs = work.inputs(context.device)
    for name, variant in context.choose(work.variants()).items():
        if context.crashed(name):
            continue
        for backward in DIRECTIONS:
            context.announce(name)
            try:
                kernels = _launched(call_of(variant, inputs, backward), context.device)
            except Exception as error:  # told by the comparison
                timing.survive(error, context.device)
                continue
            what = describe(work, backward)
            context.row(f"{name} {DIRECTIONS[backward]}", MEASURED, **what, kernels=kernels)


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
