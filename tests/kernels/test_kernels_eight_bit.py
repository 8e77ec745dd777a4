"""Attention with 8-bit products: by its kernels in Triton's interpreter, else by its CPU reference.

Quantisation has an error of its own, which GATES bound: against the formula in fp64, on tokens of unit
variance. The kernels are held to the reference, which rounds where they do.
"""

from collections.abc import Callable

import pytest
import torch
from operator_formulas import attention_formula, random
from operator_formulas import unwritten_memory_is_nan as unwritten_memory_is_nan  # a fixture
from torch import Tensor

from pixart_kernels import flash_attention
from pixart_kernels.attention.eight_bit_operator import flash_attention_8bit_reference
from pixart_kernels.dispatch.registration import INTERPRETED

GATES = {"int8": 4e-2, "fp8": 6e-2}  # relative root mean square errors
LEAST_COSINE = 0.999
# An integer or an e4m3 that lies between two is not rounded to the same in every order of sums.
CLOSENESS = {"int8": 2e-3, "fp8": 6e-3}
precisions = pytest.mark.parametrize("precision", GATES)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter: TRITON_INTERPRET=1")

if INTERPRETED:
    import triton
    import triton.language as tl

    from pixart_kernels.attention import quantisation
    from pixart_kernels.attention.eight_bit import check_architecture
    from pixart_kernels.dispatch import launch

    @triton.jit
    def no_mean(ptr, row, length, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
        return tl.zeros([COLUMNS], tl.float32)


def qkv(
    batch: int, queries: int, keys: int, channels: int, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    sizes = ((batch, n, 2, channels) for n in (queries, keys, keys))
    return [random(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)]


def relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm()).item()


def check(
    q: Tensor, k: Tensor, v: Tensor, precision: str, lengths: Tensor | None = None
) -> tuple[float, float]:
    """Error and cosine against fp64, both within the gates."""
    out = flash_attention(q, k, v, kv_lengths=lengths, precision=precision)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    exact = attention_formula(q.double(), k.double(), v.double(), lengths)
    error = relative(out, exact)
    cosine = torch.cosine_similarity(out.double().flatten(), exact.flatten(), dim=0).item()
    assert error <= GATES[precision], f"error {error:.2e}"
    assert cosine >= LEAST_COSINE, f"cosine {cosine:.5f}"
    rounded = flash_attention_8bit_reference(q, k, v, lengths, None, precision)
    assert relative(out, rounded) <= CLOSENESS[precision]
    return error, cosine


@precisions
@pytest.mark.parametrize("channels", [64, 72, 128])
def test_it_is_accurate_at_the_head_dimensions_of_models(channels: int, precision: str) -> None:
    check(*qkv(1, 33, 141, channels), precision)


@precisions
@pytest.mark.parametrize("channels", [8, 40, 96])
def test_it_is_accurate_at_other_head_dimensions(channels: int, precision: str) -> None:
    check(*qkv(1, 5, 70, channels), precision)


@precisions
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_it_is_accurate_in_other_dtypes(dtype: torch.dtype, precision: str) -> None:
    check(*qkv(1, 9, 70, 72, dtype), precision)


@interpreted
@precisions
def test_tails_of_8_columns_give_the_same_bits(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = qkv(1, 65, 70, 72)
    expected = flash_attention(*tensors, precision=precision)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_89")
    assert torch.equal(flash_attention(*tensors, precision=precision), expected)


@precisions
def test_keys_at_and_beyond_each_length_do_not_count(precision: str) -> None:
    q, k, v = (x[:, :, :1] for x in qkv(4, 5, 130, 72))
    lengths = torch.tensor([130, 64, 7, 0])
    check(q, k, v, precision, lengths)
    expected = flash_attention(q, k, v, kv_lengths=lengths, precision=precision)
    assert expected[3].count_nonzero() == 0
    for tokens in (k, v):
        for sample, length in zip(tokens, lengths, strict=True):
            sample[length:] = torch.nan
    out = flash_attention(q, k, v, kv_lengths=[500, 64, 7, 0], precision=precision)
    assert torch.equal(out, expected)


def outliers() -> list[Tensor]:
    """Keys some of whose channels lie 50 deviations off, as those of trained models do."""
    q, k, v = qkv(1, 33, 141, 72)
    k[..., ::9] += 50
    return [q, k, v]


@precisions
def test_outlier_channels_of_keys_are_no_problem(precision: str) -> None:
    check(*outliers(), precision)


@interpreted
@precisions
def test_without_the_mean_taken_away_outliers_are_found_out(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisation, "_mean", no_mean)
    with pytest.raises(AssertionError, match="error"):
        check(*outliers(), precision)


@precisions
def test_channels_of_values_have_scales_of_their_own(precision: str) -> None:
    q, k, v = qkv(1, 9, 70, 72, torch.float16)
    v *= torch.logspace(-2, 3, 72)
    out = flash_attention(q, k, v, precision=precision)
    exact = attention_formula(q.double(), k.double(), v.double())
    errors = (out.double() - exact).flatten(0, 2).norm(dim=0) / exact.flatten(0, 2).norm(dim=0)
    assert errors.max() <= 2 * GATES[precision]


@precisions
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_may_be_negative_or_nothing(scale: float, precision: str) -> None:
    q, k, v = qkv(1, 9, 70, 72)
    out = flash_attention(q, k, v, scale=scale, precision=precision)
    weights = (torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * scale).softmax(-1)
    exact = torch.einsum("bhnm,bmhd->bnhd", weights, v.double())
    assert relative(out, exact) <= GATES[precision] * (1 if scale else 2)  # of a mean near zero


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same (B, N, H, D) numbers in other places in memory."""
    packed = x.new_zeros(x.shape[0], x.shape[1], 3, *x.shape[2:])
    packed[:, :, 1] = x
    shifted = x.new_zeros(x.numel() + 1)[1:].view(x.shape)
    shifted.copy_(x)
    return {
        "a slice of a packed projection": packed[:, :, 1],
        "heads before tokens": x.transpose(1, 2).contiguous().transpose(1, 2),
        "channels not contiguous": x.transpose(1, 3).contiguous().transpose(1, 3),
        "not on a 16-byte boundary": shifted,
    }


@precisions
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_strides_do_not_matter(layout: str, precision: str) -> None:
    tensors = qkv(1, 5, 70, 72)
    expected = flash_attention(*tensors, precision=precision)
    given = (layouts(x)[layout] for x in tensors)
    assert torch.equal(flash_attention(*given, precision=precision), expected)


@precisions
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(value: float, precision: str) -> None:
    # An integer has no NaN.
    clean = qkv(1, 3, 70, 72)
    for index in range(3):
        tensors = [x.clone() for x in clean]
        tensors[index][0, 1, 0, 5] = value
        out = flash_attention(*tensors, precision=precision)
        spoilt = ~out[0, :, 0].isfinite()
        expected = {0: spoilt[1].all(), 1: spoilt.all(), 2: spoilt[:, 5].all()}[index]
        assert expected, f"in {'qkv'[index]}"
        assert out[0, :, 1].isfinite().all()


@precisions
def test_no_tokens_give_no_tokens_and_no_keys_give_zeros(precision: str) -> None:
    for batch, queries, keys in ((0, 5, 7), (2, 0, 7), (2, 5, 0)):
        q, k, v = qkv(batch, queries, keys, 72)
        out = flash_attention(q, k, v, precision=precision)
        assert out.shape == q.shape
        assert out.count_nonzero() == 0


@interpreted
def test_quantised_keys_and_values_are_those_of_the_reference() -> None:
    from pixart_kernels.attention import eight_bit_operator as formula

    _, k, v = qkv(1, 1, 100, 72)
    k8, k_scales, v8, v_scales = quantisation.quantiser(k, v, 96, 72, 2, True)(k, v, None)
    centred = (k.float() - k.float().mean(1, keepdim=True))[0].transpose(0, 1)  # (H, M, D)
    for block, keys in enumerate(centred.split(formula.KEYS, dim=1)):
        integers, scales = formula._as_integers(keys, keys.abs().amax((1, 2), keepdim=True))
        start = block * formula.KEYS
        stored = k8[:, start : start + keys.shape[1]]
        assert (stored[..., :72] - integers).abs().max() <= 1
        assert (stored[..., :72] != integers).double().mean() < 1e-3
        assert stored[..., 72:].count_nonzero() == 0
        assert torch.allclose(k_scales[:, block], scales.flatten(), rtol=1e-6)
    assert k8[:, 100:].count_nonzero() == 0
    rounded, factors = formula._as_e4m3(v)
    assert torch.equal(v8[..., :100].float(), rounded[0].permute(1, 2, 0).float())
    assert v8[..., 100:].float().count_nonzero() == 0
    assert torch.allclose(v_scales, factors[0, :, 0], rtol=1e-6)


def test_the_same_input_gives_the_same_bits_under_autocast_too() -> None:
    tensors = qkv(1, 5, 7, 72)
    expected = flash_attention(*tensors, precision="fp8")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flash_attention(*tensors, precision="fp8"), expected)


X = random(1, 3, 2, 8)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "another precision": (
        lambda: flash_attention(X, X, X, precision="int4"),
        r"precision must be \"int8\", \"fp8\" or None, got 'int4'",
    ),
    "fp64": (
        lambda: flash_attention(*[X.double()] * 3, precision="int8"),
        "q must be fp32, bf16 or fp16 where precision is 'int8', got torch.float64; cast it",
    ),
    "too wide": (
        lambda: flash_attention(*[torch.zeros(1, 2, 1, 136)] * 3, precision="int8"),
        "head_dim must be at most 128, got 136",
    ),
    "a gradient": (
        lambda: flash_attention(X, X.clone().requires_grad_(), X, precision="int8"),
        "precision must be None where a derivative is wanted or torch.func is at work, got 'int8'",
    ),
    "forward mode": (
        lambda: torch.func.jvp(lambda x: flash_attention(x, X, X, precision="fp8"), (X,), (X,)),
        "precision must be None where a derivative is wanted",
    ),
    "mapped": (
        lambda: torch.vmap(lambda x: flash_attention(x, X, X, precision="fp8"))(X[None]),
        "precision must be None where a derivative is wanted",
    ),
    "lengths of another shape": (
        lambda: flash_attention(X, X, X, kv_lengths=[1, 2], precision="int8"),
        r"kv_lengths must have shape \(1,\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused_in_one_line(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_no_gradient_is_wanted_where_none_is_recorded() -> None:
    leaf = X.clone().requires_grad_()
    with torch.no_grad():
        assert not flash_attention(leaf, leaf, leaf, precision="int8").requires_grad


@interpreted
def test_fp8_is_refused_where_there_is_none() -> None:
    for architecture in ("sm_80", "sm_86", "gfx942"):
        check_architecture("int8", architecture)
        with pytest.raises(ValueError, match=f'"int8" or None on {architecture}, which has no'):
            check_architecture("fp8", architecture)
    for architecture in ("sm_89", "sm_90", "sm_100", "sm_120"):
        check_architecture("fp8", architecture)


@precisions
def test_the_operator_keeps_the_rules_of_torch(precision: str) -> None:
    q, k, v = qkv(2, 3, 5, 8)
    arguments = (q, k, v, torch.tensor([5, 2]), 0.3, precision)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.pixart.flash_attention_8bit.default
    torch.library.opcheck(operator, arguments, test_utils=tests)


def test_it_compiles_as_one_graph() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, kv_lengths=torch.tensor([5, 2]), precision="int8")

    tensors = qkv(2, 3, 5, 8)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), call(*tensors))
