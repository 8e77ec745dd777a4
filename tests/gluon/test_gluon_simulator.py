"""The simulator: that it finds what it is for, on a kernel small enough to see that it should."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gluon_simulator import Descriptor, Fault, Kernel, Machine, Pointer, launch, rounded, stand_ins

gluon_language = pytest.importorskip("triton.experimental.gluon.language")

# X Yᵀ of blocks that one partition copies and another multiplies; and their number, counted by all.
SMALL = """
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _copy(x_box, y_box, x, y, full, empty, blocks):
    for j in range(blocks):
        mbarrier.wait(empty.index(0), (j & 1) ^ 1)
        mbarrier.expect(full.index(0), 2 * 64 * 16 * 2)
        copy(x_box, [j * 64, 0], full.index(0), x.index(0))
        copy(y_box, [j * 64, 0], full.index(0), y.index(0))


@gluon.jit
def _multiply(out_ptr, done_ptr, x, y, full, empty, blocks):
    acc = gl.full([64, 64], 0.0, gl.float32)
    for j in range(blocks):
        mbarrier.wait(full.index(0), j & 1)
        acc = warpgroup_mma(x.index(0), y.index(0).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(0), count=1)
    row = gl.arange(0, 64)[:, None]
    while gl.atomic_add(done_ptr, 0, sem="acquire") < gl.program_id(0):
        pass
    gl.atomic_add(out_ptr + row * 64 + gl.arange(0, 64)[None, :], acc, sem="relaxed")
    gl.atomic_add(done_ptr, 1, sem="release")


@gluon.jit
def kernel(x_box, y_box, out_ptr, done_ptr, blocks):
    x = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 16], None)
    y = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 16], None)
    full = gl.allocate_shared_memory(gl.int64, [1, 1], None)
    empty = gl.allocate_shared_memory(gl.int64, [1, 1], None)
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(empty.index(0), count=1)
    gl.warp_specialize([
        (_multiply, (out_ptr, done_ptr, x, y, full, empty, blocks)),
        (_copy, (x_box, y_box, x, y, full, empty, blocks)),
    ], [1], [24])
"""
WAIT = "        acc = warpgroup_mma_wait(0, deps=[acc])\n"
GIVE_BACK = "        mbarrier.arrive(empty.index(0), count=1)\n"
TURN = '    while gl.atomic_add(done_ptr, 0, sem="acquire") < gl.program_id(0):\n        pass\n'
SECOND = "        copy(y_box, [j * 64, 0], full.index(0), y.index(0))\n"
MISTAKES = {
    "reads before the copy": ("        mbarrier.wait(full.index(0), j & 1)\n", "", "reads a tile"),
    "overwrites what is read": (WAIT + GIVE_BACK, GIVE_BACK + WAIT, "may still read"),
    "overwrites at once": ("        mbarrier.wait(empty.index(0), (j & 1) ^ 1)\n", "", ""),
    "uses a product under way": (WAIT, "        acc = acc * 1.0\n", "still under way"),
    "takes a product under way": (WAIT, WAIT.replace("0", "1", 1), "still under way"),
    "deadlock": (GIVE_BACK, "", "deadlock"),
    "an arrival too many": (GIVE_BACK, GIVE_BACK * 2, ""),
    "bytes that never come": (SECOND, "", "deadlock"),
    "a phase that is none": ("(j & 1) ^ 1", "2", "phase 2"),
    "sums in any order": (TURN, "", "no fixed order"),
    "relaxed waiting": (TURN, TURN.replace("acquire", "relaxed"), "no fixed order"),
    "relaxed telling": ('1, sem="release"', '1, sem="relaxed"', "no fixed order"),
    "a tile that is not there": (SECOND, SECOND.replace("y.index(0)", "y.index(1)"), "beyond"),
    "stores beyond the end": ("out_ptr + row * 64", "out_ptr + row * 65", "beyond"),
    "stored, not copied": (
        SECOND,
        "        y.index(0).store(gl.full([64, 16], 0.0, gl.bfloat16))\n",
        "",
    ),
    "ends with a product under way": (WAIT, "        _ = acc\n", ""),
}
ORDERS = range(6)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "small_kernel.py").write_text(SMALL)
    sys.path.insert(0, str(folder))
    yield Kernel("small_kernel", "kernel")
    sys.path.remove(str(folder))


def product(kernel: Kernel, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(3 · X Yᵀ, what it should be): of three programs, over five blocks of which the last is short."""
    rng = np.random.default_rng(0)
    x, y = (rounded(rng.standard_normal((300, 12)), "bf16") for _ in range(2))
    out, done = np.zeros(64 * 64, np.float32), np.zeros(1, int)
    boxes = (Descriptor(one, (64, 16)) for one in (x, y))
    launch(kernel, (3,), *boxes, Pointer(out), Pointer(done), 5, seed=seed, together=True)
    blocks = [slice(start, min(start + 64, 300)) for start in range(0, 300, 64)]
    want = np.zeros((64, 64), np.float32)
    for block in blocks:
        part = x[block] @ y[block].T
        want[: len(part), : len(part)] += 3 * part
    return out.reshape(64, 64), want


def test_a_right_kernel_passes_in_any_order_with_the_same_bits(small: Kernel) -> None:
    results = [product(small, seed) for seed in ORDERS]
    assert all(np.allclose(out, want, atol=1e-4) for out, want in results)
    assert all(np.array_equal(out, results[0][0]) for out, _ in results)


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_found_in_any_order(small: Kernel, what: str) -> None:
    old, new, message = MISTAKES[what]
    for seed in ORDERS:
        with pytest.raises(Fault, match=message or "."):
            product(small.with_mistake(old, new), seed)


def test_what_is_stored_needs_a_fence_before_it_is_multiplied() -> None:
    machine = Machine()
    gl = stand_ins.modules(machine, (0,), (1,))[stand_ins.GLUON + ".language"]
    tile = gl.allocate_shared_memory("bf16", [1, 64, 16]).index(0)
    tile.store(gl.full([64, 16], 1.0, "bf16"))
    zeros = gl.full([64, 64], 0.0, "fp32")
    with pytest.raises(Fault, match="without a fence"):
        machine.multiply(tile, tile.permute((1, 0)), zeros)
    machine.fence()
    assert (machine.multiply(tile, tile.permute((1, 0)), zeros).data == 16).all()


def test_a_reinterpreted_tile_is_read_where_its_layout_says() -> None:
    machine = Machine()
    gl = stand_ins.modules(machine, (0,), (1,))[stand_ins.GLUON + ".language"]
    halves = gl.allocate_shared_memory("bf16", [4, 8, 8])
    for i in range(4):
        halves.index(i).store(gl.full([8, 8], float(i), "bf16"))
    bases = [[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [0, 8]]
    tile = halves.viewed_as("bf16", [2, 8, 16], bases).index(1)
    assert (tile.values() == np.repeat([2.0, 3.0], 8)).all() and tile.shape == [8, 16]
    with pytest.raises(Fault, match="does not cover"):
        halves.viewed_as("bf16", [2, 8, 16], bases[:-1])


def test_rounding_is_to_nearest_even_and_the_pairs_of_assembly_are_in_order() -> None:
    import torch

    rng = np.random.default_rng(0)
    x = (rng.standard_normal(4096) * 10.0 ** rng.uniform(-6, 4, 4096)).astype(np.float32)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert np.array_equal(rounded(x, name), torch.from_numpy(x).to(dtype).float().numpy())
    gl = stand_ins.modules(Machine(), (0,), (1,))[stand_ins.GLUON + ".language"]
    for asm, dtype in (
        ("cvt.rn.bf16x2.f32 $0, $1, $2;", "bf16"),
        ("cvt.rn.f16x2.f32 $0, $2, $1;", "bf16"),
    ):
        with pytest.raises(Fault):
            gl.inline_asm_elementwise(asm, "=r,r,r", [gl.full([2], 1.0, "fp32")], dtype, False, 2)


def test_stand_ins_are_of_what_the_installed_triton_has() -> None:
    for name, module in stand_ins.modules(Machine(), (0,), (1,)).items():
        real = importlib.import_module(name)
        for child, value in vars(module).items():
            if not child.startswith("__"):
                assert hasattr(real, child), f"{name}.{child}"
                inner = vars(value) if child in ("mbarrier", "tma") else {}
                assert all(hasattr(getattr(real, child), one) for one in inner), (child, inner)
    tile = stand_ins.modules(Machine(), (0,), (1,))[
        stand_ins.GLUON
    ].language.shared_memory_descriptor
    names = {"reinterpret", "_reinterpret", "index", "permute", "reshape", "load", "store"}
    assert {name for name in names if hasattr(tile, name)} == {
        name for name in names if hasattr(gluon_language.shared_memory_descriptor, name)
    }


def test_a_passage_to_replace_must_be_there_once(small: Kernel, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        small.with_mistake("no such line", "")
    with pytest.raises(AssertionError):
        small.with_mistake("mbarrier.wait", "")
