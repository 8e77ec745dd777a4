"""Masks: 8 bits a pixel, from 0 for what is kept to 255 for what is drawn anew."""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pixart.files import printable
from pixart.pipeline.inputs import ALPHA, Inputs
from pixart.pipeline.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


SAME, TONE = 24, 16  # levels that a tone may be off by, and pixels over which it is looked for


def open_mask(request: Request, inputs: Inputs) -> "Image":
    """The mask of a request, of the size of its picture. ValueError for one of another size, or of a
    picture that has nothing transparent."""
    from PIL import ImageChops

    assert request.image and request.mask
    if request.mask == ALPHA:
        image = inputs.open(request.image).image
        if image.mode != "RGBA":
            raise ValueError(
                f"{printable(request.image)}: must be transparent somewhere for mask alpha, it is "
                "opaque; give a mask of its own"
            )
        mask = ImageChops.invert(image.getchannel("A"))
    else:
        mask = inputs.open_mask(request.mask)
        height, width = inputs.size(request.image)
        if mask.size != (width, height):
            raise ValueError(
                f"{printable(request.mask)}: must be as large as the picture, {width}x{height}, got "
                f"{mask.size[0]}x{mask.size[1]}"
            )
    return ImageChops.invert(mask) if request.invert_mask else mask


def refuse_empty(request: Request) -> None:
    """The ValueError of a mask in which nothing is drawn."""
    assert request.image and request.mask
    by_alpha = request.mask == ALPHA
    level = (
        ("transparent" if by_alpha else "white")
        if request.invert_mask
        else ("opaque" if by_alpha else "black")
    )
    raise ValueError(
        f"{printable(request.image if by_alpha else request.mask)}: must not be {level} all over as a "
        "mask, nothing would be drawn"
    )


def faded(mask: np.ndarray, width: int) -> np.ndarray:
    """A mask (H, W) that rises over so many pixels from what is kept.

    Its levels are scaled by the distance to the nearest 0, so that it fades into what is drawn and no 0
    becomes another: what is kept stays to the bit.
    """
    if width == 0 or mask.all():
        return mask
    ramp = _distances(torch.from_numpy(mask == 0), width + 1) / (width + 1)
    # Rounded up: a pixel that is drawn in part stays one.
    return np.ceil(mask * ramp.numpy()).astype(np.uint8)


def _distances(zeros: Tensor, most: int) -> Tensor:
    """(H, W): how far the nearest True is from each pixel, up to `most` pixels.

    The exact Euclidean distance: along the columns first, then over the columns to both sides.
    """
    height, width = zeros.shape
    rows = torch.arange(height, dtype=torch.float32)[:, None].expand(height, width)
    far = torch.where(zeros, rows, -torch.inf).cummax(0).values
    near = torch.where(zeros, rows, torch.inf).flip(0).cummin(0).values.flip(0)
    squared = torch.minimum(rows - far, near - rows).clamp(max=most).square()
    best = squared.clone()
    for step in range(1, min(most, width)):
        best[:, step:] = torch.minimum(best[:, step:], squared[:, :-step] + step**2)
        best[:, :-step] = torch.minimum(best[:, :-step], squared[:, step:] + step**2)
    return best.sqrt().clamp(max=most)


def matched(drawn: np.ndarray, own: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """What was drawn, in the tone of what is kept beside it: (H, W, 3) float from 0 to 255.

    drawn, own: (H, W, 3) of 8 bits; kept: (H, W) bool. Encoded and decoded, a plain ground is off by a level
    or two, and a line shows where it meets the file's own. How far off it is around the border is known
    from the kept pixels, which were decoded as well; it is taken back there and less and less further
    away. Where both differ by more than SAME, there is something else than a tone.
    """
    gap = torch.from_numpy(own.astype(np.float32) - drawn).permute(2, 0, 1)[None]
    told = torch.from_numpy(kept)[None, None] & (gap.abs().amax(1, keepdim=True) <= SAME)
    # Beside a straight border half of the surroundings are kept.
    around = _surroundings(told.float()).clamp_min(0.25)
    tone = _surroundings(gap * told) / around
    return (drawn + tone[0].permute(1, 2, 0).numpy()).clip(0, 255)


def _surroundings(values: Tensor) -> Tensor:
    """The weighted mean around each pixel (.., H, W) within twice TONE pixels."""
    for _ in range(2):
        for size, pad in (((2 * TONE + 1, 1), (TONE, 0)), ((1, 2 * TONE + 1), (0, TONE))):
            values = F.avg_pool2d(values, size, 1, pad, count_include_pad=False)
    return values


def filled(image: "Image") -> "Image":
    """A picture of `to_srgb` as RGB: what is wholly transparent gets the colours around it.

    What a file has under there is nobody's to see, often black or a picture that was cut out. Averages
    of opaque pixels at halved sizes, as far down as there are none, spread what surrounds a hole
    smoothly into it; a picture without any opaque pixel becomes white.
    """
    from PIL import Image

    if image.mode != "RGBA":
        return image
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    colours, weight = levels[:, :3], levels[:, 3:] / 255
    surroundings = _spread(colours, weight)
    shown = torch.where(weight > 0, colours, surroundings).round().to(torch.uint8)
    return Image.fromarray(shown[0].permute(1, 2, 0).numpy())


def _spread(colours: Tensor, weight: Tensor) -> Tensor:
    """Colours (1, 3, H, W) where the weight (1, 1, H, W) is 0, taken from where it is not."""
    height, width = weight.shape[2:]
    if not (weight == 0).any():
        return colours
    if height == width == 1:
        return torch.full_like(colours, 255.0)
    coarse = {"kernel_size": 2, "ceil_mode": True}
    total = F.avg_pool2d(weight, **coarse)
    mean = F.avg_pool2d(colours * weight, **coarse) / total.clamp_min(1e-12)
    below = _spread(mean, total)
    spread = F.interpolate(below, scale_factor=2, mode="bilinear")[..., :height, :width]
    return torch.where(weight > 0, colours, spread)
