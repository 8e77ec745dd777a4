"""Distances by kernels: the squared maximum mean discrepancy (Gretton et al. 2012), unbiased.

Kernel inception distance, KID (arXiv:1801.01401): (x·y/d + 1)³. CMMD (arXiv:2401.09603): a Gaussian.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pixart.evaluation.distances.blocks import jackknife
from pixart.evaluation.distances.rows import checked, with_fp64

SUBSETS, SUBSET_SIZE = 100, 1000
SUBSET_SEED = 2020  # torch-fidelity's: equal features give its number
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
_NUMBERS = 2**24  # of a part of a kernel matrix in memory: 128 MB

Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class KernelDistance:
    """value: the unbiased estimate from all pairs (may be below 0). error: its standard error, by a
    jackknife over groups of pictures of both sets. with_diagonal: the biased estimate, which has pairs of
    a picture and itself, and is never below 0."""

    value: float
    error: float
    with_diagonal: float


@dataclass(frozen=True)
class SubsetDistance:
    """mean and deviation (of the population) of the distances of random subsets: what papers give."""

    mean: float
    deviation: float
    subsets: int
    size: int


def kernel_distance(
    features_a: np.ndarray,
    features_b: np.ndarray,
    *,
    groups_a: Sequence[Hashable] | None = None,
    groups_b: Sequence[Hashable] | None = None,
    device: str | torch.device = "cpu",
) -> KernelDistance:
    """KID of features (n, d) and (m, d) from all pairs; not times 1,000. groups: of each row, rows of
    one are left out together (pictures of a prompt); None: each row is one. n and m at least 3.
    """
    return _discrepancy(features_a, features_b, polynomial, groups_a, groups_b, device)


def kernel_distance_of_subsets(
    features_a: np.ndarray,
    features_b: np.ndarray,
    *,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = SUBSET_SEED,
    device: str | torch.device = "cpu",
) -> SubsetDistance:
    """KID as torch-fidelity and clean-fid have it: the mean over 100 pairs of subsets of 1,000 pictures.
    ValueError where a set has fewer."""
    a, b = (checked(features, least=2) for features in (features_a, features_b))
    if min(len(a), len(b)) < size:
        raise ValueError(
            f"subsets of {size} need as many pictures in both sets, got {len(a)} and {len(b)}"
        )
    rng = np.random.RandomState(seed)  # the generator of torch-fidelity, whose draws these are
    found = []
    for _ in range(subsets):
        x, y = (_rows(rows[rng.choice(len(rows), size, replace=False)], device) for rows in (a, b))
        within = sum(float(k.sum() - k.trace()) for k in (polynomial(x, x), polynomial(y, y)))
        between = float(polynomial(x, y).sum())
        found.append(within / (size * (size - 1)) - 2 * between / size**2)
    return SubsetDistance(float(np.mean(found)), float(np.std(found)), subsets, size)


def maximum_mean_discrepancy(
    features_a: np.ndarray,
    features_b: np.ndarray,
    *,
    sigma: float = SIGMA,
    groups_a: Sequence[Hashable] | None = None,
    groups_b: Sequence[Hashable] | None = None,
    device: str | torch.device = "cpu",
) -> KernelDistance:
    """CMMD of features (n, d) and (m, d), times 1,000: kernel exp(-‖x - y‖² / 2σ²) of features that are
    divided by their norms. The code of the paper prints what `with_diagonal` is."""
    unit = [_normalised(features) for features in (features_a, features_b)]

    def gaussian(x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * (x @ y.T)
        return (squares.clamp(min=0) / (-2 * sigma**2)).exp()

    found = _discrepancy(unit[0], unit[1], gaussian, groups_a, groups_b, device)
    return KernelDistance(SCALE * found.value, SCALE * found.error, SCALE * found.with_diagonal)


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(x·y/d + 1)³ of all pairs."""
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass
class _Sums:
    """Of the rows of one set. others: kernels with all other rows of its own set, mates: with those of
    its group, itself: with itself, across: with all rows of the other set."""

    others: np.ndarray
    mates: np.ndarray
    itself: np.ndarray
    across: np.ndarray
    groups: np.ndarray

    @property
    def n(self) -> int:
        return len(self.others)

    def within(self) -> float:
        """Mean over all pairs of two pictures of the set."""
        return float(self.others.sum()) / (self.n * (self.n - 1))

    def without(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the set without each group: (within, sum across, pictures left)."""
        others, mates, across, sizes = (
            np.bincount(self.groups, weights)
            for weights in (self.others, self.mates, self.across, np.ones(self.n))
        )
        left = self.n - sizes
        # Pairs of the group and others are in the sum twice, pairs in the group once too often.
        pairs = self.others.sum() - 2 * others + mates
        return pairs / (left * (left - 1)), self.across.sum() - across, left


def _discrepancy(
    features_a: np.ndarray,
    features_b: np.ndarray,
    kernel: Kernel,
    groups_a: Sequence[Hashable] | None,
    groups_b: Sequence[Hashable] | None,
    device: str | torch.device,
) -> KernelDistance:
    a, b = (_rows(checked(features, least=3), device) for features in (features_a, features_b))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be of one width, got {a.shape[1]} and {b.shape[1]}")
    first = _sums(a, b, kernel, _numbers(groups_a, len(a)))
    second = _sums(b, a, kernel, _numbers(groups_b, len(b)))
    across = float(first.across.sum()) / (first.n * second.n)
    value = first.within() + second.within() - 2 * across
    variance = 0.0
    for one, other in ((first, second), (second, first)):
        if one.groups.max() < 2:
            variance = math.inf  # of two groups, one would be left to judge by
            break
        within, sums, left = one.without()
        rest = within + other.within() - 2 * sums / (left * other.n)
        variance += jackknife(value, rest).error ** 2
    diagonals = sum(
        float(one.others.sum() + one.itself.sum()) / one.n**2 for one in (first, second)
    )
    return KernelDistance(value, math.sqrt(variance), diagonals - 2 * across)


def _sums(rows: Tensor, others: Tensor, kernel: Kernel, groups: np.ndarray) -> _Sums:
    """In parts of the kernel matrix."""
    n, is_grouped = len(rows), bool(groups.max() + 1 < len(rows))
    step = max(1, _NUMBERS // max(n, len(others)))
    group = torch.from_numpy(groups).to(rows.device)
    parts: list[list[Tensor]] = [[], [], [], []]
    for start in range(0, n, step):
        part = rows[start : start + step]
        own = kernel(part, rows)
        itself = own.diagonal(start).clone()
        own.diagonal(start).zero_()
        parts[0].append(own.sum(dim=1))
        parts[2].append(itself)
        parts[3].append(kernel(part, others).sum(dim=1))
        if is_grouped:
            own *= group[start : start + step, None] == group
        parts[1].append(own.sum(dim=1) if is_grouped else torch.zeros_like(itself))
    sums = [torch.cat(each).cpu().numpy() for each in parts]
    return _Sums(sums[0], sums[1], sums[2], sums[3], groups)


def _numbers(groups: Sequence[Hashable] | None, n: int) -> np.ndarray:
    """Groups as numbers from 0."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"every row must have a group, got {n} rows and {len(groups)} groups")
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    return np.array([places[group] for group in groups])


def _rows(features: np.ndarray, device: str | torch.device) -> Tensor:
    return torch.from_numpy(features.astype(np.float64)).to(with_fp64(device))


def _normalised(features: np.ndarray) -> np.ndarray:
    rows = checked(features, least=3).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError("features must not be 0 throughout, which has no direction; some are")
    return rows / norms
