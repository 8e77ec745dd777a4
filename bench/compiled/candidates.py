"""Kernels that an operator takes only when told to: each with every candidate that it may be launched with.

What they launch is found as for the operators themselves, by launching on tensors without data. A kernel
is added to KERNELS; `bench.resources` then compiles it beside what its operator takes by itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bench.compiled import ahead_of_time
from bench.compiled.ahead_of_time import Launch
from bench.workloads.operators import Workload

Candidate = Mapping[str, Any]


class Kernel(NamedTuple):
    """operator: whose calls it computes. architectures: that it can be compiled for. candidates: the
    constants that may be chosen, the first the best known. launch: compute a call, forward and backward,
    with one of them; it does nothing for a call that the kernel does not serve."""

    operator: str
    architectures: Sequence[str]
    candidates: Sequence[Candidate]
    launch: Callable[[Workload, Candidate], None]


KERNELS: list[Kernel] = []


def compile_all(work: Workload, architecture: str, defaults_only: bool = False) -> Iterator[Launch]:
    """Every kernel that is launched with any candidate, or with the first; none is an operator's own
    default."""
    for kernel in KERNELS:
        if kernel.operator != work.operator.name or architecture not in kernel.architectures:
            continue
        for candidate in kernel.candidates[: 1 if defaults_only else None]:
            with ahead_of_time.recording(architecture) as launches:
                kernel.launch(work, candidate)
            for launch in launches:
                yield launch._replace(config=label(candidate), is_default=False)


def label(candidate: Candidate) -> str:
    """ "BLOCK_K64-CONSUMERS3-TURNS": a flag by its name, and only where it is set."""
    return "-".join(
        name if value is True else f"{name}{value}"
        for name, value in candidate.items()
        if value is not False
    )
