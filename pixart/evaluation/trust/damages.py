"""Drawn pictures with a damage each, and what it costs in a metric of sets."""

import io
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pixart.evaluation.in_memory import Pictures, measure
from pixart.evaluation.metric import Estimate, SetMetric
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.evaluation.trust.wrong_facts import SIDE
from pixart.pictures import open_rgb
from pixart.shapes.scene import draw, sample_scene

if TYPE_CHECKING:
    from PIL.Image import Image

NOISE = 8.0  # standard deviation, of 255 levels
QUALITY = 30  # of JPEG


def _blurred(pixels: float) -> "Callable[[Image, int], Image]":
    def damage(image: "Image", number: int) -> "Image":
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(pixels))

    return damage


def _noisy(image: "Image", number: int) -> "Image":
    from PIL import Image

    noise = np.random.default_rng(number).normal(0.0, NOISE, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8))


def _compressed(image: "Image", number: int) -> "Image":
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    file.seek(0)
    return open_rgb(file.getvalue(), "a picture of damages")


# Kind of scene, and what is done to its pictures. The first is what the others are compared with.
DAMAGES: "dict[str, tuple[str, Callable[[Image, int], Image] | None]]" = {
    "other pictures": ("one", None),
    "blur 1 px": ("one", _blurred(1.0)),
    "blur 2 px": ("one", _blurred(2.0)),
    f"noise {NOISE:g}/255": ("one", _noisy),
    f"JPEG {QUALITY}": ("one", _compressed),
    "wrong content": ("pair", None),
}


def distances(metric: SetMetric, count: int, seed: int = 0) -> Mapping[str, Estimate]:
    """By damage, the metric between `count` damaged pictures of single things and as many others that are
    not; "wrong content" are pairs of things. The same pictures are damaged in every way."""
    reference = _drawn("one", "reference", count, seed, None)
    found = {}
    for name, (kind, damage) in DAMAGES.items():
        pictures = _drawn(kind, "ours", count, seed, damage)
        found[name] = measure(metric, pictures, reference)[metric.name]
    return found


def _drawn(
    kind: str, what: str, count: int, seed: int, damage: "Callable[[Image, int], Image] | None"
) -> Pictures:
    from PIL import Image

    entries, images = [], []
    for number in range(count):
        rng = random.Random(f"{seed}/{what}/{number}")
        image = Image.fromarray(draw(sample_scene(rng, kind), SIDE))
        images.append(image if damage is None else damage(image, number))
        name = f"{number:05d}"
        entries.append(Entry(Prompt(name, "", "damages"), 0, Path(f"{name}.png")))
    return Pictures(entries, images)
