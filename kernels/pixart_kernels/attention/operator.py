"""Attention of N queries over M keys, where each sample of a batch may have fewer keys than M.

    O[b, n, h] = sum_m softmax_m(scale · Q[b, n, h]·K[b, m, h]) V[b, m, h],    m < kv_lengths[b]

B batch, N image tokens, M key tokens (image tokens after compression, or caption tokens), H heads,
D head channels. Softmax and sums are fp32; the output is rounded once.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_kernels.attention.eight_bit_operator import flash_attention_8bit
from pixart_kernels.dispatch.bypass import Compute, remembered
from pixart_kernels.dispatch.registration import (
    TRITON_DEVICES,
    are_known,
    check_device,
    check_floating,
    in_forward_mode,
    is_transformed,
    register_backward,
    register_operator,
    without_autocast,
)

MAX_HEAD_DIM = 128


@without_autocast
def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax_m(scale · Q Kᵀ) V in plain PyTorch (Vaswani et al., arXiv:1706.03762, equation 1).

    q: (B, N, H, D); k, v: (B, M, H, D), all of one floating dtype; kv_lengths: (B,) integers, the
    keys of each sample that count, whatever the others hold; scale: 1/√D unless given. Returns
    (B, N, H, D) in q's dtype, under autocast too, and zeros for a sample without keys. What runs on a
    CPU: differentiable, in any dtype, D unlimited.
    """
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    mask = None
    if kv_lengths is not None:
        # (B, 1, 1, M); a row without any key comes out of SDPA as zeros, with zero gradients.
        mask = _key_mask(kv_lengths, k.shape[1])
        # A weight of 0 does not hide NaN: 0 · NaN is NaN, in the output and in every gradient.
        beyond = ~mask.transpose(1, 3)  # (B, M, 1, 1)
        k, v = k.masked_fill(beyond, 0), v.masked_fill(beyond, 0)
    # SDPA has no rule for forward mode, none for second derivatives, and on a CPU none for vmap.
    if in_forward_mode() or is_transformed() or _sdpa_backward_is_slow(q, k, v):
        return _explicit_attention(q, k, v, mask, scale)
    q, k, v = (tokens.transpose(1, 2) for tokens in (q, k, v))  # (B, H, N or M, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _key_mask(kv_lengths: Tensor, keys: int) -> Tensor:
    return torch.arange(keys, device=kv_lengths.device) < kv_lengths.view(-1, 1, 1, 1)


def _sdpa_backward_is_slow(q: Tensor, k: Tensor, v: Tensor) -> bool:
    # On a CPU in 16 bits, SDPA's backward takes 2 to 4 times as long as the formula written out
    # when keys are few, and less when they are many. Forward + backward, ms, one Sapphire Rapids
    # core, torch 2.13, autocast bf16, (B, N, M, H, D): SDPA / its math backend / written out
    #   (64, 64, 64, 3, 64)   30 /  23 /  8      (64, 256, 20, 3, 64)   64 /   - /  20
    #   (32, 128, 128, 3, 64) 36 /   - / 25      (64, 256, 256, 3, 64) 104 / 262 /  88
    #   (8, 256, 256, 16, 72) 81 /   - / 115     (16, 512, 512, 3, 64) 132 /   - / 268
    # One core of an EPYC of Zen 4, which has no AMX, same rows: written out in 0.35, 0.37, 0.33, 1.38,
    # 1.00 and 1.04 of SDPA's time. So the same sizes gain on both.
    # In fp32 the two are within 20 % at these sizes. The forward alone is quickest in SDPA.
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    queries, keys = q.shape[1], k.shape[1]
    if not needs_grad or q.device.type != "cpu" or q.element_size() != 2:
        return False
    return are_known(queries, keys) and keys <= 128 and queries <= 1024


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    batch, queries, heads, channels = q.shape
    scale = channels**-0.5 if scale is None else scale
    q, k, v = (tokens.transpose(1, 2).flatten(0, 1) for tokens in (q, k, v))  # (B·H, N or M, D)
    bias = q.new_zeros(1, 1, 1)
    if mask is not None:
        # A row without any key keeps its scores, to have no NaN on its way to being zeroed below.
        bias = bias.expand(mask.shape).masked_fill(~mask & mask[..., :1], -torch.inf)
        bias = bias.expand(-1, heads, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)  # (B·H, N, M)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(v.dtype)
    out = torch.bmm(weights, v).unflatten(0, (batch, heads)).transpose(1, 2)
    return out if mask is None else out.masked_fill(~mask[..., :1], 0)


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lengths: Tensor | None,
    scale: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    out = flash_attention_reference(q, k, v, kv_lengths=kv_lengths, scale=scale)
    # Autograd differentiates these steps; only the kernels' backward needs the sum of weights.
    return out.contiguous(), q.new_empty(0, dtype=torch.float32)


def _prepare(*arguments: Any) -> Compute:
    from pixart_kernels.attention.forward_launcher import prepare

    return prepare(*arguments)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lengths: Tensor | None,
    scale: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    has_lse = with_lse and q.device.type in TRITON_DEVICES
    lse_shape = (batch, heads, queries) if has_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _backward_schema(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_lengths: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


def _prepare_backward(*arguments: Any) -> Compute:
    from pixart_kernels.attention.backward_launcher import prepare

    return prepare(*arguments)


def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_lengths: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv_lengths, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output, kv_lengths)


def _backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    gradients = _attention_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    needed = zip(gradients, ctx.needs_input_grad, strict=False)
    return *(gradient if needs else None for gradient, needs in needed), None, None, None


def _precision(q: Tensor, *_: Any) -> str:
    """What the kernels depend on besides their arguments."""
    if q.dtype != torch.float32:
        return "ieee"
    from pixart_kernels.dispatch.launch import precision

    return precision(q.dtype)


def _precision_of_gradients(grad_out: Tensor, q: Tensor, *_: Any) -> str:
    return _precision(q)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lengths: Tensor | None,
    scale: float | None,
    with_lse: bool,
) -> None:
    _check_tokens(q, k, v)
    if kv_lengths is not None:
        check_device("kv_lengths", kv_lengths, k)
        _check_lengths(kv_lengths, k)


_attention = register_operator(
    "flash_attention",
    _eager,
    check=_check,
    prepare=_prepare,
    fake=_fake,
    save=_save,
    backward=_backward,
    setting=_precision,
)
_attention_backward = register_backward(
    "flash_attention_backward",
    _backward_schema,
    prepare=_prepare_backward,
    fake=_fake_backward,
    setting=_precision_of_gradients,
)


SCALE_OF_SCALED = math.log(2)  # what is left of a scale whose rest, log2(e) included, q came with


@remembered
def _takes_scaled(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    from pixart_kernels.attention.forward_launcher import takes_scaled_queries

    return takes_scaled_queries(device, dtype, head_dim)


def takes_scaled_queries(x: Tensor, head_dim: int) -> bool:
    """Whether a projection does well to multiply queries of x's device and dtype by scale · log2(e)
    before it rounds them, and attention to be called with scale=SCALE_OF_SCALED.

    It then has one product less for each score. True where a Gluon kernel is what is launched; asked
    once for each device, dtype and head dimension.
    """
    kind = x.device.type
    if kind not in TRITON_DEVICES or x.element_size() != 2 or torch.compiler.is_compiling():
        return False
    if (
        kind == "cuda" and not torch.cuda.is_available()
    ):  # of a tensor without numbers: no GPU to ask
        return False
    return _takes_scaled(x.device, x.dtype, head_dim)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lengths: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    precision: str | None = None,
) -> Tensor:
    """Softmax attention that never stores the N × M scores of a long sequence.

    q: (B, N, H, D); k, v: (B, M, H, D), tokens before heads, any strides, D at most 128. All three
    are of one dtype, fp32, bf16, fp16 or fp64; softmax and sums are fp32 (fp64 for fp64, by the
    reference). kv_lengths: (B,) integers, a tensor or a list. Keys at and beyond a sample's length are
    ignored, NaN too, and have gradients of zero; a sample of length 0 gives zeros. scale: 1/√D unless
    given. Returns (B, N, H, D) in q's dtype, under autocast too. Raises ValueError for shapes or dtypes
    that do not fit together: for (B, H, N, D), too, where q, k or lengths on the host show it.
    Differentiable in q, k and v (FlashAttention-2, arXiv:2307.08691); in forward mode and under
    torch.func by the reference.

    precision: "int8" or "fp8" multiplies 8-bit numbers, with errors of about 1 % and 4 % of the output
    for tokens of unit variance (eight_bit_operator.py), on fp32, bf16 and fp16 tokens and without
    derivatives; "fp8" wants an NVIDIA GPU of sm_89 or later, where there is a GPU.
    """
    lengths = None
    if kv_lengths is not None:
        _check_tokens(q, k, v)
        lengths = _lengths_beside(k, kv_lengths)
    scale = None if scale is None else float(scale)
    if precision is not None:
        _check(q, k, v, lengths, scale, False)
        return flash_attention_8bit(q, k, v, lengths, scale, precision)
    with_lse = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    # What is exported without gradients may be trained.
    with_lse = with_lse or torch.compiler.is_exporting()
    return _attention(q, k, v, lengths, scale, with_lse)[0]


def _lengths_beside(k: Tensor, given: Tensor | Sequence[int]) -> Tensor:
    """(B,) integers on the device of k."""
    if isinstance(given, Tensor) and given.device == k.device and given.device.type != "cpu":
        return given  # what is wrong with it is found once for its shape and dtype
    lengths = given if isinstance(given, Tensor) else _as_lengths(given)
    if lengths.device.type == "meta" and k.device.type != "meta":
        raise ValueError(f"kv_lengths must be on {k.device} or the CPU, got {lengths.device}")
    _check_lengths(lengths, k)
    longest = _longest(given)
    if k.shape[1] < longest <= k.shape[2]:
        raise ValueError(
            f"kv_lengths must be at most the {k.shape[1]} tokens of k, {tuple(k.shape)}, got {longest}"
            + _SWAPPED
        )
    # Asked, so that exported programs have no cast that does nothing.
    return lengths if lengths.device == k.device else lengths.to(k.device)


def _check_lengths(lengths: Tensor, k: Tensor) -> None:
    if lengths.shape != k.shape[:1]:
        raise ValueError(f"kv_lengths must have shape ({k.shape[0]},), got {tuple(lengths.shape)}")
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(
            f"kv_lengths must be integers, signed ones or uint8, got {lengths.dtype}; cast them"
        )


def _as_lengths(given: Sequence[int]) -> Tensor:
    try:
        lengths = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"kv_lengths must be integers, got {given!r}") from error
    return lengths.long() if lengths.numel() == 0 else lengths  # an empty list has no integers


def _longest(given: Tensor | Sequence[int]) -> int:
    """The largest, 0 where reading it would wait for a GPU or cannot be traced."""
    # In words that torch.compile knows: it has no default of max.
    if not isinstance(given, Tensor):
        return max([0, *[int(length) for length in given]])
    is_plain = type(given) is Tensor and not is_transformed()
    if torch.compiler.is_compiling() or not is_plain or given.device.type != "cpu":
        return 0
    return max([0, *given.tolist()])


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tokens in (("q", q), ("k", k), ("v", v)):
        if tokens.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {tuple(tokens.shape)}")
        check_floating(name, tokens)
        check_device(name, tokens, q)
        if tokens.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {tokens.dtype}")
    if k.shape != v.shape:
        raise ValueError(
            f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}"
            + (_SWAPPED if v.shape == k.transpose(1, 2).shape else "")
        )
    if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            f"k must have the batch, heads and channels of q, {tuple(q.shape)}, "
            f"got {tuple(k.shape)}{_SWAPPED if _looks_swapped(q, k) else ''}"
        )
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[3]}")


_SWAPPED = "; tokens come before heads, (B, N, H, D): pass x.transpose(1, 2) of tensors that have heads first"


def _looks_swapped(q: Tensor, k: Tensor) -> bool:
    """Whether both have heads where tokens belong, or one has."""
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        return False
    return q.shape[1] == k.shape[1] or q.shape[1] == k.shape[2] or q.shape[2] == k.shape[1]
