"""T2I-CompBench: against its script's table of positions and 3-in-1 rule, and end to end with the checker."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import write_clip

from pixart.evaluation.detecting.detections import Detection, Picture, write_detections
from pixart.evaluation.judges import Judge
from pixart.evaluation.metric import Context
from pixart.evaluation.metrics import open_metric
from pixart.evaluation.metrics.compbench_positions import position_score, scale_of
from pixart.evaluation.needs import MissingError
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.files import read_json
from pixart.shapes.caption import describe, parse
from pixart.shapes.checker import check
from pixart.shapes.scene import draw, sample_scene

CPU = torch.device("cpu")
GOLDEN = read_json(Path(__file__).parent.parent / "golden" / "evaluation" / "compbench.json")
SQUARE = Image.new("RGB", (479, 479), "white")  # pixels are those of the official detector


class Table(Judge):
    """Answers as a table of phrase to (yes, no) says."""

    id, digest = "table", "0"

    def __init__(self, table: Mapping[str, tuple[float, float]]) -> None:
        self.table = table

    def answer(self, image: Any, question: str, choices: Sequence[str]) -> Mapping[str, float]:
        assert question.endswith("?")
        return dict(zip(("yes", "no"), self.table[question[:-1]], strict=True))


def opened(judge: Judge | None = None, **context: Any) -> Any:
    metric: Any = open_metric("compbench", Context(CPU, **({"judge": "checker"} | context)))
    metric._judge = judge or metric._judge
    return metric


def entry(category: str, text: str, name: str = "x", **meta: Any) -> Entry:
    return Entry(Prompt(name, text, "t2i-compbench", category, meta=meta), 0, Path("none"))


def phrases(path: Path, *rows: Mapping[str, Any]) -> dict[str, Path]:
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"phrases": path}


def detected(path: Path, *found: Detection, size: tuple[int, int] = (479, 479)) -> dict[str, Path]:
    write_detections(path, [("x/0000", Picture(*size, found, "made-up"))])
    return {"detections": path}


def test_positions_have_the_official_scores() -> None:
    for place, first, second, expected in GOLDEN["positions"]:
        # Their function knows no "on top of", and gives it 0; so does ours.
        assert position_score(place, first, second) == pytest.approx(expected), (
            place,
            first,
            second,
        )


def test_the_complex_rule_is_the_official_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, attribute, spatial, action, expected in GOLDEN["complex"]:
        line = {"prompt": "x", "phrases": ["a"], "objects": ["hat", "rack"], "action": "runs"}
        files = phrases(tmp_path / "p.jsonl", line)
        metric = opened(Table({"a": (attribute, 1 - attribute)}), files=files)
        # Confidences and a position that make this spatial score, whatever is below a half.
        monkeypatch.setattr(metric, "_cosine", lambda *_, value=action: value)
        monkeypatch.setattr(metric, "_spatial", lambda *_, value=spatial: _score(value))
        (score,) = metric.score([entry("complex", "the hat", complex=kind)], [SQUARE], None)
        assert score.value == pytest.approx(expected), kind


def _score(value: float) -> Any:
    from pixart.evaluation.metric import Score

    return Score(value, {"spatial": value})


def test_attributes_are_a_product_over_eight_phrases_of_yes_against_no(tmp_path: Path) -> None:
    table = {f"thing {n}": (0.6, 0.2) for n in range(8)} | {"thing 8": (0.0, 1.0)}
    metric = opened(
        Table(table), files=phrases(tmp_path / "p", {"prompt": "x", "phrases": list(table)})
    )
    (score,) = metric.score([entry("color", "many things")], [SQUARE], None)
    assert score.value == pytest.approx(0.75**8) and score.parts["phrase-1"] == pytest.approx(0.75)
    by_words = phrases(tmp_path / "p", {"prompt": "many things", "phrases": ["thing 1"]})
    (score,) = opened(Table(table), files=by_words).score(
        [entry("shape", "many things")], [SQUARE], None
    )
    assert score.value == pytest.approx(0.75)


def boxed(name: str, score: float, x: float, y: float, half: float = 20) -> Detection:
    return Detection(name, score, (x - half, y - half, x + half, y + half))


def test_spatial_is_half_confidence_and_half_position(tmp_path: Path) -> None:
    dog, cat = boxed("dog", 0.9, 100, 200), boxed("cat", 0.7, 300, 210)
    twin = boxed("dog", 0.6, 400, 200)  # the likeliest counts

    def says(text: str, *found: Detection, **context: Any) -> float:
        files = detected(tmp_path / "d.jsonl", *found)
        (score,) = opened(files=files, **context).score([entry("spatial", text)], [SQUARE], None)
        return score.value

    assert says("a dog on the left of a cat", dog, cat, twin) == pytest.approx(0.4 + 0.5)
    assert says("A dog on the right of the cat.", dog, cat) == 0.0
    assert says("a dog on the left of a cat", dog) == 0.0
    assert says("a dog on the left of a cat", dog, boxed("cat", 0.5, 300, 210)) == 0.0  # not above
    assert says("a man near a cat", boxed("person", 0.9, 100, 200), cat) == pytest.approx(0.9)
    above = (boxed("dog", 0.9, 100, 100), boxed("cat", 0.7, 100, 300))
    assert says("a dog on top of a cat", *above) == pytest.approx(0.9)
    assert says("a dog on top of a cat", *above, options={"official-quirks": "yes"}) == 0.0
    with pytest.raises(ValueError, match=r"x/0000: prompt must have one of on side of, .*'a dog'"):
        says("a dog", dog)


def test_150_pixels_are_those_of_the_official_detectors_pictures(tmp_path: Path) -> None:
    """Twice the resolution is the same score; pixels of the picture itself are told beside it."""
    found = (boxed("dog", 0.9, 100, 100), boxed("cat", 0.7, 240, 240))
    both = []
    for factor in (1, 2):
        larger = [Detection(o.name, o.score, tuple(factor * v for v in o.box)) for o in found]  # type: ignore[arg-type]
        side = 479 * factor
        files = detected(tmp_path / "d.jsonl", *larger, size=(side, side))
        image = Image.new("RGB", (side, side))
        metric = opened(files=files)
        entries = [entry("spatial", "a dog next to a cat")]
        scores = metric.score(entries, [image], None)
        both.append(scores[0].parts)
        raw = metric.reduce(entries, scores)["compbench-raw/spatial"].value
        assert raw == scores[0].parts["spatial-raw"]
    assert both[0]["spatial"] == both[1]["spatial"] == pytest.approx(0.9)
    assert both[1]["spatial-raw"] == pytest.approx(0.4 + 150 / 280 / 2)
    assert scale_of(1024, 512) == 480 / 1024 and scale_of(512, 512) == 479 / 512


def test_the_embedded_world_is_scored_by_its_checker() -> None:
    rng = random.Random(0)
    entries, images, expected = [], [], []
    for n in range(40):
        kind = ("one", "pair")[n % 2]
        scene = sample_scene(rng, kind)
        caption = describe(scene, rng, omit=0.0)
        other = sample_scene(rng, kind) if n % 4 > 1 else scene
        entries.append(Entry(Prompt(f"{n:05d}", caption, "shapes", kind), 0, Path("none")))
        images.append(Image.fromarray(draw(other, 96)))
        kinds = ("shape", "colour", "size") if kind == "one" else ("shape", "relation")
        statements = [one for one in parse(caption) if one.kind in kinds]
        expected.append(all(check(np.asarray(images[-1]), statements)))
    metric = opened(options={"compbench-categories": "color,spatial"})
    assert not metric.needs() and metric.constants["detector"] == "checker-1"
    scores = metric.score(entries, images, None)
    assert [one.value > 0 for one in scores] == expected
    found = metric.reduce(entries, scores)
    means = [np.mean([s.value for s in scores[k::2]]) for k in (0, 1)]
    assert found["compbench/color"].value == pytest.approx(means[0])
    assert found["compbench/spatial"].value == pytest.approx(means[1])
    assert found["compbench"].value == pytest.approx(np.mean(means))
    assert 0.5 <= means[0] < 1 and 0.5 <= means[1] < 1


def test_what_is_missing_is_said_by_category(tmp_path: Path) -> None:
    bare = open_metric("compbench", Context(CPU, weights=tmp_path))
    needs = " ".join(map(str, bare.needs()))
    assert (
        "--judge" in needs
        and "--file detections=FILE" in needs
        and "clip-vit-base-patch32" in needs
    )
    only = Context(CPU, judge="checker", options={"compbench-categories": "color"})
    assert not open_metric("compbench", only).needs()
    with pytest.raises(MissingError, match="compbench needs phrases.jsonl"):
        opened().score([entry("color", "a red bench")], [SQUARE], None)
    with pytest.raises(ValueError, match="compbench-categories must be of color, .* got sound"):
        opened(options={"compbench-categories": "sound"})
    with pytest.raises(
        ValueError, match=r"x/0000: prompt 'x': category must be one of color, .*'3d'"
    ):
        opened().score([entry("3d", "a red bench")], [SQUARE], None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "y", "phrases": ["a"]}, r"must have phrases for prompt 'x', it has none"),
        ({"prompt": "x", "phrases": []}, r"must have phrases for prompt 'x'"),
        ({"prompt": "x"}, "line 1: must have phrases as texts, got None"),
        ({"prompt": "x", "phrases": ["a", 3]}, "line 1: must have phrases as texts"),
        ({"prompt": "x", "phrases": ["a"], "objects": 0}, "line 1: must have objects as texts, got 0"),
        ({"prompt": 3, "phrases": ["a"]}, "line 1: prompt and action must be text, got 3"),
    ],
)  # fmt: skip
def test_wrong_phrases_are_one_clear_error(
    tmp_path: Path, line: Mapping[str, Any], message: str
) -> None:
    metric = opened(files=phrases(tmp_path / "p.jsonl", line))
    with pytest.raises(ValueError, match=message):
        metric.score([entry("color", "a red bench")], [SQUARE], None)


def test_complex_prompts_need_what_they_are_scored_by(tmp_path: Path) -> None:
    line = {"prompt": "x", "phrases": ["a red star"]}
    metric = opened(files=phrases(tmp_path / "p.jsonl", line))
    for kind, lacks in (("spatial", "objects"), ("action", "action")):
        with pytest.raises(ValueError, match=f"must have {lacks} for prompt 'x'"):
            metric.score([entry("complex", "the hat", complex=kind)], [SQUARE], None)
    with pytest.raises(
        ValueError, match="meta.complex must be one of spatial, action, spatialaction"
    ):
        metric.score([entry("complex", "the hat", complex="none")], [SQUARE], None)


def test_actions_are_the_cosine_of_clip_as_it_is(tmp_path: Path) -> None:
    model = write_clip(tmp_path / "clip-vit-base-patch32")
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    image, text = Image.fromarray(noise), "a red star"
    line = {"prompt": "y", "phrases": ["the hat"], "action": text}
    files = phrases(tmp_path / "p.jsonl", line)
    metric = opened(Table({"the hat": (1.0, 0.0)}), files=files, weights=tmp_path)
    entries = [entry("non-spatial", text), entry("complex", "the hat", "y", complex="action")]
    scores = metric.score(entries, [image, image], None)
    clip = metric._clip
    pixels = torch.from_numpy(clip.prepare(image, entries[0]))[None]
    ids = torch.tensor([clip.opened()._tokenizer(text).input_ids])
    with torch.no_grad():
        expected = float(model(pixel_values=pixels, input_ids=ids).logits_per_image)
    expected /= float(model.logit_scale.detach().exp())
    assert scores[0].value == pytest.approx(expected, abs=1e-5) and abs(expected) < 1
    assert scores[1].value == pytest.approx((1 + expected) / 2, abs=1e-5)
    found = metric.reduce(entries, scores)
    assert found["compbench"].value == pytest.approx((scores[0].value + scores[1].value) / 2)
    metric.release()
