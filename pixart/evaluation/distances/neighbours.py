"""Precision, recall, density and coverage: which pictures lie among the neighbours of the other set."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pixart.evaluation.distances.rows import checked, with_fp64

OF_PRECISION, OF_DENSITY = 3, 5  # neighbours: as both papers have them
MOST = 10_000  # pictures of a set: time and numbers of papers go with the square
_NUMBERS = 2**23  # of a matrix of distances in memory: 64 MB


@dataclass(frozen=True)
class Neighbourhoods:
    """precise (n,): whether one of our pictures is inside a ball about a real one, to its third neighbour;
    recalled (m,): whether a real one is in such a ball about one of ours (arXiv:1904.06991).
    density (n,): in how many balls about real ones, to their fifth neighbours, one of ours is, over 5;
    covered (m,): whether one of ours is in the ball about a real one (arXiv:2002.09797).
    Their means are the four numbers."""

    precise: np.ndarray
    recalled: np.ndarray
    density: np.ndarray
    covered: np.ndarray


def neighbourhoods(
    ours: np.ndarray,
    real: np.ndarray,
    *,
    of_precision: int = OF_PRECISION,
    of_density: int = OF_DENSITY,
    device: str | torch.device = "cpu",
) -> Neighbourhoods:
    """ours (n, d), real (m, d), both with more pictures than neighbours are asked for. Time and products
    n² d, memory in parts. On the edge of a ball is inside for precision and recall, outside for the
    others: each as its paper's code has it."""
    most = max(of_precision, of_density)
    rows = [checked(features, least=most + 1) for features in (ours, real)]
    if rows[0].shape[1] != rows[1].shape[1]:
        raise ValueError(
            f"features must be of one width, got {rows[0].shape[1]} and {rows[1].shape[1]}"
        )
    # About their common mean, where squared distances lose the fewest digits.
    centre = rows[1].mean(axis=0, dtype=np.float64)
    a, b = (torch.from_numpy(each - centre).to(with_fp64(device)) for each in rows)
    radius_a = _radii(a, (of_precision,))[0]
    radius_b, wide_b = _radii(b, (of_precision, of_density))
    precise, density = [], []
    recalled = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    nearest = torch.full((len(b),), torch.inf, dtype=torch.float64, device=b.device)
    step = max(1, _NUMBERS // len(b))
    for start in range(0, len(a), step):
        squares = _squares(a[start : start + step], b)
        precise.append((squares <= radius_b).any(dim=1))
        density.append((squares < wide_b).sum(dim=1).double() / of_density)
        recalled |= (squares <= radius_a[start : start + step, None]).any(dim=0)
        nearest = torch.minimum(nearest, squares.amin(dim=0))
    found = torch.cat(precise), recalled, torch.cat(density), nearest < wide_b
    return Neighbourhoods(*(values.cpu().numpy() for values in found))


def _radii(rows: Tensor, neighbours: tuple[int, ...]) -> list[Tensor]:
    """Squared distances to the k-th nearest other row, for each k: (n,) each."""
    parts = []
    step = max(1, _NUMBERS // len(rows))
    for start in range(0, len(rows), step):
        squares = _squares(rows[start : start + step], rows)
        squares.diagonal(start).fill_(torch.inf)
        parts.append(squares.topk(max(neighbours), dim=1, largest=False, sorted=True).values)
    nearest = torch.cat(parts)
    return [nearest[:, k - 1].contiguous() for k in neighbours]


def _squares(x: Tensor, y: Tensor) -> Tensor:
    products = x @ y.T
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * products
    return squares.clamp_(min=0)
