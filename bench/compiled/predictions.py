"""Predictions of how fast an attention kernel is on an H100 or H200, from its machine code. Nothing ran.

A unit is 64 queries × 128 keys of one head on one SM. Two models, both for all warps of an SM together:

    tensor + issue      cycles of the tensor core, and one for each instruction of a warp, as if nothing
                        but products hid behind products. A rule noticed after the fact: the published
                        speed of FA3 fits T + 442, that of TLX T + 517, and FA4's code has 441
                        instructions. FA3's and TLX's own code was not read; until a kernel's code and
                        speed are known together it may be a coincidence
    in order            in_order.py: from the most to the least favourable of its settings

The first is the more careful of the two for kernels whose warpgroups have code of their own. It is not
made for kernels without such, where products and exponentials take turns within each program and other
programs fill in: it does not know how many programs share an SM.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.compiled import in_order
from bench.compiled.in_order import wgmma_cycles
from bench.compiled.turns import Turn, alternatives, are_specialised

UNIT = 64 * 128  # queries × keys
SMS, CLOCK = 132, 1.7e9  # of an H100 or H200 under load
FLOPS = {"forward": 4, "backward": 10}  # useful ones, by query, key and channel


def passes_of(kernel: str) -> str:
    """Which of the two a kernel is of, by its name. One pass of Hopper's backward is named for its sums."""
    return "backward" if re.search("backward|hopper_sums", kernel) else "forward"


class Prediction(NamedTuple):
    """Of one unit. online: whether the loop keeps a running maximum. in_order: fewest and most cycles."""

    online: bool
    tensor: float
    issue: float
    in_order: tuple[float, float]

    @property
    def tensor_and_issue(self) -> float:
        return self.tensor + self.issue


def rate(cycles: float, flops: int) -> float:
    """Useful TFLOP/s of the whole GPU. flops: of a unit."""
    return flops * SMS * CLOCK / cycles / 1e12


def predict(
    turns: Sequence[Turn], warps: int, programs: int, *, taking_turns: bool = False
) -> list[Prediction]:
    """For each kind of loop that the kernel has. None for a loop without exponentials.

    warps: of a program, of which four each run a turn where the kernel has one partition; of several,
    each is one warpgroup. programs: on an SM at once. taking_turns: whether warpgroups with
    exponentials start their products one after another.
    """
    return [
        _predict(own if are_specialised(turns) else own * (warps // 4), programs, taking_turns)
        for own in alternatives(turns)
    ]


def _predict(groups: Sequence[Turn], programs: int, taking_turns: bool) -> Prediction:
    # Those with exponentials are first: they are the ones that may take turns.
    groups = sorted(groups, key=lambda turn: not turn.scores)
    units = sum(turn.scores for turn in groups) / UNIT
    weighing = sum(turn.scores > 0 for turn in groups)
    products = [op for turn in groups for op in turn.body if "GMMA" in op.name]
    bodies = [turn.body for turn in groups]
    settings = [
        in_order.cycles(bodies, programs, machine, weighing if taking_turns else 0)
        / (units * programs)
        for machine in in_order.SETTINGS
    ]
    return Prediction(
        any(turn.online for turn in groups),
        sum(map(wgmma_cycles, products)) / units,
        sum(map(len, bodies)) / units,
        (min(settings), max(settings)),
    )


def as_json(prediction: Prediction, flops: int, is_whole: bool) -> dict[str, Any]:
    """Cycles, and where the kernel does all of a pass, what they come to.

    flops: useful ones of a unit. "at_one_cycle": the TFLOP/s if a unit took one cycle, for sums of several
    kernels.
    """
    fewest, most = prediction.in_order
    law: dict[str, Any] = {"cycles": round(prediction.tensor_and_issue)}
    order: dict[str, Any] = {"cycles": [round(fewest), round(most)]}
    if is_whole:
        law["tflops"] = round(rate(law["cycles"], flops))
        order["tflops"] = [round(rate(cycles, flops)) for cycles in order["cycles"]]
    return {
        "online": prediction.online,
        "tensor": round(prediction.tensor),
        "issue": round(prediction.issue),
        "tensor + issue": law,
        "in order": order,
        "at_one_cycle": round(rate(1, flops)),
    }
