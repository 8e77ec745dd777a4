"""What a compiler makes of the Gluon kernels for sm_90, and how they are launched. No GPU is asked."""

import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from bench.compiled import ahead_of_time, sass
from pixart_kernels.attention import hopper
from pixart_kernels.dispatch.registration import INTERPRETED

# Whatever the table has first: a measurement may have reordered it.
TWO, THREE = sorted(hopper.FORWARD_CANDIDATES, key=lambda candidate: candidate["CONSUMERS"])
exhaustive = pytest.mark.exhaustive


def tensors(
    queries: int = 4096, keys: int = 4096, dim: int = 72, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a projection, without data."""
    packed = [
        torch.empty(2, n, 3, 16, 72, dtype=dtype, device="meta") for n in (queries, keys, keys)
    ]
    q, k, v = (x[:, :, i, :, :dim] for i, x in enumerate(packed))
    return q, k, v


def compiled(
    candidate: dict[str, Any], lengths: bool = False, lse: bool = True, **options: Any
) -> Any:
    dtype = options.pop("dtype", torch.bfloat16)
    q, k, v = tensors(dim=options.pop("dim", 72), dtype=dtype)
    prepared = hopper.prepare_forward(q, k, v, 0.17, candidate, **options)
    sums = q.new_empty(2, 16, 4096, dtype=torch.float32) if lse else None
    longest = [q.new_empty(2 * 16 * 32, dtype=torch.float32) if options.get("limit") else None] * 2
    counts = q.new_empty(2, dtype=torch.int64) if lengths else None
    given = (q, k, v, torch.empty_like(q).contiguous(), sums, *longest, counts)
    with ahead_of_time.recording("sm_90") as launches:
        prepared.kernel[prepared.grid](
            *given,
            *prepared.boxes(given),
            *prepared.numbers,
            **prepared.constants,
            **prepared.options,
        )
    (launch,) = launches
    assert not launch.error, launch.error
    return launch.compiled


def turns(kernel: Any, products: int) -> list[list[str]]:
    """The names of the instructions of each loop that starts so many products in a turn.

    A stretch that a branch spans backwards: partitions are reached through branches whose targets are
    in registers, so that there is no way to them to be followed. What waits is at the program's end and
    jumps back; such stretches have other numbers of products.
    """
    program = sass.parse(sass.disassemble(kernel))
    spans = [
        (op.target, i) for i, op in enumerate(program) if op.target is not None and op.target < i
    ]
    bodies = [[op.name for op in program[first : last + 1]] for first, last in spans]
    return [body for body in bodies if sum("GMMA" in name for name in body) == products]


def tensor_cycles(names: list[str]) -> float:
    """m64nNk16 takes N / 2 cycles, whether its left operand is in registers or in shared memory."""
    shapes = [sass.tensor_shape(name) for name in names]
    return sum(int(shape.split("x")[1]) / 2 for shape in shapes if shape)


COMPILED = [
    pytest.param(TWO, {"limit": 64}, 935, id="2 warpgroups"),
    pytest.param(TWO, {"limit": 64, "scaled": True}, 870, id="2, q is scaled", marks=exhaustive),
    pytest.param(
        TWO, {"limit": 14, "dtype": torch.float16, "lengths": True}, 940, id="2, fp16, lengths",
        marks=exhaustive,
    ),
    pytest.param(TWO, {"dim": 65, "lse": False}, 1100, id="2, 65 columns, online, no lse", marks=exhaustive),
    pytest.param(THREE, {"limit": 64}, 1010, id="3 warpgroups", marks=exhaustive),
    pytest.param(
        THREE, {"limit": 64, "scaled": True, "lengths": True}, 950, id="3, q is scaled, lengths",
        marks=exhaustive,
    ),
    pytest.param(THREE, {"limit": 14, "dtype": torch.float16}, 1010, id="3, fp16", marks=exhaustive),
]  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("candidate, options, cycles", COMPILED)
def test_what_the_compiler_makes_of_it(
    candidate: dict[str, Any], options: dict[str, Any], cycles: float
) -> None:
    """cycles: at most so many predicted for 64 queries and 128 keys, tensor + issue, where bounded."""
    kernel = compiled(candidate, **options)
    consumers, keys = int(candidate["CONSUMERS"]), int(candidate["BLOCK_K"])
    found = turns(
        kernel, 5 + 2 * keys // 16
    )  # of 16 columns of q, and of 16 keys for both parts of v
    assert len(found) == consumers * (2 if options.get("limit") else 1)
    for names in found:
        count = Counter(name.split(".")[0] for name in names)
        waits = [i for i, name in enumerate(names) if name.startswith("WARPGROUP.DEPBAR")]
        assert not count["LDL"] + count["STL"], "spills"
        assert len(waits) == 2, "wgmma is serialised"
        assert not any(name.startswith("MUFU.EX2") for name in names[waits[-1] :])
        assert sum(name.startswith("MUFU.EX2") for name in names) >= keys // 2
    # Bounded loops are those with fewer instructions.
    predicted = sorted(128 / keys * (tensor_cycles(names) + len(names)) for names in found)
    assert predicted[consumers - 1] <= cycles, predicted
    # What each thread of a warp gets: the copying warp's, and the warpgroups'.
    given = re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", kernel.asm["ptx"])
    assert {hopper.COPY_REGISTERS, candidate["REGISTERS"]} <= {int(n) for n in given}
    assert kernel.metadata.shared <= 227 * 1024


def test_a_prepared_launch_fits_the_kernel() -> None:
    from pixart_kernels.attention.hopper_forward import forward

    q, k, v = tensors(queries=200, keys=77)
    for candidate in hopper.FORWARD_CANDIDATES:
        prepared = hopper.prepare_forward(q, k, v, 0.17, candidate, limit=64)
        names = forward.arg_names
        assert list(prepared.constants) == names[len(names) - len(prepared.constants) :]
        boxes = prepared.boxes((q, k, v, None))
        kinds = 8 + len(boxes) + len(prepared.numbers) + len(prepared.constants)
        assert kinds == len(names)
        tall = candidate["BLOCK_K"]
        sizes = [(64, 64), (64, 16), (tall, 64), (tall, 16), (tall, 64), (tall, 8)]
        assert [tuple(box.block_shape[2:]) for box in boxes] == sizes
        assert [box.base for box in boxes] == [q, q, k, k, v, v]
        assert boxes[0].shape == [2, 16, 200, 72] and boxes[2].shape == [2, 16, 77, 72]
        assert boxes[0].strides == [200 * 3 * 16 * 72, 72, 3 * 16 * 72, 1]
        for box in boxes:
            box.__class__.__mro__[1].__post_init__(box)  # the checks that are left out
        assert prepared.grid == (-(-200 // (64 * candidate["CONSUMERS"])) * 32,)
    assert hopper.prepare_forward(q, k, v, 0.0, TWO, scaled=True).numbers[0] == 1.0
    with pytest.raises(
        ValueError, match=r"scale_log2 must be more than 0, got -1.0: turn q around"
    ):
        hopper.prepare_forward(q, k, v, -1.0, TWO)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda q, k, v: ("sm_100", q, k, v), "for sm_90 .Hopper., not sm_100"),
        (lambda q, k, v: ("sm_90", q.float(), k, v), "take bf16 and fp16, not torch.float32"),
        (lambda q, k, v: ("sm_90", q[..., :64], k, v), "from 65 to 72, not 64"),
        (lambda q, k, v: ("sm_90", q, k[:, :0], v[:, :0]), "nothing to attend to"),
        (lambda q, k, v: ("sm_90", q, k.mT.contiguous().mT, v), "channels of k are 16 apart"),
        (lambda q, k, v: ("sm_90", q, k, v[..., :71].contiguous()), "strides of v"),
        (lambda q, k, v: ("sm_90", q[:, :1].expand(2, 9, 16, 72), k, v), "strides of q"),
    ],
)  # fmt: skip
def test_what_it_does_not_serve_is_said(change: Any, reason: str) -> None:
    assert hopper.serves("sm_90", *tensors()) is None
    assert re.search(reason, hopper.serves(*change(*tensors())) or "")


def test_tensors_that_do_not_start_at_16_bytes_are_not_served() -> None:
    storage = torch.empty(2 * 9 * 16 * 72 + 8, dtype=torch.bfloat16)
    q = storage[4:-4].view(2, 9, 16, 72)
    assert "16 bytes" in (hopper.serves("sm_90", q, q, q) or "")
    one = storage[:72].view(1, 1, 1, 72).as_strided((1, 1, 1, 72), (7, 5, 3, 1))
    assert hopper.serves("sm_90", one, one, one) is None  # strides of nothing


def test_gluon_is_imported_when_a_kernel_is_prepared_and_not_before() -> None:
    program = (
        "import sys, pixart_kernels, pixart_kernels.attention.hopper\n"
        "print([name for name in sys.modules if name.startswith('triton.experimental')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout == "[]\n"
