"""Teaching the embedded model's text encoder what its words speak of, before anything is drawn.

PixArt's T5 comes from pretraining; this stands for it. From random weights the transformer can
learn which noun stands where only once the encoder ties nouns to places, and the encoder only
once the transformer asks for it: together they stayed near chance for 8,000 steps.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart.dataset.batches import pad
from pixart.distributed import own, rank, share, world_size
from pixart.libraries import silenced
from pixart.shapes.scene import SHAPES
from pixart.training.batch import drawn_data_problems, part_problems, whole_state
from pixart.training.plan import weights_plan
from pixart.training.run import Run
from pixart.training.scenes import draw_scene, scene_problems
from pixart.training.stage import RANDOM, ResolvedStage, Stage
from pixart.training.tasks.shapes import (
    CLASSES,
    TextEncoderWithReadout,
    build_text_encoder,
    run_tokenizer,
)

PLACE_SCALE = 4.0  # brings places, in sides from the centre, to the order of 1
PLACE_WEIGHT = 4.0
_SHAPE = re.compile(rf"\b({'|'.join(SHAPES)})(?:e?s)?\b")


def check(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the fields of a stage that trains a text encoder."""
    yield from part_problems(stage)
    yield from drawn_data_problems(stage, "scenes")
    yield from scene_problems(stage)
    if stage.start != RANDOM:
        yield f"start of a text_encoder must be random, got {stage.start!r}"


def check_files(stage: ResolvedStage, run: Run) -> Iterator[str]:
    """Yield nothing: such a stage needs no files."""
    yield from ()


def plan(stage: ResolvedStage, run: Run) -> str:
    """Say in words what a stage will cost."""
    return weights_plan(stage, lambda: build_text_encoder(stage.size.caption_channels))


def build(stage: ResolvedStage, run: Run) -> "TextEncoderTask":
    """Make the task as the stage begins."""
    return TextEncoderTask(stage, run_tokenizer(run))


@dataclass(frozen=True)
class Captions:
    """B captions and what W of their words speak of.

    ids, mask: (B, L). words: (W, 2), row and column. classes: (W, 3), of shape, colour and size.
    places: (W, 2), centres in sides.
    """

    ids: Tensor
    mask: Tensor
    words: Tensor
    classes: Tensor
    places: Tensor


class TextEncoderTask:
    """A Task of pixart.training.trainer: from the words for a thing's shape and colour, its shape,
    colour, size and place are predicted. spiece: the tokenizer's."""

    def __init__(self, stage: ResolvedStage, spiece: Path) -> None:
        from pixart.text.tokenizer import load_tokenizer

        self.width = stage.size.caption_channels
        self.model: nn.Module = self._build()
        self.stage = stage
        self.tokenizer: Any = load_tokenizer(spiece.parent)

    def _build(self) -> TextEncoderWithReadout:
        return TextEncoderWithReadout(build_text_encoder(self.width))

    def load(self, step: int, parts: int) -> list[Captions]:
        rngs = own(self.stage.rngs(step, self.stage.batch.of(1, world_size())))
        return [self._captions(share(rngs, part, parts)) for part in range(parts)]

    def _captions(self, rngs: Sequence[random.Random]) -> Captions:
        captions: list[list[int]] = []
        words, classes, places = [], [], []
        for row, rng in enumerate(rngs):
            scene, text = draw_scene(rng, dict(self.stage.data.scenes))
            captions.append(self.tokenizer.encode(text))
            # A group's one noun speaks of the first of its things.
            for thing, noun in zip(scene.things, _SHAPE.finditer(text), strict=False):
                colour = text.rindex(thing.colour, 0, noun.start()) + len(thing.colour)
                for end in (colour, noun.end()):
                    # The prefix has an end of sentence of its own.
                    words.append((row, len(self.tokenizer.encode(text[:end])) - 2))
                    named = zip(CLASSES, (thing.shape, thing.colour, thing.size), strict=True)
                    classes.append([names.index(name) for names, name in named])
                    places.append((thing.x, thing.y))
        ids, mask = pad([torch.tensor(caption)[:, None] for caption in captions])
        parts = (torch.tensor(part) for part in (words, classes, places))
        return Captions(ids[..., 0], mask, *parts)

    def losses(self, model: nn.Module, part: Captions) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        with self.stage.autocast(device):
            *scores, places = model(
                part.ids.to(device), part.mask.to(device), part.words.to(device)
            )
        classes = part.classes.to(device)
        named = sum(F.cross_entropy(s.float(), classes[:, k]) for k, s in enumerate(scores))
        wanted = PLACE_SCALE * (part.places.to(device) - 0.5)
        placed = F.mse_loss(places.float(), wanted)
        return {"loss": named + PLACE_WEIGHT * placed, "place": placed.sqrt() / PLACE_SCALE}

    def images(self, part: Captions) -> int:
        return len(part.ids)

    def tokens(self, part: Captions) -> int:
        return int(part.mask.sum())

    def flops(self, part: Captions) -> float:
        return 0.0  # not counted

    @silenced()
    def export(self, folder: Path) -> None:
        """FOLDER/text_encoder as transformers has it, fp32."""
        state = whole_state(self.model)
        if rank() == 0:
            whole = self._build()
            whole.load_state_dict(state)
            whole.text_encoder.save_pretrained(folder / "text_encoder")  # type: ignore[operator]

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """The losses on captions that are the same every time."""
        places = range(self.stage.validation.images)
        part = self._captions([random.Random(f"validation/{place}") for place in places])
        return {name: float(value) for name, value in self.losses(self.model, part).items()}
