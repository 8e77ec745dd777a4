"""Kernels that an operator takes only when told to: each with every candidate that it may be launched with.

What they launch is found as for the operators themselves, by launching on tensors without data. A kernel
is added to KERNELS; `bench.resources` then compiles it beside what its operator takes by itself.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from bench.compiled import ahead_of_time
from bench.compiled.ahead_of_time import Launch
from bench.workloads.operators import Workload
from pixart_kernels.attention import bound, hopper, hopper_gradients

Candidate = Mapping[str, Any]


class Kernel(NamedTuple):
    """operator: whose calls it computes. architectures: that it can be compiled for. candidates: the
    constants that may be chosen, the first the best known. launch: compute a call with one of them; it
    does nothing for a call that the kernel does not serve."""

    operator: str
    architectures: Sequence[str]
    candidates: Sequence[Candidate]
    launch: Callable[[Workload, Candidate], None]


def compile_all(work: Workload, architecture: str, defaults_only: bool = False) -> Iterator[Launch]:
    """Every kernel that is launched with any candidate, or with the first, queries scaled and not; none is
    an operator's own default."""
    for kernel in KERNELS:
        if kernel.operator != work.operator.name or architecture not in kernel.architectures:
            continue
        for candidate in kernel.candidates[: 2 if defaults_only else None]:
            with ahead_of_time.recording(architecture) as launches:
                kernel.launch(work, candidate)
            for launch in launches:
                name = name_of(launch)
                if candidate.get("PASSES") == 1 and name.endswith(("_q", "_kv")):
                    continue  # for few keys the launcher takes two passes instead
                yield launch._replace(kernel=name, config=label(candidate, name), is_default=False)


def name_of(launch: Launch) -> str:
    """The kernel's, and which it is of two that are one source: that of dQ or that of dK and dV."""
    keys = constants(launch.compiled).get("KEYS") if launch.compiled else None
    return launch.kernel + ("" if keys is None else "_kv" if keys else "_q")


def constants(compiled: Any) -> dict[str, Any]:
    """What is compiled into a CompiledKernel, by name."""
    names = compiled.src.fn.arg_names
    return {names[path[0]]: value for path, value in compiled.src.constants.items()}


def label(candidate: Candidate, name: str) -> str:
    """ "BLOCK_K64-CONSUMERS3-TURNS": a flag by its name, and only where it is set; of a candidate of
    two kernels what is for the one of that name."""
    own = candidate
    for kernel, prefix in (("_q", "Q_"), ("_kv", "KV_")):
        if name.endswith(kernel):
            own = {key.removeprefix(prefix): n for key, n in own.items() if key.startswith(prefix)}
            own |= {"SCALED": candidate["SCALED"]}
    parts = (key if n is True else f"{key}{n}" for key, n in own.items() if n is not False)
    return "-".join(parts)


def _forward(work: Workload, candidate: Candidate) -> None:
    inputs = work.inputs(torch.device("meta"))
    q, k, v = (inputs[name].detach() for name in "qkv")
    if hopper.serves("sm_90", q, k, v) is not None:
        return
    batch, queries, heads, head_dim = q.shape
    chosen = dict(candidate)
    scaled = chosen.pop("SCALED")
    limit = bound.limit(q.dtype, queries, k.shape[1])
    prepared = hopper.prepare_forward(
        q, k, v, math.log2(math.e) / math.sqrt(head_dim), chosen, limit=limit, scaled=scaled
    )
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    longest = [lse, lse] if limit else [None, None]
    tensors = [q, k, v, torch.empty_like(q), lse, *longest, inputs.get("kv_lengths")]
    prepared.kernel[prepared.grid](
        *tensors,
        *prepared.boxes(tensors),
        *prepared.numbers,
        **prepared.constants,
        **prepared.options,
    )


def _backward(work: Workload, candidate: Candidate) -> None:
    inputs = work.inputs(torch.device("meta"))
    q, k, v = (inputs[name].detach() for name in "qkv")
    if hopper_gradients.serves_backward("sm_90", q, k, v) is not None:
        return
    batch, queries, heads, head_dim = q.shape
    chosen = dict(candidate)
    scaled, lengths = chosen.pop("SCALED"), inputs.get("kv_lengths")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    scale = 1 / math.sqrt(head_dim)
    compute = hopper_gradients.prepare_backward(
        out, q, k, v, lengths, scale, scaled=scaled, candidate=chosen
    )
    compute(out, q, k, v, out, lse, lengths)


def _scaled_or_not(candidates: Sequence[Candidate]) -> list[Candidate]:
    """SCALED: q is multiplied by the scale where it is projected."""
    return [{**one, "SCALED": scaled} for one in candidates for scaled in (False, True)]


def _of_passes(count: int) -> list[Candidate]:
    return [one for one in hopper_gradients.BACKWARD_CANDIDATES if one["PASSES"] == count]


_HOPPER = "flash_attention", ("sm_90",)
KERNELS: list[Kernel] = [
    Kernel(*_HOPPER, _scaled_or_not(hopper.FORWARD_CANDIDATES), _forward),
    Kernel(*_HOPPER, _scaled_or_not(_of_passes(2)), _backward),
    Kernel(*_HOPPER, _scaled_or_not(_of_passes(1)), _backward),
]
