"""The backward kernels of attention in Triton's interpreter, against a formula written in fp64.

An error may be twice that of plain PyTorch in the same dtype, plus one rounding of the result, plus
what the order of the fp32 sums can make of it: the interpreter's products are NumPy's, whose BLAS
library chooses an order for each CPU.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pixart_kernels import flash_attention
from pixart_kernels.dispatch.registration import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter: TRITON_INTERPRET=1")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The formula, and the logarithm to base 2 of each row's sum; 0 for a sample without keys."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * scale
    if lengths is not None:
        absent = torch.arange(k.shape[2]) >= lengths.view(-1, 1, 1, 1)
        scores = scores.masked_fill(absent, -torch.inf)
        scores = scores.masked_fill((lengths <= 0).view(-1, 1, 1, 1), 0)
        v = v.masked_fill((lengths <= 0).view(-1, 1, 1, 1), 0)
    lse = scores.logsumexp(-1) * math.log2(math.e)
    if lengths is not None:
        lse = lse.masked_fill((lengths <= 0).view(-1, 1, 1), 0)
    return (scores.softmax(-1) @ v).transpose(1, 2), lse


def tensors(
    batch: int, queries: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype
) -> list[Tensor]:
    """grad_out, q, k, v"""
    generator = torch.Generator().manual_seed(0)
    rows = (queries, queries, keys, keys)
    return [torch.randn(batch, n, heads, head_dim, generator=generator).to(dtype) for n in rows]


def launched(
    inputs: list[Tensor], lengths: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, ...]:
    """The kernels' gradients, for an output and row sums that are exact but for their rounding."""
    grad_out, q, k, v = inputs
    out, lse = attention(q.double(), k.double(), v.double(), lengths, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return backward(grad_out, q, k, v, out.to(q.dtype), lse.float(), lengths, scale)


def backward(*arguments: object) -> tuple[Tensor, ...]:
    from pixart_kernels.attention.backward_launcher import prepare

    return prepare(*arguments)(*arguments)


def through_autograd(
    inputs: list[Tensor], lengths: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, ...]:
    """The kernels' gradients for the output and the row sums of the forward kernel."""
    leaves = [x.clone().requires_grad_() for x in inputs[1:]]
    out = flash_attention(*leaves, kv_lengths=lengths, scale=scale)
    return torch.autograd.grad(out, leaves, inputs[0])


def differentiated(
    inputs: list[Tensor],
    dtype: torch.dtype,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    grad_out, *leaves = (x.detach().to(dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    out, _ = attention(*leaves, lengths, scale)
    return torch.autograd.grad(out, leaves, grad_out)


def from_the_order_of_sums(
    inputs: list[Tensor], lengths: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, ...]:
    """Three standard deviations of the rounding errors that sums in fp32 bring into dq, dk and dv.

    Of n products a·b added one by one, the i-th partial sum is about i/n · Σ|a·b| where all have one
    sign, less where they have not, and its rounding is uniform within u = 2⁻²⁴ of it: a variance of
    Σᵢ (u · i/n · Σ|a·b|)² / 3 = n · (u · Σ|a·b|)² / 9 in any order. To first order the errors of
    different sums add up in squares on their way to the gradients, but for those of lse and of δ, which
    a row shares. P is a softmax: an absolute error of a score or of lse is a relative one of a weight.
    """
    u = torch.finfo(torch.float32).eps / 2
    scale = inputs[1].shape[-1] ** -0.5 if scale is None else scale
    g, q, k, v = (x.double().transpose(1, 2) for x in inputs)  # (B, H, N or M, D)
    root_n, root_d, root_m = (u * n**0.5 for n in (*q.shape[2:], k.shape[2]))
    lengths = (torch.tensor([k.shape[2]]) if lengths is None else lengths).view(-1, 1, 1, 1)
    scores = (q @ k.mT * scale).masked_fill(torch.arange(k.shape[2]) >= lengths, -torch.inf)
    p = scores.softmax(-1).nan_to_num(0)  # (B, H, N, M); a sample without keys has no weights
    out, grad = p @ v, g @ v.mT
    centred = grad - (g * out).sum(-1, keepdim=True)
    ds = p * centred

    # Nine times the variances.
    of_score = (root_d * scale * (q.abs() @ k.abs().mT)) ** 2
    of_lse = (p**2 * of_score).sum(-1, keepdim=True) + root_m**2
    of_out = (p**2 * (of_score + of_lse)) @ v**2 + (root_m * (p @ v.abs())) ** 2
    of_delta = (g**2 * of_out).sum(-1, keepdim=True)
    of_delta += (root_d * (g * out).abs().sum(-1, keepdim=True)) ** 2
    of_grad = (root_d * (g.abs() @ v.abs().mT)) ** 2
    own = ds**2 * of_score + p**2 * of_grad
    only = lengths == 1  # a weight of 1 in any order
    own, of_lse_ds, of_delta = (x.masked_fill(only, 0) for x in (own, of_lse, of_delta))
    of_dq = own @ k**2 + of_lse_ds * (ds @ k) ** 2 + of_delta * (p @ k) ** 2
    of_dq += (root_m * (ds.abs() @ k.abs())) ** 2
    of_dk = (own + ds**2 * of_lse_ds + p**2 * of_delta).mT @ q**2
    of_dk += (root_n * (ds.abs().mT @ q.abs())) ** 2
    of_dv = (p**2 * (of_score + of_lse)).mT @ g**2 + (root_n * (p.mT @ g.abs())) ** 2
    factors = (abs(scale), abs(scale), 1)
    return tuple(
        factor * variance.sqrt().transpose(1, 2)
        for factor, variance in zip(factors, (of_dq, of_dk, of_dv), strict=True)
    )


def check(
    actual: tuple[Tensor, ...],
    inputs: list[Tensor],
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> None:
    dtype = inputs[1].dtype
    exact = differentiated(inputs, torch.float64, lengths, scale)
    plain = differentiated(inputs, dtype, lengths, scale)
    orders = from_the_order_of_sums(inputs, lengths, scale)
    for name, a, p, e, order in zip(("dq", "dk", "dv"), actual, plain, exact, orders, strict=True):
        assert a.dtype == dtype and a.shape == e.shape and a.is_contiguous()
        for size in (torch.Tensor.norm, lambda x: x.abs().max()):
            budget = 2 * size(p.double() - e) + torch.finfo(dtype).eps * size(e) + size(order)
            error = size(a.double() - e)
            assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"),
    [
        (1, 1, 72),  # a single key: its weight is 1, so that dq and dk are 0
        (63, 257, 72),
        (257, 63, 72),
        (65, 129, 64),  # no tail; one more than a tile
        (64, 33, 80),  # a tail without missing channels
        (33, 64, 96),
        (17, 40, 128),
        (20, 20, 8),  # fewer channels than a product may sum over
        (20, 20, 16),
        (20, 20, 40),
        (20, 20, 104),  # one tile of 128
    ],
)
def test_gradients_are_as_accurate_as_plain_pytorch(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype
) -> None:
    inputs = tensors(1, queries, keys, 1, head_dim, dtype)
    check(launched(inputs), inputs)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_architectures_tiles_give_the_gradients(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixart_kernels.dispatch import launch

    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    inputs = tensors(1, 130, 70, 1, 72, dtype)
    lengths = torch.tensor([67])
    check(launched(inputs, lengths), inputs, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_sample_and_head_has_its_own_gradients(dtype: torch.dtype) -> None:
    inputs = tensors(2, 20, 30, 3, 72, dtype)
    check(launched(inputs), inputs)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_beyond_their_length_get_zeros_and_give_nothing(
    dtype: torch.dtype, index: torch.dtype
) -> None:
    inputs = tensors(5, 20, 130, 1, 72, dtype)
    lengths = torch.tensor([0, 1, 63, 130, 1000], dtype=index)
    exact = [x.clone() for x in inputs]
    for x in inputs[2:]:
        for sample, length in zip(x, lengths, strict=True):
            sample[length:] = torch.nan
    out, lse = attention(*(x.double() for x in exact[1:]), lengths)
    gradients = backward(*inputs, out.to(dtype), lse.float(), lengths, 72**-0.5)
    check(gradients, exact, lengths)
    for gradient in gradients[1:]:
        for sample, length in zip(gradient, lengths, strict=True):
            assert not sample[length:].any()


def test_a_sample_without_keys_has_zero_gradients() -> None:
    inputs = tensors(1, 5, 70, 2, 72, torch.bfloat16)
    for gradient in launched(inputs, torch.tensor([0])):
        assert not gradient.any()


@pytest.mark.parametrize(
    "size", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=["batch", "queries", "keys"]
)
def test_nothing_to_attend_gives_zeros(size: tuple[int, int, int]) -> None:
    batch, queries, keys = size
    inputs = tensors(batch, queries, keys, 2, 72, torch.float32)
    lse = torch.zeros(batch, 2, queries)
    gradients = backward(*inputs, torch.zeros_like(inputs[1]), lse, None, 1.0)
    for gradient, x in zip(gradients, inputs[1:], strict=True):
        assert gradient.shape == x.shape and not gradient.any()


@pytest.mark.parametrize("heads", [1, 3])
def test_views_of_packed_projections_need_no_copy(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grad_out, q, k, v = tensors(2, 20, 20, heads, 72, torch.float16)
    packed = torch.stack((q, k, v), dim=2)
    views = [grad_out.transpose(1, 2).contiguous().transpose(1, 2), *packed.unbind(2)]
    out, lse = attention(q.double(), k.double(), v.double())
    out, lse = out.half().contiguous(), lse.float().contiguous()
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", None)
        patch.setattr(Tensor, "clone", None)
        gradients = backward(*views, out, lse, None, 72**-0.5)
    check(gradients, [grad_out, q, k, v])


@pytest.mark.parametrize("stride", [73, 80])
def test_rows_at_any_distance(stride: int) -> None:
    inputs = tensors(2, 20, 20, 2, 72, torch.float32)
    apart = [torch.zeros(*x.shape[:3], stride)[..., :72].copy_(x) for x in inputs]
    check(launched(apart), inputs)


def test_the_gradient_of_a_sum_has_no_strides() -> None:
    grad_out, *inputs = tensors(1, 20, 30, 2, 72, torch.float32)
    expanded = torch.ones(()).expand(grad_out.shape)
    check(launched([expanded, *inputs]), [expanded, *inputs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_keep_their_accuracy(dtype: torch.dtype) -> None:
    inputs = tensors(1, 40, 70, 1, 72, dtype)
    logits = inputs[1].double().squeeze() @ inputs[2].double().squeeze().mT
    scale = 100 / logits.abs().max().item()
    check(through_autograd(inputs, scale=scale), inputs, scale=scale)


def test_missing_keys_do_not_overflow() -> None:
    inputs = tensors(1, 20, 70, 1, 72, torch.float32)
    inputs[1] += 10
    inputs[2] -= 10  # logits near -850: a key of zeros would have an infinite weight
    lengths = torch.tensor([40])
    check(through_autograd(inputs, lengths), inputs, lengths)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale: float) -> None:
    inputs = tensors(1, 20, 30, 1, 72, torch.float32)
    check(launched(inputs, scale=scale), inputs, scale=scale)
    check(through_autograd(inputs, scale=scale), inputs, scale=scale)


def test_few_keys_share_the_queries_among_programs() -> None:
    from pixart_kernels.attention.backward_launcher import _parts

    # Two parts of 640 and 460 queries; the last tile of the second is not full.
    assert _parts(1100, 20, 1) == (2, 640)
    inputs = tensors(1, 1100, 20, 1, 72, torch.bfloat16)
    lengths = torch.tensor([13])
    first, second = (launched(inputs, lengths) for _ in range(2))
    check(first, inputs, lengths)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("queries", [1, 511, 1024, 4096, 65536, 100_000])
@pytest.mark.parametrize(("keys", "batch_heads"), [(1, 1), (300, 16), (300, 64), (4096, 16)])
def test_parts_hold_every_query_and_none_is_empty(
    queries: int, keys: int, batch_heads: int
) -> None:
    from pixart_kernels.attention.backward_launcher import _parts

    parts, share = _parts(queries, keys, batch_heads)
    assert share % 128 == 0  # whole tiles
    assert (parts - 1) * share < queries <= parts * share


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    inputs = tensors(1, 130, 70, 1, 72, dtype)
    for first, second in zip(launched(inputs), launched(inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autograd_reaches_the_kernels(dtype: torch.dtype) -> None:
    inputs = tensors(2, 20, 40, 2, 72, dtype)
    lengths = torch.tensor([40, 7])
    check(through_autograd(inputs, lengths), inputs, lengths)


def test_inputs_without_a_gradient_get_none() -> None:
    grad_out, q, k, v = tensors(1, 20, 30, 1, 72, torch.float32)
    k.requires_grad_()
    flash_attention(q, k, v).backward(grad_out)
    assert q.grad is None and v.grad is None
    expected = differentiated([grad_out, q, k, v], torch.float32)[1]
    torch.testing.assert_close(k.grad, expected)


@pytest.mark.parametrize("lengths", [None, [30, 0]], ids=["all keys", "lengths"])
def test_the_operator_keeps_pytorchs_contract(lengths: list[int] | None) -> None:
    grad_out, q, k, v = tensors(2, 20, 30, 2, 72, torch.float32)
    kv_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    out, lse = attention(q, k, v, kv_lengths)
    arguments = (grad_out, q, k, v, out.contiguous(), lse.contiguous(), kv_lengths, 72**-0.5)
    torch.library.opcheck(torch.ops.pixart.flash_attention_backward.default, arguments)


def test_a_compiled_graph_holds_forward_and_backward() -> None:
    inputs = tensors(2, 20, 30, 2, 72, torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs[1:]]
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")
    check(torch.autograd.grad(compiled(*leaves), leaves, inputs[0]), inputs)
