"""The Fréchet distance of two Gaussians: ‖μa - μb‖² + tr Σa + tr Σb - 2 tr (Σa^½ Σb Σa^½)^½.

Dowson and Landau 1982; of Inception's features it is FID (arXiv:1706.08500). With Σb = F Fᵀ, and A the
centred rows of a set, the last trace is the sum of the singular values of A F / √(n - 1): of n pictures,
fewer than there are features, no d x d matrix is decomposed, and the zeros of a singular covariance
never pass through a square root.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pixart.evaluation.distances.rows import checked, with_fp64
from pixart.evaluation.metric import Moments

SIZES = 15  # of subsets for `fid_infinity`
_ROWS = 4096  # in fp64 at a time


def frechet_distance(
    mean_a: np.ndarray,
    cov_a: np.ndarray,
    mean_b: np.ndarray,
    cov_b: np.ndarray,
    *,
    device: str | torch.device = "cpu",
) -> float:
    """Of means (d,) and covariances (d, d). ValueError for shapes that disagree, or are not finite."""
    return Target.of_moments(Moments(mean_b, cov_b), device).to_moments(Moments(mean_a, cov_a))


def frechet_distance_of(
    features_a: np.ndarray, features_b: np.ndarray, *, device: str | torch.device = "cpu"
) -> float:
    """Of features (n, d) and (m, d), with unbiased covariances; n and m are at least 2."""
    return Sample(features_a, Target.of_features(features_b, device)).distance()


class RunningMoments:
    """Mean and unbiased covariance of features that come in parts (n, d), in memory of d²."""

    def __init__(self) -> None:
        self.n = 0
        self._shift: np.ndarray | None = None

    def add(self, features: np.ndarray) -> None:
        """ValueError for another width, or values that are not finite."""
        rows = checked(features)
        if self._shift is None:
            # Sums of squares about the mean of the first part: about 0, digits would cancel.
            self._shift = rows.mean(axis=0, dtype=np.float64)
            self._sum = np.zeros(rows.shape[1])
            self._products = np.zeros((rows.shape[1], rows.shape[1]))
        elif rows.shape[1] != len(self._shift):
            raise ValueError(f"features must be {len(self._shift)} wide, got {rows.shape[1]}")
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS].astype(np.float64) - self._shift
            self._sum += part.sum(axis=0)
            self._products += part.T @ part
        self.n += len(rows)

    def moments(self) -> Moments:
        """ValueError with fewer than two rows."""
        if self.n < 2 or self._shift is None:
            raise ValueError(f"a covariance needs 2 pictures, got {self.n}")
        mean = self._sum / self.n
        covariance = (self._products - self.n * np.outer(mean, mean)) / (self.n - 1)
        return Moments(self._shift + mean, covariance, self.n)


def moments_of(features: np.ndarray) -> Moments:
    """Mean and unbiased covariance of features (n, d), fp64."""
    running = RunningMoments()
    running.add(features)
    return running.moments()


class Target:
    """What sets are compared with: its mean, the trace of its covariance Σ, and F (d, r) with Σ = F Fᵀ."""

    def __init__(self, mean: Tensor, factor: Tensor, n: int | None) -> None:
        self.mean, self.factor, self.n = mean, factor, n
        self.trace = float(factor.square().sum())

    @classmethod
    def of_moments(cls, moments: Moments, device: str | torch.device = "cpu") -> "Target":
        mean, covariance = _checked_moments(moments, device)
        values, vectors = torch.linalg.eigh(covariance)
        # What rounding leaves of a zero: the rest of a singular covariance is a smaller problem.
        kept = values > values[-1].abs() * len(values) * torch.finfo(torch.float64).eps
        return cls(mean, vectors[:, kept] * values[kept].sqrt(), moments.n)

    @classmethod
    def of_features(cls, features: np.ndarray, device: str | torch.device = "cpu") -> "Target":
        rows = checked(features, least=2)
        if len(rows) > rows.shape[1]:
            return cls.of_moments(moments_of(rows), device)
        tensor = torch.from_numpy(rows.astype(np.float64)).to(with_fp64(device))
        mean = tensor.mean(dim=0)
        return cls(mean, (tensor - mean).T / (len(rows) - 1) ** 0.5, len(rows))

    def to_moments(self, moments: Moments) -> float:
        """The distance of a set of which the moments are known."""
        mean, covariance = _checked_moments(moments, self.factor.device)
        self.check_width(len(mean))
        cross = _roots(self.factor.T @ covariance @ self.factor)
        return self.total(mean, float(covariance.trace()), cross)

    def total(self, mean: Tensor, trace: float, cross: float) -> float:
        """Of a set with this mean and trace of its covariance. cross: tr (Σa^½ Σb Σa^½)^½."""
        # Of equal sets rounding may leave less than nothing.
        return max(0.0, float((mean - self.mean).square().sum()) + trace + self.trace - 2 * cross)

    def check_width(self, width: int) -> None:
        if width != len(self.mean):
            raise ValueError(
                f"features must be as wide as the reference's {len(self.mean)}, got {width}"
            )


class Sample:
    """A set of pictures in the coordinates of a target: the distances of many of its subsets."""

    def __init__(self, features: np.ndarray, target: Target) -> None:
        self._rows = checked(features, least=2)
        target.check_width(self._rows.shape[1])
        self.n, self._target = len(self._rows), target
        self._centre = self._sum(slice(None)) / self.n
        squares, projected = [], []
        for rows in self._chunks(slice(None)):
            centred = rows - self._centre
            squares.append(centred.square().sum(dim=1))
            projected.append(centred @ target.factor)
        self._squares, self._projected = torch.cat(squares), torch.cat(projected)
        self._products: Tensor | None = None

    def distance(self) -> float:
        """Of the whole set."""
        if self.n <= self._projected.shape[1]:
            cross = float(torch.linalg.svdvals(self._projected).sum()) / (self.n - 1) ** 0.5
            trace = float(self._squares.sum()) / (self.n - 1)
            return self._target.total(self._centre, trace, cross)
        return self._distance(self.n, torch.zeros_like(self._centre), self._squares.sum(), None)

    def of(self, chosen: np.ndarray) -> float:
        """Of the rows with these indices, at least 2."""
        mean = self._sum(chosen) / len(chosen) - self._centre
        rows = torch.from_numpy(chosen)
        return self._distance(len(chosen), mean, self._squares[rows].sum(), self._projected[rows])

    def without(self, block: np.ndarray) -> float:
        """Of all rows but those with these indices; at least 2 stay."""
        count = self.n - len(block)
        # The sum of all centred rows is 0.
        mean = (len(block) * self._centre - self._sum(block)) / count
        gone = torch.from_numpy(block)
        stay = torch.ones(self.n, dtype=torch.bool)
        stay[gone] = False
        squares = self._squares[stay].sum()
        if count <= self._projected.shape[1]:
            return self._distance(count, mean, squares, self._projected[stay])
        products = self._all_products() - self._projected[gone].T @ self._projected[gone]
        return self._distance(count, mean, squares, None, products)

    def _distance(
        self,
        count: int,
        mean: Tensor,
        squares: Tensor,
        projected: Tensor | None,
        products: Tensor | None = None,
    ) -> float:
        """mean: of the rows, relative to the centre. squares: sum of their squared norms, and products:
        sum of the outer products of what they are projected to, about the centre."""
        aside = mean @ self._target.factor
        if projected is not None and count <= projected.shape[1]:
            rows = projected - aside
            matrix = rows @ rows.T
        else:
            if products is None:
                products = self._all_products() if projected is None else projected.T @ projected
            matrix = products - count * torch.outer(aside, aside)
        trace = float(squares - count * mean.square().sum()) / (count - 1)
        return self._target.total(self._centre + mean, trace, _roots(matrix / (count - 1)))

    def _all_products(self) -> Tensor:
        if self._products is None:
            self._products = self._projected.T @ self._projected
        return self._products

    def _sum(self, chosen: np.ndarray | slice) -> Tensor:
        total = torch.zeros(
            self._rows.shape[1], dtype=torch.float64, device=self._target.mean.device
        )
        for rows in self._chunks(chosen):
            total += rows.sum(dim=0)
        return total

    def _chunks(self, chosen: np.ndarray | slice) -> Iterator[Tensor]:
        """The rows, fp64, a few at a time."""
        indices = np.arange(self.n)[chosen]
        for start in range(0, len(indices), _ROWS):
            part = self._rows[indices[start : start + _ROWS]].astype(np.float64)
            yield torch.from_numpy(part).to(self._target.mean.device)


def fid_infinity(sample: Sample, *, sizes: int = SIZES, seed: int = 0) -> tuple[float, float]:
    """(What the Fréchet distance tends to for endlessly many pictures, its standard error): the intercept
    of a line through the distances of random subsets against 1/n, sizes from n/6 to n (Chong and
    Forsyth, arXiv:1911.07023). The error is that of the line alone. ValueError below 30 pictures.
    """
    if sample.n < 2 * sizes:
        raise ValueError(f"FID at infinity needs {2 * sizes} pictures, got {sample.n}")
    rng = np.random.default_rng(seed)
    counts = np.linspace(sample.n / 6, sample.n, sizes).round().astype(int)
    distances = [sample.of(np.sort(rng.permutation(sample.n)[:count])) for count in counts.tolist()]
    design = np.stack([np.ones(sizes), 1 / counts], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    solution = inverse @ design.T @ np.array(distances)
    left = np.array(distances) - design @ solution
    # Small subsets scatter most and weigh most: an error of each its own (HC3, MacKinnon and White 1985).
    weight = np.einsum("ij,jk,ik->i", design, inverse, design)
    row = (inverse @ design.T)[0]
    error = np.sqrt(((row * left / (1 - weight)) ** 2).sum())
    return float(solution[0]), float(error)


def _roots(matrix: Tensor) -> float:
    """The sum of the square roots of the eigenvalues of a matrix that is symmetric but for rounding."""
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return float(values.clamp(min=0).sqrt().sum())


def _checked_moments(moments: Moments, device: str | torch.device) -> tuple[Tensor, Tensor]:
    mean, covariance = (
        np.asarray(values, dtype=np.float64) for values in (moments.mean, moments.covariance)
    )
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"a mean (d,) goes with a covariance (d, d), got {mean.shape} and {covariance.shape}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("mean and covariance must be finite, they are not")
    place = with_fp64(device)
    return torch.from_numpy(mean).to(place), torch.from_numpy(covariance).to(place)
