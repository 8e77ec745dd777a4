"""Where the study draws: requests in batches, and pictures that are drawn once and kept as files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from pixart.files import written_aside
from pixart.pictures import open_picture
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline


@dataclass(frozen=True)
class Studio:
    """folder: of what is kept. steps: of every picture."""

    pipe: Pipeline
    folder: Path
    steps: int = 20
    batch: int = 8

    def draw(
        self, requests: Sequence[Request], pictures: Mapping[str, Image.Image] | None = None
    ) -> list[Image.Image]:
        """The pictures of requests, denoised `batch` at a time."""
        asked = [replace(one, steps=self.steps, batched=True, tile=False) for one in requests]
        drawn = self.pipe.draw_many(asked, batch=self.batch, pictures=pictures)
        return [one.image for one in drawn]

    def keep(
        self,
        name: str,
        requests: Mapping[int, Request],
        pictures: Mapping[str, Image.Image] | None = None,
    ) -> dict[int, Image.Image]:
        """The pictures of numbered requests, drawn where folder/NAME/NUMBER.png is not there yet."""
        files = {number: self.folder / name / f"{number:04}.png" for number in requests}
        missing = [number for number, file in files.items() if not file.exists()]
        drawn = self.draw([requests[number] for number in missing], pictures)
        for number, picture in zip(missing, drawn, strict=True):
            with written_aside(files[number], durable=False) as aside:
                picture.save(aside, "PNG")
        return {number: open_picture(file, str(file)) for number, file in files.items()}


def pixels(picture: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8."""
    return np.asarray(picture.convert("RGB"))
