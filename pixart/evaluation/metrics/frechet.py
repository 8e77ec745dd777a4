"""Fréchet distances between features of two sets: FID in its three variants, FD-DINOv2."""

import math
from collections.abc import Mapping
from typing import Any

from pixart.evaluation.distances import (
    Jackknife,
    Sample,
    Target,
    blocks_of,
    fid_infinity,
    jackknife,
)
from pixart.evaluation.distances.blocks import BLOCKS
from pixart.evaluation.distances.frechet import SIZES
from pixart.evaluation.metric import Context, Features, Moments
from pixart.evaluation.metrics.kernels import kid_estimate
from pixart.evaluation.metrics.of_sets import FeatureMetric, estimate, groups
from pixart.evaluation.statistics.estimate import Estimate

STRAIGHT = 30_000  # pictures; the smallest subsets have 5,000 then, as in the paper
ENOUGH = 10_000  # pictures; below, most of the number may be bias
SEED = 0  # of blocks and of subsets
USUAL = {  # features and source of each
    "fid-clean": (
        "inception-clean",
        "arXiv:1706.08500, resized as in clean-fid (arXiv:2104.11222)",
    ),
    "fid-pytorch": ("inception-pytorch", "arXiv:1706.08500, resized as in pytorch-fid"),
    "fid-tf": ("inception-tf", "arXiv:1706.08500, resized as in TensorFlow and torch-fidelity"),
    "fd-dinov2": ("dinov2", "arXiv:2306.04675; github.com/layer6ai-labs/dgm-eval"),
}
_OF_PICTURES = (
    "The interval is of the choice of pictures alone: training the same model again moves it more "
    "(FID lottery, 2026)."
)
_BENT = (
    f"Below {STRAIGHT:,} pictures distances are not quite on a line: read it as a direction, which may "
    "be too low."
)


class Frechet(FeatureMetric):
    """NAME, the distance itself, with a jackknife over 50 blocks of our pictures; and fid-infinity
    (fd-infinity), what it tends to for endlessly many, as a second number where there are 30 pictures.
    Below 10,000 pictures of either set kid-x1000, which has no such bias, stands before them.
    """

    category_pictures = 1000

    def __init__(self, name: str, context: Context) -> None:
        self.usual, self.source = USUAL[name]
        super().__init__(name, context)

    @property
    def constants(self) -> Mapping[str, Any]:
        return {**super().constants, "interval": self.interval, "blocks": BLOCKS, "sizes": SIZES}

    def compare(self, ours: Features, reference: Features | Moments) -> Mapping[str, Estimate]:
        if isinstance(reference, Moments):
            target = Target.of_moments(reference, self.device)
        else:
            target = Target.of_features(reference.values, self.device)
        sample = Sample(ours.values, target)
        found = distance(sample, groups(ours), self.interval)
        values: dict[str, Estimate] = {}
        notes = [*self.notes(), _OF_PICTURES]
        if min(sample.n, target.n or sample.n) < ENOUGH:
            if isinstance(reference, Features) and min(sample.n, len(reference.keys)) > 2:
                values["kid-x1000"] = kid_estimate(ours, reference, self.device, self.notes())
            few = target.n is not None and target.n < ENOUGH
            of = f" (the reference has {target.n:,})" if few else ""
            notes.insert(0, f"{biased(found.bias, 'pictures', of)} Read KID first.")
        values[self.name] = as_estimate(found, sample.n, notes)
        if sample.n >= 2 * SIZES:
            value, error = fid_infinity(sample, seed=SEED)
            name = "fid-infinity" if self.name.startswith("fid") else "fd-infinity"
            method = f"line through {SIZES} sizes"
            method += ", jackknife" if self.interval != "none" else ""
            both = math.hypot(error, found.error) if self.interval != "none" else math.inf
            bent = (_BENT,) if sample.n < STRAIGHT else ()
            values[name] = estimate(value, both, sample.n, method, (*self.notes(), *bent))
        return values


def distance(sample: Sample, of: list[str], interval: str) -> Jackknife:
    """With its standard error, infinite if the interval is not wanted. of: the group of each row."""
    blocks = blocks_of(of, seed=SEED) if interval == "jackknife" else []
    if any(sample.n - len(block) < 2 for block in blocks):
        blocks = []
    return jackknife(sample.distance(), [sample.without(block) for block in blocks])


def as_estimate(found: Jackknife, n: int, notes: list[str]) -> Estimate:
    method = f"jackknife over {found.blocks} blocks" if found.blocks > 1 else "none"
    return estimate(found.value, found.error, n, method, notes, least=0.0)


def biased(bias: float, what: str, note: str = "") -> str:
    """A note on a distance of few pictures, or crops."""
    part = f", about {bias:.3g} of it is bias" if math.isfinite(bias) else ""
    return f"Biased: below {ENOUGH:,} {what}{note}{part}."
