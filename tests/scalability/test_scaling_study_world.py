"""What the runs of the scaling study see: captions that are wrong or filtered, and no scene too many."""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from pixart.scalability.study.plan import BATCH, DATA, FULL, RUNS, Run
from pixart.scalability.study.world import (
    DESCRIPTIONS,
    Feed,
    World,
    captions_of,
    donate,
    make_world,
    most_told,
    tokenizer,
)
from pixart.shapes.caption import parse
from pixart.shapes.checker import check, is_true, reading_of
from pixart.shapes.scene import draw, sample_scene


@cache
def world() -> World:
    return make_world(replace(FULL, pool=192, scenes=8))


def texts_of(ids: torch.Tensor) -> list[str]:
    reader = tokenizer()
    return [reader.decode([one for one in row.tolist() if one > 1]) for row in ids]


def test_a_third_of_the_captions_are_of_other_scenes_and_none_of_those_is_true() -> None:
    """Of drawn pictures, as the checker reads them, and not of what the scene says."""
    rng = random.Random(3)
    scenes = [sample_scene(rng, ("one", "pair")[k % 2]) for k in range(60)]
    told = [captions_of(scene, rng) for scene in scenes]
    donors = donate(scenes, told, random.Random(4))
    wrong = [k for k, donor in enumerate(donors) if donor != k]
    assert len(wrong) == 18
    for place, donor in enumerate(donors):
        picture = draw(scenes[place], 128)
        for text in told[donor][1:]:
            assert all(check(picture, parse(text))) == (donor == place)


def test_the_filter_keeps_the_scenes_with_true_captions_and_no_other() -> None:
    same = world().donors == torch.arange(192)
    assert torch.equal(world().are_true, same) and 0.69 < same.float().mean() < 0.71
    kept = Feed(world(), Run("x", quality="filtered")).allowed
    assert torch.equal(kept, same.nonzero().flatten())


def test_wrong_captions_reach_the_batches_and_filtered_ones_do_not() -> None:
    scenes = (world().donors != torch.arange(192)).nonzero().flatten()[:BATCH]
    wrong = texts_of(Feed(world(), Run("x", quality="wrong")).captions(scenes, dropped=0.0))
    right = texts_of(Feed(world(), Run("x", quality="filtered")).captions(scenes, dropped=0.0))
    for scene, false, true in zip(scenes, wrong, right, strict=True):
        own = texts_of(world().ids[scene])
        assert false not in own and true in own


@pytest.mark.parametrize("count", [32, 128])
def test_a_run_of_few_scenes_sees_no_more_and_each_as_often(count: int) -> None:
    feed = Feed(world(), next(run for run in DATA if run.scenes == count))
    seen = torch.cat([feed.scenes() for _ in range(3 * count // BATCH)])
    assert torch.equal(seen.bincount(), torch.full((count,), 3))
    other = Feed(world(), Run("x", scenes=count, seed=1))
    assert not torch.equal(other.scenes(), seen[:BATCH])


def test_more_scenes_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="scenes must be at most 192, got 2048"):
        Feed(world(), DATA[-1]).next()


def test_captions_are_those_of_the_mix() -> None:
    scenes = torch.arange(192)
    found = {
        mix: Feed(world(), Run("x", captions=mix)).captions(scenes, dropped=0.0)
        for mix in ("raw", "synthetic", "mixed", "top")
    }
    raw = world().ids[:, 0]
    assert torch.equal(found["raw"], raw)
    is_raw = (found["mixed"] == raw).all(1).float().mean()
    assert 0.4 < is_raw < 0.6
    assert not (found["synthetic"] == raw).all(1).any()
    for place in range(192):
        five = [len(parse(text)) for text in texts_of(world().ids[place, 1:])]
        assert len(five) == DESCRIPTIONS
        assert len(parse(texts_of(found["top"][place : place + 1])[0])) == max(five)


def test_a_tenth_of_the_captions_is_empty_in_training() -> None:
    ids = torch.cat([Feed(world(), Run("x", seed=k)).captions(torch.arange(192)) for k in range(5)])
    share = ((ids != 0).sum(1) == 1).float().mean()
    assert 0.07 < share < 0.13


def test_the_top_caption_is_the_first_that_states_most() -> None:
    told = ["a small red star", "a red star", "a red star on black", "a red star on white"]
    assert most_told(told) == 2


def test_a_raw_caption_is_true_but_for_the_number_of_things() -> None:
    rng = random.Random(0)
    scene = sample_scene(rng, "one")
    raw = captions_of(scene, rng)[0]
    assert is_true(reading_of(scene), parse(raw)) and len(parse(raw)) == 3


def test_a_world_is_the_same_again_and_through_a_file(tmp_path: Path) -> None:
    world().save(tmp_path / "world.safetensors")
    again, loaded = (
        make_world(replace(FULL, pool=192, scenes=8)),
        World.load(tmp_path / "world.safetensors"),
    )
    for name, value in vars(world()).items():
        assert torch.equal(value, getattr(again, name)) and torch.equal(
            value, getattr(loaded, name)
        )


def test_a_larger_set_holds_the_smaller_ones() -> None:
    sizes = [set(Feed(world(), run).allowed.tolist()) for run in DATA[:2]]
    assert sizes[0] < sizes[1] <= set(Feed(world(), Run("all")).allowed.tolist())


def test_every_run_has_a_name_of_its_own() -> None:
    assert len({run.name for run in RUNS}) == len(RUNS)
