"""The Triton kernels of compression, in Triton's interpreter, against formulas written out in fp64;
and the folded projection, which is plain PyTorch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operator_formulas import DTYPES, check_accuracy, random
from operator_formulas import unwritten_memory_is_nan as unwritten_memory_is_nan  # a fixture
from torch import Tensor
from torch.library import opcheck

from pixart_kernels import compress_kv
from pixart_kernels.compression.operator import fold_projection
from pixart_kernels.dispatch.registration import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter: TRITON_INTERPRET=1")


def merge_formula(
    tokens: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], ratio: int
) -> Tensor:
    patches = gather_patches(tokens, grid, ratio).unflatten(2, (ratio**2, -1))
    return torch.einsum("bmtc,ct->bmc", patches, weight.flatten(1)) + bias


def gather_patches(tokens: Tensor, grid: tuple[int, int], ratio: int) -> Tensor:
    """(B, H·W, C) -> (B, M, R·R·C); the last row and column repeated where there is none."""
    index = []
    for top in range(0, grid[0], ratio):
        for left in range(0, grid[1], ratio):
            rows = [min(top + p, grid[0] - 1) for p in range(ratio)]
            cols = [min(left + q, grid[1] - 1) for q in range(ratio)]
            index.append([row * grid[1] + col for row in rows for col in cols])
    return tokens[:, torch.tensor(index)].flatten(2)


def functions(
    grid: tuple[int, int], ratio: int
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """compress_kv and its formula, of a packed projection (B, N, 3·C), both results in one."""

    def operator(packed: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        k, v = packed.chunk(3, dim=-1)[1:]
        affine = norm or (None, None)
        return torch.stack(compress_kv(k, v, weight, bias, *affine, grid=grid, ratio=ratio))

    def formula(packed: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        merged = [
            merge_formula(tokens, weight, bias, grid, ratio)
            for tokens in packed.chunk(3, dim=-1)[1:]
        ]
        if norm:
            merged = [F.layer_norm(tokens, bias.shape, *norm, 1e-5) for tokens in merged]
        return torch.stack(merged)

    return operator, formula


def tensors(
    batch: int, grid: tuple[int, int], channels: int, ratio: int, dtype: torch.dtype
) -> list[Tensor]:
    """The packed projection, weight, bias, norm_weight and norm_bias."""
    packed = random(batch, grid[0] * grid[1], 3 * channels, dtype=dtype)
    weight = random(channels, 1, ratio, ratio, dtype=dtype, seed=1)
    return [packed, weight, *(random(channels, dtype=dtype, seed=s) for s in (2, 3, 4))]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [2, 3])
def test_whole_and_odd_grids_are_accurate_forward_and_backward(
    ratio: int, dtype: torch.dtype
) -> None:
    for grid in ((ratio, 2 * ratio), (ratio + 1, 2 * ratio - 1)):
        check_accuracy(*functions(grid, ratio), *tensors(2, grid, 24, ratio, dtype))


@interpreted
@pytest.mark.parametrize(
    ("grid", "ratio"),
    [
        ((1, 3), 1),  # nothing to merge
        ((5, 6), 4),  # the last row and the last two columns of a patch are one
        ((1, 1), 4),  # all taps on one token
        ((9, 2), 2),
        ((1, 63), 2),
    ],
)
def test_any_ratio_and_grid_is_accurate(grid: tuple[int, int], ratio: int) -> None:
    check_accuracy(*functions(grid, ratio), *tensors(1, grid, 8, ratio, torch.bfloat16))


@interpreted
@pytest.mark.parametrize("channels", [144, 1152])
def test_widths_of_models_are_accurate(channels: int) -> None:
    check_accuracy(*functions((3, 2), 2), *tensors(1, (3, 2), channels, 2, torch.bfloat16))


@interpreted
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_without_a_norm_it_is_the_convolution(grid: tuple[int, int]) -> None:
    check_accuracy(*functions(grid, 2), *tensors(1, grid, 24, 2, torch.float32)[:3])


@interpreted
def test_fp32_weights_beside_16_bit_tokens_keep_their_precision() -> None:
    packed = tensors(1, (4, 4), 24, 2, torch.bfloat16)[:1]
    leaves = [*packed, *tensors(1, (4, 4), 24, 2, torch.float32)[1:]]
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    operator, formula = functions((4, 4), 2)
    out, exact = operator(*leaves), formula(*wide)
    weights = random(*out.shape, dtype=torch.bfloat16)
    gradients = torch.autograd.grad(out, leaves, weights)
    expected = torch.autograd.grad(exact, wide, weights.double())
    assert out.dtype == torch.bfloat16
    for leaf, actual, wanted in zip(leaves, gradients, expected, strict=True):
        assert actual.dtype == leaf.dtype
        assert (actual - wanted).norm() <= torch.finfo(leaf.dtype).eps * 4 * wanted.norm()


@interpreted
def test_any_strides_give_the_same_result() -> None:
    packed, *weights = tensors(2, (4, 4), 24, 2, torch.float32)
    _, k, v = (part.contiguous() for part in packed.chunk(3, dim=-1))
    apart = k.transpose(1, 2).contiguous().transpose(1, 2), v
    for actual in (apart, packed.chunk(3, dim=-1)[1:]):
        outs = compress_kv(*actual, *weights, grid=(4, 4), ratio=2)
        expected = compress_kv(k, v, *weights, grid=(4, 4), ratio=2)
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


@interpreted
def test_results_are_the_same_bits_every_time() -> None:
    inputs = [t.requires_grad_() for t in tensors(1, (6, 7), 24, 2, torch.bfloat16)]
    outs = [functions((6, 7), 2)[0](*inputs) for _ in range(2)]
    gradients = [torch.autograd.grad(out.float().square().sum(), inputs) for out in outs]
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@interpreted
def test_an_empty_batch_gives_nothing_and_weights_without_gradient() -> None:
    inputs = [t.requires_grad_() for t in tensors(0, (4, 4), 24, 2, torch.float32)]
    out = functions((4, 4), 2)[0](*inputs)
    assert out.shape == (2, 0, 4, 24)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@interpreted
@pytest.mark.parametrize("norms", [2, 0])
def test_the_operator_keeps_the_contract_of_custom_operators(norms: int) -> None:
    packed, weight, bias, *norm = tensors(1, (2, 3), 8, 2, torch.float32)
    k, v = (part.clone().requires_grad_() for part in packed.chunk(3, dim=-1)[1:])
    affine = [row.requires_grad_() for row in norm] if norms else [None, None]
    weights = weight.requires_grad_(), bias.requires_grad_()
    opcheck(torch.ops.pixart.compress_kv.default, (k, v, *weights, *affine, 2, 3, 2, 1e-5))


@interpreted
def test_compiled_compression_is_the_same_forward_and_backward() -> None:
    inputs = [t.requires_grad_() for t in tensors(1, (3, 4), 24, 2, torch.float32)]
    operator, _ = functions((3, 4), 2)
    outs = torch.compile(operator, fullgraph=True, backend="aot_eager")(*inputs), operator(*inputs)
    assert torch.equal(*outs)
    gradients = (torch.autograd.grad(out.square().sum(), inputs) for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("grid", "ratio"), [((4, 6), 2), ((5, 4), 2), ((6, 3), 3)])
def test_the_folded_projection_is_projection_then_merging(
    grid: tuple[int, int], ratio: int
) -> None:
    channels, features = 8, 12
    x = random(2, grid[0] * grid[1], features, dtype=torch.float64)
    weight_kv, bias_kv = random(2 * channels, features), random(2 * channels, seed=1)
    weight, bias = random(channels, 1, ratio, ratio, seed=2), random(channels, seed=3)
    folded = fold_projection(weight_kv, bias_kv, weight, bias)
    actual = F.linear(gather_patches(x, grid, ratio), *(t.double() for t in folded))
    keys_values = F.linear(x, weight_kv.double(), bias_kv.double()).chunk(2, dim=-1)
    expected = [
        merge_formula(tokens, weight.double(), bias.double(), grid, ratio) for tokens in keys_values
    ]
    assert torch.allclose(actual, torch.cat(expected, dim=-1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_folded_projection_is_as_accurate_in_16_bits(dtype: torch.dtype) -> None:
    channels, features, grid = 32, 64, (4, 4)
    x = random(1, 16, features, dtype=dtype)
    weight_kv = (random(2 * channels, features) * features**-0.5).to(dtype)
    bias_kv, bias = random(2 * channels, dtype=dtype, seed=1), random(channels, dtype=dtype, seed=3)
    weight = random(channels, 1, 2, 2, dtype=dtype, seed=2)

    def two_steps(x: Tensor, *weights: Tensor) -> Tensor:
        kv = F.linear(x, *weights[:2]).chunk(2, dim=-1)
        return torch.cat([merge_formula(tokens, *weights[2:], grid, 2) for tokens in kv], dim=-1)

    weights = (weight_kv, bias_kv, weight, bias)
    exact = two_steps(x.double(), *(t.double() for t in weights))
    folded = F.linear(gather_patches(x, grid, 2), *fold_projection(*weights))
    error, plain = (folded - exact).norm(), (two_steps(x, *weights) - exact).norm()
    assert error <= 2 * plain + torch.finfo(dtype).eps * exact.norm()


def test_a_projection_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_kv must have 16 rows, got shape \(8, 12\)"):
        fold_projection(random(8, 12), random(8), random(8, 1, 2, 2), random(8))
