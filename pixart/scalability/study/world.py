"""The scenes that all runs share: latents and captions, made once, of which each run sees its part.

Captions are kept as token ids of the embedded model's tokenizer; its text encoder, which stays as it is,
reads those of a batch as they come. File of tensors: S scenes of a pool, K captions of each (the raw one
and five descriptions), L tokens.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pixart.config import EMBEDDED
from pixart.pipeline.directory import open_directory
from pixart.scalability.study.plan import BATCH, Run, Scale
from pixart.shapes.caption import describe, parse
from pixart.shapes.checker import is_true, reading_of
from pixart.shapes.scene import Scene, sample_scene
from pixart.tensors import read_safetensors
from pixart.text.tokenizer import Tokenizer, load_tokenizer
from pixart.training.batch import draw_timestep
from pixart.training.scenes import anchor_latents, picture_of

SIDE = 128  # px, 64 tokens
KINDS = {"one": 0.6, "pair": 0.4}
DESCRIPTIONS = 5
WRONG = 0.3  # share of scenes whose captions are of another scene, where captions are to be wrong
DROPPED = 0.1  # share of captions that are empty in training, for guidance
TIMESTEPS = 0.2  # mean of the logit of t, as the embedded model's first stage has it


@dataclass(frozen=True)
class World:
    """latents: (S, 4, 16, 16). ids: (S, 1 + 5, L), 0 behind a caption's end. most_told: (S,), which caption
    states most, 1 to 5. donors: (S,), whose captions a scene has where 30 % are wrong. are_true: (S,), what
    the checker says of those captions. Of the scenes that the loss is measured on and no run sees:
    held_latents, held_noise (n, 4, 16, 16), held_timesteps (n,), held_ids (n, L)."""

    latents: Tensor
    ids: Tensor
    most_told: Tensor
    donors: Tensor
    are_true: Tensor
    held_latents: Tensor
    held_noise: Tensor
    held_timesteps: Tensor
    held_ids: Tensor

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file({one.name: getattr(self, one.name) for one in fields(self)}, path)

    @classmethod
    def load(cls, path: Path) -> "World":
        return cls(**read_safetensors(path)[0])


def tokenizer() -> Tokenizer:
    """That of the embedded model."""
    return load_tokenizer(open_directory(EMBEDDED, True) / "tokenizer")


def make_world(scale: Scale) -> World:
    """Draw all scenes and write all captions; the same for the same scale. 1.3 ms a scene."""
    reader, rng = tokenizer(), random.Random("pool")
    scenes = list(_scenes(rng, scale.pool))
    told = [captions_of(scene, rng) for scene in scenes]
    donors = donate(scenes, told, random.Random("wrong"))
    held = list(_scenes(random.Random("held"), scale.scenes))
    held_told = [captions_of(scene, random.Random(f"held/{k}"))[1] for k, scene in enumerate(held)]
    generator = torch.Generator().manual_seed(7)
    latents = _latents(held)
    return World(
        latents=_latents(scenes),
        ids=torch.stack([padded([reader.encode(text) for text in texts], 40) for texts in told]),
        most_told=torch.tensor([most_told(texts) for texts in told]),
        donors=torch.tensor(donors),
        are_true=torch.tensor(
            [are_true(scene, told[k]) for scene, k in zip(scenes, donors, strict=True)]
        ),
        held_latents=latents,
        held_noise=torch.randn(latents.shape, generator=generator),
        held_timesteps=draw_timesteps(len(held), generator),
        held_ids=padded([reader.encode(text) for text in held_told], 40),
    )


def _scenes(rng: random.Random, count: int) -> Iterator[Scene]:
    for _ in range(count):
        yield sample_scene(rng, rng.choices(list(KINDS), list(KINDS.values()))[0])


def _latents(scenes: Sequence[Scene]) -> Tensor:
    return torch.cat([anchor_latents(picture_of(scene, SIDE)) for scene in scenes])


def captions_of(scene: Scene, rng: random.Random) -> list[str]:
    """The raw caption, colour and shape of one thing, as an alt text might be; then five descriptions."""
    first = scene.things[0]
    article = "an" if first.colour[0] in "aeiou" else "a"
    raw = f"{article} {first.colour} {first.shape}"
    return [raw, *(describe(scene, rng) for _ in range(DESCRIPTIONS))]


def most_told(texts: Sequence[str]) -> int:
    """Which of a scene's captions states most, the first of several; the raw one does not stand for it."""
    return max(range(1, len(texts)), key=lambda place: len(parse(texts[place])))


def are_true(scene: Scene, texts: Sequence[str]) -> bool:
    """Whether the exact checker finds every description true of the scene."""
    reading = reading_of(scene)
    return all(is_true(reading, parse(text)) for text in texts[1:])


def donate(scenes: Sequence[Scene], told: Sequence[Sequence[str]], rng: random.Random) -> list[int]:
    """For each scene the place of the one whose captions it gets: 30 % get another's, of whose
    descriptions none is true of it."""
    places = list(range(len(scenes)))
    for place in rng.sample(places, round(WRONG * len(scenes))):
        reading = reading_of(scenes[place])
        while True:
            donor = rng.randrange(len(scenes))
            if not any(is_true(reading, parse(text)) for text in told[donor][1:]):
                break
        places[place] = donor
    return places


def padded(rows: Sequence[Sequence[int]], length: int = 0) -> Tensor:
    """Token ids (B, L), 0 behind the end of a caption."""
    found = torch.zeros(len(rows), max(length, *map(len, rows)), dtype=torch.int32)
    for row, ids in zip(found, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return found


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """(count,), logit-normal."""
    return torch.cat([draw_timestep(TIMESTEPS, generator) for _ in range(count)])


class Feed:
    """What a run trains on, batch by batch. Scenes come in a new order every time all were seen."""

    def __init__(self, world: World, run: Run) -> None:
        self._world, self._run = world, run
        self._generator = torch.Generator().manual_seed(1000 + run.seed)
        self._order = torch.empty(0, dtype=torch.long)

    @cached_property
    def allowed(self) -> Tensor:
        """The scenes that the run may see: the first of the pool, so that a larger set has a smaller one."""
        count = self._run.scenes or len(self._world.latents)
        if count > len(self._world.latents):
            raise ValueError(f"scenes must be at most {len(self._world.latents)}, got {count}")
        if self._run.quality == "filtered":
            return self._world.are_true[:count].nonzero().flatten()
        return torch.arange(count)

    def next(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, noise, timesteps and token ids of a batch."""
        scenes = self.scenes()
        latents = self._world.latents[scenes]
        noise = torch.randn(latents.shape, generator=self._generator)
        return latents, noise, draw_timesteps(BATCH, self._generator), self.captions(scenes)

    def scenes(self) -> Tensor:
        """The scenes of the next batch, (16,)."""
        while len(self._order) < BATCH:
            drawn = torch.randperm(len(self.allowed), generator=self._generator)
            self._order = torch.cat([self._order, self.allowed[drawn]])
        taken, self._order = self._order[:BATCH], self._order[BATCH:]
        return taken

    def captions(self, scenes: Tensor, dropped: float = DROPPED) -> Tensor:
        """A caption of each scene as the run has them, (B, L); a share of them empty."""
        world, generator = self._world, self._generator
        chosen = torch.randint(1, 1 + DESCRIPTIONS, scenes.shape, generator=generator)
        if self._run.captions == "top":
            chosen = world.most_told[scenes]
        is_raw = torch.rand(scenes.shape, generator=generator) < _RAW_SHARE[self._run.captions]
        chosen = torch.where(is_raw, 0, chosen)
        owners = world.donors[scenes] if self._run.quality == "wrong" else scenes
        ids = world.ids[owners, chosen]
        is_empty = torch.rand(scenes.shape, generator=generator) < dropped
        ids[is_empty] = padded([[END]], ids.shape[1])
        return ids


_RAW_SHARE = {"raw": 1.0, "mixed": 0.5, "synthetic": 0.0, "top": 0.0}
END = 1  # T5's end of text, all that an empty caption has
