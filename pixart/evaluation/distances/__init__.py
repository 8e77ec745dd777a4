"""Distances between two sets of pictures, by features of both: Fréchet, kernels, neighbours.

Features are rows (n, d) of any real dtype; everything is computed in fp64, in chunks.
"""

from pixart.evaluation.distances.blocks import Jackknife, blocks_of, jackknife
from pixart.evaluation.distances.frechet import (
    RunningMoments,
    Sample,
    Target,
    fid_infinity,
    frechet_distance,
    frechet_distance_of,
    moments_of,
)
from pixart.evaluation.distances.kernels import (
    KernelDistance,
    SubsetDistance,
    kernel_distance,
    kernel_distance_of_subsets,
    maximum_mean_discrepancy,
)
from pixart.evaluation.distances.neighbours import Neighbourhoods, neighbourhoods

__all__ = [
    "Jackknife",
    "KernelDistance",
    "Neighbourhoods",
    "RunningMoments",
    "Sample",
    "SubsetDistance",
    "Target",
    "blocks_of",
    "fid_infinity",
    "frechet_distance",
    "frechet_distance_of",
    "jackknife",
    "kernel_distance",
    "kernel_distance_of_subsets",
    "maximum_mean_discrepancy",
    "moments_of",
    "neighbourhoods",
]
