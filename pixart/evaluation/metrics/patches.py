"""Fréchet distance between patches, for pictures of which a network sees a thumbnail (4K).

Eight crops of 299 pixels a picture and scale: native, 1/2 and 1/4. A network that is shown a whole 4K
picture gets it at 299 pixels, in which its detail is gone. There is no standard for this: the number
compares with numbers of this metric alone, and the real pictures must be of such a size themselves.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pixart.evaluation.distances import Sample, Target
from pixart.evaluation.metric import Context, Extractor, Features, Moments
from pixart.evaluation.metrics.cosine import digest_of
from pixart.evaluation.metrics.frechet import ENOUGH, as_estimate, biased, distance
from pixart.evaluation.metrics.of_sets import FeatureMetric, groups
from pixart.evaluation.statistics.estimate import Estimate
from pixart.pictures import PictureError

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.evaluation.needs import Need
    from pixart.evaluation.store.entries import Entry

SCALES = {
    1: "",
    2: "-half",
    4: "-quarter",
}  # pixels of a picture for one of a crop: end of the name
GRID = (4, 2)  # crops along the longer side and the shorter one
SIDE = 299
_VERSION = "1"  # of where crops are


class Patches(Extractor):
    """What another extractor makes of crops: 8 a scale, as rows in order of scales.

    Each crop is somewhere in its cell of a fixed grid, where the picture's key says. A crop of 1/2 is
    made of twice the side, 2 x 2 pixels averaged. PictureError for a picture whose shorter side is below
    4 crops.
    """

    def __init__(self, inner: Extractor, side: int) -> None:
        self.inner, self.side = inner, side
        self.name = f"patches-{side}-{inner.name}"
        self.width, self.rows = inner.width, len(SCALES) * GRID[0] * GRID[1]

    def needs(self) -> "Sequence[Need]":
        return self.inner.needs()

    @property
    def digest(self) -> str:
        text = f"{_VERSION} {self.side} {GRID} {list(SCALES)} {self.inner.digest}"
        return hashlib.sha256(text.encode()).hexdigest()[: len(self.inner.digest)]

    def prepare(self, image: "Image", entry: "Entry") -> Any:
        least = self.side * max(SCALES)
        if min(image.size) < least:
            got = "x".join(map(str, image.size))
            raise PictureError(
                str(entry.path),
                f"patches need a picture of {least} pixels on the shorter side, got {got}",
            )
        prepared = []
        for scale in SCALES:
            for left, upper in _places(image.size, self.side * scale, f"{entry.key} {scale}"):
                box = (left, upper, left + self.side * scale, upper + self.side * scale)
                crop = image.crop(box)
                crop = crop if scale == 1 else crop.reduce(scale)
                prepared.append(self.inner.prepare(crop, entry))
        return prepared

    def __call__(self, prepared: Sequence[Any]) -> np.ndarray:
        # A picture at a time: 24 crops are a batch.
        return np.stack([self.inner(crops) for crops in prepared])

    def release(self) -> None:
        self.inner.release()


class PatchFrechet(FeatureMetric):
    """patch-fd at native resolution, patch-fd-half and patch-fd-quarter of pictures made smaller.
    `--option patch-size=N` has other crops than 299 pixels."""

    usual = "inception-clean"
    source = "no paper: Fréchet distance (arXiv:1706.08500) of crops"
    category_pictures = 1000

    def __init__(self, name: str, context: Context) -> None:
        side = context.options.get("patch-size", str(SIDE))
        if not side.isdecimal() or not 16 <= int(side) <= 4096:
            raise ValueError(f"option patch-size must be from 16 to 4096 pixels, got {side!r}")
        super().__init__(name, context)
        self._inner, self._side = self.extractor, int(side)
        self.extractor = Patches(self._inner, self._side)

    @property
    def constants(self) -> Mapping[str, Any]:
        return {
            "features": self._inner.name,
            "weights": digest_of(self._inner),
            "category_pictures": self.category_pictures,
            "side": self._side,
            "grid": list(GRID),
            "scales": list(SCALES),
            "interval": self.interval,
        }

    def notes(self) -> tuple[str, ...]:
        if self._inner.name == self.usual:
            return ()
        return (f"By features of {self._inner.name}, not of {self.usual}.",)

    def compare(self, ours: Features, reference: Features | Moments) -> Mapping[str, Estimate]:
        real = self.features_of(reference)
        values = {}
        for place, (scale, end) in enumerate(SCALES.items()):
            rows = slice(place * GRID[0] * GRID[1], (place + 1) * GRID[0] * GRID[1])
            sample = Sample(
                _flat(ours.values[:, rows]),
                Target.of_features(_flat(real.values[:, rows]), self.device),
            )
            of = [group for group in groups(ours) for _ in range(GRID[0] * GRID[1])]
            found = distance(sample, of, self.interval)
            notes = [f"Of pictures at 1/{scale} of their size."] if scale > 1 else []
            notes += self.notes()
            if min(sample.n, len(real.keys) * GRID[0] * GRID[1]) < ENOUGH:
                notes.append(biased(found.bias, "crops"))
            values[f"{self.name}{end}"] = replace(
                as_estimate(found, sample.n, notes), n=len(ours.keys)
            )
        return values


def _places(size: tuple[int, int], side: int, key: str) -> list[tuple[int, int]]:
    """Left and upper edges: one in each cell of the grid, anywhere in it."""
    along, across = GRID if size[0] >= size[1] else GRID[::-1]
    rng = np.random.default_rng(list(hashlib.sha256(key.encode()).digest()))
    found = []
    for row in range(across):
        for column in range(along):
            found.append(
                (
                    _within(column, along, size[0] - side, rng),
                    _within(row, across, size[1] - side, rng),
                )
            )
    return found


def _within(cell: int, cells: int, most: int, rng: np.random.Generator) -> int:
    """A number of a cell of 0 ... most, both included."""
    low, high = cell * (most + 1) // cells, (cell + 1) * (most + 1) // cells
    return int(rng.integers(low, max(high, low + 1)))


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, values.shape[-1])
