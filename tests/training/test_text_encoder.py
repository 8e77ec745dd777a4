"""The text encoder's own stage: what is asked of which word, and what a wrong answer costs."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixart.shapes.caption import describe
from pixart.shapes.scene import sample_scene
from pixart.training.recipe import load_recipe
from pixart.training.stage import ResolvedStage
from pixart.training.tasks import text_encoder
from pixart.training.tasks.shapes import CLASSES, train_tokenizer
from pixart.training.tasks.text_encoder import (
    PLACE_SCALE,
    PLACE_WEIGHT,
    Captions,
    TextEncoderTask,
)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    train_tokenizer(path, captions=2000)
    return path


def read_stage(**changes: Any) -> ResolvedStage:
    stage = next(one for one in load_recipe("shapes") if one.name == "read")
    return replace(stage, precision="fp32", **changes).resolved()


def pieces(spiece: Path, part: Captions) -> list[str]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    ids = part.ids[part.words[:, 0], part.words[:, 1]].tolist()
    return [processor.id_to_piece(number).lstrip("▁") for number in ids]


@pytest.mark.parametrize("kind", ["one", "pair", "group"])
def test_the_words_for_shape_and_colour_are_asked_for_what_they_speak_of(
    spiece: Path, kind: str
) -> None:
    stage = read_stage()
    task = TextEncoderTask(replace(stage, data=replace(stage.data, scenes=((kind, 1.0),))), spiece)
    (part,) = task.load(0, 1)
    shapes, colours, _ = CLASSES
    words = pieces(spiece, part)
    assert len(words) == len(part.ids) * (4 if kind == "pair" else 2)
    for colour, shape, named in zip(words[::2], words[1::2], part.classes[::2], strict=True):
        assert colour == colours[named[1]]
        assert shape in {shapes[named[0]] + ending for ending in ("", "s", "es")}
    assert (part.classes[::2] == part.classes[1::2]).all() and part.mask.any(dim=1).all()


def test_places_are_those_of_the_things(spiece: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    scenes = [sample_scene(rng, "pair") for _ in range(64)]
    drawn = iter([(scene, describe(scene, rng)) for scene in scenes])
    monkeypatch.setattr(text_encoder, "draw_scene", lambda rng, kinds: next(drawn))
    (part,) = TextEncoderTask(read_stage(), spiece).load(0, 1)
    wanted = [(thing.x, thing.y) for scene in scenes for thing in scene.things for _ in range(2)]
    assert torch.equal(part.places, torch.tensor(wanted))


class Knows(torch.nn.Module):
    """A model that is sure of every class and `off` of a side away from every place."""

    def __init__(self, part: Captions, off: float) -> None:
        super().__init__()
        self.part, self.off = part, torch.nn.Parameter(torch.tensor(off))

    def forward(self, ids: Tensor, mask: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        scores = (
            100.0 * torch.nn.functional.one_hot(self.part.classes[:, k], len(names))
            for k, names in enumerate(CLASSES)
        )
        return *scores, PLACE_SCALE * (self.part.places - 0.5 + self.off)


def test_the_loss_is_of_classes_and_of_places_in_sides(spiece: Path) -> None:
    task = TextEncoderTask(read_stage(), spiece)
    (part,) = task.load(0, 1)
    sure = task.losses(Knows(part, 0.0), part)
    assert float(sure["loss"]) == pytest.approx(0.0, abs=1e-6)
    beside = task.losses(Knows(part, 0.1), part)
    assert float(beside["place"]) == pytest.approx(0.1, rel=1e-4)
    assert float(beside["loss"]) == pytest.approx(PLACE_WEIGHT * (0.1 * PLACE_SCALE) ** 2, rel=1e-4)
    classes = part.classes.clone()
    classes[:, 2] = 1 - classes[:, 2]  # small for large
    wrong = task.losses(Knows(replace(part, classes=classes), 0.0), part)
    assert float(wrong["loss"]) == pytest.approx(100.0, rel=1e-4)
