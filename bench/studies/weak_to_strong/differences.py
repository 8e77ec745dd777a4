"""A difference of two experiments' losses, what it is uncertain by, and how large it must be to be seen.

Losses are paired: both experiments are measured on the same scenes, and, of several seeds, trained on
the same data in the same order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from pixart.evaluation.statistics.student import student_quantile

LEVEL = 0.05  # of a decision by chance, where there is no difference
POWER = 0.8  # the share of studies in which a detectable difference is seen


@dataclass(frozen=True)
class Difference:
    """A mean, its standard error, and how many standard errors decide: more than `factor`.

    each: the means of the seeds. detectable: the smallest true difference that is decided in POWER of
    such studies (H. S. Bloom, Minimum Detectable Effects, Evaluation Review 19, 1995).
    """

    mean: float
    error: float
    factor: float
    each: tuple[float, ...] = ()
    detectable: float = math.nan

    @property
    def is_decided(self) -> bool:
        return abs(self.mean) > self.factor * self.error


def over_scenes(low: Sequence[float], high: Sequence[float]) -> Difference:
    """`high` minus `low`, losses of the same scenes, for one run of each: what another run would
    differ by is not in the error. More than two standard errors decide."""
    values = [b - a for a, b in zip(low, high, strict=True)]
    return Difference(fmean(values), stdev(values) / math.sqrt(len(values)), 2.0)


def over_seeds(low: Sequence[Sequence[float]], high: Sequence[Sequence[float]]) -> Difference:
    """`high` minus `low`, losses of the same scenes (inner) by two seeds or more (outer).

    Seeds and scenes are crossed and both a sample: the verdict is to hold for other seeds and other
    scenes. In d = mean + seed + scene + rest, the variance of the mean over S seeds and N scenes is

        seed / S + scene / N + rest / (S N)  =  (M_seed + M_scene - M_rest) / (S N)

    in expected mean squares M of a two-way analysis of variance with one observation a cell (H. H.
    Clark, The language-as-fixed-effect fallacy, 1973: quasi-F for crossed random effects). The
    degrees of freedom are Satterthwaite's (Biometrics 2, 1946), rounded down: S - 1, where seeds are
    all of the spread, and near N - 1, where they add none. A component of variance that comes out
    negative is zero. The mean of the seeds with S - 1 degrees of freedom alone would take the
    scenes for all that there are; without a true difference it decides up to a third of all rows
    of three seeds when scenes differ much, and this 3 to 8 %.
    """
    cells = [
        [b - a for a, b in zip(*one, strict=True)] for one in zip(low, high, strict=True)
    ]  # (S, N)
    by_seed = [fmean(row) for row in cells]
    by_scene = [fmean(column) for column in zip(*cells, strict=True)]
    seeds, scenes, mean = len(by_seed), len(by_scene), fmean(by_seed)
    rest = sum(
        (value - by_seed[s] - by_scene[n] + mean) ** 2
        for s, row in enumerate(cells)
        for n, value in enumerate(row)
    )
    squares = {  # mean squares and their degrees of freedom
        "seed": (scenes * stdev(by_seed) ** 2, seeds - 1),
        "scene": (seeds * stdev(by_scene) ** 2, scenes - 1),
        "rest": (rest / ((seeds - 1) * (scenes - 1)), (seeds - 1) * (scenes - 1)),
    }
    total, freedom = _combined(squares)
    error = math.sqrt(total / (seeds * scenes))
    factor = student_quantile(1 - LEVEL / 2, freedom)
    detectable = (factor + student_quantile(POWER, freedom)) * error
    return Difference(mean, error, factor, tuple(by_seed), detectable)


def _combined(squares: dict[str, tuple[float, int]]) -> tuple[float, int]:
    """M_seed + M_scene - M_rest without negative components, and its degrees of freedom."""
    seed, scene, rest = (squares[name] for name in ("seed", "scene", "rest"))
    if seed[0] <= rest[0] or scene[0] <= rest[0]:
        return max(seed, scene)  # the component that is left, with that of the rest
    total = seed[0] + scene[0] - rest[0]
    spread = sum(square**2 / freedom for square, freedom in (seed, scene, rest))
    return total, max(1, math.floor(total**2 / spread))
