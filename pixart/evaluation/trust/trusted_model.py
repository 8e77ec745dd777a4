"""Whether a metric ranks a model's pictures as the exact checker does: from one step to many, and from no
guidance to far too much."""

import random
from pathlib import Path
from typing import Any

import torch

from pixart.evaluation.in_memory import Pictures, scores_of
from pixart.evaluation.metric import PictureMetric
from pixart.evaluation.metrics.shapes import check_caption
from pixart.evaluation.statistics.intervals import spearman
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.evaluation.trust.wrong_facts import KINDS, SIDE, pairs
from pixart.files import written_aside
from pixart.pictures import open_rgb
from pixart.progress import counted

STEPS = (1, 2, 3, 5, 10, 20)
GUIDANCE = (1.0, 2.0, 4.0, 8.0)
FOLDER = "model"


def ranked(
    output: Path, metric: PictureMetric, model: str, count: int, device: torch.device
) -> dict[str, Any]:
    """Spearman's correlation, over pictures, of the metric with the share of a caption's statements that
    hold. Pictures that are there are not drawn again."""
    import numpy as np

    pictures = _drawn(output / FOLDER, model, count, device)
    shares = []
    for entry, image in zip(pictures.entries, pictures.images, strict=True):
        checked = check_caption(np.asarray(image), entry.prompt.prompt)
        shares.append(sum(checked.holds) / len(checked.holds))
    sign = 1 if metric.higher_is_better else -1
    values = [sign * one.value for one in scores_of(metric, pictures)]
    found = spearman(values, shares)
    return {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "method": found.method,
        "notes": list(found.notes),
        "steps": list(STEPS),
        "guidance": list(GUIDANCE),
    }


def _drawn(folder: Path, model: str, count: int, device: torch.device) -> Pictures:
    """Pictures of captions of all kinds, each at steps and guidance of its own."""
    from pixart.pipeline.request import Request
    from pixart.pipeline.text_to_image import Pipeline

    made = [one for kind in KINDS for one in pairs(kind, -(-count // len(KINDS)))]
    wanted = {}
    for number, pair in enumerate(random.Random("model").sample(made, count)):
        rng = random.Random(f"model/{number}")
        wanted[folder / f"{number:05d}.png"] = Request(
            pair.caption,
            seed=number,
            height=SIDE,
            width=SIDE,
            steps=rng.choice(STEPS),
            guidance=rng.choice(GUIDANCE),
        )
    if missing := {path: one for path, one in wanted.items() if not path.is_file()}:
        pipe = Pipeline.from_pretrained(model, device=device, cache_dir=None)
        drawn = pipe.draw_many(list(missing.values()))
        for path, one in zip(missing, counted(drawn, "drawing", len(missing)), strict=True):
            with written_aside(path, durable=False) as aside:
                one.image.save(aside, format="PNG")
    entries = [
        Entry(Prompt(path.stem, request.prompt, "trust"), 0, path)
        for path, request in wanted.items()
    ]
    return Pictures(entries, [open_rgb(path, str(path)) for path in wanted])
