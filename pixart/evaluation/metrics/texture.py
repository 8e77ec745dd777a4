"""Texture of single pictures, without a network: grey-level co-occurrence, compression, spectrum.

For 4K, where the metrics of thumbnails are blind. All three are raised by noise as by detail.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pixart.evaluation.metric import Context, PictureMetric, Score
from pixart.evaluation.statistics.estimate import Estimate
from pixart.evaluation.statistics.intervals import mean_over_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

LEVELS, PATCH = 64, 64  # grey levels, pixels of a patch's side
DISTANCES = (1, 2, 3, 4)  # pixels
ANGLES = (0, 45, 90, 135)  # degrees
QUALITY = 95  # of JPEG
LOWEST, HIGHEST = 1 / 32, 1 / 2.5  # cycles a pixel, of the slope
_RINGS = 16
_PATCHES = 64  # at a time
_NOISE = "Noise raises it as detail does."
_LESS = "Less for more detail; noise lowers it as detail does."


class Texture(PictureMetric):
    """texture: the GLCM score of Diffusion-4K as its code computes it. texture-entropy: the entropy of
    co-occurrences in bits, as its name says. texture-compression: bytes of pixels to bytes of JPEG, less
    for more detail. texture-slope: of the power spectrum, nearer to 0 for finer detail."""

    reads_prompts = False
    source = "arXiv:2503.18352 and github.com/zhang0jhon/diffusion-4k, eval.py"

    def __init__(self, name: str, context: Context) -> None:
        self.name = name
        self.opposite = (f"{name}-compression",)

    @property
    def constants(self) -> Mapping[str, Any]:
        return {
            "levels": LEVELS,
            "patch": PATCH,
            "distances": list(DISTANCES),
            "angles": list(ANGLES),
            "jpeg_quality": QUALITY,
            "frequencies": [LOWEST, HIGHEST],
        }

    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: np.ndarray | None,
    ) -> list[Score]:
        assert images is not None
        return [_score(image) for image in images]

    def reduce(self, entries: "Sequence[Entry]", scores: Sequence[Score]) -> Mapping[str, Estimate]:
        values = {self.name: [one.value for one in scores]}
        for part in ("entropy", "compression", "slope"):
            values[f"{self.name}-{part}"] = [one.parts[part] for one in scores]
        found = {name: mean_over_prompts(entries, each) for name, each in values.items()}
        return {
            name: replace(
                one, notes=(*one.notes, _LESS if name.endswith("-compression") else _NOISE)
            )
            for name, one in found.items()
        }


def _score(image: "Image") -> Score:
    grey = np.asarray(image.convert("L"))
    glcm, entropy = glcm_scores(grey)
    parts = {
        "entropy": entropy,
        "compression": compression_ratio(image),
        "slope": spectral_slope(grey),
    }
    return Score(glcm, parts)


def glcm_scores(grey: np.ndarray) -> tuple[float, float]:
    """(As Diffusion-4K's code has it, entropy of the co-occurrences in bits): means over whole patches of
    64 pixels, of grey (height, width), uint8. ValueError below one patch.

    The code takes scikit-image's `shannon_entropy` of the matrix, which is the entropy of how often each
    *value* occurs in it, nearly all being 0; published scores, 0.6 to 0.8, are of this. The second is
    -Σ p log2 p of each of the 16 matrices, their mean.
    """
    height, width = (side // PATCH for side in grey.shape)
    if not height or not width:
        raise ValueError(f"texture needs {PATCH} pixels on either side, got {grey.shape[::-1]}")
    levels = (grey[: height * PATCH, : width * PATCH] // (256 // LEVELS)).astype(np.int64)
    patches = levels.reshape(height, PATCH, width, PATCH).swapaxes(1, 2)
    patches = patches.reshape(-1, PATCH, PATCH)
    scores = [
        _of_patches(patches[start : start + _PATCHES]) for start in range(0, len(patches), _PATCHES)
    ]
    values, entropies = (np.concatenate(each) for each in zip(*scores, strict=True))
    return float(values.mean()), float(entropies.mean())


def _of_patches(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = len(patches)
    occurrences: list[dict[float, int]] = [{} for _ in range(count)]
    entropies = np.zeros(count)
    for row, column in _offsets():
        first = patches[:, : PATCH - row, max(0, -column) : PATCH - max(0, column)]
        second = patches[:, row:, max(0, column) : PATCH + min(0, column)]
        total = first[0].size
        codes = (first * LEVELS + second).reshape(count, -1)
        codes += np.arange(count)[:, None] * LEVELS**2
        matrix = np.bincount(codes.ravel(), minlength=count * LEVELS**2).reshape(count, -1)
        shares = matrix / total
        with np.errstate(divide="ignore", invalid="ignore"):
            entropies -= np.where(matrix > 0, shares * np.log2(shares), 0).sum(axis=1)
        for seen, of_patch in zip(occurrences, matrix, strict=True):
            for number, times in enumerate(np.bincount(of_patch).tolist()):
                if times:
                    # Of two offsets, equal shares are one value.
                    seen[number / total] = seen.get(number / total, 0) + times
    offsets = len(DISTANCES) * len(ANGLES)
    values = [_entropy(list(seen.values())) for seen in occurrences]
    return np.array(values), entropies / offsets


def _offsets() -> list[tuple[int, int]]:
    """(rows down, columns to the right) of each distance and angle; half a pixel and more is one, so that
    on the diagonals distances 1 and 2 are the same."""
    return [
        (
            round(math.sin(math.radians(angle)) * distance),
            round(math.cos(math.radians(angle)) * distance),
        )
        for distance in DISTANCES
        for angle in ANGLES
    ]


def _entropy(times: Sequence[int]) -> float:
    shares = np.array(times, dtype=np.float64) / sum(times)
    return float(-(shares * np.log2(shares)).sum())


def compression_ratio(image: "Image") -> float:
    """Bytes of an RGB picture's pixels to those of it as JPEG, quality 95 (Diffusion-4K; which sampling of
    colours its encoder has, it does not say: here Pillow's 4:2:0). Less for more detail."""
    written = io.BytesIO()
    image.save(written, "JPEG", quality=QUALITY)
    return image.width * image.height * 3 / written.tell()


def spectral_slope(grey: np.ndarray) -> float:
    """The slope of log power against log frequency, of rings from 1/32 to 1/2.5 cycles a pixel: about -2
    for photographs (Field 1987), lower for blurred ones, 0 for noise. Under a Hann window, to which the
    rounding of levels is added, so that a flat picture has one as well."""
    window = np.outer(*(np.hanning(side + 2)[1:-1] for side in grey.shape))
    level = grey.astype(np.float64)
    spectrum = np.fft.rfft2((level - level.mean()) * window)
    power = np.abs(spectrum) ** 2 / (window**2).sum() + 1 / 12
    rows, columns = np.fft.fftfreq(grey.shape[0]), np.fft.rfftfreq(grey.shape[1])
    radius = np.hypot(rows[:, None], columns)
    edges = np.geomspace(LOWEST, HIGHEST, _RINGS + 1)
    ring = np.digitize(radius.ravel(), edges) - 1
    inside = (ring >= 0) & (ring < _RINGS)
    counts = np.bincount(ring[inside], minlength=_RINGS)
    sums = np.bincount(ring[inside], power.ravel()[inside], minlength=_RINGS)
    there = counts > 0
    x = np.log(np.sqrt(edges[1:] * edges[:-1]))[there]
    y = np.log(sums[there] / counts[there])
    return float(np.polyfit(x, y, 1)[0])
