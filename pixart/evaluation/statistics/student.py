"""Student's distribution, without SciPy: shares and quantiles for whole degrees of freedom."""

import math
from functools import cache


@cache
def student_quantile(share: float, freedom: int) -> float:
    """The t that so large a share of Student's distribution lies below; share: from 0.5 up, below 1."""
    low, high = 0.0, 1.0
    while student_share(high, freedom) < share:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_share(middle, freedom) < share else (low, middle)
    return high


def student_share(t: float, freedom: int) -> float:
    """The share below t ≥ 0, exact for whole degrees of freedom (Abramowitz & Stegun, 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(3 if odd else 2, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    inside = math.sin(angle) * total
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return (1 + inside) / 2
