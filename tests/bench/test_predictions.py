"""Predictions from machine code: turns of each worker, planted faults, both models, and the targets."""

import re
from collections.abc import Sequence
from typing import Any

import pytest

from bench.compiled import counts, in_order, predictions, rows, sass, turns
from bench.compiled.architectures import ARCHITECTURES
from bench.compiled.defects import defects
from bench.compiled.in_order import Machine
from bench.compiled.sass import Instruction
from bench.reporting import pages, targets

Row = dict[str, Any]

SCORES = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0"
SUMS = "HGMMA.64x64x16.F32.BF16 R60, R4, gdesc[UR8], R60, gsb0"
SUMS_TAIL = "HGMMA.64x8x16.F32.BF16 R92, R4, gdesc[UR8], R92"
WAIT_FOR_SCORES = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
WAIT_FOR_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
EXP = "MUFU.EX2 R4, R24"
TURN = (SCORES, SUMS_TAIL, SUMS, WAIT_FOR_SCORES, *[EXP] * 32, WAIT_FOR_ALL)
RESCALED = (
    SCORES,
    SUMS_TAIL,
    SUMS,
    WAIT_FOR_SCORES,
    *[EXP] * 34,
    WAIT_FOR_ALL,
)  # two rows of a thread


def text(*lines: str) -> str:
    """As cuobjdump prints it. "name:" is a label, and a branch may name one; "[stall=4 writes=0 waits=1]"
    at the end says what is in the upper bits."""
    labels, plain = {}, []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = 16 * len(plain)
        else:
            plain.append(line)
    printed = []
    for i, line in enumerate(plain):
        code, _, control = line.partition(" [")
        for label, address in labels.items():
            code = re.sub(rf"\b{label}$", hex(address), code)
        fields = {"stall": 1, "writes": 7, "reads": 7, "waits": 0}
        fields |= {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", control)}
        bits = fields["stall"] | fields["writes"] << 5 | fields["reads"] << 8
        bits |= fields["waits"] << 11
        printed.append(f"        /*{16 * i:04x}*/   {code} ;   /* 0x{0:016x} */")
        printed.append(f"                        /* 0x{bits << 41:016x} */")
    return "\n".join(printed) + "\n"


def specialised(first: Sequence[str] = TURN, second: Sequence[str] = TURN) -> list[Instruction]:
    """A kernel of two warpgroups that multiply and a copying warp, as Gluon makes them: what is not the
    first begins behind an indirect branch, and tries for its registers until it has them."""
    return sass.parse(
        text(
            "@P0 BRA workers", "USETMAXREG.DEALLOC.CTAPOOL 0xf0",
            "first:", *first, "@P1 BRA first", "EXIT",
            "workers:", "LDS.U8 R2, [R1]", "BRX R2 -0x5b40",
            "USETMAXREG.DEALLOC.CTAPOOL 0x18",
            "copies:", "UTMALDG.4D [UR8], [UR4]", "@P1 BRA copies", "BRA workers",
            "tries:", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xa0", "@!P0 BRA tries",
            "second:", *second, "@!P2 BRA slow", "back:", "@P1 BRA second", "BRA workers",
            "slow:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R3", "@!P2 BRA slow", "BRA back",
            "end:", "BRA end",
        )
    )  # fmt: skip


def test_turns_of_workers_behind_an_indirect_branch_are_found() -> None:
    found = sorted(turns.turns(specialised(), 168))
    assert [(turn.partition > 0, turn.registers) for turn in found] == [(False, 240), (True, 160)]
    first, second = found
    assert [turn.wgmma for turn in found] == [3, 3] and [turn.waits for turn in found] == [2, 2]
    assert [turn.scores for turn in found] == [32 * 128] * 2
    assert [turn.exposed for turn in found] == [0, 0]
    assert not any(turn.serialised or turn.spills or turn.online for turn in found)
    assert len(first.body) == len(TURN) + 1  # the branch
    assert len(second.body) == len(TURN) + 2  # of a wait, without its slow side
    assert turns.are_specialised(found) and turns.loop_spills(specialised()) == 0
    assert counts.count(specialised())["wgmma"] == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ((*TURN, "LDL R4, [R1]"), "spills inside a loop, 1 times"),
        ((*TURN[:6], "STL.64 [R1], R4", *TURN[6:]), "spills inside a loop, 1 times"),
        ((*TURN, EXP), "1 exponentials while no product is under way"),
        ((*TURN[:3], WAIT_FOR_ALL, *TURN[4:]), "32 exponentials while no product is under way"),
        (
            (SCORES, WAIT_FOR_ALL, SUMS_TAIL, WAIT_FOR_ALL, SUMS, *TURN[3:]),
            "4 waits for 3 wgmma",
        ),
    ],
)
def test_a_fault_in_a_worker_is_reported(fault: Sequence[str], words: str) -> None:
    assert _defects(specialised()) == []
    for program in (specialised(second=fault), specialised(first=fault)):
        assert any(words in one for one in _defects(program))


def _defects(program: Sequence[Instruction]) -> list[str]:
    """Of a row that is sound but for what its machine code shows."""
    row = {
        "what": "attention_hopper_forward.forward", "architecture": "sm_90", "dtype": "bfloat16",
        "head_dim": 72, "status": "compiled", "spill_bytes": 0, "shared_bytes": 0, "shared_limit": 1,
        "tensor_memory": 0, "resident_warps": 9, "products": 2, "useful_share": 0.9, "loads": {"TMA": 1},
        "loop_spills": turns.loop_spills(program), **counts.count(program),
        "partitions": rows.partitions(turns.turns(program, 168)),
    }  # fmt: skip
    return defects(row | {"serialised": False})


def test_a_spill_in_the_loop_of_the_copying_warp_is_seen() -> None:
    lines = specialised()
    place = next(i for i, op in enumerate(lines) if op.name.startswith("UTMALDG"))
    lines[place] = lines[place]._replace(name="LDL", operands="R4, [R1]")
    assert turns.loop_spills(lines) == 1


def test_what_stands_outside_of_loops_is_no_spill_in_a_loop() -> None:
    lines = specialised()
    lines[1] = lines[1]._replace(name="STL", operands="[R1], R4")
    assert turns.loop_spills(lines) == 0


def test_loops_with_and_without_a_running_maximum_are_told_apart() -> None:
    both = text(
        "bounded:", *TURN, "@P1 BRA bounded", "online:", *RESCALED, "@P1 BRA online", "EXIT",
        "end:", "BRA end",
    )  # fmt: skip
    found = turns.turns(sass.parse(both), 120)
    assert [[turn.online for turn in own] for own in turns.alternatives(found)] == [[False], [True]]
    assert {turn.scores for turn in found} == {32 * 128}
    bounded, online = predictions.predict(found, warps=8, programs=2)
    assert (bounded.online, online.online) == (False, True)
    assert online.issue - bounded.issue == 2 * 2  # of two warpgroups that share a unit


def test_tensor_and_issue_are_sums_over_the_warpgroups_of_a_unit() -> None:
    (made,) = predictions.predict(turns.turns(specialised(), 168), warps=9, programs=1)
    # 64 × 64 scores a warpgroup and turn: two of them make a unit. A m64n64k16 takes
    # 32 cycles, the tail with its left operand in registers 4.
    assert made.tensor == 2 * (2 * 32 + 4)
    assert made.issue == 2 * len(TURN) + 1 + 2
    low, high = made.in_order
    assert made.tensor <= low <= high
    printed = predictions.as_json(made, 4 * predictions.UNIT * 72, is_whole=True)
    assert printed["tensor + issue"]["cycles"] == made.tensor + made.issue
    assert printed["tensor + issue"]["tflops"] == pytest.approx(529_400 / 213, rel=1e-3)
    assert printed["at_one_cycle"] == pytest.approx(529_400, rel=1e-3)
    backward = predictions.as_json(made, 10 * predictions.UNIT * 72, is_whole=False)
    assert backward["at_one_cycle"] == pytest.approx(1_323_600, rel=1e-3)
    assert "tflops" not in backward["tensor + issue"]


@pytest.mark.parametrize(
    ("code", "cycles"),
    [
        (SCORES, 32),  # both operands, 4 KB, at 128 bytes a cycle; as long as the products
        (SUMS, 32),
        ("HGMMA.64x8x16.F32.BF16 R4, gdesc[UR8], R4", 18),  # bound by shared memory
        ("HGMMA.64x8x16.F32.BF16 R4, R8, gdesc[UR8], R4", 4),
        ("HGMMA.64x256x16.F32.BF16 R4, gdesc[UR8], R4", 128),
        ("QGMMA.64x64x32.F32.E4M3.E4M3 R4, gdesc[UR8], R4", 32),
    ],
)
def test_wgmma_takes_as_long_as_its_products_or_its_operands(code: str, cycles: float) -> None:
    (op,) = sass.parse(text(code))
    assert in_order.wgmma_cycles(op) == cycles
    assert in_order.wgmma_cycles(op, shortest=16) == max(16, cycles)


def test_control_bits_are_those_that_ptxas_wrote() -> None:
    # LDS.U8 and, waiting for it, ISETP, as ptxas of CUDA 12.9 encodes them for sm_90.
    program = sass.parse(
        "        /*0ab0*/   LDS.U8 R2, [R2+UR4+0x2b20c] ;   /* 0x02b20c0402027984 */\n"
        "                                           /* 0x000e240008000000 */\n"
        "        /*0ac0*/   ISETP.GT.U32.AND P0, PT, R2, 0x4, PT ; /* 0x000000040200780c */\n"
        "                                           /* 0x001fda0003f04070 */\n"
    )
    assert program[0].control == (2, 0, 7, 0)
    assert program[1].control == (13, 7, 7, 1)


BEST = in_order.SETTINGS[0]


def cycles(*lines: str, groups: int = 1, programs: int = 1, machine: Machine = BEST) -> float:
    body = sass.parse(text(*lines))
    return in_order.cycles([body] * groups, programs, machine)


def test_stalls_and_scoreboards_hold_a_warp_up() -> None:
    assert cycles(*["NOP [stall=10]"] * 8) == 80
    waits = "FADD R5, R4, R4 [waits=1]"
    free = cycles("MUFU.EX2 R4, R4", "FADD R5, R4, R4", *["NOP"] * 30)
    held = cycles("MUFU.EX2 R4, R4 [writes=0]", waits, *["NOP"] * 30)
    assert free == 32 and held == 32 + 25  # 8 of the pipe and 18 until it is there, less one


def test_warps_share_issue_slots_and_pipes() -> None:
    assert cycles(*["NOP"] * 50, groups=2, programs=2) == pytest.approx(200, rel=0.03)
    assert cycles(*["FMNMX R4, R4, R5"] * 50, programs=2) == pytest.approx(200, rel=0.03)
    assert cycles(*["MUFU.EX2 R4, R4"] * 50, groups=3) == pytest.approx(1200, rel=0.05)
    products = (*[SCORES.removesuffix(", gsb0")] * 7, SCORES, WAIT_FOR_ALL)
    assert cycles(*products, groups=4) == pytest.approx(4 * 8 * 32, rel=0.03)


def test_exponentials_behind_products_cost_less_than_after_them() -> None:
    product, *_ = sass.parse(text(SUMS))
    assert in_order.wgmma_cycles(product) == 32
    beside = cycles(*[SUMS] * 8, *[EXP] * 30, WAIT_FOR_ALL)
    after = cycles(*[SUMS] * 8, WAIT_FOR_ALL, *[EXP] * 30)
    assert beside < 8 * 32 + 60 and after > 8 * 32 + 30 * 8 - 30
    # A warp that may have only one wgmma queued waits with its exponentials for the others.
    assert cycles(*[SUMS] * 8, *[EXP] * 30, WAIT_FOR_ALL, machine=Machine(queue=1)) > beside + 100


def test_barriers_join_the_warps_of_a_program_only() -> None:
    joined = ("NOP [stall=15]", "BAR.SYNC.DEFER_BLOCKING 0x0")
    assert cycles(*joined, groups=2) == pytest.approx(15 + 20, rel=0.03)
    assert cycles("BAR.SYNC.DEFER_BLOCKING 0x1, 0x80") == 20
    bodies = [sass.parse(text(*joined)), sass.parse(text("NOP"))]
    with pytest.raises(RuntimeError, match="a barrier that nobody reaches"):
        in_order.cycles(bodies, 1, BEST)


def test_turns_of_starting_products_are_taken() -> None:
    body = sass.parse(text(*[SUMS] * 4, *[EXP] * 40, WAIT_FOR_ALL))
    shared = in_order.cycles([body] * 2, 1, BEST, taking_turns=2)
    assert shared == pytest.approx(2 * 40 * 8, rel=0.05)  # the exponentials of both


def prediction(cycles: int, **changes: Any) -> Row:
    made = predictions.Prediction(False, 600.0, cycles - 600.0, (cycles - 50.0, cycles + 50.0))
    flops = changes.pop("flops", 4) * predictions.UNIT * 72
    return predictions.as_json(made, flops, is_whole=True) | changes


def compiled(what: str, config: str, *made: Row, **changes: Any) -> Row:
    row = {"what": what, "config": config, "architecture": "sm_90", "defects": []}
    return row | {"floor_bytes": {"self-bf16-72": {"4k": 1}}, "predictions": list(made)} | changes


def test_targets_are_held_against_the_best_that_has_no_defect() -> None:
    forward = "attention_hopper_forward.forward"
    once = "attention_hopper_sums.hopper_sums_kernel"
    found = targets.predicted(
        [
            compiled(forward, "slow", prediction(960)),
            compiled(forward, "good", prediction(890), prediction(1100, online=True)),
            compiled(forward, "spills", prediction(700), defects=["spills 8 bytes"]),
            compiled(forward, "scaled", prediction(800), scaled=True),
            compiled(forward, "other", prediction(600), architecture="sm_100"),
            compiled("attention_backward.backward_q_kernel", "a", prediction(1300, flops=10)),
            compiled("attention_backward.backward_kv_kernel", "b", prediction(1700, flops=10)),
            compiled(once, "c", prediction(2401, flops=10), scaled=True),
        ]
    )
    forward_row, online, scaled, two, one = found
    assert scaled["configurations"] == {forward: "scaled"} and scaled["met"]["cycles"]
    assert forward_row["name"] == "forward, Gluon" and online["name"] == "forward, Gluon, online"
    assert forward_row["configurations"] == {forward: "good"} and forward_row["defects"] == []
    faulty = compiled(forward, "spills", prediction(700), defects=["spills 8 bytes"])
    (only,) = targets.predicted([faulty])
    assert only["defects"] == ["spills 8 bytes"] and "spills; spills 8 bytes" in targets.words(only)
    assert forward_row["met"] == {"cycles": True, "tflops": True}  # 955 cycles, 590 TFLOP/s
    assert forward_row["tensor + issue"] == {"cycles": 890, "tflops": 595}
    assert online["met"] == {"cycles": None, "tflops": False}
    assert two["tensor + issue"] == {"cycles": 3000, "tflops": 441}
    assert two["configurations"].keys() == {
        "attention_backward.backward_q_kernel",
        "attention_backward.backward_kv_kernel",
    }
    assert one["met"] == {"cycles": False, "tflops": True}  # 2400 cycles, 480 TFLOP/s
    assert forward_row["peers"] == {"FA2": 265, "FA3": 438, "FA4": 489}


def test_the_page_names_predictions_goals_and_sources() -> None:
    made = compiled("attention_forward.forward", "a", prediction(1000))
    run = {"rows": [], "targets": targets.predicted([made])}
    page = pages._predicted({"runs": [run]})
    assert "| forward, Triton | a | 600 + 400 = 1000 | 529 | 950 to 1050 | 504 to 557 |" in page
    assert "| **not met** | FA2 265, FA3 438, FA4 489 |" in page
    assert "FA3, forward, 438: T + 442" in page and "Nothing was measured" in page
    assert pages._predicted({"runs": [{"rows": []}]}) == ""  # of an older file


def test_rates_are_those_of_the_gpu_that_they_are_for() -> None:
    assert ARCHITECTURES["sm_90"].multiplies * 2 * predictions.SMS * 1.83e9 == pytest.approx(
        989e12, rel=0.01
    )
