"""The operators against formulas written out in fp64.

An error may be twice that of plain PyTorch in the same dtype, plus one rounding of the result
(errors are norms; inputs have unit scale).
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operator_formulas import (
    DTYPES,
    attention_formula,
    check_accuracy,
    gate_formula,
    modulation_formula,
    random,
)
from torch import Tensor

from pixart_kernels import compress_kv, flash_attention, gate_add, gate_add_modulate, modulate

# Few keys, as from a caption; more queries than the CPU's path for few keys takes; tiny; N = M.
ATTENTION_SHAPES = [(2, 63, 20, 3, 72), (1, 1100, 9, 2, 64), (2, 5, 3, 2, 8), (1, 257, 257, 2, 96)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_attention_is_accurate_forward_and_backward(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch, queries, keys, heads, channels = shape
    q = random(batch, queries, heads, channels, dtype=dtype)
    k, v = (random(batch, keys, heads, channels, dtype=dtype, seed=s) for s in (1, 2))
    check_accuracy(flash_attention, attention_formula, q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [20, 300])
def test_attention_ignores_keys_at_and_beyond_each_length(keys: int, dtype: torch.dtype) -> None:
    q = random(4, 33, 2, 72, dtype=dtype)
    k, v = (random(4, keys, 2, 72, dtype=dtype, seed=s) for s in (1, 2))
    lengths = torch.tensor([keys, 7, 1, 0], dtype=torch.int32)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, kv_lengths=lengths)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_formula(q, k, v, lengths)

    # The formula's softmax of a row without keys is NaN in its backward; that row is tested below.
    first = slice(0, 3)
    lengths = lengths[first]
    check_accuracy(masked, formula, q[first], k[first], v[first])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [20, 300])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_sample_without_keys_gets_zeros_and_zero_gradients(
    keys: int, dtype: torch.dtype, needs_grad: bool
) -> None:
    q, k, v = (random(2, n, 2, 64, dtype=dtype).requires_grad_(needs_grad) for n in (9, keys, keys))
    out = flash_attention(q, k, v, kv_lengths=torch.tensor([0, 3]))
    assert out[0].count_nonzero() == 0
    assert out[1].count_nonzero() > 0
    if needs_grad:
        for gradient in torch.autograd.grad(out.float().square().sum(), (q, k, v)):
            assert gradient[0].count_nonzero() == 0
            assert gradient[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_constant_values_returns_them(dtype: torch.dtype) -> None:
    q, k = random(2, 40, 2, 72, dtype=dtype), random(2, 30, 2, 72, dtype=dtype, seed=1)
    v = random(2, 1, 2, 72, dtype=dtype, seed=2)
    out = flash_attention(q, k, v.expand(-1, 30, -1, -1), kv_lengths=torch.tensor([30, 4]))
    assert torch.allclose(out, v.expand_as(out), rtol=8 * torch.finfo(dtype).eps)


def test_attention_takes_views_of_one_packed_projection() -> None:
    packed = random(2, 50, 3, 4, 72)
    q, k, v = packed.unbind(2)
    expected = flash_attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(flash_attention(q, k, v), expected)


def test_attention_scales_by_what_it_is_given() -> None:
    q, k, v = (random(1, 9, 1, 16, seed=s) for s in range(3))
    out = flash_attention(q, k, v, scale=0.5)
    assert torch.allclose(out, attention_formula(q, k, v, scale=0.5), atol=1e-6)
    assert not torch.allclose(out, flash_attention(q, k, v), atol=1e-2)


def test_empty_batches_and_empty_captions_are_no_error() -> None:
    assert flash_attention(*(random(0, 5, 2, 8) for _ in range(3))).shape == (0, 5, 2, 8)
    none = random(2, 0, 2, 8)
    assert flash_attention(random(2, 5, 2, 8), none, none).count_nonzero() == 0
    x, row = random(0, 5, 8), random(0, 8)
    assert gate_add_modulate(x, x, row, row, row)[1].shape == x.shape
    with torch.no_grad():
        assert modulate(x, row, row).shape == x.shape


def compression_formula(
    k: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, ratio: int
) -> Tensor:
    # A grid of 5 rows and 7 columns, its tokens gathered with clamped indices.
    rows = [[min(i * ratio + p, 4) for p in range(ratio)] for i in range(-(-5 // ratio))]
    cols = [[min(j * ratio + q, 6) for q in range(ratio)] for j in range(-(-7 // ratio))]
    patches = k.unflatten(1, (5, 7))[:, torch.tensor(rows)][:, :, :, torch.tensor(cols)]
    merged = torch.einsum("bipjqc,cpq->bijc", patches, weight[:, 0]) + bias
    return F.layer_norm(merged.flatten(1, 2), bias.shape, norm_weight, norm_bias, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
def test_compression_is_accurate_on_a_grid_that_no_ratio_divides(
    ratio: int, dtype: torch.dtype
) -> None:
    packed = random(2, 35, 3 * 24, dtype=dtype)
    k, v = packed.chunk(3, dim=-1)[1:]
    weight, bias = random(24, 1, ratio, ratio, dtype=dtype), random(24, dtype=dtype, seed=1)
    norm = [random(24, dtype=dtype, seed=s) for s in (2, 3)]
    for index, tokens in enumerate((k, v)):

        def operator(*inputs: Tensor, index: int = index) -> Tensor:
            both = compress_kv(inputs[0], inputs[0], *inputs[1:], grid=(5, 7), ratio=ratio)
            return both[index]

        def formula(*inputs: Tensor) -> Tensor:
            return compression_formula(*inputs, ratio=ratio)

        check_accuracy(operator, formula, tokens, weight, bias, *norm)


def test_keys_and_values_are_compressed_each_from_its_own_tokens() -> None:
    k, v = random(1, 16, 8), random(1, 16, 8, seed=1)
    weights = random(8, 1, 2, 2), random(8), random(8), random(8)
    keys, values = compress_kv(k, v, *weights, grid=(4, 4), ratio=2)
    assert torch.equal(keys, compress_kv(k, k, *weights, grid=(4, 4), ratio=2)[1])
    assert torch.equal(values, compress_kv(v, v, *weights, grid=(4, 4), ratio=2)[0])
    assert not torch.allclose(keys, values)


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 1), (9, 2)])
@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_averaging_keeps_constants_and_every_token(grid: tuple[int, int], ratio: int) -> None:
    row = random(1, 1, 8)
    k = row.expand(2, grid[0] * grid[1], 8)
    weight, bias = torch.full((8, 1, ratio, ratio), ratio**-2), torch.zeros(8)
    keys, _ = compress_kv(k, k, weight, bias, None, None, grid=grid, ratio=ratio)
    assert keys.shape[1] == -(-grid[0] // ratio) * -(-grid[1] // ratio)
    assert torch.allclose(keys, row.expand_as(keys), atol=1e-6)


# 1,000 tokens: PyTorch's LayerNorm on a CPU would sum their weight gradients in 16 bits.
@pytest.mark.parametrize("tokens", [7, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_modulation_is_accurate(tokens: int, dtype: torch.dtype) -> None:
    x, branch = (random(3, tokens, 72, dtype=dtype, seed=s) for s in (0, 1))
    shift, scale, gate = (random(3, 72, dtype=dtype, seed=s) for s in (2, 3, 4))
    check_accuracy(modulate, modulation_formula, x, shift, scale)
    check_accuracy(gate_add, gate_formula, x, branch, gate)

    def second(*inputs: Tensor) -> Tensor:
        return gate_add_modulate(*inputs)[1]

    def formula(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return modulation_formula(gate_formula(x, branch, gate), shift, scale)

    check_accuracy(second, formula, x, branch, gate, shift, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_modulation_is_as_accurate_without_gradients(dtype: torch.dtype) -> None:
    x, shift, scale = (random(*s, dtype=dtype) for s in ((3, 50, 72), (3, 72), (3, 72)))
    exact = modulation_formula(x.double(), shift.double(), scale.double())
    with torch.no_grad():
        error = (modulate(x, shift, scale).double() - exact).norm()
        assert error <= (modulation_formula(x, shift, scale).double() - exact).norm()


def test_zero_shift_and_scale_leave_the_layer_norm() -> None:
    x, zero = random(2, 9, 24), torch.zeros(2, 24)
    expected = F.layer_norm(x, (24,), eps=1e-6)
    assert torch.allclose(modulate(x, zero, zero), expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(modulate(x, zero, zero), expected, atol=1e-6)


def test_a_gate_of_zero_is_the_identity_and_no_gate_is_one() -> None:
    x, branch = random(2, 7, 24), random(2, 7, 24, seed=1)
    shift, scale = random(2, 24), random(2, 24, seed=1)
    assert torch.equal(gate_add(x, branch, torch.zeros(2, 24)), x)
    assert torch.equal(gate_add(x, branch), x + branch)
    y, modulated = gate_add_modulate(x, branch, None, shift, scale)
    assert torch.equal(y, x + branch)
    assert torch.equal(modulated, modulate(y, shift, scale))


@pytest.mark.parametrize("grad", [True, False])
def test_tokens_keep_their_dtype_beside_fp32_rows(grad: bool) -> None:
    x, row = random(2, 6, 24, dtype=torch.bfloat16), random(2, 24)
    merge = random(24, 1, 2, 2), random(24), random(24), random(24)
    with torch.set_grad_enabled(grad):
        outputs = [modulate(x, row, row), gate_add(x, x, row)]
        outputs += gate_add_modulate(x, x.float(), row, row, row)
        outputs += compress_kv(x, x, *merge, grid=(2, 3), ratio=2)
    assert {output.dtype for output in outputs} == {torch.bfloat16}


def test_autocast_does_not_lower_the_precision_of_compression() -> None:
    k = random(1, 16, 8)
    weights = random(8, 1, 2, 2), random(8), random(8), random(8)
    expected, _ = compress_kv(k, k, *weights, grid=(4, 4), ratio=2)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = compress_kv(k, k, *weights, grid=(4, 4), ratio=2)
    assert torch.equal(actual, expected)


X = torch.zeros(2, 6, 8)
HEADS = torch.zeros(2, 6, 2, 8)
ROW = torch.zeros(2, 8)
MERGE = torch.zeros(8, 1, 2, 2), torch.zeros(8)
REFUSED = [
    (lambda: flash_attention(*[torch.zeros(1, 4, 1, 160)] * 3), "head_dim must be at most 128"),
    (lambda: flash_attention(X, HEADS, HEADS), "q must have 4 dimensions"),
    (lambda: flash_attention(HEADS, HEADS, HEADS.half()), "v must have the dtype of q"),
    (lambda: flash_attention(HEADS, HEADS, HEADS[:, :3]), "v must have the shape of k"),
    (lambda: flash_attention(HEADS, HEADS[:1], HEADS[:1]), "k must have the batch, heads and"),
    (
        lambda: flash_attention(HEADS, HEADS, HEADS, kv_lengths=torch.ones(3).int()),
        r"kv_lengths must have shape \(2,\), got \(3,\)",
    ),
    (
        lambda: flash_attention(HEADS, HEADS, HEADS, kv_lengths=torch.ones(2)),
        "kv_lengths must be integers",
    ),
    (lambda: modulate(X, ROW[:1], ROW), r"shift must have shape \(2, 8\), got \(1, 8\)"),
    (lambda: modulate(X[0], ROW, ROW), "x must have 3 dimensions"),
    (lambda: gate_add(X, X[:, :1], ROW), "branch must have the shape of x"),
    (lambda: gate_add(X, X, ROW[:, :1]), "gate must have shape"),
    (lambda: gate_add(X, X, [0.5] * 8), "gate must be a tensor or a number, got list"),
    (lambda: modulate(X, None, ROW), "shift must be a tensor or a number, got NoneType"),
    (lambda: gate_add_modulate(X, X, None, ROW, X[:, :2]), "scale must have shape"),
    (lambda: compress_kv(X, X, *MERGE, None, None, grid=(3, 3), ratio=2), "grid must have 6"),
    (lambda: compress_kv(X, X, *MERGE, None, None, grid=(2, 3), ratio=5), "ratio must be from 1"),
    (lambda: compress_kv(X, X, *MERGE, None, None, grid=(2, 3), ratio=3), "weight must have"),
    (lambda: compress_kv(X, X, *MERGE, ROW[0], None, grid=(2, 3), ratio=2), "given together"),
    (lambda: compress_kv(X, X, *MERGE, ROW, ROW, grid=(2, 3), ratio=2), "norm_weight must have"),
    (lambda: compress_kv(X, X[:1], *MERGE, None, None, grid=(2, 3), ratio=2), "k and v must be"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_arguments_that_cannot_be_honoured_are_refused(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call()
