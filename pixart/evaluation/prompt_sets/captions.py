"""Captions of real pictures: COCO and MJHQ-30K. Each prompt names its picture."""

import random
from pathlib import Path

from pixart.evaluation.prompt_sets.reading import (
    Read,
    as_object,
    list_of,
    number_of,
    prompt_of,
    read_json_object,
    text_of,
)
from pixart.evaluation.store.entries import Prompt

COCO_PICTURE = "COCO_val2014_{:012d}.jpg"


def read_coco(paths: list[Path], seed: int) -> Read:
    """captions_val2014.json: of every picture that has captions one, chosen by the seed; ids are the
    pictures'. Five captions of one picture would be five drawings against one reference."""
    (path,) = paths
    captions: dict[int, list[tuple[int, str]]] = {}
    for number, values in enumerate(list_of(read_json_object(path), "annotations", str(path))):
        place = f"{path}, annotation {number}"
        one = as_object(values, place)
        text = prompt_of(text_of(one, "caption", place), place)
        captions.setdefault(number_of(one, "image_id", place), []).append(
            (number_of(one, "id", place), text)
        )
    rng = random.Random(f"{seed}/coco/captions")
    prompts = []
    for image in sorted(captions):
        annotation, text = rng.choice(sorted(captions[image]))
        prompts.append(
            Prompt(
                f"{image:012d}",
                text,
                reference=COCO_PICTURE.format(image),
                meta={"annotation": annotation},
            )
        )
    return Read(prompts)


def read_mjhq(paths: list[Path], seed: int) -> Read:
    """meta_data.json: {hash: {"category", "prompt"}}. The pictures are CATEGORY/HASH.jpg, as
    mjhq30k_imgs.zip unpacks."""
    (path,) = paths
    prompts = []
    for name, values in read_json_object(path).items():
        place = f"{path}, {name[:80]!r}"
        one = as_object(values, place)
        category = text_of(one, "category", place)
        if not category or set(category) & set('/\\"') or category.startswith("."):
            raise ValueError(f"{place}: category must be a folder's name, got {category[:80]!r}")
        text = prompt_of(text_of(one, "prompt", place), place)
        prompts.append(Prompt(name, text, category=category, reference=f"{category}/{name}.jpg"))
    return Read(prompts)
