"""How often each caption is drawn, counted before training and by drawing."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pictures
import pytest

from pixart.data import main as data
from pixart.dataset import batches
from pixart.dataset.batches import CaptionMix, FeatureDataset
from pixart.train import main as train

WEIGHTS = {"prompt": 50.0, "synth": 50.0}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures: two with all captions, one without a synthetic one, one with two of five."""
    place = tmp_path_factory.mktemp("data")
    raw = pictures.folder(place / "raw", 4, height=64, width=64)
    for picture, count in ((0, 5), (1, 5), (3, 2)):
        for number in range(1, count + 1):
            pictures.write(raw / f"{picture}.synth.{number}.txt", f"star {number}")
    prepare = ["prepare", str(raw), str(place / "out"), "--resolution", "64", "--square"]
    assert data([*prepare, "--device", "cpu"]) == 0
    return place / "out"


def test_a_mix_is_that_of_each_picture_averaged(features: Path) -> None:
    mix = FeatureDataset(features).caption_mix(WEIGHTS)
    each = {1: 0.1 + 0.1 + 0.25, 2: 0.1 + 0.1 + 0.25, 3: 0.2, 4: 0.2, 5: 0.2}
    expected = {"prompt": (0.5 + 0.5 + 1 + 0.5) / 4}
    expected |= {f"synth.{number}": share / 4 for number, share in each.items()}
    assert mix.shares == pytest.approx(expected) and sum(mix.shares.values()) == pytest.approx(1)
    assert (mix.samples, mix.lacking) == (4, 1)
    assert str(mix) == (
        "prompt 62 %, synth.1, synth.2 11 % each, synth.3 … synth.5 5 % each; "
        "1 of 4 pictures lack one of these, and show their others"
    )


def test_drawing_gives_the_mix(features: Path) -> None:
    dataset = FeatureDataset(features)
    rng, rounds = random.Random(0), 2000
    drawn = Counter(
        batches._draw(entry, WEIGHTS, rng) for _ in range(rounds) for entry in dataset.entries
    )
    for name, share in dataset.caption_mix(WEIGHTS).shares.items():
        # Five standard deviations of a binomial distribution, which is wider than that of the mixture.
        deviation = (share * (1 - share) / drawn.total()) ** 0.5
        assert abs(drawn[name] / drawn.total() - share) < 5 * deviation


def test_captions_without_a_weight_are_never_drawn(features: Path) -> None:
    dataset = FeatureDataset(features)
    mix = dataset.caption_mix({"prompt": 1, "synth": 0})
    assert mix.lacking == 0 and str(mix) == "prompt 100 %, synth.1 … synth.5 0 % each"
    with pytest.raises(ValueError, match="must give weight to a caption of every sample"):
        dataset.caption_mix({"synth": 1})


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"a": 1.0}, "a 100 %"),
        ({f"s.{n}": 0.1 for n in range(1, 11)}, "s.1 … s.10 10 % each"),
        ({"s.1": 0.4, "s.3": 0.3, "s.4": 0.3}, "s.1 40 %, s.3, s.4 30 % each"),
        ({"s.1": 0.3, "s.2": 0.1, "s.3": 0.3, "s.4": 0.3}, "s.1, s.3, s.4 30 % each, s.2 10 %"),
        ({"p": 0.62, **{f"s.{n}": 0.076 for n in range(1, 6)}}, "p 62 %, s.1 … s.5 7.6 % each"),
    ],
)
def test_a_mix_in_words(shares: dict[str, float], said: str) -> None:
    assert str(CaptionMix(shares, 1, 0)) == said


def test_a_dry_run_says_it(features: Path, tmp_path: Path, capsys: Any) -> None:
    stage = {
        "name": "a", "start": "shapes", "pipeline": "shapes", "steps": 2, "batch": {"images": 2},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "data": {"source": str(features), "captions": WEIGHTS},
    }  # fmt: skip
    file = pictures.write(tmp_path / "recipe.yaml", json.dumps({"stages": [stage]}))
    command = [str(file), "--dry-run", "--device", "cpu", "--output", str(tmp_path / "run")]
    assert train(command) == 0
    told = capsys.readouterr().out
    assert "\ncaptions: prompt 62 %, synth.1, synth.2 11 % each, synth.3 … synth.5 5 % each" in told
    assert train([*command, "--data.source", str(tmp_path / "absent")]) == 2
    assert "captions:" not in capsys.readouterr().out
