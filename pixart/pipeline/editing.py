"""What a picture is drawn from: another picture, fitted to a size, with a border and a mask; and the
drawn put together with what is kept of it.

Outside the mask a finished picture has the file's own pixels (upright, sRGB, 8 bits) to the bit: the VAE
is not asked for them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pixart.files import printable
from pixart.pictures import over
from pixart.pipeline import defaults
from pixart.pipeline.inputs import ALPHA, Inputs
from pixart.pipeline.limits import BUCKET, EXACT_SIZE, parse_border
from pixart.pipeline.masks import faded, filled, matched, open_mask, refuse_empty
from pixart.pipeline.request import Request
from pixart.resolution import MAX_SIDE, MIN_TOKENS, Resolved, resolve_size
from pixart.vae.autoencoder import to_images

if TYPE_CHECKING:
    from PIL.Image import Image

STRENGTH, MASKED_STRENGTH = 0.6, 1.0
_WIDEST = 4  # of a bucket, to its height


def fit_of(request: Request) -> str:
    """How the picture of a request meets the size where it does not say so."""
    keeps = request.mask is not None or request.outpaint is not None or request.only_enlarges
    return request.fit or ("exact" if keeps else "crop")


def strength_of(request: Request) -> float | None:
    """How much of the picture is drawn anew; None if nothing is drawn from it."""
    if request.image is None or request.only_enlarges:
        return None
    if request.strength is not None:
        return request.strength
    keeps = request.mask is not None or request.outpaint is not None
    return MASKED_STRENGTH if keeps else STRENGTH


def canvas_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """What is drawn for a picture of any number of pixels: rounded up, later cut back."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def size_of(request: Request, inputs: Inputs, *, native: int, multiple: int) -> Resolved:
    """The size in pixels of what is drawn first, with a note for people.

    Without a picture, that of `defaults.size_of`. fit exact: the picture's own, and the border.
    crop: the size that is asked for, or the bucket nearest to the picture's aspect.
    """
    if request.image is None:
        return defaults.size_of(request, native=native, multiple=multiple)
    own = inputs.size(request.image)
    if fit_of(request) == "exact":
        return _exact_size(request, own, native=native, multiple=multiple)
    if request.outpaint is not None:
        raise ValueError("outpaint must be given without fit crop: it keeps all of the picture")
    if any(getattr(request, name) is not None for name in (*EXACT_SIZE, "aspect")):
        return defaults.size_of(request, native=native, multiple=multiple)
    height, width = own
    ratio = min(max(width / height, 1 / _WIDEST), _WIDEST)
    size = resolve_size(
        None, f"{ratio:.6f}:1", request.resolution, native=native, multiple=multiple
    )
    side = f"{size.width}x{size.height}"
    return Resolved(size.height, size.width, f"{side}, the bucket nearest to {width}x{height}")


def _exact_size(request: Request, own: tuple[int, int], *, native: int, multiple: int) -> Resolved:
    left, top, right, bottom = border_of(request)
    height, width = own[0] + top + bottom, own[1] + left + right
    is_own = (request.height, request.width) == (height, width)  # of a request that was resolved
    asked = [name for name in (*EXACT_SIZE, *BUCKET) if getattr(request, name) is not None]
    if asked and not is_own:
        raise ValueError(
            f"{asked[0]} must be left out with fit exact, which draws {width}x{height}, got "
            f"{getattr(request, asked[0])}"
            + ("" if request.outpaint else "; fit crop cuts the picture to another size")
        )
    sides = canvas_size(height, width, multiple)
    low = 1 if request.only_enlarges else min(MIN_TOKENS * multiple, native)
    if min(sides) < low or max(sides) > MAX_SIDE:
        raise ValueError(
            f"{printable(str(request.image))}: must be {low} to {MAX_SIDE} px a side to be drawn as it "
            f"is, got {width}x{height}; fit crop scales it"
        )
    return Resolved(height, width, f"{width}x{height}, the picture's own size")


def border_of(request: Request) -> tuple[int, int, int, int]:
    """Left, top, right and bottom pixels around the picture."""
    return parse_border(request.outpaint) if request.outpaint else (0, 0, 0, 0)


def check_inputs(request: Request, size: Resolved, inputs: Inputs) -> None:
    """Open what a request is drawn from. ValueError for a picture that cannot be read whole, and for a
    mask that does not belong to it or says that nothing is to be drawn."""
    if request.image is not None:
        inputs.open(request.image)
    if request.mask is not None:
        mask = _inner_mask(request, *_inner_size(request, size.height, size.width), inputs)
        if not mask.any() and request.outpaint is None:
            refuse_empty(request, inputs)


@dataclass(frozen=True)
class Canvas:
    """pixels: (height, width, 3) of 8 bits, what the picture gives. mask: (height, width) of 8 bits, from
    0 for what is kept to 255 for what is drawn; None where all is."""

    pixels: np.ndarray
    mask: np.ndarray | None

    @property
    def image(self) -> "Image":
        from PIL import Image

        return Image.fromarray(self.pixels)

    def tensor(self, multiple: int) -> Tensor:
        """(1, 3, H, W) in [-1, 1]: the canvas, its edges repeated up to the next multiples."""
        return to_unit(_rounded_up(self.pixels, multiple))

    def redraw(self, multiple: int, downsample: int) -> Tensor | None:
        """(1, 1, H / downsample, W / downsample): 1 for each cell in which the mask touches a pixel."""
        if self.mask is None:
            return None
        touched = torch.from_numpy(_rounded_up(self.mask, multiple) > 0).float()
        return F.max_pool2d(touched[None, None], downsample)

    def compose(self, drawn: Tensor) -> "Image":
        """The finished picture from the decoded canvas, (1, 3, H, W) about [-1, 1]: cut back, with what
        is kept put into it."""
        height, width = self.pixels.shape[:2]
        drawn = drawn[..., :height, :width].cpu()
        if self.mask is None:
            return to_images(drawn)[0]
        kept, mask = to_unit(self.pixels), torch.from_numpy(self.mask)[None, None]
        drawn = matched(drawn.clamp(-1, 1), kept, mask == 0)
        return to_images(torch.lerp(kept, drawn, mask / 255))[0]


def make_canvas(request: Request, inputs: Inputs) -> Canvas:
    """Of a request with a picture, resolved."""
    assert request.image and request.height and request.width
    height, width = _inner_size(request, request.height, request.width)
    image = inputs.open(request.image).image
    image = filled(image) if request.mask == ALPHA else over(image, "white")
    pixels = np.asarray(_fitted(image, request, height, width))
    left, top, right, bottom = border_of(request)
    border = ((top, bottom), (left, right))
    pixels = np.pad(pixels, (*border, (0, 0)), "edge")
    if request.mask is None and request.outpaint is None:
        return Canvas(pixels, None)
    mask = np.pad(_inner_mask(request, height, width, inputs), border, constant_values=255)
    return Canvas(pixels, faded(mask, request.mask_blur or 0))


def _inner_size(request: Request, height: int, width: int) -> tuple[int, int]:
    """Of the picture within its border."""
    left, top, right, bottom = border_of(request)
    return height - top - bottom, width - left - right


def _inner_mask(request: Request, height: int, width: int, inputs: Inputs) -> np.ndarray:
    from PIL.Image import Resampling

    if request.mask is None:
        return np.zeros((height, width), np.uint8)
    # Bilinear has no negative weights: what is 0 all around stays 0.
    mask = open_mask(request, inputs)
    return np.asarray(_fitted(mask, request, height, width, Resampling.BILINEAR))


def _fitted(
    image: "Image", request: Request, height: int, width: int, resample: int | None = None
) -> "Image":
    if fit_of(request) == "exact":
        assert image.size == (width, height)
        return image
    return cover(image, height, width, resample)


def _rounded_up(pixels: np.ndarray, multiple: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    rows, columns = canvas_size(height, width, multiple)
    more = [(0, rows - height), (0, columns - width), (0, 0)]
    return np.pad(pixels, more[: pixels.ndim], "edge")


def to_unit(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) of 8 bits to (1, 3, H, W) in [-1, 1], as the VAE takes it."""
    return torch.tensor(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def cover(image: "Image", height: int, width: int, resample: int | None = None) -> "Image":
    """Scaled until it covers the size, by Lanczos if nothing else is said, and cut about the middle."""
    from PIL.Image import Resampling

    own_width, own_height = image.size
    scale = max(width / own_width, height / own_height)
    if scale == 1:  # cut alone, at whole pixels, so that they stay as they are
        column, row = (own_width - width) // 2, (own_height - height) // 2
        return image.crop((column, row, column + width, row + height))
    cut_width, cut_height = min(width / scale, own_width), min(height / scale, own_height)
    left, top = (own_width - cut_width) / 2, (own_height - cut_height) / 2
    box = (left, top, left + cut_width, top + cut_height)
    return image.resize((width, height), Resampling.LANCZOS if resample is None else resample, box)
