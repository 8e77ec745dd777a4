"""What a stored table of positions tells: the scale that it was made with."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from pixart.resolution import position_embedding


def solve_interpolation(table: Tensor, side: int) -> float | None:
    """The pe_interpolation whose square table (side², C) this is, None if there is none.

    The last column's coordinate is found from its angles, the slowest first: each is exact up to
    whole turns, and the slower ones before it say how many. The table is rebuilt to compare.
    """
    channels = table.shape[1]
    if side == 1 or channels % 4 or not table.isfinite().all():
        return None
    sines, cosines = table[side - 1, : channels // 2].double().cpu().chunk(2)
    coordinate = 0.0
    for k in reversed(range(len(sines))):
        frequency = 10000.0 ** -(k / len(sines))
        angle = math.atan2(sines[k], cosines[k])
        turns = round((frequency * coordinate - angle) / (2 * math.pi))
        coordinate = (angle + 2 * math.pi * turns) / frequency
    if not 1e-3 < coordinate < 1e6:
        return None
    solved = (side - 1) / coordinate
    simple = [float(Fraction(solved).limit_denominator(d)) for d in (1, 2, 4, 8, 32, 100, 1000)]
    candidates = [scale for scale in (side / 32, *simple, solved) if scale > 0]
    first_row = table[:side]
    best = min(candidates, key=lambda s: float(_distance(first_row, (1, side), side, s).mean()))
    tolerance = 2 * torch.finfo(table.dtype).eps  # another library's sine may round the other way
    return best if _distance(table, (side, side), side, best).max() <= tolerance else None


def _distance(table: Tensor, grid: tuple[int, int], side: int, scale: float) -> Tensor:
    rebuilt = position_embedding(table.shape[1], grid, side, scale).to(table.dtype)
    return (rebuilt.float() - table.float().cpu()).abs()
