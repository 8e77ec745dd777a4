"""From a prompt to a PNG file, stage by stage: with the embedded model, and on a GPU at the published
sizes as well; and what starting costs."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import suite
from bench.measure import memory, timing
from bench.measure.machine import ROOT
from bench.measure.worker import Case, Context
from bench.workloads import pipelines
from bench.workloads import sizes as shapes
from bench.workloads.comparisons import failed, measured
from pixart import Pipeline
from pixart.config import EMBEDDED
from pixart.generation.pictures import write_picture
from pixart.pipeline.metadata import MODEL_OPTIONS, Metadata
from pixart.pipeline.request import Drawn, Request
from pixart.sampler.loop import Progress
from pixart.sampler.schedulers import default_steps, make_scheduler

PROMPT = "a small orange cross in the bottom right corner on black"
STAGES = ("open", "text encoder", "load", "denoiser", "VAE", "write", "whole")
LEAST_PICTURES = 3
# By device: the embedded model, then random weights at native sizes, merged at 4K as published.
MODELS = {"cpu": (EMBEDDED,), "cuda": (EMBEDDED, "1k", "4k")}
MERGED = ("4k",)
# What a fresh process does, and a word of what it must say.
STARTS = {
    "python": (("-c", "print('ready')"), "ready"),
    "import pixart": (("-c", "import pixart; print(pixart.__name__)"), "pixart"),
    "generate --help": (("-m", "pixart.generate", "--help"), "--guidance"),
}
Report = Callable[[suite.Row], None]


class Stages:
    """Seconds and peak bytes of the stages of one picture; each ends where the next one begins. Their
    FLOPs where it is drawn in `counter`, which takes time and does not know our operators."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counter = FlopCounterMode(display=False)
        self.seconds: dict[str, float] = {}
        self.flops: dict[str, int] = {}
        self.peaks: dict[str, int | None] = {}
        self._begin_next()

    def end(self, stage: str) -> None:
        timing.synchronize(self.device)
        self.seconds[stage] = time.perf_counter() - self.began
        self.peaks[stage] = self.meter.peak()
        self.flops[stage] = self.counter.get_total_flops() - sum(self.flops.values())
        self._begin_next()

    def _begin_next(self) -> None:
        self.meter = memory.Meter(self.device)
        self.began = time.perf_counter()


def _draw(stages: Stages, source: str | Path, path: Path) -> tuple[Pipeline, Drawn]:
    pipe = Pipeline.from_pretrained(source, device=stages.device, cache_dir=None)
    stages.end("open")
    pipe.prepare([PROMPT, ""])
    stages.end("text encoder")
    pipe.transformer.eval()
    stages.end("load")

    def step(progress: Progress) -> None:
        if progress.step == progress.total:
            stages.end("denoiser")

    drawn = pipe.draw(Request(PROMPT), callback=step)
    stages.end("VAE")
    opened = dict.fromkeys(MODEL_OPTIONS) | {"model": pipe.source}
    write_picture(drawn.image, path, Metadata.of(drawn, pipe, Request(PROMPT), opened))
    stages.end("write")
    stages.seconds["whole"] = sum(stages.seconds.values())
    with Image.open(path) as written:
        assert written.tobytes() == drawn.image.tobytes()
    return pipe, drawn


@contextmanager
def _opened(model: str, device: torch.device) -> Iterator[str | Path]:
    """What from_pretrained opens: the embedded model, or a pipeline of that resolution, written here."""
    if model == EMBEDDED:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        merge = shapes.PUBLISHED if model in MERGED else None
        pipelines.write(Path(folder), model, merge, device)
        yield Path(folder)


def _draw_often(model: str, context: Context) -> None:
    try:
        with _opened(model, context.device) as source:
            _time_stages(model, source, context)
    except torch.OutOfMemoryError as error:  # smaller GPUs than these sizes are meant for
        for stage in STAGES:
            context.row(variant=stage, agrees=None, status=failed(error))


def _time_stages(model: str, source: str | Path, context: Context) -> None:
    began = time.perf_counter()
    runs: list[Stages] = []
    # A CPU's other attention is not known to the counter; a GPU's is, and this one's scores at 4K
    # would fit into no memory.
    known = sdpa_kernel(SDPBackend.MATH) if context.device.type == "cpu" else nullcontext()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        counted = Stages(context.device)
        with counted.counter, known:
            pipe, drawn = _draw(counted, source, path)  # untimed: the first one loads libraries
        what = _describe(model, pipe, drawn)
        work = {"text encoder": (counted.flops["text encoder"], 0), "denoiser": (_flops(pipe), 0)}
        if not drawn.request.tile:  # tiles overlap: what they compute twice is no useful work
            work["VAE"] = (counted.flops["VAE"], 0)
        dtype = pipe.transformer.dtype
        del pipe  # the next ones are alone in the memory
        while len(runs) < LEAST_PICTURES or time.perf_counter() - began < context.seconds:
            runs.append(Stages(context.device))
            _draw(runs[-1], source, path)
        work["write"] = (0, path.stat().st_size)
    for stage in STAGES:
        samples = [run.seconds[stage] for run in runs]
        peaks = [peak for run in runs if (peak := run.peaks.get(stage)) is not None]
        row: dict[str, Any] = {"variant": stage, "agrees": True, **what}
        row |= {"peak_bytes": max(peaks, default=None)}
        result = timing.summarize(samples, "wall")
        context.row(**row, **measured(result, context, *work.get(stage, (0, 0)), dtype))


def _describe(model: str, pipe: Pipeline, drawn: Drawn) -> dict[str, Any]:
    """What is drawn, and how the pipeline chose to: by the memory that was free."""
    merge = pipe.opened.config.kv_compression
    return {
        "weights": "trained" if model == EMBEDDED else "random",
        "kv_compression": None if merge is None else asdict(merge),
        "dtype": str(pipe.transformer.dtype),
        "resolution": str(pipe.native),
        "prompt": PROMPT,
        "height": pipe.native,
        "width": pipe.native,
        "batched": drawn.request.batched,
        "tile": drawn.request.tile,
    }


def _flops(pipe: Pipeline) -> int:
    """Of all steps; guidance takes two samples a step, each with the tokens of its own caption."""
    config = pipe.opened.config
    sizes = shapes.Model(config.hidden_size, config.num_heads, config.depth)
    merge = config.kv_compression
    side = pipe.native // pipe.multiple
    keys = (-(-side // merge.ratio)) ** 2 if merge else 0
    layers = len(merge.layers) if merge else 0
    texts = (int(one.mask.sum()) for one in pipe._captions.pair(PROMPT, ""))
    once = sum(
        shapes.forward_flops(sizes._replace(text_tokens=text), side**2, keys, layers)
        for text in texts
    )
    return default_steps(make_scheduler(None, pipe.scheduler_config)) * once


def _start(arguments: tuple[str, ...], word: str) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    assert word in done.stdout


def _start_often(context: Context) -> None:
    calls = {name: [partial(_start, *start)] for name, start in context.choose(STARTS).items()}
    results: Mapping[str, Any] = timing.measure(calls, torch.device("cpu"), seconds=context.seconds)
    for name, result in results.items():
        row = {"variant": name, "agrees": True, "command": ["python", *STARTS[name][0]]}
        context.row(**row, **measured(result, context, 0, 0))


def _pictures(model: str) -> list[Case]:
    name = "picture" if model == EMBEDDED else f"picture/{model}"
    return [Case(name, partial(_draw_often, model), STAGES)]


@suite.at_each(MODELS[suite.device().type], _pictures)
def bench_picture(rows: dict[str, suite.Row], variant: str, report: Report) -> None:
    report(rows[variant])


@suite.at_each(("once",), lambda size: [Case("startup", _start_often, tuple(STARTS))])
def bench_startup(rows: dict[str, suite.Row], variant: str, report: Report) -> None:
    report(rows[variant])
