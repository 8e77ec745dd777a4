"""ControlNet-Transformer (PixArt-δ, arXiv:2401.05252, section 4): copies of a base's first blocks steer it.

With the base's blocks b_0 … b_D, a control of n < D copies a_0 … a_{n-1}, and a hint c, the latents of a
picture such as the outline of another, embedded as the base embeds its own:

    x = b_0(x)
    c = a_0(x + before(c)),   x = b_1(x + after_0(c))
    c = a_i(c),               x = b_{i+1}(x + after_i(c))        i = 1 … n - 1
    x = b_i(x)                                                   i = n + 1 … D

Copies see the base's timestep and caption. `before` and `after` are linear and start at zero: a control
that was never trained changes nothing. Parameters have their published names.
Axis letters: B batch, N image tokens, C channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pixart.config import PixArtConfig
from pixart.model.blocks import Block, EncodedCaption, KeysValues, modulation_rows
from pixart.model.exchange import Share
from pixart_kernels import gate_add, gate_add_modulate

COPIES = 13  # of the published controls
Run = Callable[..., tuple[Tensor, Tensor]]  # calls a block: (layer, block, *its arguments)


class ControlBlock(nn.Module):
    """A copy of a base's block, and the projection of what it gives to the base; the first has another
    for the hint."""

    def __init__(self, config: PixArtConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.copied_block = Block(config, layer)
        self.before_proj = nn.Linear(width, width) if layer == 0 else None
        self.after_proj = nn.Linear(width, width)


class ControlNet(nn.Module):
    """The copies. config: the base's; where its block compresses keys and values, so does the copy.

    A new one holds zeros for its projections, and nothing of use in its blocks until `copy_from`:
    PixArt.new_control makes one.
    """

    def __init__(self, config: PixArtConfig, copies: int = COPIES) -> None:
        super().__init__()
        if not 1 <= copies < config.depth:
            raise ValueError(
                f"copies must be from 1 to {config.depth - 1}, below the depth of the base, got {copies}"
            )
        self.config = config
        self.controlnet = nn.ModuleList(ControlBlock(config, layer) for layer in range(copies))
        for block in self.control_blocks:
            nn.init.zeros_(block.copied_block.scale_shift_table)
            for projection in (block.before_proj, block.after_proj):
                if projection is not None:
                    nn.init.zeros_(projection.weight)
                    nn.init.zeros_(projection.bias)

    @torch.no_grad()
    def copy_from(self, blocks: nn.ModuleList) -> None:
        """Take the weights of the base's blocks, which must be of the same configuration."""
        for own, block in zip(self.control_blocks, blocks, strict=False):
            own.copied_block.load_state_dict(block.state_dict())

    @property
    def control_blocks(self) -> list[ControlBlock]:
        """In their order along the base."""
        return cast(list[ControlBlock], list(self.controlnet))

    @property
    def copies(self) -> int:
        """How many blocks it has."""
        return len(self.controlnet)

    def set_attention(self, precision: str | None) -> None:
        """As of the base: see PixArt.set_attention."""
        for block in self.control_blocks:
            block.copied_block.attn.precision = precision

    def keys_values(self, tokens: Tensor) -> tuple[KeysValues, ...]:
        """Of the cross-attention of each copy. tokens: (B, L, C), captions as the base embeds them."""
        return tuple(
            block.copied_block.cross_attn.keys_values(tokens) for block in self.control_blocks
        )

    def project_hint(self, tokens: Tensor) -> Tensor:
        """before(c), which depends on no timestep. tokens: (B, N, C), an embedded hint."""
        before = self.control_blocks[0].before_proj
        assert before is not None
        return before(tokens)


@dataclass(frozen=True)
class Control:
    """A control for one call of the base.

    hint: (b, in_channels, h, w), latents of the size of the base's, or what PixArt.encode_hint made of
    them, (b, N, C); b divides the batch, and fewer are repeated in turn. scale: what is given to the
    base is times this. caption: what PixArt.encode_caption made for this network; needed where the
    base's own caption is encoded, and nowhere else.
    """

    network: ControlNet
    hint: Tensor
    scale: float = 1.0
    caption: EncodedCaption | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale of a control must be a finite number, got {self.scale}")


class Steering:
    """Controls on their way along the base, through one call of it.

    shared: (B, 6·C) of the base's t_block. hints: (B, N, C) and captions of each control. run: may
    compute a block again in the backward pass. share: of SelfAttention.
    """

    def __init__(
        self,
        controls: Sequence[Control],
        hints: Sequence[Tensor],
        captions: Sequence[Sequence[Tensor | KeysValues]],
        lengths: Tensor | None,
        shared: Tensor,
        grid: tuple[int, int],
        run: Run,
        share: Share | None = None,
    ) -> None:
        self._walks = [
            _Walk(control, hint, caption, shared)
            for control, hint, caption in zip(controls, hints, captions, strict=True)
        ]
        self._rest: tuple[Any, ...] = (lengths, grid, False, share)
        self._run = run

    def reaches(self, layer: int) -> bool:
        """Whether a control adds to what goes into the base's block of this index."""
        return any(1 <= layer <= walk.copies for walk in self._walks)

    def apply(self, x: Tensor, layer: int, next_rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """x: (B, N, C), which leaves the base's block before `layer`. Returns what that block takes: x
        with all that controls add, and the same modulated. next_rows: its shift and scale."""
        # All of them before any is added: the first copies see the base's own x.
        walks = [walk for walk in self._walks if layer <= walk.copies]
        branches = [(walk.step(x, layer, self._run, self._rest), walk.gate) for walk in walks]
        for branch, gate in branches[:-1]:
            x = gate_add(x, branch, gate)
        shift, scale = next_rows
        return gate_add_modulate(x, *branches[-1], shift, scale)


class _Walk:
    """One control on its way. x, modulated: its own stream, between its blocks."""

    def __init__(
        self,
        control: Control,
        hint: Tensor,
        captions: Sequence[Tensor | KeysValues],
        shared: Tensor,
    ) -> None:
        self._blocks = control.network.control_blocks
        self._rows = modulation_rows(shared, [block.copied_block for block in self._blocks])
        self._captions = captions
        self._hint = hint
        self._x = self._modulated = hint
        self.copies = len(self._blocks)
        self.gate = None if control.scale == 1 else control.scale

    def step(
        self,
        x: Tensor,
        layer: int,
        run: Run,
        rest: tuple[Any, ...],
    ) -> Tensor:
        """What the block of `layer` - 1 gives to the base: (B, N, C). x: of the base, for the first."""
        index = layer - 1
        own, block = self._rows[index], self._blocks[index]
        if index == 0:
            self._x, self._modulated = gate_add_modulate(x, self._hint, None, *own[:2])
        following = self._rows[layer][:2] if layer < self.copies else None
        self._x, self._modulated = run(
            index, block.copied_block,
            self._x, self._modulated, own[2:], following, self._captions[index], *rest,
        )  # fmt: skip
        return block.after_proj(self._x)
