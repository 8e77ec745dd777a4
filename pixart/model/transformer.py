"""The PixArt-α and PixArt-Σ diffusion transformer, under the published parameter names.

Axis letters: B batch, N image tokens (rows·cols), M key tokens, L caption tokens, C channels.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

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
    modulation_rows,
)
from pixart.model.compression import initialise
from pixart.model.control import COPIES, Control, ControlNet, Run, Steering
from pixart.model.embedders import CaptionEmbedder, PatchEmbedder, PositionTables, SinusoidEmbedder
from pixart.model.exchange import Share, TokenExchange, rows_together
from pixart.plans.schedule import check_ratios
from pixart_kernels import modulate


@dataclass
class Reuse:
    """What the blocks after the first ones added in one call, for another. first: how many are computed in any
    case. change: (B, N, C) that is added in the place of the others; None: they are computed, and what they
    added is put here."""

    first: int
    change: Tensor | None = None


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
        *,
        perturbed: Collection[int] = (),
        controls: Sequence[Control] = (),
        exchange: TokenExchange | None = None,
        kv_ratios: Sequence[int] = (),
        reuse: Reuse | None = None,
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
        perturbed: blocks in which every token attends to itself alone (perturbed-attention guidance).
        controls: what steers it; what several add up to, each times its scale.
        exchange: shares the tokens among processes, each of which is given all arguments whole and returns
            the whole prediction. Gradients of weights are those of its own tokens, times the processes: the
            mean over the processes is the gradient. ValueError for too few rows of tokens to share.
        kv_ratios: for each block how many keys and values it merges, R×R: 1 or more for a dense one, a
            multiple of its own for one that compresses; () for what each was made for. See SelfAttention.
        reuse: adds to the picture's tokens what its blocks added before, or keeps what they add; None for a
            call by itself.
        """
        _check_perturbed(perturbed, self.config)
        check_ratios(kv_ratios, self.config)
        _check_reuse(reuse, self.config)
        batch = _check_latents(latents, self.config)
        side = self.config.patch_size
        grid = (latents.shape[2] // side, latents.shape[3] // side)
        t = self._embed_timesteps(timesteps, batch, latents.device)  # (B, C)
        t = self._add_sizes(t, image_size, aspect_ratio)
        tokens, lengths = self._caption_tokens(caption, caption_mask, batch)  # (B, L, C), (B,)
        together = self._rows_together(controls, kv_ratios)
        share = None if exchange is None else exchange.share(grid, together)
        x = self.x_embedder(_own_rows(latents, side, share).to(self.dtype))  # (B, N, C)
        x = x + _own(self.position_tables(grid, x), share)  # (B, N, C)
        is_encoded = isinstance(caption, EncodedCaption)
        hints = [_own(self._hint_tokens(each, batch, grid), share) for each in controls]
        seen = [_caption_of(each, tokens[0], is_encoded, batch) for each in controls]
        shared = self.t_block(t)  # (B, 6·C)
        run = partial(self._run, self.training or any(each.network.training for each in controls))
        own_grid = grid if share is None else share.grid
        steering = Steering(controls, hints, seen, lengths, shared, own_grid, run, share)
        rows = [*modulation_rows(shared, self._blocks), self._last_rows(t)]
        given = (tokens, lengths, own_grid, perturbed, share, kv_ratios, reuse)
        patches = self.final_layer(self._apply_blocks(x, rows, *given, steering, run))
        return self._unpatchify(patches if share is None else share.whole(patches), grid)

    def encode_caption(
        self,
        caption: Tensor,
        caption_mask: Tensor | None = None,
        network: ControlNet | None = None,
    ) -> EncodedCaption:
        """The keys and values of every block's cross-attention, which depend on no timestep: a
        sampler computes them once per prompt. Arguments as in forward; the batch is the caption's.
        Takes 2·depth·C numbers per token: 78 MB for 300 tokens, XL/2 and 16 bits, twice with
        guidance. network: those of this control's copies instead.
        """
        tokens, lengths = self._embed_caption(caption, caption_mask, caption.shape[0])
        if network is not None:
            return EncodedCaption(network.keys_values(tokens), lengths)
        return EncodedCaption(
            tuple(block.cross_attn.keys_values(tokens) for block in self._blocks), lengths
        )

    def new_control(self, copies: int = COPIES) -> ControlNet:
        """A control that copies the first blocks and changes nothing yet, where the model is and in its
        dtype. ValueError unless the model has more blocks than `copies`."""
        network = ControlNet(self.config, copies).to(self.x_embedder.proj.weight.device, self.dtype)
        network.copy_from(self.blocks)
        return network

    def encode_hint(self, network: ControlNet, hint: Tensor) -> Tensor:
        """What a control's first block adds to the picture's tokens, which depends on no timestep.

        hint: (b, in_channels, h, w) latents. Returns (b, N, C), which Control takes in their place.
        """
        _check_latents(hint, self.config)
        side = self.config.patch_size
        tokens = self.x_embedder(hint.to(self.dtype))
        grid = (hint.shape[2] // side, hint.shape[3] // side)
        return network.project_hint(tokens + self.position_tables(grid, tokens))

    def _hint_tokens(self, control: Control, batch: int, grid: tuple[int, int]) -> Tensor:
        """(B, N, C) of a control's hint. ValueError if the control does not fit the model, or the hint the
        latents."""
        width, own = self.config.hidden_size, control.network.config.hidden_size
        if own != width or control.network.copies >= self.config.depth:
            raise ValueError(
                f"a control must be of width {width} and have fewer than {self.config.depth} copies, "
                f"got {control.network.copies} of width {own}"
            )
        hint = control.hint
        tokens = hint if hint.dim() == 3 else self.encode_hint(control.network, hint)
        count, rows = grid[0] * grid[1], tokens.shape[0]
        if tokens.shape[1:] != (count, width) or rows == 0 or batch % rows:
            raise ValueError(
                f"a hint must be of the size of the latents and its batch divide {batch}, "
                f"got {tuple(hint.shape)}"
            )
        return tokens.repeat(batch // rows, 1, 1)

    def _rows_together(self, controls: Sequence[Control], ratios: Sequence[int]) -> int:
        configs = [self.config, *(each.network.config for each in controls)]
        return rows_together((config.kv_compression for config in configs), ratios)

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
        rows: Sequence[Sequence[Tensor]],
        captions: Sequence[Tensor | KeysValues],
        lengths: Tensor | None,
        grid: tuple[int, int],
        perturbed: Collection[int],
        share: Share | None,
        kv_ratios: Sequence[int],
        reuse: Reuse | None,
        steering: Steering,
        run: Run,
    ) -> Tensor:
        # A block ends by preparing what follows it, so that the first must be prepared here.
        modulated = modulate(x, *rows[0][:2])
        change = None if reuse is None else reuse.change
        blocks = self._blocks if reuse is None or change is None else self._blocks[: reuse.first]
        begun = x
        for layer, block in enumerate(blocks):
            own, following = rows[layer][2:], rows[layer + 1][:2]
            is_steered = steering.reaches(layer + 1)
            is_changed = is_steered or (change is not None and layer + 1 == len(blocks))
            inputs = (x, modulated, own, None if is_changed else following, captions[layer])
            more = (layer in perturbed, share, kv_ratios[layer] if kv_ratios else None)
            x, modulated = run(layer, block, *inputs, lengths, grid, *more)
            if is_steered:
                x, modulated = steering.apply(x, layer + 1, following)
            if reuse is not None and layer + 1 == reuse.first:
                begun = x
        if change is not None:
            return modulate(x + change, *rows[-1][:2])
        if reuse is not None:
            reuse.change = x - begun
        return modulated

    def _run(
        self, is_training: bool, layer: int, block: Block, *inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """A block of the model or of a control, which the backward pass computes again where asked."""
        every = self.gradient_checkpointing
        if every > 0 and layer % every == 0 and is_training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _last_rows(self, t: Tensor) -> tuple[Tensor, ...]:
        """Shift and scale of the final layer, (B, C) each, from the timestep embedding itself and not
        from what t_block made of it."""
        cut_again(self.final_layer)
        table = whole(self.final_layer.scale_shift_table).float()
        return (t.float().unsqueeze(1) + table).unbind(1)

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


def _own(tokens: Tensor, share: Share | None) -> Tensor:
    return tokens if share is None else share.own(tokens)


def _own_rows(latents: Tensor, side: int, share: Share | None) -> Tensor:
    return latents if share is None else share.rows_of(latents, side)


def _linears(*modules: nn.Module | None) -> list[nn.Linear]:
    children = [child for module in modules if module is not None for child in module.modules()]
    return [child for child in children if isinstance(child, nn.Linear)]


def _caption_of(
    control: Control, tokens: Tensor | KeysValues, is_encoded: bool, batch: int
) -> Sequence[Tensor | KeysValues]:
    """What each copy of a control takes as its caption. tokens: what the base's first block takes."""
    if (control.caption is not None) != is_encoded:
        rule = "encoded for it" if is_encoded else "None beside one that is not encoded"
        raise ValueError(f"caption of a control must be {rule}, got {control.caption}")
    if control.caption is None:
        return [tokens] * control.network.copies
    if control.caption.batch != batch:
        raise ValueError(
            f"caption of a control must be encoded for {batch}, got {control.caption.batch}"
        )
    return control.caption.keys_values


def _check_perturbed(perturbed: Collection[int], config: PixArtConfig) -> None:
    if outside := [layer for layer in perturbed if not 0 <= layer < config.depth]:
        raise ValueError(f"perturbed must be blocks from 0 to {config.depth - 1}, got {outside[0]}")


def _check_reuse(reuse: Reuse | None, config: PixArtConfig) -> None:
    if reuse is not None and not 1 <= reuse.first < config.depth:
        raise ValueError(
            f"reuse.first must be from 1 to {config.depth - 1} blocks, got {reuse.first}"
        )


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
