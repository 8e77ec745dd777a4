"""How it is drawn: by the teacher, by models that were distilled, and by the teacher with their samplers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.studies.few_steps.cases import SIDE, requests
from pixart.calibration.studio import Scene, Settings, Studio
from pixart.checkpoint.names import CONFIG
from pixart.few_step import FewStep, spelt
from pixart.lora.files import CONFIG as ADAPTER
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.publishing.source import find_source
from pixart.sampler.walk import Walk
from pixart.training.distillation import even_timesteps

TEACHER, UNDISTILLED, DISTILLED = PARTS = ("teacher", "undistilled", "distilled")
STEPS = (1, 2, 4)  # that the samplers make without distillation
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Way:
    """A row. name: unique. settings: of requests, which take the rest from the pipeline. control: the name of
    the row of the same sampler without distillation."""

    part: str
    name: str
    pipe: Pipeline
    settings: Mapping[str, Any]
    control: str | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What its pictures depend on, beside captions and seeds, and what they cost: evaluations of the
        transformer, and its FLOPs for the first picture (captions differ by a token or two)."""
        [first] = requests("one", [0])
        resolved = self.pipe.resolve(_with(first, self.settings))
        settings, studio = Settings.of(resolved), Studio(self.pipe, SIDE, SIDE)
        evaluations = studio.walk(settings).evaluations
        start, end = settings.interval
        guided = sum(settings.guidance > 1 and start <= one.share < end for one in evaluations)
        return {
            "part": self.part,
            "control": self.control,
            "settings": {
                "scheduler": settings.scheduler,
                "timesteps": [round(float(one.timestep)) for one in evaluations],
                "guidance": settings.guidance,
            },
            "weights": self.pipe.weights,
            "evaluations": len(evaluations) + guided,
            "flops": studio.cost(settings, Scene(resolved.prompt, resolved.seed)),
        }

    def requests(self, kind: str, numbers: Sequence[int]) -> Iterator[Request]:
        """Of these cases, as this way draws them."""
        return (_with(one, self.settings) for one in requests(kind, numbers))


def of_teacher(pipe: Pipeline) -> list[Way]:
    """The pipeline's own settings, and the same without guidance."""
    steps = f"{pipe.resolve(requests('one', [0])[0]).steps} steps"
    return [
        Way(TEACHER, steps, pipe, {}),
        Way(TEACHER, f"{steps}, guidance 1", pipe, {"guidance": 1.0}),
    ]


def undistilled(pipe: Pipeline, counts: Sequence[int] = STEPS) -> list[Way]:
    """The samplers of distilled models, and DPM-Solver++, which needs no distillation, all without guidance."""
    found = [_control(pipe, FewStep("ddim", even_timesteps(count))) for count in counts]
    for count in counts:
        settings = {"scheduler": "dpm-solver++", "steps": count, "guidance": 1.0}
        found.append(Way(UNDISTILLED, f"dpm-solver++, {_steps(count)}", pipe, settings))
    return [*found, *(_control(pipe, _lcm(pipe, count)) for count in counts)]


def distilled(
    name: str, place: str, teacher: Pipeline, model: str, also: Sequence[int] = ()
) -> list[Way]:
    """A model as it says that it is drawn, and in other numbers of steps; each before its control.

    place: a run, a stage or a state of training, a pipeline, or, for the pipeline `model`, a transformer or the
    folder of a LoRA.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"--distilled must have a name of letters, digits, . and -, got {name!r}")
    pipe = _opened(place, model)
    own = pipe.few_step
    if own is None:
        raise ValueError(
            f"--distilled must be of models that say what they were distilled for (few_step), got {place}"
        )
    wanted = {own.timesteps: own}
    for count in also:
        other = _other(teacher, own, count)
        wanted.setdefault(other.timesteps, other)
    found = []
    for one in wanted.values():
        control = _control(teacher, one)
        found.append(Way(DISTILLED, f"{name}: {one_line(one)}", pipe, _settings(one), control.name))
        found.append(control)
    return found


def one_line(few_step: FewStep) -> str:
    """As rows name it."""
    guided = "" if few_step.guidance == 1 else f", guidance {few_step.guidance:g}"
    return f"{few_step.scheduler} at {spelt(few_step.timesteps)}{guided}"


def _control(pipe: Pipeline, few_step: FewStep) -> Way:
    return Way(UNDISTILLED, one_line(few_step), pipe, _settings(few_step))


def _settings(few_step: FewStep) -> dict[str, Any]:
    return {
        "scheduler": few_step.scheduler,
        "timesteps": few_step.timesteps,
        "guidance": few_step.guidance,
    }


def _other(pipe: Pipeline, own: FewStep, count: int) -> FewStep:
    if own.scheduler == "lcm":
        return _lcm(pipe, count)
    learned = [one for one in own.walks if len(one) == count]
    timesteps = learned[0] if learned else even_timesteps(count)
    return FewStep(own.scheduler, timesteps, own.guidance)


def _lcm(pipe: Pipeline, count: int) -> FewStep:
    walk = Walk(pipe.solver("lcm"), count)
    return FewStep("lcm", tuple(int(one.timestep) for one in walk.evaluations))


def _opened(place: str, model: str) -> Pipeline:
    path = Path(place)
    options: dict[str, Any] = {"device": "cpu", "cache_dir": None}
    if (path / ADAPTER).is_file():
        return Pipeline.from_pretrained(model, lora=[(place, 1.0)], **options)
    if path.is_file() or (path / CONFIG).is_file():
        return Pipeline.from_pretrained(model, transformer=place, **options)
    return Pipeline.from_pretrained(find_source(place).pipeline, **options)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _with(request: Request, settings: Mapping[str, Any]) -> Request:
    return replace(request, **settings)
