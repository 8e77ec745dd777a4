"""Scores and numbers of a folder: networks shared, errors named, results the same every time."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shapes_pictures import write_lines, write_scenes

from pixart.evaluation.in_memory import Pictures
from pixart.evaluation.metric import (
    Context,
    Extractor,
    Features,
    Metric,
    Moments,
    PictureMetric,
    Score,
    SetMetric,
)
from pixart.evaluation.metrics.shapes import (
    ShapesAccuracy,
    ShapesEdges,
    ShapesPurity,
    check_caption,
)
from pixart.evaluation.needs import MissingError, Need
from pixart.evaluation.prompt_sets.files import read_prompts
from pixart.evaluation.protocols.protocol import Use
from pixart.evaluation.running.computing import extracting
from pixart.evaluation.running.opening import Given, check_needs, open_metrics
from pixart.evaluation.running.run import Pictures as OfFolder
from pixart.evaluation.running.run import score
from pixart.evaluation.running.scoring import Reference, Scoring
from pixart.evaluation.statistics.estimate import Estimate
from pixart.evaluation.store.entries import Entry
from pixart.evaluation.store.folders import MissingPictures, find_pictures, reference_pictures

CONTEXT: Any = Context(device="cpu")  # type: ignore[arg-type]


class Colour(Extractor):
    """The mean colour; notes what was done, in `log`."""

    name, width, digest = "colour", 3, "abc"

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def prepare(self, image: Any, entry: Entry) -> Any:
        return np.asarray(image, np.float32).mean((0, 1))

    def __call__(self, prepared: Sequence[Any]) -> np.ndarray:
        self.log.append(f"network {len(prepared)}")
        return np.stack(prepared)

    def release(self) -> None:
        self.log.append("release")


class Redness(PictureMetric):
    def __init__(self, name: str, extractor: Extractor | None) -> None:
        self.name, self.extractor = name, extractor

    def score(self, entries: Any, images: Any, features: Any) -> list[Score]:
        if self.extractor is None:
            if any(entry.prompt.id == "00003" for entry in entries):
                raise ValueError("00003 has no red")
            return [Score(float(np.asarray(image)[..., 0].mean())) for image in images]
        return [Score(float(row[0])) for row in features]


class Apart(SetMetric):
    name, category_pictures = "apart", 3

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor

    def compare(self, ours: Features, reference: Features | Moments) -> Mapping[str, Estimate]:
        assert isinstance(reference, Features)
        value = float(np.abs(ours.values.mean(0) - reference.values.mean(0)).sum())
        return {self.name: Estimate(value, value, value, len(ours.keys), "none")}


def _scoring(
    folder: Path, metrics: Sequence[Metric], reference: Reference | None = None
) -> Scoring:
    found = find_pictures(folder / "images", read_prompts(folder / "prompts.jsonl"))
    return Scoring(folder / "out", found, metrics, reference)


def test_metrics_share_a_network_that_is_opened_once(tmp_path: Path) -> None:
    write_scenes(tmp_path, 10)
    log: list[str] = []
    metrics: list[Metric] = [
        Redness("red", Colour(log)), ShapesAccuracy("shapes", CONTEXT), Redness("red2", Colour(log)),
    ]  # fmt: skip
    blocks = _scoring(tmp_path, metrics).run()
    assert list(blocks) == ["red", "shapes", "red2"] and log == ["network 10", "release"]
    assert blocks["red"]["values"]["red"]["value"] == blocks["red2"]["values"]["red2"]["value"]
    assert blocks["shapes"]["values"]["shapes"]["value"] == 1.0
    assert set(blocks["shapes"]["categories"]) == {"one", "pair"}
    assert blocks["shapes"]["categories"]["one"]["shapes"]["n"] == 5
    _scoring(tmp_path, metrics).run()
    assert log == ["network 10", "release", "release"]  # features are kept


def test_sets_are_compared_with_others_and_by_category(tmp_path: Path) -> None:
    write_scenes(tmp_path, 8)
    extractor = Colour([])
    found = reference_pictures(tmp_path / "images")
    ids = {one.id: "one" if int(one.id[:5]) % 2 == 0 else "pair" for one in found.prompts}
    reference = Reference(found, digest="x", categories=ids)
    blocks = _scoring(tmp_path, [Apart(extractor)], reference).run()
    assert blocks["apart"]["values"]["apart"]["value"] == 0.0
    assert blocks["apart"]["categories"]["pair"]["apart"] == {
        "value": 0.0, "low": 0.0, "high": 0.0, "n": 4, "method": "none", "notes": [],
    }  # fmt: skip
    assert not blocks["apart"]["per_picture"]


def test_networks_round_nothing_to_tf32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    class Watching(Colour):
        def __call__(self, prepared: Sequence[Any]) -> np.ndarray:
            seen.append(torch.backends.cudnn.allow_tf32)
            return super().__call__(prepared)

    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    entries = reference_pictures(tmp_path).entries
    list(extracting(Watching([]))(iter([list(entries)])))
    Pictures(entries, [Image.open(tmp_path / "a.png")]).features(Watching([]))
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32


def test_a_missing_picture_is_an_error_or_a_note(tmp_path: Path) -> None:
    write_scenes(tmp_path, 6)
    (tmp_path / "images" / "00002" / "0000.png").unlink()
    (tmp_path / "images" / "00004" / "0000.png").unlink()
    metrics = [ShapesAccuracy("shapes", CONTEXT)]
    with pytest.raises(MissingPictures, match=r"2 of 6 pictures are missing \(00002/0000, 00004"):
        _scoring(tmp_path, metrics).run()
    scoring = _scoring(tmp_path, metrics)
    number = scoring.run(allow_missing=True)["shapes"]["values"]["shapes"]
    assert number["n"] == 4 and scoring.pictures == 4 and scoring.failed == 2
    assert number["notes"] == ["2 of 6 pictures are missing or cannot be scored."]
    lines = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["00002/0000", "00004/0000"]


def test_a_damaged_picture_is_named_and_takes_no_other_with_it(tmp_path: Path) -> None:
    write_scenes(tmp_path, 6)
    path = tmp_path / "images" / "00002" / "0000.png"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    metrics: list[Metric] = [ShapesAccuracy("shapes", CONTEXT), Redness("red", Colour([]))]
    with pytest.raises(
        MissingPictures, match=r"1 of 6 .*\(00002/0000; .*0000\.png: cannot be read"
    ):
        _scoring(tmp_path, metrics).run()
    blocks = _scoring(tmp_path, metrics).run(allow_missing=True)
    assert {block["values"][name]["n"] for name, block in blocks.items()} == {5}
    path.write_bytes(content)
    assert _scoring(tmp_path, metrics).run()["shapes"]["values"]["shapes"]["n"] == 6
    assert not (tmp_path / "out" / "errors.jsonl").exists()


def test_what_one_metric_cannot_score_the_others_can(tmp_path: Path) -> None:
    write_scenes(tmp_path, 6)
    metrics: list[Metric] = [Redness("red", None), ShapesAccuracy("shapes", CONTEXT)]
    scoring = _scoring(tmp_path, metrics)
    blocks = scoring.run(allow_missing=True)
    assert blocks["red"]["values"]["red"]["n"] == 5
    assert blocks["shapes"]["values"]["shapes"]["n"] == 6
    assert scoring.errors == [{"key": "00003/0000", "metric": "red", "error": "00003 has no red"}]


def test_a_picture_of_another_size_than_asked_for_is_an_error(tmp_path: Path) -> None:
    write_scenes(tmp_path, 2)
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "prompts.jsonl", [{**line, "size": "128x64"} for line in lines])
    with pytest.raises(
        MissingPictures, match=r"no picture can be scored \(.* must be 128x64 pixels"
    ):
        _scoring(tmp_path, [ShapesAccuracy("shapes", CONTEXT)]).run()


def test_edges_are_clean_where_scenes_are_drawn_and_not_where_they_are_blurred(
    tmp_path: Path,
) -> None:
    from PIL import ImageFilter

    write_scenes(tmp_path, 4, side=128)
    metric = ShapesEdges("shapes-edges", CONTEXT)
    colours = ShapesPurity("shapes-purity", CONTEXT)
    sharp = _scoring(tmp_path, [metric]).run()["shapes-edges"]["values"]
    pure = _scoring(tmp_path, [colours]).run()["shapes-purity"]["values"]["shapes-purity"]
    for path in tmp_path.rglob("0000.png"):
        with Image.open(path) as image:
            blurred = image.filter(ImageFilter.GaussianBlur(5))
        blurred.save(path)
    soft = _scoring(tmp_path, [metric]).run()["shapes-edges"]["values"]
    assert sharp["shapes-edges"]["value"] == 1.0 and soft["shapes-edges"]["value"] == 0.0
    assert soft["shapes-edges/overlap"]["value"] < 0.9 < sharp["shapes-edges/overlap"]["value"]
    mixed = _scoring(tmp_path, [colours]).run()["shapes-purity"]["values"]["shapes-purity"]
    assert mixed["value"] < 0.95 < pure["value"]


def test_a_caption_that_names_no_shape_cannot_be_checked() -> None:
    picture = np.full((64, 64, 3), 255, np.uint8)
    with pytest.raises(ValueError, match="caption must say which shapes there are, got 'a cat'"):
        check_caption(picture, "a cat")
    checked = check_caption(picture, "a large red circle in the center on a white background")
    assert not checked.is_right and checked.of_kind("background") == [True]
    assert not checked.has_count and checked.of_kind("relation") == []


class Wanting(PictureMetric):
    def __init__(self, name: str, context: Context) -> None:
        self.name = name
        self.level = context.options.get("level", "1")

    def needs(self) -> Sequence[Need]:
        return (Need(f"{self.name}.pth", "example.org", "--weights"), Need("clip", "hub", "hub"))


def test_all_that_is_missing_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixart.evaluation.metrics.METRICS", {"a": Wanting, "b": Wanting})
    opened = open_metrics([Use("a"), Use("b")], Given(device="cpu"))
    with pytest.raises(MissingError) as raised:
        check_needs(opened, [Need("prompts.json", "example.org", "--set")], "coco")
    text = str(raised.value)
    assert text.startswith("coco, a, b needs prompts.json") and text.count("clip (from hub)") == 1
    assert "a.pth" in text and "b.pth" in text and raised.value.exit_code == 3


def test_an_option_that_no_metric_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixart.evaluation.metrics.METRICS", {"a": Wanting})
    open_metrics([Use("a")], Given("cpu", options={"level": "2"}))
    with pytest.raises(ValueError, match="--option levle: none of a knows it"):
        open_metrics([Use("a")], Given("cpu", options={"levle": "2"}))
    with pytest.raises(FileNotFoundError, match="--weights must be a folder, there is none at x"):
        Given("cpu", weights=Path("x"))


def test_other_pixels_and_other_formats_are_another_protocol(tmp_path: Path) -> None:
    ids = {}
    for name, size, suffix in (("a", 64, "png"), ("b", 96, "png"), ("c", 64, "jpg")):
        images = tmp_path / name
        images.mkdir()
        picture = Image.new("RGB", (size, size), "red")
        picture.save(images / f"00000.{suffix}")
        (images / "broken.png").write_bytes(b"no picture")
        (tmp_path / "prompts.txt").write_text("a large red circle on white\n")
        found = OfFolder.others(images, tmp_path / "prompts.txt", None, [Use("shapes")])
        results = score(found, [ShapesAccuracy("shapes", CONTEXT)], tmp_path / f"out-{name}")
        ids[name] = results["protocol"]["id"]
        kind = "JPEG" if suffix == "jpg" else "PNG"
        assert results["protocol"]["files"] == {"sizes": [f"{size}x{size}"], "formats": [kind]}
    assert len(set(ids.values())) == 3
    again = score(found, [ShapesAccuracy("shapes", CONTEXT)], tmp_path / "out-c")
    assert again["protocol"]["id"] == ids["c"]
