"""The delete-one-block jackknife: how uncertain and how biased a number of a set of pictures is."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

BLOCKS = 50


@dataclass(frozen=True)
class Jackknife:
    """value: of the whole. error: its standard error, infinite of a single block. bias: what the value
    is too high by, in the first order of 1/n. blocks: how many there were."""

    value: float
    error: float
    bias: float
    blocks: int


def jackknife(value: float, without: Sequence[float] | np.ndarray) -> Jackknife:
    """without: the number of the set without each of the blocks, which are of about one size
    (Quenouille 1956, Tukey 1958)."""
    rest = np.asarray(without, dtype=np.float64)
    count = len(rest)
    if count < 2:
        return Jackknife(value, math.inf, math.nan, count)
    error = math.sqrt((count - 1) / count * float(((rest - rest.mean()) ** 2).sum()))
    return Jackknife(value, error, (count - 1) * (float(rest.mean()) - value), count)


def blocks_of(groups: Sequence[Hashable], count: int = BLOCKS, seed: int = 0) -> list[np.ndarray]:
    """Indices of the rows of each block, all of a group in one. groups: of each row, for instance its
    prompt. At most `count` blocks, each of as many groups, which are drawn by the seed: neighbours in the
    order of keys are of one category."""
    places: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        places.setdefault(group, []).append(row)
    members = list(places.values())
    order = np.random.default_rng(seed).permutation(len(members))
    return [
        np.sort(np.concatenate([members[group] for group in part])).astype(np.int64)
        for part in np.array_split(order, min(count, len(members)))
    ]
