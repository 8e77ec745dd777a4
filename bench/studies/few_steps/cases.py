"""What is asked for: short captions, the same for every way to draw them.

They leave out what may be left out, so that many scenes fit: sizes, places and grounds are the model's choice,
and a step must choose. Full captions decide the scene, and a first prediction is the picture, distilled or not.
"""

import random
from collections.abc import Sequence

from pixart.pipeline.request import Request
from pixart.shapes.caption import describe
from pixart.shapes.scene import sample_scene

SIDE = 128  # pixels, the embedded model's native side
SEEDS = {"one": 3_000_000, "pair": 3_500_000}  # of noise, by kind: that of case 0


def caption(kind: str, number: int) -> str:
    """Of case `number` of one thing ("one") or of two ("pair")."""
    rng = random.Random(f"few_steps/{kind}/{number}")
    return describe(sample_scene(rng, kind), rng, omit=1.0)


def requests(kind: str, numbers: Sequence[int]) -> list[Request]:
    """Of cases, without how they are drawn."""
    return [
        Request(
            caption(kind, number), seed=SEEDS[kind] + number, height=SIDE, width=SIDE,
            batched=True, tile=False,
        )
        for number in numbers
    ]  # fmt: skip
