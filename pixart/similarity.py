"""How alike two pictures are, number by number. Importing this module imports numpy alone."""

import math
from functools import cache

import numpy as np

WINDOW, SIGMA = 11, 1.5  # of the Gaussian of SSIM
K1, K2 = 0.01, 0.03


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of one shape, in dB; infinite for the same."""
    _check(a, b)
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al., 2004) of two uint8 pictures (height, width, 3) or (height, width):
    the mean over channels, each with a Gaussian window of 11 × 11 pixels, sigma 1.5, without the border that
    it does not fit into. At least 11 pixels a side."""
    _check(a, b)
    if min(a.shape[:2]) < WINDOW:
        raise ValueError(f"pictures must have {WINDOW} pixels a side at least, got {a.shape[:2]}")
    x, y = (one.reshape(*one.shape[:2], -1).astype(np.float64) for one in (a, b))
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x = _blurred(x * x) - mean_x**2
    var_y = _blurred(y * y) - mean_y**2
    both = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    alike = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float(np.mean(alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def _blurred(image: np.ndarray) -> np.ndarray:
    """(height - 10, width - 10, channels) of (height, width, channels)."""
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(image, WINDOW, axis)
        image = windows @ _gaussian()
    return image


@cache
def _gaussian() -> np.ndarray:
    weights = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    return weights / weights.sum()


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(
            f"pictures must be uint8 and of one shape, got {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
