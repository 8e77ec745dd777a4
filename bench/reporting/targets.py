"""What a GPU is to reach, where each figure comes from, and what compiled code predicts of it.

Peers pad a head dimension of 72 to 80 or 96. Nobody has published their speed at 72: the figures here
are what the rules of bench/compiled/predictions.py, which fit their published speeds at 64 and 128, give
at the tensor cores' cycles of the padded one, on an H100 or H200 at 1.7 GHz.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.measure.results import Row

CASE = "self-bf16-72"  # what the targets are for
ARCHITECTURE = "sm_90"
MODELS = ("tensor + issue", "in order")


class Target(NamedTuple):
    """At 4K, head dimension 72. topics: a pattern of what is timed for it. kernel: how the name of the
    one ends whose compiled code predicts cycles. way: of WAYS, whose predicted rate stands beside them."""

    name: str
    goal: str
    topics: str
    kernel: str = ""
    way: str = ""


class Peer(NamedTuple):
    """Useful TFLOP/s, and what is known of them."""

    name: str
    rate: int
    source: str


class Way(NamedTuple):
    """A way to compute attention or its gradient, by one kernel or several, one after the other.

    kernels: patterns of their names. rate: useful TFLOP/s that are the goal. cycles: at most so many of a
    unit, by tensor + issue; None where none is asked for. scaled: whether q comes multiplied by the scale.
    """

    name: str
    passes: str
    kernels: tuple[str, ...]
    rate: int
    cycles: int | None = None
    scaled: bool = False


PEERS = {
    "forward": (
        Peer("FA2", 265, "2.13 T + 361 by FlashAttention's assets/flash3_fp16_fwd.png, T of 96"),
        Peer("FA3", 438, "T + 442 by the same, T of 96 = 768 (hopper/tile_size.h pads 72 to 96)"),
        Peer("FA4", 489, "at most: T + 442, T of 80 = 640, counted in its code compiled at 72"),
    ),
    "backward": (
        Peer(
            "FA3", 396, "1.34 T + 770 by the FA3 paper's charts (arXiv 2407.08608), T of 96 = 1920"
        ),
        Peer("FA4", 455, "the same rule, T of 80 = 1600, counted in its code compiled at 72"),
    ),
}
_TRITON = (r"attention_backward\.backward_q_kernel", r"attention_backward\.backward_kv_kernel")
_GLUON = (
    r"attention_hopper_backward\.hopper_backward_kernel_q",
    r"attention_hopper_backward\.hopper_backward_kernel_kv",
)
_GLUON_FORWARD = (r"attention_hopper_forward\.forward",)
_ONE_PASS = (r"attention_hopper_sums\.hopper_sums_kernel",)
WAYS = (
    Way("forward, Triton", "forward", (r"attention_forward\.forward",), 590),
    Way("forward, Gluon", "forward", _GLUON_FORWARD, 590, 955),
    Way("forward, Gluon, q scaled", "forward", _GLUON_FORWARD, 590, 860, scaled=True),
    Way("backward, Triton, two passes", "backward", _TRITON, 480),
    Way("backward, Gluon, two passes", "backward", _GLUON, 480),
    Way("backward, Gluon, two passes, q scaled", "backward", _GLUON, 480, 2930, scaled=True),
    Way("backward, Gluon, one pass", "backward", _ONE_PASS, 480),
    Way("backward, Gluon, one pass, q scaled", "backward", _ONE_PASS, 480, 2400, scaled=True),
)

_FORWARD = "≥ 590 useful TFLOP/s, ≥ 1.25 × the best SDPA backend, ≥ 1.0 × FA4"
_BACKWARD = "≥ 480 useful TFLOP/s, all kernels together"
_STREAMING = "≥ 85 % of the copy bandwidth, ≥ 1.0 × torch.compile"
_STEP = "≥ 2 × diffusers, eager and dense; compressed ≥ 33 % faster than dense"
_ATTENTION = "flash_attention self"
TARGETS = (
    Target(
        "attention, forward",
        _FORWARD,
        f"{_ATTENTION} forward",
        "attention_forward.forward",
        "forward, Triton",
    ),
    Target(
        "attention, backward: dQ",
        _BACKWARD,
        f"{_ATTENTION} backward",
        "backward_q",
        "backward, Triton, two passes",
    ),
    Target("attention, backward: dK, dV", _BACKWARD, f"{_ATTENTION} backward", "backward_kv"),
    Target("compress_kv", _STREAMING, "compress_kv .*"),
    Target("modulate", _STREAMING, "modulate .*"),
    Target("gate_add_modulate", _STREAMING, "gate_add_modulate .*"),
    Target("denoising step", _STEP, "denoising step"),
)


def predicted(rows: Sequence[Row]) -> list[Row]:
    """For each way whose kernels were compiled, and loops with and without a running maximum: the
    configurations with the fewest cycles by tensor + issue, among those without a defect if there are
    any, that, and whether the goals are met by it."""
    found = []
    for way in WAYS:
        for online in (False, True):
            best = [_best(rows, kernel, way.scaled, online) for kernel in way.kernels]
            chosen = [one for one in best if one is not None]
            if len(chosen) == len(way.kernels):
                found.append(_as_row(way, online, chosen))
    return found


def _best(rows: Iterable[Row], kernel: str, scaled: bool, online: bool) -> tuple[Row, Row] | None:
    """A row and its prediction."""
    fitting = [
        (row, prediction)
        for row in rows
        if re.fullmatch(kernel, row["what"])
        and row["architecture"] == ARCHITECTURE
        and CASE in row["floor_bytes"]
        and row.get("scaled", False) == scaled
        for prediction in row.get("predictions", ())
        if prediction["online"] == online
    ]
    return min(
        fitting,
        key=lambda pair: (bool(pair[0]["defects"]), pair[1][MODELS[0]]["cycles"]),
        default=None,
    )


def _as_row(way: Way, online: bool, chosen: Sequence[tuple[Row, Row]]) -> Row:
    made = [prediction for _, prediction in chosen]
    law = sum(one[MODELS[0]]["cycles"] for one in made)
    fewest, most = (sum(one[MODELS[1]]["cycles"][i] for one in made) for i in range(2))
    rates = [round(made[0]["at_one_cycle"] / cycles) for cycles in (law, fewest, most)]
    return {
        "name": way.name + ", online" * online,
        "passes": way.passes,
        "configurations": {row["what"]: row["config"] for row, _ in chosen},
        "defects": [defect for row, _ in chosen for defect in row["defects"]],
        "tensor": sum(one["tensor"] for one in made),
        "issue": sum(one["issue"] for one in made),
        MODELS[0]: {"cycles": law, "tflops": rates[0]},
        MODELS[1]: {"cycles": [fewest, most], "tflops": rates[1:]},
        "goal": {"cycles": way.cycles, "tflops": way.rate},
        # The goal in cycles is for the loop without a running maximum.
        "met": {
            "cycles": None if way.cycles is None or online else law <= way.cycles,
            "tflops": rates[0] >= way.rate,
        },
        "peers": {peer.name: peer.rate for peer in PEERS[way.passes]},
    }


def words(target: Row) -> list[str]:
    """Cells of a table: name, configurations, cycles, rates, goals, whether they are met, peers."""
    law, order = target[MODELS[0]], target[MODELS[1]]
    goal, met = target["goal"], target["met"]
    asked = f"≥ {goal['tflops']} TFLOP/s" + (
        f", ≤ {goal['cycles']} cycles" if met["cycles"] is not None else ""
    )
    verdicts = [met["tflops"]] + [met["cycles"]] * (met["cycles"] is not None)
    return [
        target["name"],
        "; ".join([", ".join(target["configurations"].values()), *target["defects"]]),
        f"{target['tensor']} + {target['issue']} = {law['cycles']}",
        str(law["tflops"]),
        f"{order['cycles'][0]} to {order['cycles'][1]}",
        f"{order['tflops'][1]} to {order['tflops'][0]}",
        asked,
        ", ".join("met" if one else "**not met**" for one in verdicts),
        ", ".join(f"{name} {rate}" for name, rate in target["peers"].items()),
    ]


COLUMNS = (
    "way", "configuration", "tensor + issue, cycles", "TFLOP/s", "in order, cycles", "TFLOP/s",
    "goal", "by tensor + issue", "peers, TFLOP/s",
)  # fmt: skip


def sources() -> str:
    """Where the peers' figures come from, as a list."""
    lines = [
        f"- {peer.name}, {passes}, {peer.rate}: {peer.source}"
        for passes, peers in PEERS.items()
        for peer in peers
    ]
    return "\n".join(lines)
