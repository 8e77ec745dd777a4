"""From the bytes of a picture file to an RGB picture, and to the size of its bucket.

Whatever is wrong with a file is an ImageError, whose message is the reason that a report gives.
"""

import io
import struct
import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
# What Pillow's decoders raise over damaged bytes.
_DAMAGED = (OSError, SyntaxError, ValueError, LookupError, EOFError, TypeError, struct.error,
            zlib.error, OverflowError, MemoryError)  # fmt: skip
LANCZOS_FROM = 2048  # px of resolution; bicubic below, as published


class ImageError(ValueError):
    """A picture that cannot be used, and why."""


def decode(content: bytes) -> "Image":
    """The whole picture as RGB, upright, transparency over white. Raises ImageError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as opened:
            # Opening reads the head alone: damage further on shows here.
            opened.load()
            # A camera stores what its sensor saw and notes how to turn it. size_of turns the same
            # way, or the bucket would be that of a picture on its side.
            return _as_rgb(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError as error:
        raise ImageError(f"unreadable image: {error}") from error
    except _DAMAGED as error:
        kind = "truncated" if "truncated" in str(error).lower() else "unreadable"
        reason = "no picture format that is known" if "cannot identify" in str(error) else error
        raise ImageError(f"{kind} image: {reason}") from error


def size_of(content: bytes) -> tuple[int, int]:
    """Height and width of the upright picture, read from the head of the file. Raises ImageError."""
    from PIL import Image

    orientation = 0x0112  # the EXIF tag; 5 to 8 lie on their side
    try:
        with Image.open(io.BytesIO(content)) as opened:
            width, height = opened.size
            lies = opened.getexif().get(orientation, 1) in (5, 6, 7, 8)
    except (*_DAMAGED, Image.DecompressionBombError):
        return decode(content).size[::-1]  # says in its own words what is wrong
    return (width, height) if lies else (height, width)


def cover(image: "Image", bucket: tuple[int, int], resolution: int) -> Tensor:
    """The picture scaled until it covers a bucket of (height, width) px, and the middle of that.

    Returns (3, height, width), float32 in [-1, 1]. Lanczos from a resolution of 2048 up, else
    bicubic; sides round as torchvision's Resize and CenterCrop round them.
    """
    import numpy as np
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
    image = image.crop((left, top, left + width, top + height))
    # np.array copies; a view of a Pillow image is read-only, which PyTorch warns about.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32).div(127.5).sub(1.0)


def _as_rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image)
    # Transparent pixels have a colour too, often black, which dropping alpha would show.
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: "Image") -> "Image":
    """16 and 32 bit grey to 8 bits; Pillow's own conversion clips everything above 255 to white."""
    import numpy as np
    from PIL import Image

    levels = np.asarray(image)
    if levels.dtype.kind == "f":
        raise ImageError("unreadable image: pixels of floating point have no known range")
    return Image.fromarray((levels.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
