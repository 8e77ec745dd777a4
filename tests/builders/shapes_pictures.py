"""Folders of scenes of the embedded world, each as its caption says."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from pixart.shapes.caption import describe
from pixart.shapes.scene import draw, sample_scene

SIDE = 64


def write_scenes(
    folder: Path, count: int, *, kinds: Sequence[str] = ("one", "pair"), side: int = SIDE
) -> Path:
    """Fill folder/images (ID/0000.png) and folder/prompts.jsonl; returns the folder."""
    rng = random.Random(0)
    lines = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        scene = sample_scene(rng, kind)
        caption = describe(scene, rng, omit=0.0)
        path = folder / "images" / f"{number:05d}" / "0000.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(draw(scene, side)).save(path)
        lines.append({"id": f"{number:05d}", "prompt": caption, "category": kind})
    write_lines(folder / "prompts.jsonl", lines)
    return folder


def write_lines(path: Path, lines: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
