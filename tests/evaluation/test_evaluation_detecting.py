"""Detectors of transformers and the checker, and the colours of what they find."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import build_mask2former, build_owl

from pixart.evaluate import main
from pixart.evaluation.detecting import detectors as detecting
from pixart.evaluation.detecting.colours import ClipColours
from pixart.evaluation.detecting.detections import Detection, Mask, read_detections
from pixart.evaluation.detecting.detectors import Detector, detect, open_detector, wanted_names
from pixart.evaluation.metric import Context
from pixart.evaluation.metrics import open_metric
from pixart.evaluation.needs import MissingError
from pixart.evaluation.prompt_sets.files import write_prompts
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.shapes.scene import Scene, Thing, draw

CPU = torch.device("cpu")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))


def test_mask2former_finds_instances_with_masks(tmp_path: Path) -> None:
    detector = open_detector(str(build_mask2former(tmp_path / "m")), Context(CPU))
    assert detector.id == "hf-mask2former:m" and not detector.needs()
    found = detector(NOISE, ())
    assert found and {one.name for one in found} <= {"dog", "computer mouse", "bench"}
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        assert one.mask is not None
        pixels = one.mask.pixels()
        rows, columns = np.nonzero(pixels)
        assert pixels.shape == (60, 90)
        assert one.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_confidences_are_of_class_times_mask_and_padding_is_cut_off(tmp_path: Path) -> None:
    """A query on the left half of an upright picture that was padded to a square."""
    detector: Any = open_detector(str(build_mask2former(tmp_path / "m")), Context(CPU))
    classes = torch.tensor([[[0.0, 3.0, 0.0, 0.0], [-9.0, -9.0, -9.0, 9.0]]])
    masks = torch.full((1, 2, 16, 16), -8.0)
    masks[0, 0, :, :4] = 2.0
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    seen = torch.zeros(1, 64, 64)
    seen[:, :, :32] = 1
    inputs: Any = {"pixel_values": torch.zeros(1, 3, 64, 64), "pixel_mask": seen}
    processor, model = detector._opened

    class Inputs(dict):  # type: ignore[type-arg]
        def to(self, _: object) -> "Inputs":
            return self

    class Fixed:
        config = model.config

        def __call__(self, **_: Any) -> Any:
            return outputs

    detector.__dict__["_opened"] = (lambda **_: Inputs(inputs), Fixed())
    first = detector(Image.new("RGB", (100, 200)), ())[0]
    assert first.name == "computer mouse"  # COCO calls it a mouse
    left, top, right, bottom = first.box
    assert (left, top, bottom) == (0, 0, 200) and right == pytest.approx(50, abs=6)
    probability = float(classes[0, 0].softmax(0)[1])
    inside = float(torch.tensor(2.0).sigmoid())
    # Pixels between the halves are interpolated, and nearer to a half.
    assert 0.9 * probability * inside < first.score < probability * inside


def test_owlv2_finds_what_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes and confidences are those of transformers' own processor."""
    monkeypatch.setattr(detecting, "LEAST", 0.0)
    detector: Any = open_detector(str(build_owl(tmp_path / "o")), Context(CPU))
    assert detector.id == "hf-owlv2:o"
    found = detector(NOISE, ("dog", "red cat"))
    processor, model = detector._opened
    texts = [["a photo of a dog", "a photo of a red cat"]]
    inputs = processor(text=texts, images=NOISE, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    (theirs,) = processor.post_process_grounded_object_detection(
        outputs, threshold=0.0, target_sizes=[(60, 90)]
    )
    order = theirs["scores"].argsort(descending=True)[: len(found)]
    assert [one.score for one in found] == pytest.approx(theirs["scores"][order].tolist())
    limits = torch.tensor([90.0, 60.0, 90.0, 60.0])
    boxes = torch.minimum(theirs["boxes"][order].clamp(min=0), limits)
    assert np.allclose([one.box for one in found], boxes, atol=1e-3)
    names = [("dog", "red cat")[k] for k in theirs["labels"][order].tolist()]
    assert [one.name for one in found] == names
    with pytest.raises(ValueError, match="names must be of classes, one at least"):
        detector(NOISE, ())


def test_a_file_of_detections_is_scored_by_geneval(tmp_path: Path) -> None:
    """Pictures of the embedded world, by way of a file."""
    things = (Thing("star", "red", "large", 0.27, 0.5), Thing("circle", "blue", "small", 0.73, 0.5))
    entries = []
    for name, caption in (
        ("a", "a red star left of a blue circle"),
        ("b", "a red star above a blue circle"),
    ):
        path = tmp_path / f"{name}.png"
        Image.fromarray(draw(Scene("pair", "white", things, "left of"), 96)).save(path)
        entries.append(Entry(Prompt(name, caption, "shapes"), 0, path))
    context = Context(CPU)
    file = tmp_path / "d.jsonl"
    detect(entries, open_detector("checker", context), file)
    assert len(read_detections(file)) == 2
    prompts = tmp_path / "prompts.jsonl"
    write_prompts(prompts, [one.prompt for one in entries])
    other = tmp_path / "other.jsonl"
    given = ["--images", str(tmp_path), "--prompts", str(prompts), "--output", str(other)]
    assert main(["detect", "checker", *given]) == 0
    assert other.read_bytes() == file.read_bytes()
    assert main(["detect", "facebook/mask2former-nowhere", *given]) == 3
    write_prompts(prompts, [*(one.prompt for one in entries), Prompt("c", "a red star", "shapes")])
    assert main(["detect", "checker", *given]) == 1
    metric: Any = open_metric("geneval", Context(CPU, files={"detections": file}))
    images = [Image.open(one.path) for one in entries]
    assert [one.value for one in metric.score(entries, images, None)] == [1.0, 0.0]
    assert metric.protocol == "geneval/checker-1" and len(metric.constants["detections"]) == 16


def test_classes_of_a_prompt_are_asked_for_once(tmp_path: Path) -> None:
    asked = []

    class Asking(Detector):
        id = "asking"
        asks_names = True

        def __call__(self, image: Image.Image, names: Any) -> tuple[Detection, ...]:
            asked.append(list(names))
            return ()

    NOISE.save(tmp_path / "x.png")
    meta = {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
    }
    detect(
        [Entry(Prompt("x", "two dogs", meta=meta), 0, tmp_path / "x.png")],
        Asking(),
        tmp_path / "d.jsonl",
    )
    assert asked == [["dog"]]
    assert wanted_names(Prompt("y", "A man next to the wine glass.", category="spatial")) == [
        "person",
        "wine glass",
    ]
    assert read_detections(tmp_path / "d.jsonl")["x/0000"].detections == ()
    with pytest.raises(ValueError, match="cannot be read"):
        detect(
            [Entry(Prompt("y", "", meta=meta), 0, tmp_path / "y.png")],
            Asking(),
            tmp_path / "e.jsonl",
        )
    assert not (tmp_path / "e.jsonl").exists()


class Mean:
    """In the place of CLIP: a picture's feature is its mean colour, a text's that of the colour it names."""

    levels = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}

    def prepare(self, image: Image.Image, entry: object) -> Any:
        return np.asarray(image).mean((0, 1)) / 255

    def opened(self) -> Any:
        return self

    def pictures(self, prepared: Any) -> Any:
        return np.stack(prepared)

    def texts(self, texts: Any) -> Any:
        rows = [next((v for k, v in self.levels.items() if k in t), (0, 0, 0)) for t in texts]
        rows = np.array(rows, float) + 1e-3
        return SimpleNamespace(features=rows / np.linalg.norm(rows, axis=1, keepdims=True))


def test_colours_are_of_the_mask_within_the_box() -> None:
    pixels = np.full((40, 40, 3), (255, 0, 0), np.uint8)
    pixels[10:20, 10:20] = (0, 0, 255)
    pixels[12:15, 10:20] = (0, 255, 0)
    image = Image.fromarray(pixels)
    colours: Any = ClipColours(Context(CPU))
    colours._clip = Mean()
    mask = np.zeros((40, 40), bool)
    mask[12:15, 10:20] = True
    box = (10.0, 10.0, 20.0, 20.0)
    plain, masked = Detection("dog", 0.9, box), Detection("dog", 0.9, box, mask=Mask.of(mask))
    known = Detection("dog", 0.9, box, color="pink")
    assert [one.color for one in colours(image, [plain, masked, known])] == [
        "blue",
        "green",
        "pink",
    ]
    crop = np.asarray(colours.crop(image, masked))
    assert crop.shape == (10, 10, 3) and (crop[0, 0] == 0x99).all()
    assert colours.crop(image, Detection("dog", 1, (5.2, 5.2, 5.3, 5.3))).size == (1, 1)


def test_what_is_no_detector_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(
        ValueError, match="detector must be checker, a Mask2Former or an OWLv2, got"
    ):
        open_detector(str(tmp_path), Context(CPU))
    for name in ("facebook/mask2former-nowhere", "google/owlv2-nowhere"):
        detector = open_detector(name, Context(CPU, weights=tmp_path))
        assert f"huggingface.co/{name}" in str(detector.needs()[0])
        with pytest.raises(MissingError, match=f"detector needs {name}"):
            detector(NOISE, ("dog",))
