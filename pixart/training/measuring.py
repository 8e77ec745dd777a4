"""What metrics of `pixart evaluate` say of a model while it trains: `validation.metrics`.

Pictures are drawn as previews are. The first process scores them; the networks of the metrics are let go
of afterwards, since training needs the memory.
"""

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pixart.distributed import rank
from pixart.evaluation.in_memory import Pictures, measure
from pixart.evaluation.metric import Metric, SetMetric
from pixart.evaluation.needs import MissingError
from pixart.evaluation.protocols.protocol import Use
from pixart.evaluation.running import opening as opening
from pixart.evaluation.running.opening import Given
from pixart.evaluation.running.results import distinct_names
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.pictures import open_rgb, picture_suffixes
from pixart.shapes.caption import describe
from pixart.shapes.scene import Scene, draw, sample_scene
from pixart.training.problems import problems_of
from pixart.training.stage import CONTROLNET, DRAWN, ResolvedStage, Stage

if TYPE_CHECKING:
    from PIL.Image import Image

SHIPPED = {"clip-model": "shapes-clip", "features": "shapes-clip"}  # for drawn pictures
LEAST_REFERENCES = 64  # drawn scenes that sets are compared with; they cost next to nothing


def open_metrics(stage: Stage, device: torch.device) -> list[Metric]:
    """The metrics of a stage's validation; nothing of them is loaded. ValueError for names that nobody
    knows, and for options that are none."""
    validation = stage.validation
    pairs = (one.partition("=") for one in validation.metric_options)
    given = Given(
        str(device),
        Path(validation.metric_weights) if validation.metric_weights else None,
        options={name: value for name, _, value in pairs},
    )
    usual = SHIPPED if stage.data.source == DRAWN else {}
    return opening.open_metrics([Use(name, usual) for name in validation.metrics], given)


def metric_problems(stage: Stage, device: torch.device) -> Iterator[str]:
    """Yield what is wrong with a stage's metrics, but for what they lack; see `check_metrics`."""
    validation = stage.validation
    if not validation.metrics:
        return
    named = f"validation.metrics ({', '.join(validation.metrics)})"
    is_drawn = stage.data.source == DRAWN
    if not stage.trains_transformer and not (stage.trains == CONTROLNET and is_drawn):
        where = f"trains is {stage.trains}"
        if stage.trains == CONTROLNET:
            where += " and data are prepared"
        yield f"validation.metrics must be empty where {where}, which draws nothing"
        return
    if not is_drawn and not validation.prompts:
        yield f"validation.prompts must be given for {named} to score, got none"
    metrics: list[Metric] = []
    yield from problems_of(lambda: metrics.extend(open_metrics(stage, device)))
    sets = [metric.name for metric in metrics if isinstance(metric, SetMetric)]
    folder = validation.metric_reference
    if is_drawn and folder:
        yield f"validation.metric_reference must be empty for drawn data, got {folder}"
    elif sets and not is_drawn:
        if not folder:
            yield f"validation.metric_reference must be a folder of pictures for {sets[0]}, got none"
        elif not Path(folder).is_dir() or not _pictures_in(Path(folder)):
            yield f"validation.metric_reference must be a folder of pictures, got {folder}"


def check_metrics(stage: Stage, device: torch.device) -> None:
    """MissingError with all that the metrics of a stage lack on this machine."""
    metrics = open_metrics(stage, device) if stage.validation.metrics else []
    needs = {str(need): need for metric in metrics for need in metric.needs()}
    if needs:
        wanting = [metric.name for metric in metrics if metric.needs()]
        raise MissingError(f"stage {stage.name}: {', '.join(wanting)}", needs.values())


class Measuring:
    """The metrics of a stage's validation, opened once."""

    def __init__(self, stage: ResolvedStage, device: torch.device) -> None:
        self.stage = stage
        self._metrics = open_metrics(stage, device) if stage.validation.metrics else []

    @property
    def captions(self) -> list[str]:
        """What is drawn for metrics where data are drawn: whole captions, or short ones where training has
        some, the same every time."""
        return [text for _, text in self.scenes]

    @property
    def scenes(self) -> list[tuple[Scene, str]]:
        """The same with the scenes that they are captions of."""
        if not self._metrics:
            return []
        return list(self._scenes("caption", self.stage.validation.metric_count))

    def _scenes(self, what: str, count: int) -> Iterator[tuple[Scene, str]]:
        kinds = dict(self.stage.data.scenes)
        omit = 1.0 if self.stage.data.short else 0.0
        for number in range(count):
            rng = random.Random(f"validation/{what}/{number}")
            scene = sample_scene(rng, rng.choices(list(kinds), list(kinds.values()))[0])
            yield scene, describe(scene, rng, omit=omit, apart=0.0)

    def __call__(self, prompts: Sequence[str], images: "Sequence[Image]") -> dict[str, float]:
        """The numbers and the ends of their intervals, as a log has them: "clip", "clip/low" and
        "clip/high". Nothing for pictures of which one is missing, and in all processes but the first."""
        if not self._metrics or rank() != 0 or len(images) < len(prompts):
            return {}
        pictures = _pictures(prompts, images)
        blocks = {}
        for metric in self._metrics:
            reference = self._reference if isinstance(metric, SetMetric) else None
            blocks[metric.name] = measure(metric, pictures, reference)
            _release(metric)
        values: dict[str, float] = {}
        for (of, name), called in distinct_names(blocks).items():
            found = blocks[of][name]
            values |= {
                called: found.value,
                f"{called}/low": found.low,
                f"{called}/high": found.high,
            }
        return values

    @cached_property
    def _reference(self) -> Pictures:
        """What sets are compared with; its features are kept."""
        if self.stage.data.source != DRAWN:
            files = _pictures_in(Path(self.stage.validation.metric_reference))
            return _pictures(
                [path.stem for path in files], [open_rgb(path, str(path)) for path in files]
            )
        from PIL import Image

        count = max(self.stage.validation.metric_count, LEAST_REFERENCES)
        scenes = list(self._scenes("reference", count))
        drawn = [Image.fromarray(draw(scene, self.stage.resolution)) for scene, _ in scenes]
        return _pictures([text for _, text in scenes], drawn)


def _pictures(prompts: Sequence[str], images: "Sequence[Image]") -> Pictures:
    entries = [
        Entry(Prompt(f"{number:05d}", prompt), 0, Path(f"{number:05d}.png"))
        for number, prompt in enumerate(prompts)
    ]
    return Pictures(entries, images)


def _pictures_in(folder: Path) -> list[Path]:
    suffixes = picture_suffixes()
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)


def _release(metric: Metric) -> None:
    metric.release()
    if (extractor := getattr(metric, "extractor", None)) is not None:
        extractor.release()
