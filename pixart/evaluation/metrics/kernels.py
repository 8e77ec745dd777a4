"""KID and CMMD: distances by kernels, without bias however few pictures there are."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pixart.evaluation.distances import (
    kernel_distance,
    kernel_distance_of_subsets,
    maximum_mean_discrepancy,
)
from pixart.evaluation.distances.kernels import SIGMA, SUBSET_SEED, SUBSET_SIZE, SUBSETS
from pixart.evaluation.metric import Features, Moments
from pixart.evaluation.metrics.of_sets import NORMAL, FeatureMetric, estimate, groups
from pixart.evaluation.statistics.estimate import Estimate


class Kid(FeatureMetric):
    """kid: from all pairs, times 1,000, with a jackknife over prompts of ours and over real pictures.
    kid-subsets: of 100 subsets of 1,000, as torch-fidelity draws them, where there are as many."""

    usual = "inception-clean"
    unit = "x1000"
    source = "arXiv:1801.01401; subsets as in torch-fidelity and clean-fid"
    category_pictures = 100

    @property
    def constants(self) -> Mapping[str, Any]:
        return {
            **super().constants,
            "kernel": "(x.y/d + 1)^3",
            "subsets": SUBSETS,
            "subset_size": SUBSET_SIZE,
            "seed": SUBSET_SEED,
        }

    def compare(self, ours: Features, reference: Features | Moments) -> Mapping[str, Estimate]:
        real = self.features_of(reference)
        whole = kid_estimate(ours, real, self.device, self.notes())
        values = {self.name: whole}
        if min(len(ours.keys), len(real.keys)) >= SUBSET_SIZE:
            found = kernel_distance_of_subsets(
                ours.values, real.values, subsets=SUBSETS, size=SUBSET_SIZE, device=self.device
            )
            # Of the pictures as kid's, and of which subsets were drawn.
            error = math.hypot(
                (whole.high - whole.value) / NORMAL, 1000 * found.deviation / math.sqrt(SUBSETS)
            )
            note = f"Deviation of subsets: {1000 * found.deviation:.3g}."
            values["kid-subsets"] = estimate(
                1000 * found.mean,
                error,
                len(ours.keys),
                f"jackknife, {SUBSETS} subsets",
                (*self.notes(), note),
            )
        return values


class Cmmd(FeatureMetric):
    """cmmd: unbiased, from all pairs. cmmd-with-diagonal: as the paper's code computes it, with pairs of a
    picture and itself. Features are divided by their norms."""

    usual = "clip-l14-336"
    unit = "x1000"
    source = "arXiv:2401.09603; github.com/google-research/google-research, cmmd"
    category_pictures = 100

    @property
    def constants(self) -> Mapping[str, Any]:
        return {**super().constants, "sigma": SIGMA}

    def compare(self, ours: Features, reference: Features | Moments) -> Mapping[str, Estimate]:
        real = self.features_of(reference)
        found = maximum_mean_discrepancy(
            ours.values,
            real.values,
            groups_a=groups(ours),
            groups_b=groups(real),
            device=self.device,
        )
        n = len(ours.keys)
        # Off by what n and m alone decide, nearly: the error is the same.
        return {
            self.name: estimate(found.value, found.error, n, "jackknife", self.notes()),
            f"{self.name}-with-diagonal": estimate(
                found.with_diagonal, found.error, n, "jackknife", self.notes(), least=0.0
            ),
        }


def kid_estimate(
    ours: Features, real: Features, device: torch.device, notes: Sequence[str]
) -> Estimate:
    """KID times 1,000, from all pairs."""
    found = kernel_distance(
        ours.values,
        real.values,
        groups_a=groups(ours),
        groups_b=groups(real),
        device=device,
    )
    n = len(ours.keys)
    return estimate(1000 * found.value, 1000 * found.error, n, "jackknife", notes)
