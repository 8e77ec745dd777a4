"""The compile-time report, and what kernels must keep to in it. Compiles, so not for the interpreter."""

import importlib
import pkgutil
import re
from typing import Any

import pytest
import torch

import pixart_kernels
from bench.measure import results
from bench.workloads import sizes
from bench.workloads.operators import Workload
from pixart_kernels.dispatch.registration import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

from triton.runtime.jit import JITFunction

from bench import resources
from bench.compiled import ahead_of_time, counts, flow, in_order, sass
from bench.compiled import rows as compiled_rows
from bench.compiled.architectures import ARCHITECTURES, resident_warps
from bench.compiled.defects import defects

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Every kernel on sm_90, the first of its configurations; predicted in one setting of four."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(in_order, "SETTINGS", in_order.SETTINGS[:1])
        return resources.report("sm_90", [*_attention(), *_others()], defaults_only=True)


def _attention() -> list[Workload]:
    # Text keys: a length per sample, and a count that 16 does not divide.
    return _at_1k("self-bf16-72", "masked-bf16-72")


def _others() -> list[Workload]:
    """Every other operator in bf16, as published."""
    return [
        case
        for case in ahead_of_time.cases()
        if case.operator.name != "flash_attention"
        and (case.size, case.dtype, case.ratio) == ("1k", torch.bfloat16, sizes.RATIO)
    ]


def _at_1k(*names: str) -> list[Workload]:
    every = [case for case in ahead_of_time.cases() if case.size == "1k"]
    return [case for case in every if case.operator.label(case) in names]


def _all_defects(rows: list[Row]) -> list[tuple[str, str, list[str]]]:
    found = [(row["what"], row["variant"], row["defects"]) for row in rows]
    return [defect for defect in found if defect[2]]


def test_default_configurations_keep_to_sm_90(rows):
    assert _all_defects([row for row in rows if row["default"]]) == []


def test_warpgroups_with_code_of_their_own_keep_to_sm_90(rows):
    own = [row for row in rows if any(one["number"] for one in row.get("partitions", ()))]
    assert {row["what"].split(".")[0] for row in own} == {
        "attention_hopper_forward", "attention_hopper_backward", "attention_hopper_sums"
    }  # fmt: skip
    for name, variant, found in _all_defects(own):
        # With Triton 3.9, ptxas has too few registers to leave these where they are in the source.
        known = name == "attention_hopper_sums.hopper_sums_kernel"
        late = all(words.endswith("while no product is under way") for words in found)
        assert known and late, (name, variant, found)
    assert all(row["predictions"] for row in own)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "sm_90"])
def test_default_attention_keeps_to_every_other_architecture(architecture):
    assert _all_defects(resources.report(architecture, _attention()[:1], defaults_only=True)) == []


@pytest.mark.parametrize("architecture", ["sm_80", "gfx942"])
def test_other_default_kernels_keep_to_other_architectures(architecture):
    assert _all_defects(resources.report(architecture, _others(), defaults_only=True)) == []


def test_every_kernel_is_reported(rows):
    found = {}
    for module in pkgutil.walk_packages(pixart_kernels.__path__, "pixart_kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, JITFunction):
                found[ahead_of_time.kernel_name(value)] = value.fn
    called = {name for function in found.values() for name in function.__code__.co_names}
    kernels = {name for name, function in found.items() if function.__name__ not in called}
    # One source has two names: of the kernel for dQ, and of that for dK and dV.
    reported = {re.sub(r"(hopper_backward_kernel)_(q|kv)$", r"\1", row["what"]) for row in rows}
    assert kernels and kernels <= reported <= found.keys()


FORWARD = {
    "self-bf16-72": "attention_forward.forward",
    "compress2-bf16": "compression_kernels.compress_forward",
    "modulate-bf16": "modulation_kernels.modulation_forward",
    "gate_add-bf16": "modulation_kernels.modulation_forward",
    "gate_add_modulate-bf16": "modulation_kernels.modulation_forward",
    "add_modulate-bf16": "modulation_kernels.modulation_forward",
}


def _floor(rows: list[Row], kernel: str, case: str) -> int:
    return next(
        row["floor_bytes"][case]["1k"]
        for row in rows
        if row["what"] == kernel and case in row["floor_bytes"]
    )


def test_floors_are_those_of_the_shapes(rows):
    batch, tokens = 2, sizes.tokens("1k")
    sums = {"flash_attention": batch * tokens * 16 * 4}  # the log-sum-exp of each query and head
    works = {work.operator.label(work): work for work in _at_1k(*FORWARD)}
    assert set(works) == set(FORWARD)
    for name, work in works.items():
        size = work.bytes(False) + sums.get(work.operator.name, 0)
        floor = _floor(rows, FORWARD[name], name)
        assert size <= floor < 1.01 * size, name  # weights and rows (B, C) are a little more


def test_attention_without_the_head_stride_hint_is_caught(monkeypatch):
    # 72 is not divisible by 16, and Triton looks for nothing less by itself.
    from pixart_kernels.attention import forward_launcher

    monkeypatch.setattr(forward_launcher, "stride_divisor", lambda *tensors: 1)
    text = _attention()[1]
    with torch.no_grad():
        rows = resources.report("sm_80", [text], defaults_only=True)
    assert any(words.startswith("loads") for *_, found in _all_defects(rows) for words in found)


GOOD = {
    "what": "attention_forward.forward",
    "architecture": "sm_90",
    "dtype": "bfloat16",
    "head_dim": 72,
    "status": "compiled",
    "spill_bytes": 0,
    "shared_bytes": 80_000,
    "shared_limit": 232_448,
    "tensor_memory": 0,
    "resident_warps": 16,
    "products": 4,
    "useful_share": 0.9,
    "loads": {"TMA": 8, "4": 1},
    "wgmma": 13,
    "serialised": False,
    "waits": 4,
    "loop_spills": 0,
    "partitions": [],
}
WORKER = {"number": 2, "online": False, "waits": 2, "wgmma": 13, "serialised": False, "exposed": 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "does not compile: PTXASError: no"}, "does not compile"),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 232_449}, "shared memory"),
        ({"tensor_memory": 513}, "tensor memory"),
        ({"resident_warps": 0}, "does not fit"),
        ({"useful_share": 0.75}, "useful"),
        ({"useful_share": None}, "useful"),  # no tensor cores at all
        ({"loads": {"16": 8, "2": 80}}, "loads"),
        ({"loads": {"8": 8}}, "loads"),
        ({"wgmma": 0}, "does not use wgmma"),
        ({"waits": 5}, "waits 5 times"),
        ({"what": "attention_backward.backward_q", "waits": 7}, "waits 7 times"),
        ({"waits": 3, "serialised": True}, "waits 3 times"),
        ({"loop_spills": 2}, "spills inside a loop, 2 times"),
        ({"partitions": [WORKER | {"serialised": True}]}, "partition 2: 2 waits for 13 wgmma"),
        ({"partitions": [WORKER | {"waits": 5, "online": True}]}, "partition 2, online: 5 waits"),
        ({"partitions": [WORKER | {"exposed": 32}]}, "partition 2: 32 exponentials while no"),
    ],
)
def test_each_guard_catches_what_it_is_for(change, words):
    assert defects(GOOD) == []
    (defect,) = defects(GOOD | change)
    assert words in defect


# A loop that waits for a barrier; ptxas has moved the waiting to the end of the program.
LOOP = """
        /*0000*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;                /* 0x0 */
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0020*/              @!P0 BRA 0x90 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   MUFU.EX2 R4, R5 ;
        /*0060*/                   FFMA R4, R5, R6, R7 &req={1} ?trans1;
        /*0070*/                   BRA.U UP0, 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00a0*/              @!P0 BRA 0x90 ;
        /*00b0*/                   BRA 0x30 ;
        /*00c0*/                   BRA 0xc0 ;
"""


def test_the_loop_includes_code_that_was_moved_out_of_it():
    program = sass.parse(LOOP)
    loops = flow.Flow(program).loops()
    assert sorted(sorted(loop.indices) for loop in loops) == [
        [1, 2, 3, 4, 5, 6, 7, 9, 10, 11],
        [9, 10],
    ]
    found = counts.count(program)
    assert found == {
        "tensor": {"64x64x16": 1},
        "exp": 1,
        "fma": 1,
        "alu": 0,
        "instructions": 10,
        "waits": 1,
        "wgmma": 1,
        "serialised": True,  # one wait for one wgmma
    }
    assert counts.transfers(program, "load") == {"2": 1}


GCN = """
\tglobal_load_dwordx4 v[2:5], v1, s[0:1]
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\ts_waitcnt vmcnt(0)
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], v[0:15]
\tv_exp_f32_e32 v1, v2
\tv_fma_f32 v1, v2, v3, v4
\tv_max_f32_e32 v1, v2, v3
\ts_cbranch_scc0 .LBB0_1
\ts_endpgm
"""


def test_amd_assembly_is_read_too():
    program = sass.parse(GCN)
    found = counts.count(program)
    assert found["tensor"] == {"32x32x8": 1}
    assert [found[kind] for kind in ("exp", "fma", "alu", "waits")] == [1, 1, 1, 1]
    assert counts.transfers(program, "load") == {"16": 1}


TTIR = """
    %0 = scf.for %i = %c0 to %N step %c64 iter_args(%a = %b) -> (tensor<64xf32>)  : i32 {
      %1 = scf.for %j = %c0 to %M step %c64 iter_args(%c = %d) -> (tensor<64xf32>)  : i32 {
        %2 = tt.dot %q, %k, %z : tensor<64x16xbf16> * tensor<16x32xbf16> -> tensor<64x32xf32>
        scf.yield %2 : tensor<64xf32>
      } loc(#loc2)
      %3 = tt.dot %q, %k, %z : tensor<64x64xbf16> * tensor<64x32xbf16> -> tensor<64x32xf32>
      scf.yield %3 : tensor<64xf32>
    } loc(#loc1)
"""


def test_products_are_those_of_the_innermost_loop():
    assert compiled_rows.loop_products(TTIR) == [(64, 32, 16)]


def test_resident_warps_are_bound_by_what_runs_out_first():
    sm_90 = ARCHITECTURES["sm_90"]
    assert resident_warps(sm_90, 32, 0, 4) == 64  # warps
    assert resident_warps(sm_90, 128, 60_000, 8) == 16  # registers
    assert resident_warps(sm_90, 32, 100_000, 8) == 16  # shared memory
    assert resident_warps(sm_90, 32, 0, 1) == 32  # programs
    assert resident_warps(sm_90, 255, 200_000, 16) == 0


def test_command_writes_json_and_machine_code(tmp_path, monkeypatch, capsys):
    one = _at_1k("modulate-bf16")
    monkeypatch.setattr(ahead_of_time, "cases", lambda: one)
    file, directory = tmp_path / "report.json", tmp_path / "code"
    with torch.no_grad():
        resources.main(["--arch", "sm_90", "--json", str(file), "--dump", str(directory)])
    (run,) = results.read(file)["runs"]
    assert run["triton"] and run["machine"] is None and run["complete"]
    stems = [f"{row['what']}.{row['variant']}.sm_90" for row in run["rows"]]
    assert 1 < len(stems) <= 8  # configurations
    written = {path.name for path in directory.iterdir()}
    assert written == {f"{stem}.{kind}" for stem in stems for kind in ("ptx", "sass")}
    assert ".target sm_90" in (directory / f"{stems[0]}.ptx").read_text()
    assert run["rows"][0]["variant"] in capsys.readouterr().out
