"""What the compiler makes of attention's backward for Hopper: launched by the host's own code, compiled
for sm_90 without a GPU, and counted in the machine code of each warpgroup's loop."""

from pathlib import Path
from typing import Any

import pytest
import stubbed
import torch

from bench.compiled import ahead_of_time, predictions, sass, stub_driver, turns
from pixart_kernels.dispatch.registration import INTERPRETED

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

from pixart_kernels.attention import hopper_gradients
from pixart_kernels.attention.hopper_gradients import BACKWARD_CANDIDATES

SHARED_MEMORY = 227 * 1024
# Cycles per unit of 64 queries and 128 keys, by passes. A Triton without products of 8 columns needs more.
TARGETS = {2: 2930, 1: 2400} if hopper_gradients.HAS_NARROW_WGMMA else {2: 3050, 1: 2500}


def compiled(
    candidate: dict[str, Any], *, dtype: torch.dtype, lengths: bool, scaled: bool
) -> list[Any]:
    """The Gluon kernels of a backward of 4096 queries and keys."""
    q, k, v, grad = torch.empty(4, 1, 4096, 16, 72, dtype=dtype, device="meta").unbind(0)
    given = q.new_empty(1, dtype=torch.int64) if lengths else None
    lse = q.new_empty((1, 16, 4096), dtype=torch.float32)
    with ahead_of_time.recording("sm_90") as launches:
        compute = hopper_gradients.prepare_backward(
            grad, q, k, v, given, 0.1, scaled=scaled, candidate=candidate
        )
        compute(grad, q, k, v, q, lse, given)
    assert not [launch.error for launch in launches if launch.error]
    return [launch.compiled for launch in launches if "hopper_columns" not in launch.kernel]


def check(candidate: dict[str, Any], **setting: Any) -> float:
    """Cycles per unit, predicted as products and instructions one after the other. Raises AssertionError
    for spills in loops, products that are waited for one by one, and exponentials that wait for sums."""
    total = 0.0
    once = candidate["PASSES"] == 1
    kernels = compiled(candidate, **setting)
    assert len(kernels) == candidate["PASSES"]
    for kernel in kernels:
        assert kernel.metadata.shared <= SHARED_MEMORY
        program = sass.parse(sass.disassemble(kernel))
        assert turns.loop_spills(program) == 0
        found = turns.turns(program, 0)
        adding = [turn for turn in found if not turn.exponentials]
        assert len(adding) == once and len(found) - len(adding) in (2, 3)
        for turn in found:
            assert turn.waits == (1 if turn in adding else 3) and not turn.serialised
            # In one pass Triton 3.9's ptxas moves half of them there, for lack of registers.
            assert turn.exposed == 0 or once
        (prediction,) = predictions.predict(found, 4, 1)
        total += prediction.tensor_and_issue
    return total


SETTINGS = [
    {"dtype": dtype, "lengths": lengths, "scaled": scaled}
    for dtype in (torch.bfloat16, torch.float16)
    for lengths in (False, True)
    for scaled in (True, False)
]


def test_the_default_compiles_to_what_it_is_meant_to_be() -> None:
    cycles = check(hopper_gradients.TWO_PASSES, dtype=torch.bfloat16, lengths=False, scaled=True)
    assert cycles <= TARGETS[2]


@pytest.mark.exhaustive
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda x: "-".join(map(str, x.values())))
@pytest.mark.parametrize(
    "candidate", BACKWARD_CANDIDATES, ids=lambda x: "-".join(map(str, x.values()))
)
def test_all_compile_without_spills_or_serialised_products(
    candidate: dict[str, Any], setting: dict[str, Any]
) -> None:
    cycles = check(candidate, **setting)
    # Multiplying scores by a scale takes 64 to 128 more; lengths a few.
    more = (0 if setting["scaled"] else 160) + (10 if setting["lengths"] else 0)
    if candidate["PASSES"] == 1 or candidate["Q_CONSUMERS"] == 2:
        limit = TARGETS[candidate["PASSES"]]
        assert cycles <= limit + more


LAUNCHED = """
import time
from pixart_kernels.attention import hopper_gradients
hopper_gradients.ENOUGH_PROGRAMS = 8  # so that few keys fill a GPU
qkv = torch.zeros(2, 256, 3, 4, 72, dtype=torch.bfloat16)
q, k, v = qkv.unbind(2)
lse = torch.zeros(2, 4, 256)
found = []
for lengths in (None, torch.tensor([256, 100])):
    for grad in (torch.zeros_like(q), torch.ones((), dtype=q.dtype).expand(q.shape)):
        compute = hopper_gradients.prepare_backward(
            grad, q, k, v, lengths, 0.1, candidate=CANDIDATE)
        for _ in range(3):  # the first goes Triton's way, the others past it
            gradients = compute(grad, q, k, v, torch.zeros(q.shape, dtype=q.dtype), lse, lengths)
print(json.dumps([stub_driver.counted(what) for what in ("launches", "maps", "refused")]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not stubbed.has_compiler(), reason="needs a C compiler")
@pytest.mark.parametrize(
    "candidate, launches, maps",
    [
        (hopper_gradients.TWO_PASSES, 3, 24),
        ({"PASSES": 1, "BLOCK": 64, "STAGES": 4, "TURNS": True}, 3, 12),
    ],
    ids=["two passes", "one pass"],
)
def test_a_driver_takes_every_launch_and_box(
    tmp_path: Path, candidate: dict[str, Any], launches: int, maps: int
) -> None:
    log = tmp_path / "log"
    counts = stubbed.run(LAUNCHED.replace("CANDIDATE", str(candidate)), log=log)
    assert counts == [12 * launches, 12 * maps, 0]
    kernels = [line["kernel"] for line in stub_driver.logged(log) if line["kind"] == "launch"]
    assert len(kernels) == 12 * launches and kernels[0] == "columns_kernel"
