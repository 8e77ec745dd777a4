"""ComfyUI's PixArt with K/V compression, and with positions as the model was trained.

Only inside ComfyUI: its classes are the bases. Its own PixArtMS has compression in its attention, but never
builds it, and hands that the size of the latents in the place of the token grid, so that it cannot run.
Its position tables keep the model's range of coordinates near the native size only; ours at every size.

Axis letters: B batch, N image tokens (rows·cols), M merged tokens, L caption tokens, C channels, R ratio.
"""

from typing import Any

import comfy.model_base
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.pixart.blocks import AttentionKVCompress
from comfy.ldm.pixart.pixartms import PixArtMS
from torch import Tensor, nn

from pixart.checkpoint.comfyui import comfyui_settings
from pixart.config import KVCompression, PixArtConfig
from pixart.model.embedders import PositionTables


class CompressedAttention(AttentionKVCompress):
    """Self-attention to keys and values merged R×R. `sr` and `norm` are layers of ComfyUI and are called,
    never read: so they are cast, moved and patched like any other."""

    def __init__(self, config: PixArtConfig, compression: KVCompression, **place: Any) -> None:
        super().__init__(
            config.hidden_size, num_heads=config.num_heads, qkv_bias=True, sampling="conv",
            sr_ratio=compression.ratio, qk_norm=config.qk_norm, **place,
        )  # fmt: skip
        self.compression = compression
        if compression.sampling != "conv":
            del self.sr
        if compression.norm == "none":
            self.norm = nn.Identity()

    def merge(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Keys or values (B, N, C) of a grid to (B, M, C). As in pixart, the last row and column are
        repeated where the ratio does not divide the grid."""
        ratio, sampling = self.compression.ratio, self.compression.sampling
        if sampling == "uniform_every":
            return self.norm(tokens[:, ::ratio])
        image = tokens.transpose(1, 2).unflatten(2, grid)
        if sampling == "uniform":
            return self.norm(image[:, :, ::ratio, ::ratio].flatten(2).transpose(1, 2))
        below, right = (-side % ratio for side in grid)
        if below or right:
            image = F.pad(image, (0, right, 0, below), mode="replicate")
        merged = self.sr(image) if sampling == "conv" else F.avg_pool2d(image, ratio)
        return self.norm(merged.flatten(2).transpose(1, 2))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, HW: Any = None, block_id: Any = None, **_: Any
    ) -> Tensor:
        """x: (B, N, C); HW: its token grid. Returns (B, N, C)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        merged = (self.merge(k, HW), self.merge(v, HW))
        return self.proj(optimized_attention(q, *merged, self.num_heads, mask=mask))


class Transformer(PixArtMS):
    """PixArtMS whose blocks may merge keys and values, and know their token grid."""

    def __init__(self, pixart_config: PixArtConfig, **settings: Any) -> None:
        super().__init__(**settings)
        place = {name: settings.get(name) for name in ("dtype", "device", "operations")}
        compression = pixart_config.kv_compression
        for layer, block in enumerate(self.blocks):
            if compression is not None and compression.applies_to(layer):
                block.attn = CompressedAttention(pixart_config, compression, **place)
        self.position_tables = PositionTables(pixart_config)

    def forward_orig(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        c_size: Tensor | None = None,
        c_ar: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x: (B, in_channels, h, w); y: (B, 1, L, caption_channels), every token of which counts.
        Returns (B, out_channels, h, w)."""
        batch, (height, width) = len(x), x.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            step = 8 * self.patch_size
            raise ValueError(
                f"width and height must be multiples of {step} px, got {width * 8}x{height * 8}"
            )
        grid = (height // self.patch_size, width // self.patch_size)
        tokens = self.x_embedder(x)  # (B, N, C)
        tokens = tokens + self.position_tables(grid, tokens)
        t = self.t_embedder(timestep, x.dtype)  # (B, C)
        if self.micro_conditioning and c_size is not None and c_ar is not None:
            sizes = [self.csize_embedder(c_size, batch), self.ar_embedder(c_ar, batch)]
            t = t + torch.cat(sizes, dim=1)
        rows = self.t_block(t)  # (B, 6·C)
        # ComfyUI's cross-attention takes the captions of a batch in one row.
        caption = self.y_embedder(y, False).reshape(1, -1, self.hidden_size)
        for block in self.blocks:
            tokens = block(tokens, caption, rows, None, grid, **kwargs)
        return self.unpatchify(self.final_layer(tokens, t), height, width)


class Model(comfy.model_base.PixArt):
    """What ComfyUI samples with: its PixArt, so that it knows our LoRA, around our transformer."""

    def __init__(self, model_config: Any, pixart_config: PixArtConfig) -> None:
        def build(**settings: Any) -> Transformer:
            return Transformer(pixart_config, **settings)

        # PixArt's own constructor names PixArtMS.
        comfy.model_base.BaseModel.__init__(self, model_config, unet_model=build)


def new_model(config: PixArtConfig, parameters: int, weight_dtype: torch.dtype) -> Model:
    """A model without weights yet, in the precision that ComfyUI chooses for `parameters` of weight_dtype."""
    import comfy.model_management as management
    import comfy.supported_models as supported

    settings = comfyui_settings(config)
    is_alpha = settings["image_model"] == "pixart_alpha"
    chosen = (supported.PixArtAlpha if is_alpha else supported.PixArtSigma)(settings)
    kinds = list(chosen.supported_inference_dtypes)
    dtype = management.unet_dtype(
        model_params=parameters, supported_dtypes=kinds, weight_dtype=weight_dtype
    )
    cast = management.unet_manual_cast(dtype, management.get_torch_device(), kinds)
    chosen.set_inference_dtype(dtype, cast)
    return Model(chosen, config).eval()
