"""Pictures like photographs, for the tests of what looks at them as a whole."""

import numpy as np
from PIL import Image


def scenery(seed: int, width: int = 256, height: int = 192) -> Image.Image:
    """Like a photograph: power falls with the frequency squared, colours apart."""
    rng = np.random.default_rng(seed)
    down, right = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    falls = 1 / np.maximum(np.hypot(down, right), 1 / width) ** 1.3
    noise = rng.normal(size=(3, height, width)) + 2 * rng.normal(size=(1, height, width))
    waves = np.fft.ifft2(np.fft.fft2(noise) * falls).real
    waves /= waves.std(axis=(1, 2), keepdims=True)
    return Image.fromarray((128 + 45 * waves).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def cut(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Without shares of its sides."""
    width, height = image.size
    box = (left * width, top * height, width - right * width, height - bottom * height)
    return image.crop(tuple(map(round, box)))  # type: ignore[arg-type]
