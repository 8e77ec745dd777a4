"""Pictures of fixed prompts while a stage trains."""

import logging
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from pixart.distributed import rank
from pixart.files import written_aside
from pixart.pipeline.decoding import NotFinitePicture
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.training.stage import Stage

logger = logging.getLogger("pixart")


def draw_pictures(
    pipe: Pipeline,
    stage: Stage,
    folder: Path,
    prompts: Sequence[str] | None = None,
    controls: Sequence[Image] = (),
) -> list[Image]:
    """The stage's validation prompts, or others, each from noise of its own that is the same every time.
    controls: a picture for each, that the pipeline's control follows; or none. Where one comes to NaN
    there is a warning, and no picture of it and of those after it."""
    validation, side = stage.validation, stage.resolution
    images: list[Image] = []
    named = {f"control-{number}": picture for number, picture in enumerate(controls)}
    requests = [
        Request(
            prompt,
            seed=number,
            height=side,
            width=side,
            steps=validation.sampling_steps,
            guidance=validation.guidance,
            batched=False,  # not as each process's free memory allows: a cut model runs in all
            control_image=(f"control-{number}",) if controls else None,
        )
        for number, prompt in enumerate(validation.prompts if prompts is None else prompts)
    ]
    try:
        for number, drawn in enumerate(pipe.draw_many(requests, pictures=named)):
            images.append(drawn.image)
            if rank() == 0:
                with written_aside(folder / f"{number:02d}.png", durable=False) as aside:
                    drawn.image.save(aside, format="PNG")
    except NotFinitePicture as error:  # a look at a model is no reason to lose it
        if rank() == 0:
            logger.warning("stage %s: %s", stage.name, error)
    return images
