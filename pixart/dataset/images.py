"""From the bytes of a picture file to an RGB picture, and to the size of its bucket.

Whatever is wrong with a file is an ImageError, whose message is the reason that a report gives.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pixart import pictures
from pixart.pictures import Head, PictureError, open_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

LANCZOS_FROM = 2048  # px of resolution; bicubic below, as published


class ImageError(ValueError):
    """A picture that cannot be used, and why."""


def decode(content: bytes) -> "Image":
    """The whole picture as RGB, upright, in sRGB, transparency over white. Raises ImageError."""
    with refusals():
        return open_rgb(content, "picture")


def head_of(content: bytes) -> Head:
    """Size of the upright picture and state of its profile, by the file's head. Raises ImageError."""
    with refusals():
        return pictures.head_of(content, "picture")


def cover(image: "Image", bucket: tuple[int, int], resolution: int) -> Tensor:
    """The picture scaled until it covers a bucket of (height, width) px, and the middle of that.

    Returns (3, height, width), float32 in [-1, 1]. Lanczos from a resolution of 2048 up, else
    bicubic; sides round as torchvision's Resize and CenterCrop round them.
    """
    from PIL import Image

    height, width = bucket
    # max: a product that floats round to just under the side would leave a strip uncovered.
    if height / image.height > width / image.width:
        scaled_height, scaled_width = height, max(width, int(image.width * height / image.height))
    else:
        scaled_height, scaled_width = max(height, int(image.height * width / image.width)), width
    method = Image.Resampling.LANCZOS if resolution >= LANCZOS_FROM else Image.Resampling.BICUBIC
    image = image.resize((scaled_width, scaled_height), method)
    top, left = round((scaled_height - height) / 2), round((scaled_width - width) / 2)
    return as_pixels(image.crop((left, top, left + width, top + height)))


def as_pixels(image: "Image") -> Tensor:
    """An RGB picture as (3, height, width), float32 in [-1, 1]."""
    import numpy as np

    # np.array copies; a view of a Pillow image is read-only, which PyTorch warns about.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32).div(127.5).sub(1.0)


def as_image(pixels: Tensor) -> "Image":
    """The picture that as_pixels was given."""
    from PIL import Image

    levels = pixels.add(1.0).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


@contextmanager
def refusals() -> Iterator[None]:
    """Whatever is wrong with a picture within the block is an ImageError."""
    try:
        yield
    except PictureError as error:
        kind = "truncated" if "truncated" in error.reason.lower() else "unreadable"
        raise ImageError(f"{kind} image: {error.reason}") from error
