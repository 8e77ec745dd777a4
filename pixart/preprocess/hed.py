"""Soft edges: holistically-nested edge detection (HED, Xie and Tu 2015, arXiv:1504.06375).

The network is the form of HED that ControlNets were trained with (ControlNetHED.pth, 14.7 M weights; RGB
from 0 to 255): the five stages of VGG-16's convolutions, behind each a 1x1 convolution to one channel, its
side output. Those are scaled to the picture's size and averaged, and the sigmoid of that is the edge map.
The paper weighs its side outputs instead, and crops what it pads.

The published weights were not at hand when this was written: names and shapes are those that public code
gives, the formula is tested on random weights.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixart.tensors import read_tensors
from pixart.weights import fit

if TYPE_CHECKING:
    from PIL.Image import Image

# Of each stage: channels and convolutions. Stages after the first begin with a 2x2 maximum.
VGG_16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class Stage(nn.Module):
    """3x3 convolutions with rectifiers, and a side output. Named as in the published file."""

    def __init__(self, channels: int, width: int, convolutions: int) -> None:
        super().__init__()
        widths = [channels, *[width] * convolutions]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1)
            for before, after in zip(widths, widths[1:], strict=False)
        )
        self.projection = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) -> (B, width, h, w), and the side output (B, 1, h, w)."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.projection(x)


class HED(nn.Module):
    """stages: channels and convolutions of each."""

    def __init__(self, stages: tuple[tuple[int, int], ...] = VGG_16) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))  # what is taken from each colour
        channels = 3
        for number, (width, convolutions) in enumerate(stages, 1):
            self.add_module(f"block{number}", Stage(channels, width, convolutions))
            channels = width
        self.least = 2 ** (len(stages) - 1)  # pixels of a side, of which the last stage sees one

    def forward(self, x: Tensor) -> Tensor:
        """Edges in (0, 1), (B, 1, H, W), of RGB from 0 to 255, (B, 3, H, W)."""
        size = x.shape[-2:]
        x = x - self.norm
        total = x.new_zeros(len(x), 1, *size)
        stages = [stage for name, stage in self.named_children() if name.startswith("block")]
        for number, stage in enumerate(stages):
            x, side = stage(F.max_pool2d(x, 2) if number else x)
            total += F.interpolate(side, size, mode="bilinear", align_corners=False)
        return torch.sigmoid(total / len(stages))


def open_hed(path: Path, device: torch.device | str = "cpu") -> HED:
    """The network with a file's weights, in fp32. CheckpointError for a file of anything else,
    NotFiniteError for NaN."""
    network = HED()
    fit(network, read_tensors(path), path)
    return network.eval().requires_grad_(False).to(device)


@torch.inference_mode()
def draw_hed(network: HED, image: "Image") -> "Image":
    """Edges of an RGB picture as RGB of three equal channels, white on black. ValueError for a picture that
    is too small. The official features were made of numbers that are not rounded to 8 bits."""
    import numpy as np
    from PIL import Image

    if min(image.size) < network.least:
        raise ValueError(
            f"image must have {network.least} pixels a side for preprocessor hed, got "
            f"{image.width}x{image.height}"
        )
    pixels = torch.from_numpy(np.array(image)).to(network.norm.device)
    edges = network(pixels.permute(2, 0, 1)[None].float())[0, 0]
    return Image.fromarray((edges * 255).round().byte().cpu().numpy()).convert("RGB")
