"""The rows of the table: what is counted, and what the scalability paper printed of it.

arXiv 2404.02883: table 1 has the UNets, table 2 the transformers, both at 256 px.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pixart.scalability.unets import LATENT_CHANNELS, TEXT, UNETS, unet
from pixart.variants import VARIANTS

if TYPE_CHECKING:
    from pixart.scalability.counting import Count

VAE = 8  # pixels of a latent's side
PAPER_SIZE = 256
STEP, MOST = 64, 8192  # pixels of a side: what all rows divide, and as far as anybody trains
TRANSFORMER_BLOCKS, ATTENTION_LAYERS = "Transformer2DModel", "Attention"  # classes of diffusers


@dataclass(frozen=True)
class Paper:
    """Printed: parameters in 1e9, MACs in 1e9, those inside of transformer blocks."""

    parameters: float
    macs: float
    inside: float | None = None


@dataclass(frozen=True)
class Row:
    """channels, tokens: of its text. note: why something of it is not the paper's. variant: the name in
    VARIANTS of a transformer, empty for a UNet."""

    name: str
    channels: int
    tokens: int
    paper: Paper | None = None
    note: str = ""
    variant: str = ""

    @property
    def is_unet(self) -> bool:
        return not self.variant

    def build(self, device: torch.device | str = "meta") -> nn.Module:
        """The denoiser with weights of any value, for inference; on the meta device without memory."""
        if self.is_unet:
            return unet(self.name, device)
        from pixart.checkpoint.load import empty_model
        from pixart.model.transformer import PixArt

        config = VARIANTS[self.variant]
        if torch.device(device).type == "meta":
            return empty_model(config).eval()
        with torch.device(device):
            return PixArt(config).eval()

    def forward(self, module: nn.Module, size: int, batch: int = 1) -> Any:
        """One denoising step of so many pictures, on inputs where the weights are and of their dtype."""
        weight = next(module.parameters())
        side = size // VAE
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        latents = torch.zeros(batch, LATENT_CHANNELS, side, side, **like)
        text = torch.zeros(batch, self.tokens, self.channels, **like)
        times = torch.full((batch,), 500, device=weight.device)
        return module(latents, times, text)

    def count(self, size: int) -> "Count":
        """At a size in pixels."""
        from pixart.scalability.counting import count, count_transformer

        if not self.is_unet:
            return count_transformer(VARIANTS[self.variant], size // VAE, self.tokens)
        module = self.build()
        return count(module, lambda module: self.forward(module, size), self.inside(module))

    def inside(self, module: nn.Module) -> list[str]:
        """The modules of a UNet whose layers the paper's column of attention counts. Found by trying: of
        SDXL and its variations it leaves the middle of the network out."""
        kind = ATTENTION_LAYERS if UNETS[self.name].family == "IF" else TRANSFORMER_BLOCKS
        return [
            name
            for name, one in module.named_modules()
            if type(one).__name__ == kind
            and (UNETS[self.name].family != "SDXL" or not name.startswith("mid_block"))
        ]


def _unet(name: str, parameters: float, macs: float, inside: float, note: str = "") -> Row:
    return Row(name, *TEXT, Paper(parameters, macs, inside), note)


def _transformers() -> list[Row]:
    rows = []
    for name, config in VARIANTS.items():
        paper, length = _TABLE_2.get(name), config.model_max_length
        row = Row(name, config.caption_channels, length, paper, variant=name)
        if name == ALPHA:
            rows.append(replace(row, note=_ALPHA_NOTE))
            row = replace(row, name=f"{name}-{TEXT[1]}", tokens=TEXT[1], note=_ALPHA_SHORT)
        rows.append(row)
    return rows


ALPHA = "pixart-h1152-d28-t5"
_TABLE_2 = {
    ALPHA: Paper(0.61, 139),
    "pixart-h1152-d28": Paper(0.61, 139),
    "pixart-h1536-d28": Paper(1.08, 247),
    "pixart-h1024-d28": Paper(0.48, 110),
    "pixart-h1024-d56": Paper(0.95, 220),
}
_ALPHA_NOTE = (
    "PixArt-α reads 120 tokens; the paper's GMACs are those of 77, the next row, and the difference is no "
    "deviation of the model"
)
_ALPHA_SHORT = "PixArt-α with the 77 tokens that the paper's GMACs are of"
ROWS: Mapping[str, Row] = {
    row.name: row
    for row in (
        _unet("SD2-C320", 0.87, 86, 34),
        _unet("SD2-C512", 2.19, 219, 85),
        _unet("IF-XL-C512", 2.04, 194, 23),
        _unet("IF-XL-C704", 3.83, 364, 42),
        _unet("SDXL-C128", 0.42, 35, 23),
        _unet("SDXL-C192", 0.90, 75, 48),
        _unet("SDXL-C320", 2.39, 198, 127),
        _unet("SDXL-C384", 3.40, 282, 179),
        _unet("TD2", 0.85, 98, 43),
        _unet("TD4", 1.24, 123, 64),
        _unet("TD12", 2.78, 223, 147),
        _unet("TD14", 3.16, 248, 168),
        _unet("TD4_4", 1.32, 143, 84),
        _unet("TD4_8", 2.09, 193, 123),
        _unet("TD4_12", 2.86, 243, 167),
        _unet("C384-TD4_12", 4.07, 346, 237),
        *_transformers(),
    )
}


def choose(only: Sequence[str]) -> list[Row]:
    """The rows of these names, or whose names begin so; all without any. ValueError for what fits none."""
    chosen: set[str] = set()
    for word in only:
        exact = [name for name in ROWS if name.casefold() == word.casefold()]
        begun = [name for name in ROWS if word and name.casefold().startswith(word.casefold())]
        if not begun:
            raise ValueError(
                f"only must name rows or begin their names, got {word!r}; there are {', '.join(ROWS)}"
            )
        chosen |= set(exact or begun)
    return [row for name, row in ROWS.items() if name in chosen or not only]


def check_size(size: int) -> None:
    """ValueError for a side that not all rows take."""
    if size < STEP or size > MOST or size % STEP:
        raise ValueError(f"size must be a multiple of {STEP} from {STEP} to {MOST}, got {size}")
