"""The greedy search and its bands: on numbers, without a model."""

import itertools
import random

import pytest

from pixart.calibration.journal import Journal
from pixart.calibration.run import upper_error
from pixart.calibration.search import Choice, Prefix, bands_of, prefixes
from pixart.config import PixArtConfig
from pixart.plans.schedule import KVSchedule

BANDS = [(1000.0, 700.0), (700.0, 300.0), (300.0, 0.0)]


def test_bands_cover_all_evaluations_once_and_all_timesteps() -> None:
    times = [999.0, 850.0, 700.0, 500.0, 301.5, 300.0, 2.0]
    for count in (1, 2, 3, 7, 20):
        bands = bands_of(times, count)
        assert [n for members, _ in bands for n in members] == list(range(7))
        assert bands[0][1][0] == 1000 and bands[-1][1][1] == 0
        for members, (high, low) in bands:
            assert all(high >= times[n] >= low for n in members)
        for (_, before), (_, after) in itertools.pairwise(bands):
            assert before[1] == after[0]


def test_a_prefix_is_a_schedule_of_the_same_ratios() -> None:
    chosen = {
        (0, 0): 2, (0, 1): 2, (1, 0): 2, (1, 1): 2, (2, 0): 4, (2, 2): 4, (3, 0): 3, (3, 1): 3, (3, 2): 3,
    }  # fmt: skip
    prefix = Prefix({cell: Choice(*cell, ratio, 0.1, 5) for cell, ratio in chosen.items()})
    schedule = prefix.schedule(BANDS)
    assert schedule is not None and str(schedule) == "2:4@1000-700; 0-1:2@1000-300; 3:3; 2:4@300-0"
    config = PixArtConfig(hidden_size=144, num_heads=2, depth=4)
    for band, timestep in enumerate((800.0, 500.0, 100.0)):
        expected = tuple(chosen.get((block, band), 1) for block in range(4))
        assert KVSchedule.parse(str(schedule)).ratios(timestep, config) == expected
    assert Prefix({}).schedule(BANDS) is None and Prefix({}).error == 0
    assert prefix.saved == 45 and prefix.error == pytest.approx(0.9**0.5)


def test_each_prefix_saves_more_and_what_costs_nothing_comes_first() -> None:
    rng = random.Random(0)
    choices = [
        Choice(block, band, ratio, rng.random() * ratio if block else 0.0, 10 * ratio + block)
        for block in range(4) for band in range(3) for ratio in (2, 3, 4)
    ]  # fmt: skip
    found = prefixes(choices)
    saved = [one.saved for one in found]
    assert saved[0] == 0 and saved == sorted(saved) and len(set(saved)) == len(saved)
    assert {cell for cell, _ in found[3].chosen.items()} == {(0, 0), (0, 1), (0, 2)}
    assert all(one.ratio == 4 for one in found[-1].chosen.values()) and len(found[-1].chosen) == 12
    # Within a budget it saves as much as chance does, and more.
    budget = found[-1].error / 2
    best = max(one.saved for one in found if one.error <= budget)
    for _ in range(200):
        some = {one.cell: one for one in rng.sample(choices, 12)}
        if Prefix(some).error <= budget:
            assert Prefix(some).saved <= best


def test_the_error_that_is_verified_is_no_mean_but_the_end_of_its_interval() -> None:
    assert upper_error([0.04, 0.04]) == pytest.approx(0.2)
    assert upper_error([0.02, 0.06]) > 0.2
    assert upper_error([0.02, 0.06] * 50) < upper_error([0.02, 0.06])
    assert upper_error([0.0, 0.0]) == 0


def test_a_journal_keeps_what_its_own_run_found(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path, about = tmp_path / "x.partial", {"seed": 1}
    first = Journal(path, about)
    assert first.measured("a", lambda: [1, 2]) == first.measured("a", lambda: [3]) == [1.0, 2.0]
    first.write()
    assert Journal(path, about).measured("a", lambda: [3]) == [1.0, 2.0]
    for other in ({"seed": 2}, {}):
        assert Journal(path, other).measured("a", lambda: [3]) == [3.0]
    for content in ("", "[]", "{}", '{"about": {"seed": 1}, "found": {"a": [null]}}', "\x00"):
        path.write_text(content)
        assert Journal(path, about).measured("a", lambda: [3]) == [3.0]
    first.remove()
    first.remove()
    assert not path.exists()
