"""How clean the colours of a picture of the embedded world are."""

import numpy as np

from pixart.shapes.checker import distance
from pixart.shapes.scene import BACKGROUNDS, COLOURS

NEAR = 20.0  # Euclidean distance in 8-bit RGB


def purity(picture: np.ndarray) -> float:
    """The share of pixels that are near a colour of the world, of a (height, width, 3) uint8 picture: above 98 %
    in true renders, whose edges are blended, and far below it in blurred ones."""
    pixels = picture.astype(np.float32)
    is_near = np.zeros(pixels.shape[:2], bool)
    for colour in (*COLOURS.values(), *BACKGROUNDS.values()):
        is_near |= distance(pixels, np.array(colour, np.float32)) <= NEAR
    return float(is_near.mean())
