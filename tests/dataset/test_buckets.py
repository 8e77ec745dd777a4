"""The plan of an epoch: what it holds, and what it depends on."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pixart.dataset.buckets import epoch_plan
from pixart.distributed import share

ROOT = Path(__file__).parent.parent.parent
WIDE, TALL, SQUARE = (512, 1024), (1024, 512), (704, 704)
BUCKETS = [WIDE] * 7 + [TALL] * 12 + [SQUARE] * 2
SIZES = {WIDE: 4, TALL: 6, SQUARE: 8}


def test_every_sample_comes_and_only_what_fills_a_batch_comes_twice() -> None:
    counts = Counter(i for batch in epoch_plan(BUCKETS, SIZES, seed=0, epoch=0) for i in batch)
    assert set(counts) == set(range(len(BUCKETS)))
    assert sum(counts[i] for i in range(7)) == 8  # one sample too few for two batches of 4
    assert all(counts[i] == 1 for i in range(7, 19))  # two whole batches
    assert [counts[19], counts[20]] == [4, 4]  # a bucket smaller than its batch repeats evenly


def test_a_batch_holds_one_bucket_at_that_buckets_size() -> None:
    for batch in epoch_plan(BUCKETS, SIZES, seed=0, epoch=3):
        (bucket,) = {BUCKETS[i] for i in batch}
        assert len(batch) == SIZES[bucket]


def test_a_filled_batch_holds_no_sample_twice_if_the_bucket_has_enough() -> None:
    for epoch in range(20):
        for batch in epoch_plan([0] * 13, 5, seed=1, epoch=epoch):
            assert len(set(batch)) == 5


def test_what_fills_a_batch_is_drawn_anew_every_epoch() -> None:
    filling = set()
    for epoch in range(30):
        counts = Counter(i for b in epoch_plan([0] * 7, 4, seed=0, epoch=epoch) for i in b)
        filling |= {i for i, count in counts.items() if count == 2}
    assert filling == set(range(7))


def test_buckets_are_mixed_and_the_order_is_of_the_seed_and_the_epoch() -> None:
    buckets = ["a"] * 40 + ["b"] * 40
    plan = epoch_plan(buckets, 4, seed=0, epoch=0)
    kinds = [buckets[batch[0]] for batch in plan]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)
    assert plan == epoch_plan(buckets, 4, seed=0, epoch=0)
    assert plan != epoch_plan(buckets, 4, seed=0, epoch=1)
    assert plan != epoch_plan(buckets, 4, seed=1, epoch=0)


def test_the_plan_is_the_same_in_another_process() -> None:
    code = (
        "from pixart.dataset.buckets import epoch_plan\n"
        "print(epoch_plan([str(i % 3) for i in range(40)], 4, seed=5, epoch=6))"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    here = epoch_plan([str(i % 3) for i in range(40)], 4, seed=5, epoch=6)
    assert printed == [f"{here}\n"] * 2


def test_processes_share_a_batch_in_equal_parts() -> None:
    batch = epoch_plan([0] * 13, 6, seed=0, epoch=0)[0]
    parts = [share(batch, rank, 3) for rank in range(3)]
    assert sum(parts, []) == batch and [len(part) for part in parts] == [2, 2, 2]


def test_no_samples_make_no_batches() -> None:
    assert epoch_plan([], 4, seed=0, epoch=0) == []


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="name every bucket, got none for b"):
        epoch_plan(["a", "b"], {"a": 2}, seed=0, epoch=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        epoch_plan(["a"], 0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 4"):
        share([1, 2, 3, 4], 0, 3)
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        share([1, 2], 2, 2)
