"""The forward kernel of attention, run by Triton's interpreter, against the formula in fp64.

An error may be twice that of plain PyTorch in the same dtype, plus one rounding of the result.
"""

from dataclasses import fields

import pytest
import torch
from operator_formulas import DTYPES, attention_formula, random
from operator_formulas import unwritten_memory_is_nan as unwritten_memory_is_nan  # a fixture
from torch import Tensor

from pixart_kernels import flash_attention
from pixart_kernels.dispatch.registration import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter: TRITON_INTERPRET=1")

if INTERPRETED:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from pixart_kernels.attention import bound, forward_launcher
    from pixart_kernels.dispatch import bypass, launch

# Keys through pointers; through the copy engine; through it, without a maximum where scores allow.
VARIANTS = [("sm_80", False), ("sm_90", False), ("sm_90", True)]


@pytest.fixture(params=VARIANTS, ids=["pointers", "boxes", "bounded"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, bounded = request.param
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    if bounded:
        monkeypatch.setattr(bound, "LOOKED_FOR_FROM", 0)


def qkv(batch: int, queries: int, keys: int, heads: int, channels: int, dtype: torch.dtype):
    sizes = ((batch, n, heads, channels) for n in (queries, keys, keys))
    return [random(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)]


def check(actual: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: object) -> None:
    exact = attention_formula(q.double(), k.double(), v.double(), **options)
    plain = attention_formula(q, k, v, **options).double()
    assert actual.shape == exact.shape
    assert actual.dtype == q.dtype
    rounding = torch.finfo(q.dtype).eps * max(exact.norm().item(), exact.numel() ** 0.5)
    budget = 2 * (plain - exact).norm().item() + rounding
    error = (actual.double() - exact).norm().item()
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"


# One query, one key; less and more than a tile; whole tiles only; more keys than queries.
SHAPES = [(1, 1, 1, 1, 72), (2, 63, 130, 2, 72), (1, 257, 64, 2, 72), (1, 1, 257, 3, 72)]


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_accurate_at_any_number_of_queries_and_keys(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    q, k, v = qkv(*shape, dtype)
    check(flash_attention(q, k, v), q, k, v)


# Powers of two, two tiles, one tile with zeros (112), no multiple of 8 (20: pointers everywhere).
@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("channels", [8, 16, 20, 40, 64, 80, 96, 112, 128])
def test_it_is_accurate_at_any_head_dimension(channels: int) -> None:
    q, k, v = qkv(1, 33, 140, 2, channels, torch.bfloat16)
    check(flash_attention(q, k, v), q, k, v)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[130, 129, 65, 64, 1, 0], [7, 500, 128, 0, 2, 63]])
def test_keys_at_and_beyond_each_length_do_not_count(
    lengths: list[int], dtype: torch.dtype
) -> None:
    q, k, v = qkv(6, 5, 130, 1, 72, dtype)
    kv_lengths = torch.tensor(lengths, dtype=torch.int32)
    expected = flash_attention(q, k, v, kv_lengths=kv_lengths)
    check(expected, q, k, v, kv_lengths=kv_lengths)
    for tokens in (k, v):
        for sample, length in zip(tokens, lengths, strict=True):
            sample[length:] = torch.nan
    assert torch.equal(flash_attention(q, k, v, kv_lengths=kv_lengths.long()), expected)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_log_of_the_sum_of_weights_is_in_base_2(dtype: torch.dtype) -> None:
    q, k, v = qkv(3, 70, 100, 2, 72, dtype)
    kv_lengths = torch.tensor([100, 30, 0])
    _, lse = torch.ops.pixart.flash_attention(q, k, v, kv_lengths, 0.25, True)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * 0.25
    for sample, length in enumerate(kv_lengths[:2]):
        exact = scores[sample, :, :, :length].logsumexp(-1) / torch.tensor(2.0).log()
        # Without a peak it is the sum of the weights as they were rounded.
        rounding = 1.5 * torch.finfo(dtype).eps if bound.LOOKED_FOR_FROM == 0 else 0
        assert (lse[sample] - exact).abs().max() < 1e-5 + rounding
    assert lse[2].count_nonzero() == 0


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same (B, N, H, D) numbers in other places in memory."""
    batch, tokens, heads, channels = x.shape
    packed = x.new_zeros(batch, tokens, 3, heads, channels)
    packed[:, :, 1] = x
    shifted = x.new_zeros(x.numel() + 1)[1:].view(x.shape)
    shifted.copy_(x)
    return {
        "a slice of a packed projection": packed[:, :, 1],
        "heads before tokens": x.transpose(1, 2).contiguous().transpose(1, 2),
        "channels not contiguous": x.transpose(1, 3).contiguous().transpose(1, 3),
        "not on a 16-byte boundary": shifted,
    }


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_strides_do_not_matter(layout: str) -> None:
    tensors = qkv(2, 20, 70, 2, 72, torch.bfloat16)
    expected = flash_attention(*tensors)
    assert torch.equal(flash_attention(*(layouts(x)[layout] for x in tensors)), expected)


@pytest.mark.usefixtures("variant")
def test_one_key_may_stand_for_all_samples() -> None:
    q, k, v = qkv(3, 9, 70, 2, 72, torch.bfloat16)
    k, v = (x[:1].expand(3, -1, -1, -1) for x in (k, v))
    assert torch.equal(flash_attention(q, k, v), flash_attention(q, k.clone(), v.clone()))


def test_the_copy_engine_is_used_for_packed_projections_and_where_it_can_read() -> None:
    packed = torch.zeros(2, 70, 3, 2, 72, dtype=torch.bfloat16)
    k, v = packed.unbind(2)[1:]
    make = forward_launcher._boxes("sm_90", k, v, (64, 16), (64, 16), 64)
    boxes = make((None, k, v))
    assert [box.base.data_ptr() for box in boxes] == [x.data_ptr() for x in (k, k, v, v)]
    for box in boxes:
        TensorDescriptor(*(getattr(box, field.name) for field in fields(box)))  # checks itself
    without_tail = forward_launcher._boxes("sm_90", k, v, (64, 0), (64, 0), 64)((None, k, v))
    assert [box is None for box in without_tail] == [False, True, False, True]
    for refused in (k.float(), k[:1].expand(2, -1, -1, -1)):
        assert forward_launcher._boxes("sm_90", refused, v, (64, 16), (64, 16), 64) is None
    for other in ("sm_80", "sm_89", "gfx942", "interpreter"):
        assert forward_launcher._boxes(other, k, v, (64, 16), (64, 16), 64) is None


@pytest.mark.parametrize("switch", ["0", "1", "off"])
def test_a_switch_turns_the_copy_engine_off(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setenv("PIXART_TMA", switch)
    made: list[object] = []
    monkeypatch.setattr(launch.Box, "__post_init__", lambda box: made.append(box))
    q, k, v = qkv(1, 9, 70, 2, 72, torch.bfloat16)
    if switch == "off":
        with pytest.raises(ValueError, match="PIXART_TMA must be 0 or 1, got 'off'"):
            flash_attention(q, k, v)
        return
    check(flash_attention(q, k, v), q, k, v)
    assert len(made) == (4 if switch == "1" else 0)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.5, -1.5])
def test_large_scores_and_outlier_tokens_are_no_problem(scale: float, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 40, 200, 1, 72, dtype)
    q[:, 3:6] *= 8  # |score| up to 100 and more, in rows that most keys are nothing to
    k[:, 150] *= 4
    v[:, 150] *= 50
    assert (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale).abs().max() > 100
    check(flash_attention(q, k, v, scale=scale), q, k, v, scale=scale)


@pytest.mark.usefixtures("variant")
def test_scores_that_only_grow_or_only_fall_are_no_problem() -> None:
    q, k, v = qkv(1, 3, 200, 1, 72, torch.bfloat16)
    q[:], k[:] = 1, torch.linspace(-1, 1, 200).view(1, 200, 1, 1)
    for keys in (k, k.flip(1)):
        check(flash_attention(q, keys, v, scale=1.0), q, keys, v, scale=1.0)


def exceeding_scores() -> list[Tensor]:
    q, k, v = qkv(1, 200, 200, 2, 72, torch.bfloat16)
    q[:, 140, 1] *= 100  # scores of ±300 in the second tile of the second head
    return [q, k, v]


def test_queries_too_long_for_the_bound_get_a_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "LOOKED_FOR_FROM", 0)
    q, k, v = exceeding_scores()
    check(flash_attention(q, k, v), q, k, v)
    monkeypatch.setitem(bound.LIMITS, torch.bfloat16, 10_000)
    bypass.forget()
    finite = flash_attention(q, k, v).isfinite().all(dim=3)
    assert finite[:, :, 0].all()
    assert not finite[:, 140, 1].any()


def test_the_longest_tokens_of_each_head_are_found() -> None:
    q, k, _ = qkv(2, 300, 1100, 3, 72, torch.bfloat16)
    lengths = torch.tensor([1100, 5])
    k[1, 5:] = torch.nan
    longest_q, longest_k = bound.prepare(q, k)(q, k, lengths)
    squares = q.double().square().sum(-1).transpose(1, 2)  # (B, H, N)
    expected = torch.stack([part.amax(-1) for part in squares.split(128, dim=-1)], dim=-1)
    assert torch.allclose(longest_q.view(expected.shape).double(), expected, rtol=1e-6)
    squares = k.double().square().sum(-1)
    expected = torch.stack([squares[0].amax(0), squares[1, :5].amax(0)])
    found = longest_k.view(2, 3, -1).amax(-1)
    assert torch.allclose(found.double(), expected, rtol=1e-6)


def test_no_tokens_give_no_tokens_and_no_keys_give_zeros() -> None:
    for batch, queries in ((0, 5), (2, 0)):
        q, k, v = qkv(batch, queries, 7, 2, 72, torch.bfloat16)
        assert flash_attention(q, k, v).shape == q.shape
    q, k, v = qkv(2, 5, 0, 2, 72, torch.bfloat16)
    assert flash_attention(q, k, v).count_nonzero() == 0


@pytest.mark.usefixtures("variant")
def test_the_same_input_gives_the_same_bits() -> None:
    q, k, v = qkv(2, 70, 100, 2, 72, torch.float16)
    lengths = torch.tensor([100, 33])
    first, second = (flash_attention(q, k, v, kv_lengths=lengths) for _ in range(2))
    assert torch.equal(first, second)


def test_a_negated_query_is_not_written_back() -> None:
    q, k, v = qkv(1, 5, 7, 1, 72, torch.float32)
    before = q.clone()
    flash_attention(q, k, v, scale=-1.0)
    assert torch.equal(q, before)


def test_tensors_that_need_no_gradient_get_none() -> None:
    q, k, v = qkv(2, 5, 7, 1, 72, torch.float32)
    exact = torch.autograd.functional.jacobian(
        lambda x: attention_formula(x, k.double(), v.double()).sum(), q.double()
    )
    q.requires_grad_()
    flash_attention(q, k, v).sum().backward()
    assert (q.grad - exact).norm() <= 1e-5 * exact.norm()
    assert k.grad is None
    assert v.grad is None


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_operator_keeps_the_rules_of_torch(needs_grad: bool) -> None:
    q, k, v = qkv(2, 5, 7, 1, 72, torch.float32)
    for x in (q, k, v):
        x.requires_grad_(needs_grad)
    arguments = (q, k, v, torch.tensor([7, 2]), 0.3, True)
    torch.library.opcheck(torch.ops.pixart.flash_attention.default, arguments)


def test_it_compiles_as_one_graph_with_its_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(2, 5, 7, 1, 72, torch.float32))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, kv_lengths=torch.tensor([7, 2])).square().sum()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, eager in zip(
        torch.autograd.grad(compiled(q, k, v), (q, k, v)), expected, strict=True
    ):
        assert torch.allclose(actual, eager)


@pytest.mark.parametrize("setting", ["legacy", "matmul", "everywhere"])
def test_no_way_of_allowing_tf32_disturbs_16_bit_inputs(setting: str) -> None:
    from pixart_kernels.dispatch import launch

    matmul, backends = torch.backends.cuda.matmul, torch.backends
    before = getattr(matmul, "fp32_precision", None)
    if before is None and setting != "legacy":
        pytest.skip("this PyTorch has only the legacy switch")
    try:
        if setting == "legacy":
            matmul.allow_tf32 = True
        elif setting == "matmul":
            matmul.fp32_precision = "tf32"
        else:
            backends.fp32_precision = "tf32"
        q = torch.randn(1, 3, 1, 8).bfloat16()
        assert flash_attention(q, q, q).isfinite().all()
        if setting != "everywhere":
            assert launch.precision(torch.float32) == "tf32"
    finally:
        if before is not None:
            backends.fp32_precision = "none"
            matmul.fp32_precision = before
        else:
            matmul.allow_tf32 = False
    assert launch.precision(torch.float32) == "ieee"
