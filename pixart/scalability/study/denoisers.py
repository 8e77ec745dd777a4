"""The denoisers of the study, which are called alike: a transformer of ours, and a small UNet.

The UNet is diffusers', laid out as MobileDiffusion (arXiv 2311.16567) lays out its own: no attention at
the highest resolution, transformer blocks at the lower ones. Axis letters: B pictures, L caption tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pixart.config import EMBEDDED, PixArtConfig
from pixart.cost import forward_flops
from pixart.libraries import importing
from pixart.sampler.guidance import Captions
from pixart.scalability.counting import flops_by_module, parameters
from pixart.scalability.study.plan import Run
from pixart.text.encoder import PromptEmbeddings
from pixart.training.recipe import load_recipe
from pixart.training.stage import ResolvedStage
from pixart.training.starts import transformer_config
from pixart.training.tasks.shapes import build_pair, open_pair

CAPTION_TOKENS = 20  # that are counted: what 16 captions are padded to, on average
HEAD = 72
LATENTS = (4, 16, 16)


class UNet(nn.Module):
    """Two levels, 16 and 8 latents a side; attention at the lower one, `depth` transformer blocks behind
    each of its residual blocks."""

    def __init__(self, width: int, depth: int, text_channels: int) -> None:
        super().__init__()
        with importing():
            from diffusers import UNet2DConditionModel
        self.unet: Any = UNet2DConditionModel(
            sample_size=LATENTS[1],
            in_channels=LATENTS[0],
            out_channels=LATENTS[0],
            block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=depth,
            attention_head_dim=(max(width // 32, 1), max(width // 16, 1)),  # heads, by its old name
            cross_attention_dim=text_channels,
            norm_num_groups=8,
            use_linear_projection=True,
        )

    def forward(self, latents: Tensor, timesteps: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        return self.unet(latents, timesteps, features, encoder_attention_mask=mask).sample


def build(run: Run) -> nn.Module:
    """A denoiser at random weights, called with latents (B, 4, 16, 16), timesteps (B,), text features
    (B, L, 128) and their mask (B, L)."""
    config = _config(run)
    if run.denoiser == "unet":
        return UNet(run.width, run.depth, config.caption_channels)
    return build_pair(config).transformer


def _stage() -> ResolvedStage:
    """The first stage of the embedded model's transformer."""
    return next(stage for stage in load_recipe("shapes") if stage.name == "base").resolved()


def _config(run: Run) -> PixArtConfig:
    shipped = transformer_config(_stage())
    if run.denoiser == "unet":
        return shipped
    heads = max(1, run.width // HEAD)
    return replace(shipped, hidden_size=run.width, depth=run.depth, num_heads=heads)


def cost(run: Run) -> tuple[int, int]:
    """Parameters, and FLOP of a forward pass for one picture. Nothing is held in memory."""
    with torch.device("meta"):
        model = build(run)
        if run.denoiser == "transformer":
            flops = forward_flops(_config(run), (8, 8), CAPTION_TOKENS)
            return parameters(model), flops
        features = torch.zeros(1, CAPTION_TOKENS, _config(run).caption_channels)
        mask = torch.ones(1, CAPTION_TOKENS, dtype=torch.bool)
        inputs = torch.zeros(1, *LATENTS), torch.zeros(1), features, mask
        return parameters(model), flops_by_module(model, lambda model: model(*inputs))[""]


class Reader:
    """The embedded model's text encoder, as it was shipped."""

    def __init__(self) -> None:
        pair, _ = open_pair(replace(_stage(), start=EMBEDDED))
        self._encoder: Any = pair.text_encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> PromptEmbeddings:
        """Features of token ids (B, L), 0 behind the end, cut to the longest caption."""
        ids = ids[:, : int((ids != 0).sum(1).max())].long()
        mask = ids != 0
        features = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return PromptEmbeddings(features, mask)


class Prompted:
    """A `pixart.sampler.Denoiser` for a batch of captions, always guided: prompts are those of the
    unconditional half and of the conditional one, (2B, L, D)."""

    def __init__(self, model: nn.Module, prompts: PromptEmbeddings) -> None:
        self._model, self._prompts = model, prompts

    def __call__(self, latents: Tensor, timesteps: Tensor, captions: Captions, /) -> Tensor:
        if captions != "both":
            raise ValueError(f'captions must be "both", got {captions!r}')
        return self._model(latents, timesteps, self._prompts.features, self._prompts.mask)


def guided(reader: Reader, ids: Tensor, empty: Sequence[int]) -> PromptEmbeddings:
    """Of captions (B, L): the empty caption B times, then them."""
    nothing = torch.zeros_like(ids)
    nothing[:, : len(empty)] = torch.tensor(list(empty), dtype=ids.dtype)
    return reader(torch.cat([nothing, ids]))
