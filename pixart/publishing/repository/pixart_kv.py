"""PixArt's transformer with merged keys and values, for diffusers: remote code of a published model.

diffusers' own class has no place for what key/value token compression adds (PixArt-Σ, arXiv:2403.04692,
section 3.2) and would drop those weights. This one has it, computes with `pixart_kernels` where they are
installed and can run, and in plain PyTorch elsewhere.

Axis letters: B batch, N image tokens (rows·cols), M merged tokens, L caption tokens, C channels, H heads,
D channels of a head, R ratio.
"""

import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

# In the place of diffusers' "ada_norm_single": its own class refuses by this text, in place of drawing
# without the weights that it does not know.
GUARD = (
    "ada_norm_single of PixArtKVTransformer2DModel; load the pipeline with trust_remote_code=True"
)
CALL = "pixart_kv"  # in cross_attention_kwargs, which diffusers hands from forward to processor
SAMPLINGS = ("conv", "average", "uniform", "uniform_every")

_has_kernels = importlib.util.find_spec("pixart_kernels") is not None
_kernels: Any = importlib.import_module("pixart_kernels") if _has_kernels else None


def kernels_for(x: Tensor) -> Any:
    """pixart_kernels where they are installed and can run on the device of x, else None."""
    if _kernels is None or x.device.type == "cpu":
        return _kernels
    if x.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    is_old = torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0)
    return None if is_old else _kernels


class PixArtKVTransformer2DModel(PixArtTransformer2DModel):
    """diffusers' PixArt transformer, with keys and values of some blocks merged R×R.

    kv_compression: layers (block indices), ratio (R), sampling ("conv", "average", "uniform",
    "uniform_every") and norm ("layer", "none"), or None. qk_norm: a LayerNorm of queries and one of keys.
    model_max_length: tokens of the longest caption it was trained with. has_null_caption: whether the
    weights hold a null caption of their own, `null_caption` (model_max_length, caption_channels).
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        cross_attention_dim: int | None = 1152,
        sample_size: int = 128,
        patch_size: int = 2,
        norm_type: str = "ada_norm_single",
        interpolation_scale: float | None = None,
        use_additional_conditions: bool = False,
        caption_channels: int | None = 4096,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        kv_compression: dict[str, Any] | None = None,
        model_max_length: int = 300,
        has_null_caption: bool = False,
    ) -> None:
        if caption_channels is None:
            raise ValueError(
                "caption_channels must be a width, got None: a model without a caption embedding is not "
                "supported here"
            )
        if norm_type not in (GUARD, "ada_norm_single"):
            raise ValueError(f"norm_type must be {GUARD!r}, got {norm_type!r}")
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            cross_attention_dim=cross_attention_dim,
            sample_size=sample_size,
            patch_size=patch_size,
            norm_type="ada_norm_single",
            interpolation_scale=interpolation_scale,  # type: ignore[arg-type]  # fractions work
            use_additional_conditions=use_additional_conditions,
            caption_channels=caption_channels,
        )
        self.register_to_config(norm_type=norm_type)
        width = num_attention_heads * attention_head_dim
        for layer, block in enumerate(self.transformer_blocks):
            own = kv_compression if _merges(kv_compression, layer) else None
            _extend(block.attn1, width, own, qk_norm)
            block.attn2.set_processor(PixArtKVAttnProcessor())
            if mlp_ratio != 4.0:
                block.ff = FeedForward(
                    width, activation_fn="gelu-approximate", inner_dim=int(width * mlp_ratio)
                )
        if has_null_caption:
            table = torch.zeros(model_max_length, caption_channels)
            self.register_buffer("null_caption", table)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own. hidden_states: (B, in_channels, h, w); encoder_hidden_states: (B, L,
        caption_channels); encoder_attention_mask: (B, L), non-zero where a token counts, or None for all.
        """
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states must be given, got None")
        if attention_mask is not None:
            raise ValueError("attention_mask must be None: image tokens have no mask, got one")
        for layer, block in enumerate(self.transformer_blocks):
            for name in ("attn1", "attn2"):
                processor = getattr(block, name).processor
                # Not by class: diffusers runs this file again for every repository that it opens.
                if not getattr(processor, "is_pixart_kv", False):
                    raise ValueError(
                        f"transformer_blocks.{layer}.{name}.processor must be a PixArtKVAttnProcessor, "
                        f"which merges keys and values, got {type(processor).__name__}"
                    )
        caption, lengths = _pack(encoder_hidden_states, encoder_attention_mask)
        side = self.config.patch_size
        grid = (hidden_states.shape[2] // side, hidden_states.shape[3] // side)
        return super().forward(
            hidden_states,
            encoder_hidden_states=caption,
            timestep=timestep,  # type: ignore[arg-type]
            added_cond_kwargs=added_cond_kwargs,  # type: ignore[arg-type]
            cross_attention_kwargs={**(cross_attention_kwargs or {}), CALL: (grid, lengths)},
            return_dict=return_dict,
        )

    def fuse_qkv_projections(self) -> None:
        """Refused: the processors here read three projections."""
        raise ValueError("fuse_qkv_projections is not supported by PixArtKVTransformer2DModel")


class PixArtKVAttnProcessor:
    """Self-attention over merged keys and values, and cross-attention over the tokens that count."""

    is_pixart_kv = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        pixart_kv: tuple[tuple[int, int], Tensor | None] | None = None,
    ) -> Tensor:
        """hidden_states: (B, N, C); encoder_hidden_states: (B, L, C). Returns (B, N, C)."""
        if pixart_kv is None:
            raise ValueError(
                "the transformer must be called, not its blocks, for the grid of tokens"
            )
        grid, lengths = pixart_kv
        is_cross = encoder_hidden_states is not None
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        if not is_cross:
            if getattr(attn, "q_norm", None) is not None:
                q, k = _layer_norm(q, attn.q_norm), _layer_norm(k, attn.k_norm)
            compression = getattr(attn, "kv_compression", None)
            if compression is not None:
                k, v = _compress(k, v, grid, compression, attn)
        q, k, v = (each.unflatten(2, (attn.heads, -1)) for each in (q, k, v))
        out = _attend(q, k, v, lengths if is_cross else None).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def _merges(compression: dict[str, Any] | None, layer: int) -> bool:
    return compression is not None and compression["ratio"] > 1 and layer in compression["layers"]


def _extend(attn: Any, width: int, compression: dict[str, Any] | None, qk_norm: bool) -> None:
    """Give a self-attention what diffusers' has not; the convolution starts as the mean."""
    attn.set_processor(PixArtKVAttnProcessor())
    if qk_norm:
        attn.q_norm, attn.k_norm = nn.LayerNorm(width), nn.LayerNorm(width)
    if compression is None:
        return
    ratio, sampling = compression["ratio"], compression["sampling"]
    if sampling not in SAMPLINGS:
        raise ValueError(
            f"kv_compression.sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}"
        )
    attn.kv_compression = dict(compression)
    if sampling == "conv":
        attn.sr = nn.Conv2d(width, width, ratio, stride=ratio, groups=width)
        nn.init.constant_(attn.sr.weight, ratio**-2)
        nn.init.zeros_(attn.sr.bias)
    if compression["norm"] == "layer":
        attn.norm = nn.LayerNorm(width)


def _compress(
    k: Tensor, v: Tensor, grid: tuple[int, int], compression: dict[str, Any], attn: Any
) -> tuple[Tensor, Tensor]:
    """Merge keys and values (B, N, C) of a grid: (B, M, C) each."""
    ratio, norm = compression["ratio"], getattr(attn, "norm", None)
    if compression["sampling"] == "uniform_every":
        k, v = k[:, ::ratio], v[:, ::ratio]
    elif compression["sampling"] == "uniform":
        k, v = (x.unflatten(1, grid)[:, ::ratio, ::ratio].flatten(1, 2) for x in (k, v))
    else:
        weight, bias = _merging_weights(k, ratio, getattr(attn, "sr", None))
        affine = (None, None) if norm is None else (norm.weight, norm.bias)
        kernels = kernels_for(k)
        if kernels is not None:
            return kernels.compress_kv(k, v, weight, bias, *affine, grid=grid, ratio=ratio)
        return _convolve(k, weight, bias, norm, grid), _convolve(v, weight, bias, norm, grid)
    return (k, v) if norm is None else (_layer_norm(k, norm), _layer_norm(v, norm))


def _merging_weights(like: Tensor, ratio: int, sr: Any) -> tuple[Tensor, Tensor]:
    """(C, 1, R, R) and (C,): the convolution's own, or those of the mean in fp32."""
    if sr is not None:
        return sr.weight, sr.bias
    width = like.shape[-1]
    weight = like.new_full((width, 1, ratio, ratio), ratio**-2, dtype=torch.float32)
    return weight, like.new_zeros(width, dtype=torch.float32)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, norm: Any, grid: tuple[int, int]) -> Tensor:
    """(B, N, C) to (B, M, C), in fp32 and rounded once. A grid that R does not divide is completed by its
    last row and column: no token is dropped."""
    ratio = weight.shape[-1]
    image = x.float().transpose(1, 2).unflatten(2, grid)  # (B, C, rows, cols)
    short = (0, -grid[1] % ratio, 0, -grid[0] % ratio)
    image = F.pad(image, short, mode="replicate")
    merged = F.conv2d(image, weight.float(), bias.float(), stride=ratio, groups=weight.shape[0])
    merged = merged.flatten(2).transpose(1, 2)
    return (merged if norm is None else _layer_norm(merged, norm)).to(x.dtype)


def _layer_norm(x: Tensor, norm: Any) -> Tensor:
    """norm(x), computed in fp32 and rounded to x's dtype."""
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(x.float(), weight.shape, weight, bias, norm.eps).to(x.dtype)


def _pack(caption: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The kept tokens of each caption first, the batch cut to the longest, and how many count: (B,) int32,
    or None if all that remain do. Attention does not see their order."""
    if mask is None:
        return caption, None
    if mask.shape != caption.shape[:2]:
        raise ValueError(
            f"encoder_attention_mask must be {tuple(caption.shape[:2])}, got {tuple(mask.shape)}"
        )
    kept = mask != 0
    lengths = kept.sum(dim=1, dtype=torch.int32)
    counts = lengths.tolist()
    if min(counts) == 0:
        raise ValueError(
            "encoder_attention_mask must keep a token of every caption, got none of one"
        )
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(counts)]
    caption = caption.gather(
        1, order.to(caption.device)[..., None].expand(-1, -1, caption.shape[2])
    )
    return caption, None if min(counts) == max(counts) else lengths.to(caption.device)


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """q: (B, N, H, D); k, v: (B, M or L, H, D); lengths: (B,). Returns (B, N, H, D)."""
    kernels = kernels_for(q)
    if kernels is not None:
        return kernels.flash_attention(q, k, v, kv_lengths=lengths)
    mask = None
    if lengths is not None:
        mask = torch.arange(k.shape[1], device=k.device) < lengths[:, None]  # (B, L)
        mask = mask[:, None, None]
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
