"""The way to a picture of 4096 × 4096 pixels in seconds, rung by rung: what is drawn, what it computes, and how
long it takes from a prompt to pixels.

bench/reporting/ladder.py predicts the same rungs. Random weights: each takes as long as with trained ones.
"""

import time
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from bench.measure import timing
from bench.measure.case import Case, Context, failed, measured
from bench.measure.results import Row
from bench.workloads import models, pipelines, sizes
from bench.workloads.pictures import PROMPT, Stages
from bench.workloads.sizes import Compression
from pixart import cost
from pixart.few_step import FewStep
from pixart.pipeline.request import Request
from pixart.plans.plan import OF_ANY_MODEL
from pixart.plans.schedule import KVSchedule
from pixart.sampler.loop import Progress

SIZE = "4k"
STEPS, GUIDANCE = 20, 4.5  # by default
TEXT, DENOISING, DECODING, WHOLE = STAGES = ("T5", "denoising", "VAE", "whole")
PATIENCE = 300  # seconds that a picture may take without a word
_EVERYWHERE = Compression(everywhere=True)
_PLAN = OF_ANY_MODEL["balanced"]
# Taken for what a calibration may find; nobody has measured it with XL/2. Noise forgives merging.
ASSUMED_SCHEDULE = "0-{last}:4@1000-500"
FEW = FewStep("lcm", (999, 749, 499, 249))


class Rung(NamedTuple):
    """settings: of the request, beside its prompt and size. schedule: its KV schedule, as ASSUMED_SCHEDULE is."""

    name: str
    compression: Compression | None
    settings: dict[str, Any]
    schedule: str | None = None

    def request(self, size: str) -> Request:
        side, last = sizes.PIXELS[size], sizes.config(size).depth - 1
        text = None if self.schedule is None else self.schedule.format(last=last)
        return Request(PROMPT, height=side, width=side, kv_schedule=text, **self.settings)


_BY_DEFAULT: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE}
_PLANNED = _BY_DEFAULT | {"steps": _PLAN.steps, "guidance_interval": _PLAN.guidance_interval}
_FEW_STEPS: dict[str, Any] = {
    "timesteps": FEW.timesteps, "scheduler": FEW.scheduler, "guidance": FEW.guidance
}  # fmt: skip
RUNGS = (
    Rung(f"dense, {STEPS} steps", None, _BY_DEFAULT),
    Rung("merged 2 × 2 in half of the blocks", Compression(), _BY_DEFAULT),
    Rung("merged in all blocks", _EVERYWHERE, _BY_DEFAULT),
    Rung("and the plan `balanced`", _EVERYWHERE, _PLANNED),
    Rung("and merged 4 × 4 while noisy", _EVERYWHERE, _PLANNED, ASSUMED_SCHEDULE),
    Rung(f"merged in all blocks, {len(FEW.timesteps)} steps", _EVERYWHERE, _FEW_STEPS),
)


class Evaluation(NamedTuple):
    """halves: 2 where it is guided. ratios: what each block merges, as `PixArt.forward` takes it."""

    timestep: float
    halves: int
    ratios: tuple[int, ...]


def case(rung: Rung, size: str = SIZE) -> Case:
    return Case(rung.name, partial(_measure, rung, size), STAGES)


def cases(size: str = SIZE) -> list[Case]:
    """The shortest first: time may end before the last."""
    return [case(rung, size) for rung in reversed(RUNGS)]


def evaluations(rung: Rung, size: str) -> list[Evaluation]:
    """What the transformer is called for, in the order of a picture's steps."""
    from pixart.sampler.schedulers import make_scheduler
    from pixart.sampler.walk import Walk

    config, request = sizes.config(size, rung.compression), rung.request(size)
    text, (start, end) = request.kv_schedule, request.guidance_interval or (0.0, 1.0)
    schedule = KVSchedule() if text is None else KVSchedule.parse(text)
    is_guided = request.guidance is not None and request.guidance > 1
    found = []
    for one in Walk(make_scheduler(request.scheduler), request.schedule).evaluations:
        halves = 2 if is_guided and start <= one.share < end else 1
        timestep = float(one.timestep)
        found.append(Evaluation(timestep, halves, schedule.ratios(timestep, config)))
    return found


def flops(rung: Rung, size: str) -> int:
    """Of all evaluations, with a caption of full length whose keys and values were made before."""
    config, grid = sizes.config(size, rung.compression), sizes.grid(size)
    return sum(
        one.halves * cost.forward_flops(config, grid, encoded=True, kv_ratios=one.ratios)
        for one in evaluations(rung, size)
    )


def text_flops(size: str) -> int:
    """T5 on two captions of full length, the prompt and the empty one."""
    config = sizes.config(size)
    return 2 * pipelines.text_flops(config, config.model_max_length)


def decoder_flops(size: str) -> int:
    rows, cols = sizes.grid(size)
    patch = sizes.config(size).patch_size
    return pipelines.decoder_flops(sizes.config(size), (patch * rows, patch * cols))


def _measure(rung: Rung, size: str, context: Context) -> None:
    what: Row = {"what": f"picture, {rung.name}", "dtype": "bfloat16"}
    what |= {"shape": {"size": size, "batch": 1, "tokens": sizes.tokens(size)}}
    context.announce(WHOLE, PATIENCE)
    try:
        pipe = _pipeline(size, context.device)
        pipe.transformer = _transformer(size, rung.compression, context.device)
        request = rung.request(size)
        _draw(pipe, _hurried(request))  # loads libraries, compiles kernels
        runs = [_draw(pipe, request)]
        began = time.perf_counter()
        while time.perf_counter() - began + runs[0].seconds[WHOLE] < context.seconds:
            runs.append(_draw(pipe, request))
    except (torch.OutOfMemoryError, ImportError) as error:  # too small a GPU, or no diffusers
        for stage in STAGES:
            context.row(stage, failed(error).replace("failed", "not measured"), **what)
        return
    work = {DENOISING: flops(rung, size), DECODING: decoder_flops(size)}
    for stage in STAGES:
        result = timing.summarize([run.seconds[stage] for run in runs], "wall")
        peaks = [peak for run in runs if (peak := run.peaks.get(stage)) is not None]
        row = measured(context, result, work.get(stage, 0))
        context.row(stage, **what, **row, rung=rung.name, peak_bytes=max(peaks, default=None))


@cache
def _pipeline(size: str, device: torch.device) -> Any:
    """All of its parts stay on the device; the transformer is another one for each rung."""
    from pixart import Pipeline

    folder = pipelines.directory(sizes.TINY if size == sizes.TINY else "1k", device)
    pipe = Pipeline.from_pretrained(folder, device=device, dtype=torch.bfloat16, cache_dir=None)
    pipe.resident = True
    return pipe


def _transformer(size: str, compression: Compression | None, device: torch.device) -> Any:
    return models.build_ours(sizes.config(size, compression), device).to(torch.bfloat16).eval()


def _hurried(request: Request) -> Request:
    """With one step of each kind that the request has."""
    if request.timesteps is not None:
        return request
    start, end = request.guidance_interval or (0.0, 1.0)
    return replace(request, steps=2, guidance_interval=(start, min(end, 0.5)))


def _draw(pipe: Any, request: Request) -> Stages:
    """Each stage to its end on the device, captions encoded anew."""
    pipe.forget_prompts()
    stages = Stages(pipe.device)
    pipe.prepare([request.prompt, request.negative])
    stages.end(TEXT)

    def step(progress: Progress) -> None:
        if progress.step == progress.total:
            stages.end(DENOISING)

    pipe.draw(request, callback=step)
    stages.end(DECODING)
    stages.seconds[WHOLE] = sum(stages.seconds.values())
    return stages
