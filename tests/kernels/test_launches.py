"""The host's path of a launch, without a GPU: a stub stands for the CUDA driver and counts."""

from pathlib import Path

import pytest
import stubbed

from bench.compiled import stub_driver

pytestmark = pytest.mark.skipif(not stubbed.has_compiler(), reason="needs a C compiler")

# Every operator, forward and backward, twice each at two sizes.
CALLS = """
def tensors(*shape, grad=False, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype).requires_grad_(grad)

def calls(grad, tokens, heads=2, head_dim=72):
    width = heads * head_dim
    q, k, v = (x.detach().requires_grad_(grad) for x in tensors(1, tokens, 3, heads, head_dim).unbind(2))
    x, branch = tensors(1, tokens, width, grad=grad), tensors(1, tokens, width, grad=grad)
    shift, scale, gate = (
        row.detach().requires_grad_(grad) for row in tensors(1, 3, width, dtype=torch.float32).unbind(1)
    )
    taps, bias = tensors(width, 1, 2, 2, grad=grad), tensors(width, grad=grad)
    return {
        "flash_attention": lambda: flash_attention(q, k, v),
        "modulate": lambda: modulate(x, shift, scale),
        "gate_add": lambda: gate_add(x, branch, gate),
        "gate_add_modulate": lambda: gate_add_modulate(x, branch, gate, shift, scale),
        "compress_kv": lambda: compress_kv(
            x, branch, taps, bias, bias, bias, grid=(4, tokens // 4), ratio=2),
    }

def backward(output):
    outputs = output if isinstance(output, tuple) else (output,)
    torch.autograd.backward(outputs, [torch.zeros_like(one) for one in outputs])
"""
COUNTED = """
found = {}
for name, call in calls(grad=False, tokens=64).items():
    counts = []
    for _ in range(3):
        before = stub_driver.counted("launches")
        with torch.no_grad():
            call()
        counts.append(stub_driver.counted("launches") - before)
    found[name] = counts
print(json.dumps(found))
"""


def test_a_call_without_gradients_is_one_launch() -> None:
    found = stubbed.run(CALLS + COUNTED)
    assert found and all(counts == [1, 1, 1] for counts in found.values()), found


EVERYTHING = """
for tokens in (64, 68):
    for grad in (False, True):
        for _ in range(2):
            for call in calls(grad, tokens).values():
                output = call()
                if grad:
                    backward(output)
print(json.dumps([stub_driver.counted(what) for what in stub_driver.COUNTS]))
"""


def test_processes_launch_the_same(tmp_path: Path) -> None:
    """Kernels, grids, blocks, shared memory and maps: so the bits of a picture are the same."""
    logs = [tmp_path / "first", tmp_path / "second"]
    counts = [stubbed.run(CALLS + EVERYTHING, log=log) for log in logs]
    first, second = map(stub_driver.logged, logs)
    assert counts[0] == counts[1] and counts[0][2] == 0 and len(first) == sum(counts[0])
    assert first == second
    assert len({line["kernel"] for line in first if line["kind"] == "launch"}) >= 6


# Which configuration is on each launch: nothing is timed, however often it is called.
THREADS = """
import sys, threading
sys.setswitchinterval(1e-5)
errors, made = [], []
barrier = threading.Barrier(2)

def work():
    barrier.wait()
    for number in range(80):
        grad = number % 2 == 1
        tokens = 16 + 8 * (number // 2 % 5)
        with torch.set_grad_enabled(grad):
            for call in calls(grad, tokens).values():
                try:
                    output = call()
                    if grad:
                        backward(output)
                    made.append(1)
                except BaseException as error:
                    errors.append(f"{type(error).__name__}: {error}"[:200])

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps([len(made), errors[:3], stub_driver.counted("launches"), stub_driver.counted("refused")]))
"""


def test_two_threads_may_launch_from_their_first_call_on() -> None:
    made, errors, launches, refused = stubbed.run(CALLS + THREADS)
    assert errors == [] and refused == 0
    assert made == 2 * 80 * 5 and launches >= made


ONE = """
q, k, v = torch.zeros(1, 64, 3, 2, 72, dtype=torch.bfloat16).unbind(2)
with torch.no_grad():
    for _ in range(2):
        flash_attention(q, k, v)
print(json.dumps([stub_driver.counted(what) for what in stub_driver.COUNTS]))
"""


def test_tma_is_described_anew_at_each_launch_and_can_be_switched_off() -> None:
    launches, maps, refused = stubbed.run(ONE)
    assert (launches, refused) == (2, 0) and maps > 0 and maps % 2 == 0
    assert stubbed.run(ONE, PIXART_TMA="0") == [2, 0, 0]
    failed = stubbed.start(ONE, PIXART_TMA="maybe")
    assert "ValueError: PIXART_TMA must be 0 or 1, got 'maybe'" in failed.stderr


def test_a_gpu_without_tma_gets_no_maps() -> None:
    assert stubbed.run(ONE, "sm_80") == [2, 0, 0]


def test_strides_that_tma_does_not_take_are_read_by_pointers() -> None:
    """A head dimension of 36: 72 bytes from head to head, which 16 does not divide."""
    odd = ONE.replace("3, 2, 72,", "3, 2, 36,")
    assert stubbed.run(odd) == [2, 0, 0]


OFF = """
q, k, v = torch.zeros(1, 64, 3, 2, 72, dtype=torch.bfloat16).unbind(2)
moved = torch.zeros(k.numel() + 1, dtype=torch.bfloat16)[1:].view(k.shape)
found = []
with torch.no_grad():
    for keys in (k.contiguous(), moved, k.contiguous()):
        before = [stub_driver.counted(what) for what in stub_driver.COUNTS]
        flash_attention(q, keys, keys)
        found.append([stub_driver.counted(w) - b for w, b in zip(stub_driver.COUNTS, before)])
print(json.dumps(found))
"""


def test_an_address_that_16_does_not_divide_is_never_described() -> None:
    aligned, moved, again = stubbed.run(OFF)
    assert aligned == again and aligned[0] == moved[0] == 1 and aligned[1] > 0
    assert moved[1:] == [0, 0]


OLD = """
import triton
compiled = []
triton.knobs.runtime.jit_cache_hook = lambda *args, **kwargs: compiled.append(1)
q, k, v = torch.zeros(1, 64, 3, 2, 72, dtype=torch.bfloat16).unbind(2)
try:
    flash_attention(q, k, v)
except RuntimeError as error:
    print(json.dumps([str(error), len(compiled), stub_driver.counted("launches")]))
"""


def test_an_old_gpu_gets_one_line_before_anything_is_compiled() -> None:
    message, compiled, launches = stubbed.run(OLD, "sm_75")
    assert message.startswith("stub is sm_75, and the kernels need sm_80") and "\n" not in message
    assert (compiled, launches) == (0, 0)
