"""Which samples make which batch: the plan of an epoch, the same on every process.

A batch holds one bucket, so that its pictures stack, and step s of an epoch takes batch s on all
processes. The plan needs no communication and no stored position: (seed, epoch, step) say it all.
"""

import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any


def epoch_plan(
    bucket_of: Sequence[Hashable],
    batch_size: Mapping[Any, int] | int,
    *,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """The batches of an epoch as sample indices, in random order, a function of (seed, epoch).

    bucket_of: the bucket of every sample. batch_size: for all buckets, or of each. Every sample
    comes at least once. The rest of a bucket is filled up with samples of the bucket that are drawn
    anew in each epoch, distinct as long as there are enough: all batches of a bucket have one size
    and no sample is left out. Raises ValueError for a size below 1 or a bucket without a size.
    """
    rng = random.Random(f"{seed}/{epoch}")  # seeded by a digest of the text: the same everywhere
    members: dict[Hashable, list[int]] = {}
    for index, bucket in enumerate(bucket_of):
        members.setdefault(bucket, []).append(index)
    batches: list[list[int]] = []
    for bucket, indices in members.items():
        batches += _batches(indices, _size(batch_size, bucket), rng)
    rng.shuffle(batches)
    return batches


def _size(batch_size: Mapping[Any, int] | int, bucket: Hashable) -> int:
    if isinstance(batch_size, Mapping) and bucket not in batch_size:
        raise ValueError(f"batch_size must name every bucket, got none for {bucket}")
    size = batch_size[bucket] if isinstance(batch_size, Mapping) else batch_size
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size} for bucket {bucket}")
    return size


def _batches(indices: list[int], size: int, rng: random.Random) -> list[list[int]]:
    order = rng.sample(indices, len(indices))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    last = batches[-1]
    # From outside of the last batch first, so that it holds no sample twice while others are left.
    others = order[: len(order) - len(last)] or order
    while len(last) < size:
        missing = size - len(last)
        last += rng.sample(others, min(missing, len(others)))
        others = order
    return batches
