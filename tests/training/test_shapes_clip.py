"""The CLIP of the embedded world: what its loss compares, and what it leaves behind."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pixart.shapes.caption import describe, parse
from pixart.shapes.checker import check as look
from pixart.shapes.checker import is_true, reading_of
from pixart.shapes.scene import draw, sample_scene
from pixart.train import main as train
from pixart.training.recipe import load_recipe
from pixart.training.stage import Batch, ResolvedStage, Size
from pixart.training.tasks import shapes_clip
from pixart.training.tasks.shapes_clip import SIDE, ClipTask, Pairs, prepared, vocabulary

TINY = Size(hidden_size=16, depth=1, num_heads=2)


def tiny_stage(**changes: Any) -> ResolvedStage:
    (stage,) = load_recipe("shapes-clip")
    return replace(stage, size=TINY, batch=Batch(images=6), **changes).resolved()


@pytest.fixture(scope="module")
def task() -> ClipTask:
    torch.manual_seed(0)
    return ClipTask(tiny_stage())


def test_every_word_of_the_captions_is_one_token(task: ClipTask) -> None:
    tokens, _ = vocabulary()
    text = "a picture of an orange star in the top left corner, on black"
    ids = task.tokenizer(text).input_ids
    words = [*text.replace(",", " ,").split()]
    assert ids == [
        tokens["<|startoftext|>"],
        *(tokens[f"{word}</w>"] for word in words),
        len(tokens) - 1,
    ]


def test_words_that_captions_never_have_are_read_to_their_end(task: ClipTask) -> None:
    *body, end = task.tokenizer("ein grüner Stern 星").input_ids
    assert end == vocabulary()[0]["<|endoftext|>"] and end not in body


def test_a_text_is_read_to_its_end_and_not_to_its_highest_token(task: ClipTask) -> None:
    """What transformers does where the end has the id 2."""
    texts = ["a red star on white", "a red star on black"]
    first, second = (text_features(task, text) for text in texts)
    assert task.model.config.text_config.eos_token_id != 2  # type: ignore[union-attr]
    assert not torch.allclose(first, second, atol=1e-4)


def text_features(task: ClipTask, text: str) -> Tensor:
    tokens = task.tokenizer([text], return_tensors="pt")
    picture = torch.zeros(1, 3, SIDE, SIDE)
    with torch.no_grad():
        return task.model(**tokens, pixel_values=picture).text_embeds[0]


def test_what_is_true_of_a_scene_is_what_the_checker_sees_in_its_picture() -> None:
    rng = random.Random(0)
    scenes = [sample_scene(rng, kind) for kind in ("one", "pair", "group") for _ in range(4)]
    texts = [describe(scene, rng, omit=0.5) for scene in scenes]
    for scene in scenes:
        for text in texts:
            seen = look(draw(scene, 128), parse(text))
            assert is_true(reading_of(scene), parse(text)) == (bool(seen) and all(seen))


def test_captions_that_are_true_of_another_picture_are_no_wrong_pairs(task: ClipTask) -> None:
    scenes = [sample_scene(random.Random(k), "one") for k in range(3)]
    words = "a {0.size} {0.colour} {0.shape} on {1}"
    texts = [words.format(scene.things[0], scene.background) for scene in scenes]
    again = shapes_clip.truths([*scenes, scenes[0]], [*texts, texts[0]])
    assert again.tolist() == [
        [row == column or {row, column} == {0, 3} for column in range(4)] for row in range(4)
    ]
    tokens = task.tokenizer([*texts, texts[0]], padding=True, return_tensors="pt")
    pictures = torch.stack([prepared(draw(scene, 128)) for scene in (*scenes, scenes[0])])
    part = Pairs(pictures, tokens.input_ids, tokens.attention_mask, again)
    with torch.no_grad():
        loss = float(task.losses(task.model, part)["loss"])
        told = task.model(input_ids=part.ids, pixel_values=part.pictures)
        scale = float(task.model.logit_scale.exp())  # type: ignore[operator]
    powers = np.exp(scale * (told.image_embeds.double() @ told.text_embeds.double().T).numpy())
    powers[0, 3] = powers[3, 0] = 0.0  # each true of the other's picture
    shares = [np.diag(powers) / powers.sum(axis) for axis in (0, 1)]
    assert loss == pytest.approx(-np.mean(np.log(shares)), rel=1e-5)


def test_a_step_is_a_function_of_its_number(task: ClipTask) -> None:
    (first,), (again,), (other,) = task.load(3, 1), task.load(3, 1), task.load(4, 1)
    assert torch.equal(first.pictures, again.pictures) and torch.equal(first.ids, again.ids)
    assert not torch.equal(first.pictures, other.pictures)


def test_what_is_exported_opens_in_transformers_and_sees_the_same(
    task: ClipTask, tmp_path: Path
) -> None:
    from transformers import AutoProcessor, CLIPModel

    task.export(tmp_path)
    model: Any = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "clip")
    (part,) = task.load(0, 1)
    rngs = task.stage.rngs(0, 6)
    drawn = [shapes_clip.draw_scene(rng, dict(task.stage.data.scenes)) for rng in rngs]
    images = [Image.fromarray(draw(scene, 128)) for scene, _ in drawn]
    texts = [text for _, text in drawn]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], part.ids)
    assert torch.allclose(inputs["pixel_values"], part.pictures, atol=1e-6)
    with torch.no_grad():
        ours, theirs = task.model.eval()(part.ids, part.pictures), model(**inputs)
    assert torch.allclose(ours.logits_per_image, theirs.logits_per_image, atol=1e-4)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    small = "--size.hidden-size 16 --size.depth 1 --size.num-heads 2 --batch.images 6 --steps 3"
    words = ["shapes-clip", "--quiet", "--validation.every", "3", "--validation.images", "4"]
    words += [*small.split(), "--device", "cpu"]
    for name, more in (("whole", []), ("parts", ["--stop-after", "1"]), ("parts", [])):
        assert train([*words, "--output", str(tmp_path / name), *more]) == 0
    whole, parts = (
        (tmp_path / name / "clip" / "step-00000003" / "clip" / "model.safetensors").read_bytes()
        for name in ("whole", "parts")
    )
    assert whole == parts


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"start": "previous"}, "start of a clip must be random, got 'previous'"),
        (
            {"batch": Batch(images=6, accumulate=2)},
            "batch.accumulate must be 1 where trains is clip, got 2",
        ),
        (
            {"size": Size(hidden_size=10, depth=1, num_heads=4)},
            "size.hidden_size must be a multiple of size.num_heads, got 10 and 4",
        ),
    ],
)
def test_what_a_stage_cannot_have_is_refused(changes: dict[str, Any], line: str) -> None:
    (stage,) = load_recipe("shapes-clip")
    assert line in list(shapes_clip.check(replace(stage, **changes)))
    assert not list(shapes_clip.check(stage))
