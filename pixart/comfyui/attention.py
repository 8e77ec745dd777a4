"""Our attention kernel in a PixArt of ComfyUI.

ComfyUI lets `optimized_attention_override` of the transformer options replace attention, but its PixArt does
not hand its blocks the transformer options (0.3.64). So the blocks' attention is replaced, by object
patches: they are ComfyUI's own, belong to one clone of the model and are taken back with it.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pixart.device import kernel_obstacle
from pixart_kernels import flash_attention
from pixart_kernels.dispatch.registration import INTERPRETED

logger = logging.getLogger("pixart")


def patch_attention(patcher: Any) -> Any:
    """A clone of a ModelPatcher whose self- and cross-attention run through flash_attention.

    Where the kernel cannot run nothing changes, and a warning says why. ValueError unless the model is a
    PixArt, of ComfyUI or of PixArtKVLoader.
    """
    from comfy.ldm.pixart.pixartms import PixArtMS

    transformer = patcher.model.diffusion_model
    if not isinstance(transformer, PixArtMS):
        raise ValueError(f"model must be a PixArt, got {type(transformer).__name__}")
    for layer, block in enumerate(transformer.blocks):
        if block.attn.sr_ratio > 1 and not hasattr(block.attn, "merge"):
            raise ValueError(
                f"a compressed model must come from PixArtKVLoader, got {type(block.attn).__name__} in "
                f"block {layer}"
            )
    if (obstacle := _obstacle(torch.device(patcher.load_device))) is not None:
        logger.warning("PixArtPatchAttention changes nothing: %s", obstacle)
        return patcher
    clone = patcher.clone()
    for layer, block in enumerate(transformer.blocks):
        for name, forward in (("attn", _self_attention), ("cross_attn", _cross_attention)):
            attention = getattr(block, name)
            where = f"diffusion_model.blocks.{layer}.{name}.forward"
            clone.add_object_patch(where, partial(forward, attention, type(attention).forward))
    return clone


def _obstacle(device: torch.device) -> str | None:
    """Why the kernel cannot run on the device that the model computes on, None if it can."""
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the kernel needs a GPU of NVIDIA or AMD, got {device}"
    return kernel_obstacle(device)


def _self_attention(
    attn: Any,
    original: Callable[..., Tensor],
    x: Tensor,
    mask: Any = None,
    HW: Any = None,
    **rest: Any,
) -> Tensor:
    """In the place of AttentionKVCompress.forward. x: (B, N, C); HW: the token grid where the block
    compresses. Returns (B, N, C)."""
    if mask is not None:
        return original(attn, x, mask=mask, HW=HW, **rest)
    q, k, v = attn.qkv(x).chunk(3, dim=-1)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if attn.sr_ratio > 1:
        k, v = attn.merge(k, HW), attn.merge(v, HW)
    return attn.proj(_attend(q, k, v, attn.num_heads))


def _cross_attention(
    attn: Any,
    original: Callable[..., Tensor],
    x: Tensor,
    cond: Tensor,
    mask: Any = None,
    **rest: Any,
) -> Tensor:
    """In the place of MultiHeadCrossAttention.forward. x: (B, N, C); cond: (1, B·L, C), all captions in
    one row. Returns (B, N, C)."""
    if mask is not None:
        return original(attn, x, cond, mask=mask, **rest)
    k, v = attn.kv_linear(cond.reshape(len(x), -1, cond.shape[-1])).chunk(2, dim=-1)
    return attn.proj(_attend(attn.q_linear(x), k, v, attn.num_heads))


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(B, N, C) of q (B, N, C) and k, v (B, M, C)."""
    split = (each.unflatten(2, (heads, -1)) for each in (q, k, v))
    return flash_attention(*split).flatten(2)
