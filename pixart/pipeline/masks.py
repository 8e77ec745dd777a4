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


SAME = 24  # levels that a tone may be off by


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


def refuse_empty(request: Request, inputs: Inputs) -> None:
    """The ValueError of a mask in which nothing is drawn, or nothing of what is cut from its picture."""
    assert request.image and request.mask
    by_alpha = request.mask == ALPHA
    name = printable(request.image if by_alpha else request.mask)
    if open_mask(request, inputs).getbbox() is not None:
        raise ValueError(
            f"{name}: must say what to draw within what fit crop leaves of the picture, there is nothing "
            "of it; fit exact keeps all"
        )
    level = (
        ("transparent" if by_alpha else "white")
        if request.invert_mask
        else ("opaque" if by_alpha else "black")
    )
    raise ValueError(f"{name}: must not be {level} all over as a mask, nothing would be drawn")


def faded(mask: np.ndarray, width: int) -> np.ndarray:
    """A mask (H, W) that rises over so many pixels from what is kept, fewer where all of it is narrower.

    Its levels are scaled by the distance to the nearest 0, so that it fades into what is drawn and no 0
    becomes another: what is kept stays to the bit. The place that is farthest from what is kept has its
    own level, however wide the fade: a mask of which nothing would be seen is no mask.
    """
    if width == 0 or mask.all():
        return mask
    distance = _distances(torch.from_numpy(mask == 0), width + 1)
    ramp = distance / distance.max().clamp(min=1)
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


def matched(drawn: Tensor, own: Tensor, kept: Tensor) -> Tensor:
    """What was drawn, in the tone of what is kept beside it: (1, 3, H, W).

    drawn, own: (1, 3, H, W) in [-1, 1]; kept: (1, 1, H, W) bool. Encoded and decoded, a plain ground is off
    by a level or two, and a line shows where it meets the file's own. How far off it is is known of the kept
    pixels, which were decoded as well, and goes on from there into what is drawn. Where both differ by more
    than SAME, there is something else than a tone.
    """
    gap = own - drawn
    told = kept & (gap.abs().amax(1, keepdim=True) <= SAME / 127.5)
    return drawn + spread(gap, told.float()) if bool(told.any()) else drawn


def filled(image: "Image") -> "Image":
    """A picture of `to_srgb` as RGB: what is wholly transparent gets the colours around it.

    What a file has under there is nobody's to see, often black or a picture that was cut out. A picture
    without any opaque pixel becomes white.
    """
    from PIL import Image

    if image.mode != "RGBA":
        return image
    levels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float()
    colours, opaque = levels[:, :3], levels[:, 3:] / 255
    if not opaque.any():
        return Image.new("RGB", image.size, "white")
    shown = torch.where(opaque > 0, colours, spread(colours, opaque))
    return Image.fromarray(shown[0].round().to(torch.uint8).permute(1, 2, 0).numpy())


def spread(values: Tensor, known: Tensor) -> Tensor:
    """Values (1, C, H, W) that go on from where they are known, (1, 1, H, W) from 0 to 1, to all places.

    Push-pull (Gortler et al., "The Lumigraph", 1996): means of what is known at halved sizes, each filled
    in from the next. So a place takes its value from as wide a part of the known as it is far from it: at
    the border the very next pixels, far off the mean of all.
    """
    height, width = known.shape[2:]
    if bool((known == 1).all()) or height == width == 1:
        return values
    total = _halved(known)
    mean = _halved(values * known) / total.clamp_min(1e-12)
    wide = F.interpolate(spread(mean, total), scale_factor=2, mode="bilinear")[..., :height, :width]
    # Known for a quarter is enough, so that at a straight border the next pixels decide.
    return torch.lerp(wide, values, (4 * known).clamp(max=1))


def _halved(values: Tensor) -> Tensor:
    """Half as high and wide, rounded up, each the mean of 4 x 4 with more weight on the inner 2 x 2."""
    channels = values.shape[1]
    kernel = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = torch.outer(kernel, kernel).expand(channels, 1, 4, 4)
    return F.conv2d(F.pad(values, (1, 2, 1, 2)), kernel, stride=2, groups=channels)
