"""Which metric notices which error: made-up metrics of which it is known what they see."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixart.evaluation import metrics
from pixart.evaluation.metric import (
    Context,
    Estimate,
    Extractor,
    Features,
    Moments,
    PictureMetric,
    Score,
    SetMetric,
)
from pixart.evaluation.store.entries import Entry
from pixart.evaluation.trust import against_checker as trust
from pixart.evaluation.trust.damages import DAMAGES, distances
from pixart.evaluation.trust.wrong_facts import KINDS, holds, pairs
from pixart.shapes.caption import parse
from pixart.shapes.scene import COLOURS, HELD_OUT

# Pairs.


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_differs_in_one_fact_and_the_checker_knows_which_is_right(kind: str) -> None:
    for pair in pairs(kind, 6):
        assert holds(pair.picture, pair.caption) and holds(pair.other_picture, pair.other_caption)
        assert not holds(pair.picture, pair.other_caption)
        assert not holds(pair.other_picture, pair.caption)
        ours, others = parse(pair.caption), parse(pair.other_caption)
        changed = {one.kind for one in {*ours} ^ {*others}}
        assert changed == {"colour" if kind == "swap" else kind}
        assert len({*ours} - {*others}) == (2 if kind == "swap" else 1)
        for scene in (pair.scene, pair.other):
            assert not {(one.shape, one.colour) for one in scene.things} & HELD_OUT
    assert pairs(kind, 2) == pairs(kind, 3)[:2] and pairs(kind, 1) != pairs(kind, 1, seed=1)


def test_captions_of_a_pair_differ_in_the_words_of_the_fact_alone() -> None:
    for pair in pairs("colour", 10):
        a, b = pair.caption.split(), pair.other_caption.split()
        assert {word for x, y in zip(a, b, strict=True) if x != y for word in (x, y)} <= {*COLOURS}


def test_a_kind_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of background, .*, got 'taste'"):
        pairs("taste", 1)


# Metrics of which it is known what they see.


class Colours(PictureMetric):
    """How many of the caption's colours there are in the picture: blind to all but colours."""

    higher_is_better = True

    def __init__(self, name: str, context: Context) -> None:
        self.name, self.calls = name, 0

    def score(self, entries: Sequence[Entry], images: Any, features: Any) -> list[Score]:
        self.calls += len(entries)
        found = []
        for entry, image in zip(entries, images, strict=True):
            pixels = np.asarray(image)
            named = [s.value for s in parse(entry.prompt.prompt) if s.kind == "colour"]
            seen = [(pixels == COLOURS[name]).all(-1).any() for name in named]
            found.append(float(np.mean(seen)))
        sign = 1 if self.higher_is_better else -1
        return [Score(sign * value) for value in found]


class Errors(Colours):
    """The same, less is better."""

    higher_is_better = False


class Mean(Extractor):
    """Mean and deviation of the levels."""

    name, width, digest = "mean", 2, "0"

    def prepare(self, image: Any, entry: Entry) -> Any:
        levels = np.asarray(image).astype(np.float32)
        return np.array([levels.mean(), levels.std()], np.float32)

    def __call__(self, prepared: Sequence[Any]) -> Any:
        return np.stack(prepared)


class Dice(PictureMetric):
    """Chance, by the picture and the caption."""

    def __init__(self, name: str, context: Context) -> None:
        self.name, self.extractor = name, Mean()

    def score(self, entries: Sequence[Entry], images: Any, features: Any) -> list[Score]:
        return [
            Score(random.Random(f"{row.tolist()}{entry.prompt.prompt}").random())
            for row, entry in zip(features, entries, strict=True)
        ]


class Sharpness(SetMetric):
    """How much more or less of neighbours differs than in the reference, in levels."""

    def __init__(self, name: str, context: Context) -> None:
        self.name = name
        self.extractor = Edges()

    def compare(self, ours: Features, reference: Features | Moments) -> dict[str, Estimate]:
        assert isinstance(reference, Features)
        gap = abs(float(ours.values.mean()) - float(reference.values.mean()))
        return {self.name: Estimate(gap, gap - 0.05, gap + 0.05, len(ours.keys), "made up")}


class Edges(Extractor):
    name, width, digest = "edges", 1, "0"

    def prepare(self, image: Any, entry: Entry) -> Any:
        return np.abs(np.diff(np.asarray(image).astype(np.float32), axis=1)).max(keepdims=True)[
            0, 0
        ]

    def __call__(self, prepared: Sequence[Any]) -> Any:
        return np.stack(prepared)[:, :1]


class Wrong(Colours):
    def score(self, entries: Sequence[Entry], images: Any, features: Any) -> list[Score]:
        return [Score(0.0)] * len(entries)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kinds = {"colours": Colours, "errors": Errors, "dice": Dice, "sharpness": Sharpness}
    for name, kind in kinds.items():
        monkeypatch.setitem(metrics.METRICS, name, kind)
    yield


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("trust")
    with pytest.MonkeyPatch.context() as patched:
        kinds = {"colours": Colours, "errors": Errors, "dice": Dice, "sharpness": Sharpness}
        for name, kind in kinds.items():
            patched.setitem(metrics.METRICS, name, kind)
        names = ["colours", "errors", "dice", "sharpness"]
        return place, trust.trust(place, names, count=8)


def test_the_checker_is_right_in_every_pair(found: tuple[Path, dict[str, Any]]) -> None:
    block = found[1]["metrics"]["shapes"]
    for numbers in (block["values"], *block["categories"].values()):
        assert {one["value"] for one in numbers.values()} == {1.0}
    assert set(block["verdicts"].values()) == {"sees"}


def test_a_metric_sees_what_it_looks_at(found: tuple[Path, dict[str, Any]]) -> None:
    block = found[1]["metrics"]["colours"]
    assert block["categories"]["colour"]["colours"]["value"] == 1.0
    assert block["categories"]["colour"]["colours/picture-auc"]["value"] == 1.0
    for kind in ("background", "size", "position", "relation", "swap", "count"):
        # It says the same of both: half of each pair.
        assert block["categories"][kind]["colours"]["value"] == 0.5
        assert block["verdicts"][kind] == "not decided"  # of eight pairs
    assert block["sentence"].startswith(
        "colours sees a wrong colour; it may or may not see a wrong "
    )
    assert block["sentence"].endswith(
        "relation or swap of two colours, of which more pairs would tell."
    )
    errors = found[1]["metrics"]["errors"]
    assert errors["categories"]["colour"]["errors"]["value"] == 1.0  # less is better


def test_chance_is_seen_to_be_chance(found: tuple[Path, dict[str, Any]]) -> None:
    numbers = found[1]["metrics"]["dice"]["values"]["dice"]
    assert numbers["low"] < 0.5 < numbers["high"] and numbers["n"] == 8 * len(KINDS)
    assert numbers["value"] == pytest.approx(0.5, abs=0.25)  # 4 standard deviations of 64 pairs


def test_what_a_distance_sees_stands_beside_what_undamaged_pictures_cost(
    found: tuple[Path, dict[str, Any]],
) -> None:
    block = found[1]["metrics"]["sharpness"]
    cost = {name: one["sharpness"]["value"] for name, one in block["categories"].items()}
    assert list(cost) == list(DAMAGES)
    assert cost["other pictures"] < cost["blur 1 px"] < cost["blur 2 px"]
    assert "blur 2 px" in block["sentence"].split(";")[0]


def test_damages_are_of_the_size_that_they_say() -> None:
    class Kept(Sharpness):
        def compare(self, ours: Features, reference: Features | Moments) -> dict[str, Estimate]:
            return {self.name: Estimate(float(len(ours.keys)), 0.0, 0.0, 1, "made up")}

    numbers = distances(Kept("kept", Any), 3)  # type: ignore[arg-type]
    assert {one.value for one in numbers.values()} == {3.0}
    noise = DAMAGES["noise 8/255"][1]
    assert noise is not None
    gray = Image.new("RGB", (64, 64), (128, 128, 128))
    added = np.asarray(noise(gray, 0)).astype(float) - 128
    # The standard deviation of one from n values is off by 1/sqrt(2 n): 5 of these are 0.25.
    assert added.std() == pytest.approx(8, abs=0.27) and abs(added.mean()) < 5 * 8 / 111


def test_what_is_there_is_not_scored_again(
    found: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, results = found
    (folder,) = (place / "scores").glob("colours-*")
    (folder / "size.jsonl").unlink()
    (folder / "shape.jsonl").write_text("{half")
    before = (place / "results.json").read_bytes()
    scored: list[str] = []

    def score(self: Any, entries: Sequence[Entry], images: Any, features: Any) -> list[Score]:
        scored.extend(entry.prompt.id.split("-")[0] for entry in entries)
        return Colours.score(self, entries, images, features)

    kind = type("Counting", (Colours,), {"score": score})
    monkeypatch.setitem(metrics.METRICS, "colours", kind)
    names = ["colours", "errors", "dice", "sharpness"]
    assert trust.trust(place, names, count=8) == results
    assert set(scored) == {"size", "shape"} and len(scored) == 2 * 3 * 8
    assert (place / "results.json").read_bytes() == before
    with pytest.raises(ValueError, match="holds results of trust/.*: other pairs; name another"):
        trust.trust(place, ["colours"], count=11)


def test_a_checker_that_errs_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics.METRICS, "shapes", Wrong)
    with pytest.raises(RuntimeError, match="must be right in every pair, it is not in background"):
        trust.trust(tmp_path, ["colours"], count=8)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("count", [7, 10_001])
def test_counts_have_bounds(tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match=f"count must be from 8 to 10,000, got {count}"):
        trust.trust(tmp_path, count=count)


def numbers(*ends: tuple[float, float]) -> dict[str, Estimate]:
    names = ("m", "m/picture")
    return {
        name: Estimate((low + high) / 2, low, high, 9, "")
        for name, (low, high) in zip(names, ends, strict=True)
    }


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        (((0.6, 0.9), (0.51, 0.8)), "sees"),
        (((0.6, 0.9), (0.4, 0.8)), "in captions"),
        (((0.5, 0.9), (0.6, 0.8)), "in pictures"),
        (((0.4, 0.6), (0.5, 0.7)), "does not see"),
        (((0.4, 0.6), (0.5, 0.8)), "not decided"),
        (((0.1, 0.4), (0.5, 0.8)), "prefers the wrong"),
    ],
)
def test_verdicts_go_by_whether_the_interval_leaves_chance_out(ends: Any, told: str) -> None:
    assert trust.verdict("m", numbers(*ends)) == told


def test_the_pages_say_it_in_words_and_numbers(found: tuple[Path, dict[str, Any]]) -> None:
    place, results = found
    readme = (place / "README.md").read_text().replace("\\", "")  # Markdown's brackets are escaped
    page = (place / "report.html").read_text()
    for block in results["metrics"].values():
        assert block["sentence"] in readme and block["sentence"] in page
    assert "| colour | 1.00 [0.68, 1.00] |" in readme
    assert page.count("data:image/png;base64,") == 2 * len(KINDS)
    assert {path.name for path in (place / "plots").iterdir()} == {
        "wrong-caption.svg",
        "wrong-picture.svg",
        "sharpness-damages.svg",
    }
    assert "<script" not in page and str(place) not in json.dumps(results) + page + readme


@pytest.mark.slow
def test_a_models_pictures_are_ranked_as_the_checker_ranks_them(tmp_path: Path) -> None:
    """By a few steps and many; the checker's own share of right pictures goes up with it."""
    results = trust.trust(tmp_path, ["colours"], count=8, model="shapes", model_count=8)
    block = results["metrics"]["shapes"]["model"]
    assert block["n"] == 8 and block["value"] > 0.5 and block["low"] <= block["value"]
    assert len(list((tmp_path / "model").glob("*.png"))) == 8
    again = trust.trust(tmp_path, ["colours"], count=8, model="shapes", model_count=8)
    assert again == results
