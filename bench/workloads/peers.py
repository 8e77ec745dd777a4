"""Who else computes what our operators compute, each behind the same call.

A variant makes a call without arguments out of a workload's inputs: masks and layouts that a peer
wants are made once, outside of what is timed. A variant that is not installed, or cannot compute
this, raises Unavailable with the reason.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.workloads import sizes
from bench.workloads.operators import Inputs, Workload

Variant = Callable[[Inputs], Callable[[], Any]]


class Unavailable(RuntimeError):
    """Why a peer is not measured."""


def variants(work: Workload) -> dict[str, Variant]:
    """Ours and every peer of the operator, by name."""
    named: dict[str, Variant] = {"ours": partial(_bind, work.ours)}
    return named | _PEERS[work.operator](work)


def _bind(run: Callable[..., Any], inputs: Inputs) -> Callable[[], Any]:
    return partial(run, **inputs)


def compile_options(resolution: str) -> dict[str, Any]:
    """torch.compile for these very shapes; without code generation at the tiny one, which is there
    to try things out."""
    from torch._functorch import config

    config.donated_buffer = False  # or a backward pass could be timed only once
    torch._dynamo.config.recompile_limit = 64  # shapes, with and without gradients
    return {"backend": "aot_eager" if resolution == sizes.TINY else "inductor", "dynamic": False}


@cache  # one compilation for all copies of the inputs
def _compiled(function: Callable[..., Any], resolution: str) -> Callable[..., Any]:
    return torch.compile(function, **compile_options(resolution))


def _compile_and_bind(
    function: Callable[..., Any], resolution: str, inputs: Inputs
) -> Callable[[], Any]:
    return partial(_compiled(function, resolution), **inputs)


def _attention_peers(work: Workload) -> dict[str, Variant]:
    backends = {
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    named: dict[str, Variant] = {
        name: partial(_sdpa, [backend]) for name, backend in backends.items()
    }
    named["sdpa default"] = partial(_sdpa, None)
    named["flex"] = partial(_flex, work.resolution)
    named |= {f"fa{generation}": partial(_flash_package, generation) for generation in (2, 3, 4)}
    return named


def _sdpa(backends: list[SDPBackend] | None, inputs: Inputs) -> Callable[[], Tensor]:
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    lengths, mask = inputs.get("kv_lengths"), None
    if lengths is not None:
        keys = torch.arange(k.shape[2], device=k.device)
        mask = keys < lengths.view(-1, 1, 1, 1)  # (B, 1, 1, M)
    attend = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)

    def call() -> Tensor:
        if backends is None:
            return attend().transpose(1, 2)
        with sdpa_kernel(backends):
            return attend().transpose(1, 2)

    return call


def _flex(resolution: str, inputs: Inputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    lengths, mask = inputs.get("kv_lengths"), None
    if lengths is not None:

        def exists(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key < lengths[batch]

        mask = create_block_mask(exists, q.shape[0], None, q.shape[2], k.shape[2], q.device.type)
    attend = _compiled(flex_attention, resolution)
    return lambda: attend(q, k, v, block_mask=mask).transpose(1, 2)


def _flash_package(generation: int, inputs: Inputs) -> Callable[[], Tensor]:
    if "kv_lengths" in inputs:
        raise Unavailable("takes no padded keys in this layout")
    module = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}[generation]
    try:
        attend = import_module(module).flash_attn_func
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"not installed: {error}") from None
    call = partial(attend, *(inputs[name] for name in "qkv"))

    def first() -> Tensor:
        out = call()
        return out[0] if isinstance(out, tuple) else out

    return first


def _elementwise_peers(work: Workload) -> dict[str, Variant]:
    formula = _FORMULAS[work.operator]
    return {
        "eager": partial(_bind, work.reference),
        "eager formula": partial(_bind, formula),
        "compiled": partial(_compile_and_bind, work.reference, work.resolution),
    }


# The formulas as model code usually has them, one operation of PyTorch after the other.
def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    shift, scale = (row.to(x.dtype).unsqueeze(1) for row in (shift, scale))
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _gate_add(x: Tensor, branch: Tensor, gate: Tensor | None = None) -> Tensor:
    return x + branch if gate is None else x + gate.to(x.dtype).unsqueeze(1) * branch


def _gate_add_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    y = _gate_add(x, branch, gate)
    return y, _modulate(y, shift, scale)


_FORMULAS: dict[str, Callable[..., Any]] = {
    "modulate": _modulate,
    "gate_add": _gate_add,
    "gate_add_modulate": _gate_add_modulate,
}


def _compression_peers(work: Workload) -> dict[str, Variant]:
    return {
        "eager": partial(_bind, work.reference),
        "compiled": partial(_compile_and_bind, work.reference, work.resolution),
        "official": partial(_bind, _compress_as_published),
        "official compiled": partial(_compile_and_bind, _compress_as_published, work.resolution),
        "diffusers": partial(_refuse, "diffusers has no key/value compression"),
    }


def _refuse(reason: str, inputs: Inputs) -> Callable[[], Any]:
    raise Unavailable(reason)


def _compress_as_published(
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    grid: tuple[int, int],
    ratio: int,
) -> tuple[Tensor, Tensor]:
    """An image of C channels, a convolution, tokens again, a LayerNorm: in the tokens' dtype, for K
    and then for V. Drops the rows and columns that the ratio leaves over."""

    def merge(tokens: Tensor) -> Tensor:
        image = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        image = F.conv2d(image, weight, bias, stride=ratio, groups=tokens.shape[2])
        merged = image.flatten(2).permute(0, 2, 1)
        return F.layer_norm(merged, norm_weight.shape, norm_weight, norm_bias)

    return merge(k), merge(v)


def _projection_peers(work: Workload) -> dict[str, Variant]:
    return {"eager": partial(_bind, work.reference), "folded": _folded}


def _folded(inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    """Convolution and projection as one product, over tokens that lie patch after patch."""
    (rows, cols), ratio = inputs["grid"], inputs["ratio"]
    if rows % ratio or cols % ratio:
        raise Unavailable("needs a grid that the ratio divides")
    x = inputs["x"].detach()
    patches = x.view(x.shape[0], rows // ratio, ratio, cols // ratio, ratio, x.shape[2])
    patches = patches.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2).contiguous()
    weight, bias = fold(*(inputs[name] for name in ("projection", "offset", "weight", "bias")))
    norm_weight, norm_bias = inputs["norm_weight"], inputs["norm_bias"]

    def call() -> tuple[Tensor, Tensor]:
        merged = F.linear(patches, weight, bias).unflatten(2, (2, -1))
        k, v = F.layer_norm(merged, norm_weight.shape, norm_weight, norm_bias).unbind(2)
        return k, v

    return call


@torch.no_grad()
def fold(projection: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (2C, R·R·C) and bias (2C,) of compress_kv's convolution after a projection (2C, C)."""
    taps = weight.flatten(1).float().repeat(2, 1)  # (2C, R·R): K and V are merged alike
    folded = (taps.unsqueeze(2) * projection.float().unsqueeze(1)).flatten(1)
    moved = taps.sum(dim=1) * offset.float() + bias.float().repeat(2)
    return folded.to(projection.dtype), moved.to(offset.dtype)


_PEERS: dict[str, Callable[[Workload], dict[str, Variant]]] = {
    "flash_attention": _attention_peers,
    "compress_kv": _compression_peers,
    "project_kv": _projection_peers,
    "modulate": _elementwise_peers,
    "gate_add": _elementwise_peers,
    "gate_add_modulate": _elementwise_peers,
}
