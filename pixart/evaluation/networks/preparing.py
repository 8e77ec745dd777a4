"""Pictures as networks take them: resized by Pillow, cropped or padded, normalised. No torchvision.

Each published network was trained behind one of these ways, and another way gives other numbers: the
filter, whether it looks at all pixels (antialias), 8 bits or floats between, crop or squash.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def bicubic_of_floats(image: "Image", width: int, height: int) -> np.ndarray:
    """(3, height, width) fp32 in 0 ... 255: Pillow's bicubic filter over each channel as floats, cut off
    at the ends but not rounded (clean-fid, arXiv:2104.11222)."""
    from PIL import Image

    levels = np.asarray(image.convert("RGB"), np.float32)
    channels = [Image.fromarray(levels[:, :, c]) for c in range(3)]
    resized = [
        np.asarray(channel.resize((width, height), Image.Resampling.BICUBIC))
        for channel in channels
    ]
    return np.stack(resized).clip(0, 255)


def bilinear(image: "Image", side: int) -> np.ndarray:
    """(3, side, side) fp32 in 0 ... 1: each pixel from four of the picture, the others unseen (no
    antialias), centres aligned."""
    resized = F.interpolate(_pixels(image)[None] / 255, (side, side), mode="bilinear")
    return resized[0].numpy()


def bilinear_of_tensorflow(image: "Image", side: int) -> np.ndarray:
    """(3, side, side) fp32 in 0 ... 255: as `bilinear`, but on TensorFlow 1's grid, which begins at the
    first pixel, without the half of a pixel that all others add: the picture moves to one corner."""
    x = _pixels(image)
    for axis in (2, 1):
        size = x.shape[axis]
        places = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side)
        low = places.long()
        share = (places - low) if axis == 2 else (places - low)[:, None]
        first = x.index_select(axis, low)
        x = first + (x.index_select(axis, (low + 1).clamp_max(size - 1)) - first) * share
    return x.numpy()


def _pixels(image: "Image") -> Tensor:
    """(3, height, width) fp32 in 0 ... 255."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()


def squashed(image: "Image", width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: Pillow's bicubic filter in 8 bits, whatever the aspect ratio."""
    from PIL import Image

    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))


def centre_cropped(
    image: "Image", shortest: int, width: int, height: int, resample: int | None = None
) -> np.ndarray:
    """(height, width, 3) uint8: the shorter side to `shortest` pixels, the longer one cut to whole
    pixels, then the middle. resample: Pillow's filter, None for bicubic. ValueError where the crop is
    larger than the picture."""
    from PIL import Image

    filter_ = Image.Resampling(Image.Resampling.BICUBIC if resample is None else resample)
    longest = int(shortest * max(image.size) / min(image.size))
    size = (shortest, longest) if image.width <= image.height else (longest, shortest)
    if size[0] < width or size[1] < height:
        raise ValueError(f"a crop of {width}x{height} must fit in {size[0]}x{size[1]} pixels")
    if image.size != size:
        image = image.resize(size, filter_)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(image.convert("RGB").crop((left, top, left + width, top + height)))


def letterboxed(image: "Image", side: int, antialias: bool = True) -> np.ndarray:
    """(3, side, side) fp32, about 0 ... 1: the longer side to `side` pixels, the rest black, as HPSv2 does
    (github.com/tgxs002/HPSv2, open_clip/transform.py, ResizeMaxSize).

    Bicubic over floats and not cut off at the ends, so that values pass 0 and 1 a little. antialias:
    torchvision did without on tensors up to 0.16, and does with it since.
    """
    pixels = _pixels(image) / 255
    scale = side / max(image.size)
    new = (round(image.height * scale), round(image.width * scale))
    resized = F.interpolate(pixels[None], new, mode="bicubic", antialias=antialias)[0]
    down, right = side - new[0], side - new[1]
    padding = (right // 2, right - right // 2, down // 2, down - down // 2)
    return F.pad(resized, padding).numpy()


def normalised(
    levels: np.ndarray, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> np.ndarray:
    """(3, height, width) fp32 of (height, width, 3) uint8: scaled to 0 ... 1, less the mean, over the
    standard deviation of each channel."""
    scaled = levels.astype(np.float32) / np.float32(255)
    shifted = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(shifted.transpose(2, 0, 1))
