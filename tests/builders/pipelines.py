"""Small pipelines, opened and drawn with as the tests of pipelines do."""

from pathlib import Path
from typing import Any

import numpy as np

from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline

SMALL = {"height": 128, "width": 128, "steps": 3}
CHANNELS = (8, 8, 8, 8)


def open_pipeline(source: Path, **options: Any) -> Pipeline:
    return Pipeline.from_pretrained(source, device="cpu", cache_dir=None, **options)


def drawn(pipe: Pipeline, prompt: str, **options: Any) -> np.ndarray:
    hooks = {name: options.pop(name) for name in ("callback", "cancel") if name in options}
    request = Request(prompt, **SMALL | options)
    return np.asarray(pipe.draw(request, **hooks).image).astype(int)


def levels_apart(a: Any, b: Any) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def link_all_but(source: Path, destination: Path, *left_out: str) -> Path:
    destination.mkdir()
    for entry in source.iterdir():
        if entry.name not in left_out:
            (destination / entry.name).symlink_to(entry)
    return destination
