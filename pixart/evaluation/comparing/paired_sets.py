"""The difference of two sets' distances to one reference, with an interval that knows the prompts are the
same: blocks of prompts are left out of both sets at once (delete-one-block jackknife).

Fréchet distances and KID can be paired where both folders keep features of the pictures and of the same
reference. What cannot, is compared by the two intervals alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pixart.evaluation.distances import Sample, Target, blocks_of, jackknife
from pixart.evaluation.distances.kernels import polynomial
from pixart.evaluation.metric import Estimate
from pixart.evaluation.running.results import Folder
from pixart.evaluation.statistics.intervals import Difference
from pixart.evaluation.statistics.resampling import LEVEL, quantile_of_normal
from pixart.evaluation.store.parts import FeatureStore

FRECHET = ("fid-clean", "fid-pytorch", "fid-tf", "fd-dinov2")
KERNEL = ("kid",)
METHOD = "paired jackknife over blocks of prompts"
APART = "intervals of both, taken as independent"
_CHUNK = 512


class Unpaired(ValueError):
    """Two sets that cannot be compared block by block: why."""


@dataclass(frozen=True)
class Rows:
    """Features of pictures, and the prompt of each."""

    values: np.ndarray
    prompts: Sequence[str]


def paired_distance(a: Folder, b: Folder, metric: str, extractor: str) -> Difference:
    """B's distance minus A's. extractor: whose features the metric reads. Unpaired where it cannot be."""
    if metric not in (*FRECHET, *KERNEL):
        raise Unpaired(f"{metric} has no form that is left out block by block")
    if not extractor:
        raise Unpaired("it does not say whose features it reads")
    name = _common(a.path / "features", b.path / "features", extractor)
    ours, theirs = (_rows(one.path / "features" / name) for one in (a, b))
    if sorted(set(ours.prompts)) != sorted(set(theirs.prompts)):
        raise Unpaired("features are not of the same prompts")
    real = [_rows(one.path / "reference" / name) for one in (a, b)]
    if not len(real[0].values) or not np.array_equal(real[0].values, real[1].values):
        raise Unpaired("no features of one and the same reference are kept in both folders")
    if min(len(ours.values), len(theirs.values), len(real[0].values)) < 4:
        raise Unpaired("there are fewer than 4 pictures")
    work = _frechet if metric in FRECHET else _kernel
    differences = [after - before for before, after in work(ours, theirs, real[0].values)]
    found = jackknife(differences[0], differences[1:])
    n = len(set(ours.prompts))
    return of_error(found.value, found.error, n, f"{METHOD} ({found.blocks})")


def apart(a: Estimate, b: Estimate, reason: str) -> Difference:
    """B - A of numbers with intervals of their own (Zou and Donner 2008): wider than need be, as both have
    the same prompts and reference."""
    difference = b.value - a.value
    low = difference - math.hypot(b.value - b.low, a.high - a.value)
    high = difference + math.hypot(b.high - b.value, a.value - a.low)
    note = f"Not paired: {reason}. The interval is wider than need be."
    error = (high - low) / (2 * quantile_of_normal(LEVEL))
    p = _p_value(difference, error)
    return Difference(difference, low, high, p, min(a.n, b.n), APART, (note,))


def of_error(difference: float, error: float, n: int, method: str) -> Difference:
    """With the normal interval of a standard error."""
    half = quantile_of_normal(LEVEL) * error
    return Difference(
        difference, difference - half, difference + half, _p_value(difference, error), n, method
    )


def _p_value(difference: float, error: float) -> float:
    if difference == 0 or not math.isfinite(error):
        return 1.0
    return math.erfc(abs(difference) / error / math.sqrt(2)) if error else 0.0


def _common(a: Path, b: Path, extractor: str) -> str:
    """The folder NAME-DIGEST of features that both have. ValueError if they are of other weights."""
    found = [
        {path.name for path in one.glob(f"{extractor}-*") if _is_of(path.name, extractor)}
        for one in (a, b)
    ]
    if not all(found):
        raise Unpaired(f"features of {extractor} are not kept in both folders")
    if not found[0] & found[1]:
        raise ValueError(
            f"features of {extractor} must be of the same weights in both, got {', '.join(sorted(found[0]))} "
            f"and {', '.join(sorted(found[1]))}"
        )
    return sorted(found[0] & found[1])[0]


def _is_of(folder: str, extractor: str) -> bool:
    """Not of an extractor whose name begins alike: digests have no hyphens."""
    return folder.rpartition("-")[0] == extractor


def _rows(folder: Path) -> Rows:
    store = FeatureStore(folder)
    count = len(list(folder.glob(f"part-*{store.suffix}")))
    rows = [row for number in range(count) for row in store.read(number) if not row.error]
    rows.sort(key=lambda row: row.key)
    values = np.stack([row.value for row in rows]) if rows else np.zeros((0, 0), np.float32)
    return Rows(values, [row.key.rpartition("/")[0] or row.key for row in rows])


def _blocks(rows: Rows, order: Sequence[str]) -> list[np.ndarray]:
    """Places of the rows of each block. order: the prompts, so that blocks are the same of both sets."""
    block: dict[str, int] = {}
    for number, places in enumerate(blocks_of(order)):
        block |= {order[place]: number for place in places}
    of_row = np.array([block[prompt] for prompt in rows.prompts])
    return [np.flatnonzero(of_row == number) for number in range(int(of_row.max()) + 1)]


def _frechet(a: Rows, b: Rows, real: np.ndarray) -> list[tuple[float, float]]:
    """(A's, B's) distance of everything, then without each block."""
    target, order = Target.of_features(real), sorted(set(a.prompts))
    columns = []
    for rows in (a, b):
        sample = Sample(rows.values, target)
        blocks = _blocks(rows, order)
        if any(sample.n - len(block) < 2 for block in blocks):
            raise Unpaired("there are too few prompts to leave some out")
        columns.append([sample.distance(), *(sample.without(block) for block in blocks)])
    return list(zip(*columns, strict=True))


def _kernel(a: Rows, b: Rows, real: np.ndarray) -> list[tuple[float, float]]:
    """The same of KID x1000. The reference's own part is the same in both and left out."""
    order = sorted(set(a.prompts))
    columns = []
    for rows in (a, b):
        blocks = _blocks(rows, order)
        within, across = _kernel_sums(rows.values, blocks, real)
        sizes = np.array([len(block) for block in blocks])
        kept = [np.ones(len(blocks), bool)]
        kept += [np.arange(len(blocks)) != number for number in range(len(blocks))]
        if any(sizes[stay].sum() < 2 for stay in kept):
            raise Unpaired("there are too few prompts to leave some out")
        columns.append([_kid(within, across, sizes, stay, len(real)) for stay in kept])
    return list(zip(*columns, strict=True))


def _kid(
    within: np.ndarray, across: np.ndarray, sizes: np.ndarray, stay: np.ndarray, real: int
) -> float:
    n = int(sizes[stay].sum())
    own = float(within[np.ix_(stay, stay)].sum()) / (n * (n - 1))
    return 1000 * (own - 2 * float(across[stay].sum()) / (n * real))


def _kernel_sums(
    values: np.ndarray, blocks: Sequence[np.ndarray], real: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(kernels between each two blocks, without those of a picture and itself; with the reference)."""
    rows = [torch.from_numpy(values[block].astype(np.float64)) for block in blocks]
    other = torch.from_numpy(real.astype(np.float64))
    within = np.zeros((len(blocks), len(blocks)))
    across = np.zeros(len(blocks))
    for i, x in enumerate(rows):
        for start in range(0, len(other), _CHUNK):
            across[i] += float(polynomial(x, other[start : start + _CHUNK]).sum())
        for j, y in enumerate(rows[: i + 1]):
            matrix = polynomial(x, y)
            within[i, j] = within[j, i] = float(matrix.sum() - (matrix.trace() if i == j else 0))
    return within, across
