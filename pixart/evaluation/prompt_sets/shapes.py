"""The embedded world's prompts: generated, and the same as those of the model card.

The captions of a category are pixart.evaluation.caption_accuracy's of its task, in order: fewer of them are the
first of more. The scenes that they describe are known too, and can be drawn as a reference.
"""

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pixart.evaluation.store.entries import Prompt
from pixart.shapes.caption import describe
from pixart.shapes.scene import Scene, sample_scene

if TYPE_CHECKING:
    from PIL.Image import Image

# Category -> kind of scene, whether its first thing is a combination that was never shown.
CATEGORIES = {
    "one": ("one", False),
    "pair": ("pair", False),
    "group": ("group", False),
    "unseen-one": ("one", True),
    "unseen-pair": ("pair", True),
}
SEED = 1_000_000  # of the model card


def shapes_prompts(count: int, seed: int = SEED) -> list[Prompt]:
    """As many captions, spread evenly over the five categories (the first have one more)."""
    prompts = []
    for k, category in enumerate(CATEGORIES):
        share = count // len(CATEGORIES) + (k < count % len(CATEGORIES))
        for number, (_, caption) in zip(range(share), scenes(category, seed), strict=False):
            name = f"{category}-{number:05d}"
            prompts.append(Prompt(name, caption, set="shapes", category=category))
    return prompts


def scenes(category: str, seed: int = SEED) -> Iterator[tuple[Scene, str]]:
    """Scenes of a category with full captions, without an end; the same for the same seed."""
    kind, held_out = CATEGORIES[category]
    rng = random.Random(f"{seed}/{kind}/{held_out}")
    while True:
        scene = sample_scene(rng, kind, held_out)
        yield scene, describe(scene, rng, omit=0.0, apart=0.0)


def drawn_scenes(count: int, size: int, seed: int) -> "Iterator[tuple[str, Image]]":
    """(id, picture) of scenes drawn exactly, (size, size) RGB, spread as `shapes_prompts` spreads: a
    reference set. Another seed than the prompts' has other scenes of the same kinds."""
    from PIL import Image

    from pixart.shapes.scene import draw

    for k, category in enumerate(CATEGORIES):
        share = count // len(CATEGORIES) + (k < count % len(CATEGORIES))
        for number, (scene, _) in zip(range(share), scenes(category, seed), strict=False):
            yield f"{category}-{number:05d}", Image.fromarray(draw(scene, size))
