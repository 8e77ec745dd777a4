"""The colour of what a detector found, named by CLIP as GenEval does (arXiv:2310.11513)."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pixart.evaluation.detecting.detections import Detection
from pixart.evaluation.metric import Context
from pixart.evaluation.needs import Need
from pixart.evaluation.networks.clip import extractor_of

if TYPE_CHECKING:
    from PIL.Image import Image


class ClipColours:
    """Which of GenEval's ten colours a detection has, by CLIP ViT-L/14: of the crop of its box, with what is
    not of its mask painted grey, the colour whose three sentences it is nearest to."""

    COLOURS = (
        "red",
        "orange",
        "yellow",
        "green",
        "blue",
        "purple",
        "pink",
        "brown",
        "black",
        "white",
    )
    TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}",
                 "a photo of a {colour} object")  # fmt: skip
    GROUND = "#999"

    def __init__(self, context: Context, model: str = "openai/clip-vit-large-patch14") -> None:
        self._clip = extractor_of(model, context)
        self._known: dict[str, Any] = {}

    def needs(self) -> Sequence[Need]:
        return self._clip.needs()

    def __call__(self, image: "Image", found: Iterable[Detection]) -> tuple[Detection, ...]:
        """The detections, each with a colour; those that have one keep it."""
        return tuple(
            one if one.color is not None else replace(one, color=self._colour(image, one))
            for one in found
        )

    def _colour(self, image: "Image", one: Detection) -> str:
        features = self._clip.opened().pictures([self._clip.prepare(self.crop(image, one), None)])  # type: ignore[arg-type]
        return self.COLOURS[int((self._directions(one.name) @ features[0]).argmax())]

    def crop(self, image: "Image", one: Detection) -> "Image":
        """At least a pixel of it."""
        from PIL import Image

        if one.mask is not None:
            ground = Image.new("RGB", image.size, self.GROUND)
            image = Image.composite(image, ground, Image.fromarray(one.mask.pixels()))
        left, top, right, bottom = map(round, one.box)
        return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))

    def _directions(self, name: str) -> Any:
        """(colours, width): the mean of the sentences' directions."""
        if name not in self._known:
            rows = []
            for colour in self.COLOURS:
                texts = [
                    one.replace("{colour}", colour).replace("{name}", name)
                    for one in self.TEMPLATES
                ]
                mean = self._clip.opened().texts(texts).features.mean(0)
                rows.append(mean / np.linalg.norm(mean))
            self._known[name] = np.stack(rows)
        return self._known[name]
