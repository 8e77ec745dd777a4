"""Teaching the embedded model's text encoder what its words speak of, before anything is drawn.

PixArt's T5 comes from pretraining; this stands for it. From random weights the transformer can
learn which noun stands where only once the encoder ties nouns to places, and the encoder only
once the transformer asks for it: together they stayed near chance for 8,000 steps.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart.dataset.batches import pad
from pixart.distributed import own, rank, share, world_size
from pixart.shapes.scene import COLOURS, RADII, SHAPES
from pixart.training.batch import whole_state
from pixart.training.stage import Stage
from pixart.training.state import load_average
from pixart.training.tasks.shapes import build_text_encoder, draw_scene

CLASSES = (SHAPES, tuple(COLOURS), tuple(RADII))
PLACE_SCALE = 4.0  # brings places, in sides from the centre, to the order of 1
PLACE_WEIGHT = 4.0
_SHAPE = re.compile(rf"\b({'|'.join(SHAPES)})(?:e?s)?\b")


@dataclass(frozen=True)
class Reading:
    """B captions and what W of their words speak of.

    ids, mask: (B, L). words: (W, 2), row and column. classes: (W, 3), of shape, colour and size.
    places: (W, 2), centres in sides.
    """

    ids: Tensor
    mask: Tensor
    words: Tensor
    classes: Tensor
    places: Tensor


class Reader(nn.Module):
    """A text encoder and what reads its features, which is thrown away afterwards."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.told = nn.Linear(text_encoder.config.d_model, sum(map(len, CLASSES)) + 2)

    def forward(self, ids: Tensor, mask: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        """Scores of shapes, colours and sizes, and places, (W, …) each."""
        features = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        told = self.told(features[words[:, 0], words[:, 1]])
        return told.split((*map(len, CLASSES), 2), dim=1)


def load_text_encoder(checkpoint: Path, text_encoder: nn.Module) -> None:
    """The averaged weights that ReadingTask reached, into a text encoder of the same form."""
    load_average(checkpoint, Reader(text_encoder))


class ReadingTask:
    """A Task of pixart.training.trainer: the words for a thing's shape and colour tell its shape,
    colour, size and place. spiece: the tokenizer's."""

    def __init__(self, stage: Stage, spiece: Path) -> None:
        from pixart.text.tokenizer import load_tokenizer

        self.width = stage.size.caption_channels
        self.model: nn.Module = Reader(build_text_encoder(self.width))
        self.stage = stage
        self.tokenizer: Any = load_tokenizer(spiece.parent)

    def load(self, step: int, parts: int) -> list[Reading]:
        rngs = own(self.stage.rngs(step, self.stage.batch.of(1, world_size())))
        return [self._read(share(rngs, part, parts)) for part in range(parts)]

    def _read(self, rngs: Sequence[random.Random]) -> Reading:
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
                    of = (thing.shape, thing.colour, thing.size)
                    classes.append(
                        [names.index(name) for names, name in zip(CLASSES, of, strict=True)]
                    )
                    places.append((thing.x, thing.y))
        ids, mask = pad([torch.tensor(caption)[:, None] for caption in captions])
        return Reading(
            ids[..., 0], mask, *(torch.tensor(part) for part in (words, classes, places))
        )

    def losses(self, model: nn.Module, part: Reading) -> dict[str, Tensor]:
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

    def images(self, part: Reading) -> int:
        return len(part.ids)

    def tokens(self, part: Reading) -> int:
        return int(part.mask.sum())

    def flops(self, part: Reading) -> float:
        return 0.0  # not counted

    def export(self, folder: Path) -> None:
        """FOLDER/text_encoder as transformers has it, fp32."""
        state = whole_state(self.model)
        if rank() == 0:
            reader = Reader(build_text_encoder(self.width))
            reader.load_state_dict(state)
            reader.text_encoder.save_pretrained(folder / "text_encoder")

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """The losses on captions that are the same every time."""
        places = range(self.stage.validation.images)
        part = self._read([random.Random(f"validation/{place}") for place in places])
        return {name: float(value) for name, value in self.losses(self.model, part).items()}
