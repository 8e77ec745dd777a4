"""The PixArt-α and PixArt-Σ diffusion transformer, under the published parameter names.

Axis letters: B batch, N image tokens (rows·cols), M key tokens, L caption tokens, C channels.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixart.config import PixArtConfig
from pixart.distributed import cut_again, whole
from pixart.model.blocks import (
    Block,
    CrossAttention,
    EncodedCaption,
    FinalLayer,
    KeysValues,
    SelfAttention,
)
from pixart.model.compression import initialise
from pixart.model.embedders import CaptionEmbedder, PatchEmbedder, PositionTables, SinusoidEmbedder
from pixart_kernels import modulate


class PixArt(nn.Module):
    """Predicts the noise in latents, and its variance if config.pred_sigma, for a caption.

    A new model has the published initialisation and returns zeros. gradient_checkpointing: 0 keeps
    every activation of a training step, k recomputes each k-th block in the backward pass.
    """

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.gradient_checkpointing = 0
        self.x_embedder = PatchEmbedder(config.in_channels, width, config.patch_size)
        self.t_embedder = SinusoidEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config)
        self.csize_embedder = SinusoidEmbedder(width // 3) if config.micro_condition else None
        self.ar_embedder = SinusoidEmbedder(width // 3) if config.micro_condition else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.position_tables = PositionTables(config)
        self.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the model computes."""
        return self.x_embedder.proj.weight.dtype

    @property
    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def set_attention(self, precision: str | None) -> None:
        """Compute self-attention with 8-bit products, "int8" or "fp8", for inference; None: in full.

        Cross-attention stays in full: its keys are few, and quantising them would take longer than it saves.
        A Pipeline sets it to its own `attention`. Raises ValueError for other words.
        """
        if precision not in (None, "int8", "fp8"):
            raise ValueError(f'precision must be "int8", "fp8" or None, got {precision!r}')
        for block in self._blocks:
            block.attn.precision = precision

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        caption: Tensor | EncodedCaption,
        caption_mask: Tensor | None = None,
        image_size: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """One denoising step. Returns (B, out_channels, h, w) in the dtype that it computed in.

        latents: (B, in_channels, h, w), h and w multiples of patch_size.
        timesteps: (B,) or one for all, whole or fractional. They stay fp32.
        caption: (B, L, caption_channels), text features; or what encode_caption made of them, which
            spares each further step that part of the work.
        caption_mask: (B, L), non-zero where a token is kept, in any pattern; None keeps all. Fewer
            rows than B are repeated in turn. On the CPU it spares a GPU model a synchronisation.
        image_size: (B, 2), height and width in pixels; aspect_ratio: (B, 1), height / width. For
            micro-conditioned models and no others; fewer rows than B are repeated in turn.
        """
        batch = _check_latents(latents, self.config)
        side = self.config.patch_size
        grid = (latents.shape[2] // side, latents.shape[3] // side)
        t = self._embed_timesteps(timesteps, batch, latents.device)  # (B, C)
        t = self._add_sizes(t, image_size, aspect_ratio)
        tokens, lengths = self._caption_tokens(caption, caption_mask, batch)  # (B, L, C), (B,)
        x = self.x_embedder(latents.to(self.dtype))  # (B, N, C)
        x = x + self.position_tables(grid, x)  # (B, N, C)
        modulated = self._apply_blocks(x, t, tokens, lengths, grid)  # (B, N, C)
        return self._unpatchify(self.final_layer(modulated), grid)

    def encode_caption(self, caption: Tensor, caption_mask: Tensor | None = None) -> EncodedCaption:
        """The keys and values of every block's cross-attention, which depend on no timestep: a
        sampler computes them once per prompt. Arguments as in forward; the batch is the caption's.
        Takes 2·depth·C numbers per token: 78 MB for 300 tokens, XL/2 and 16 bits, twice with
        guidance.
        """
        tokens, lengths = self._embed_caption(caption, caption_mask, len(caption))
        return EncodedCaption(
            tuple(block.cross_attn.keys_values(tokens) for block in self._blocks), lengths
        )

    def _caption_tokens(
        self, caption: Tensor | EncodedCaption, mask: Tensor | None, batch: int
    ) -> tuple[Sequence[Tensor | KeysValues], Tensor | None]:
        """What each block takes as its caption, and how many tokens of each sample count."""
        if isinstance(caption, EncodedCaption):
            if mask is not None:
                raise ValueError("caption_mask must be None beside an encoded caption, got a mask")
            if caption.batch != batch:
                raise ValueError(f"caption must be encoded for {batch}, got {caption.batch}")
            return caption.keys_values, caption.lengths
        tokens, lengths = self._embed_caption(caption, mask, batch)
        return [tokens] * self.config.depth, lengths

    def _embed_caption(
        self, caption: Tensor, mask: Tensor | None, batch: int
    ) -> tuple[Tensor, Tensor | None]:
        caption = _check_caption(caption, batch, self.config)
        mask = _check_mask(mask, batch, caption.shape[1])
        return self.y_embedder(caption.to(self.dtype), mask)

    def _embed_timesteps(self, timesteps: Tensor, batch: int, device: torch.device) -> Tensor:
        timesteps = torch.as_tensor(timesteps, dtype=torch.float32, device=device)
        if timesteps.dim() > 1 or timesteps.numel() not in (1, batch):
            raise ValueError(f"timesteps must be one or {batch}, got {tuple(timesteps.shape)}")
        return self.t_embedder(timesteps.flatten().expand(batch))

    def _add_sizes(
        self, t: Tensor, image_size: Tensor | None, aspect_ratio: Tensor | None
    ) -> Tensor:
        for name, value in (("image_size", image_size), ("aspect_ratio", aspect_ratio)):
            if (value is None) == self.config.micro_condition:
                rule = "given to" if self.config.micro_condition else "None for"
                raise ValueError(
                    f"{name} must be {rule} a model with micro_condition="
                    f"{self.config.micro_condition}, got {value}"
                )
        if self.csize_embedder is None or self.ar_embedder is None:
            return t
        sizes = _repeat_rows("image_size", image_size, 2, t)
        ratios = _repeat_rows("aspect_ratio", aspect_ratio, 1, t)
        # A third of the channels each: height, width, aspect ratio.
        height_width = self.csize_embedder(sizes.flatten()).view(t.shape[0], -1)  # (B, 2/3 C)
        return t + torch.cat([height_width, self.ar_embedder(ratios.flatten())], dim=1)

    def _apply_blocks(
        self,
        x: Tensor,
        t: Tensor,
        captions: Sequence[Tensor | KeysValues],
        lengths: Tensor | None,
        grid: tuple[int, int],
    ) -> Tensor:
        # A block ends by preparing what follows it, so that the first must be prepared here.
        rows = self._modulation_rows(t)
        modulated = modulate(x, *rows[0][:2])
        for layer, block in enumerate(self.blocks):
            own, following = rows[layer][2:], rows[layer + 1][:2]
            inputs = (x, modulated, own, following, captions[layer], lengths, grid)
            if self._is_checkpointed(layer):
                x, modulated = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, modulated = block(*inputs)
        return modulated

    def _modulation_rows(self, t: Tensor) -> list[tuple[Tensor, ...]]:
        """Shifts, scales and gates, (B, C) each: six for every block, two for the final layer."""
        # FSDP may have cut blocks one by one, and makes them whole in their own forward only.
        for module in (*self._blocks, self.final_layer):
            cut_again(module)
        # A few rows per sample: their sums are worth fp32 in any model. All blocks in one step: one
        # by one they would be 28 launches of next to nothing, or 28 exchanges.
        tables = whole(torch.stack([block.scale_shift_table for block in self._blocks]))
        tables = tables.float()  # (depth, 6, C)
        shared = self.t_block(t).float().unflatten(1, (1, 6, -1))  # (B, 1, 6, C)
        rows = [table.unbind(1) for table in (shared + tables).unbind(1)]
        # The final layer takes the timestep embedding itself, not what t_block made of it.
        last = t.float().unsqueeze(1) + whole(self.final_layer.scale_shift_table).float()
        return [*rows, last.unbind(1)]

    def _is_checkpointed(self, layer: int) -> bool:
        every = self.gradient_checkpointing
        return every > 0 and layer % every == 0 and self.training and torch.is_grad_enabled()

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        side = self.config.patch_size
        image = patches.unflatten(2, (side, side, -1)).unflatten(1, grid)
        image = image.permute(0, 5, 1, 3, 2, 4)  # (B, out_channels, rows, side, cols, side)
        return image.flatten(4, 5).flatten(2, 3)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialisation. The bias of the patch embedding keeps PyTorch's default."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.LayerNorm)):
                module.reset_parameters()
        for linear in _linears(self):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        embedders = (self.t_embedder, self.t_block, self.y_embedder)
        for linear in _linears(*embedders, self.csize_embedder, self.ar_embedder):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.y_embedder.y_embedding, std=self.config.caption_channels**-0.5)
        for module in self.modules():
            if isinstance(module, SelfAttention) and module.compression is not None:
                initialise(module, module.compression, self.config.hidden_size)
            if isinstance(module, (Block, FinalLayer)):
                nn.init.normal_(module.scale_shift_table, std=self.config.hidden_size**-0.5)
            if isinstance(module, CrossAttention):
                nn.init.zeros_(module.proj.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def load_official(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a state dict with the published names.

        pos_embed is recomputed and y_embedder.y_embedding may be absent. Any other missing,
        unexpected or mis-shaped tensor raises a ValueError that lists them all, and nothing is
        loaded.
        """
        given = {name: tensor for name, tensor in state_dict.items() if name != "pos_embed"}
        own = self.state_dict()
        required = set(own) - {"y_embedder.y_embedding"}
        problems = [f"missing {name}" for name in sorted(required - set(given))]
        problems += [f"unexpected {name}" for name in sorted(set(given) - set(own))]
        problems += [
            f"{name} of shape {tuple(given[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in given and given[name].shape != own[name].shape
        ]
        if problems:
            raise ValueError(f"state_dict must fit the model, got {', '.join(problems)}")
        self.load_state_dict(given, strict=False)


def _linears(*modules: nn.Module | None) -> list[nn.Linear]:
    children = [child for module in modules if module is not None for child in module.modules()]
    return [child for child in children if isinstance(child, nn.Linear)]


def _check_latents(latents: Tensor, config: PixArtConfig) -> int:
    shape, side = tuple(latents.shape), config.patch_size
    if len(shape) != 4 or shape[1] != config.in_channels:
        raise ValueError(f"latents must be (B, {config.in_channels}, h, w), got {shape}")
    if shape[2] % side or shape[3] % side or 0 in shape[2:]:
        raise ValueError(
            f"height and width of latents must be multiples of patch_size {side}, got {shape[2:]}"
        )
    return shape[0]


def _check_caption(caption: Tensor, batch: int, config: PixArtConfig) -> Tensor:
    shape = tuple(caption.shape)
    if len(shape) == 4 and shape[1] == 1:
        caption = caption.squeeze(1)
    if caption.dim() != 3 or (caption.shape[0], caption.shape[2]) != (
        batch,
        config.caption_channels,
    ):
        raise ValueError(f"caption must be ({batch}, L, {config.caption_channels}), got {shape}")
    return caption


def _check_mask(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """As booleans (B, L), from (B, L) or the loader's (B, 1, 1, L)."""
    if mask is None:
        return None
    shape = tuple(mask.shape)
    rows = shape[0] if len(shape) in (2, 3, 4) else 0
    if rows == 0 or shape[-1] != length or mask.numel() != rows * length:
        raise ValueError(f"caption_mask must be ({batch}, {length}), got {shape}")
    if batch % rows:
        raise ValueError(f"rows of caption_mask must divide the batch {batch}, got {rows}")
    return (mask.reshape(rows, length) != 0).repeat(batch // rows, 1)


def _repeat_rows(name: str, values: Tensor | None, columns: int, like: Tensor) -> Tensor:
    batch = like.shape[0]
    values = torch.as_tensor(values, dtype=torch.float32, device=like.device)
    if columns == 1 and values.dim() == 1:
        values = values.unsqueeze(1)
    rows = values.shape[0] if values.dim() == 2 and values.shape[1] == columns else 0
    if rows == 0 or batch % rows:
        raise ValueError(f"{name} must be ({batch}, {columns}), got {tuple(values.shape)}")
    return values.repeat(batch // rows, 1)
