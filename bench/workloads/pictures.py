"""From a prompt to a PNG file, stage by stage; and what starting a process costs."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import memory, timing
from bench.measure.case import Case, Context, failed, measured
from bench.measure.machine import ROOT
from bench.measure.results import Row
from bench.workloads import pipelines, sizes
from pixart import cost
from pixart.config import EMBEDDED
from pixart.pictures import open_picture

PROMPT = "a small orange cross in the bottom right corner on black"
STAGES = ("open", "text encoder", "load", "denoiser", "VAE", "write", "whole")
LEAST_PICTURES = 3
# By device: the embedded model, then random weights at native sizes, merged at 4K as published.
MODELS = {"cpu": ("embedded",), "cuda": ("embedded", "1k", "4k")}
MERGED = ("4k",)
# What a fresh process does, and a word of what it must say.
STARTS = {
    "python": (("-c", "print('ready')"), "ready"),
    "import pixart": (("-c", "import pixart; print(pixart.__name__)"), "pixart"),
    "generate --help": (("-m", "pixart.generate", "--help"), "--guidance"),
}


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


def picture(model: str) -> Case:
    return Case(model, partial(_draw_often, model), STAGES)


def start() -> Case:
    return Case("processes", _start_often, tuple(STARTS))


def _draw(stages: Stages, source: str | Path, path: Path) -> tuple[Any, Any]:
    """A pipeline, and what it drew."""
    from pixart import Pipeline
    from pixart.pipeline.metadata import MODEL_OPTIONS, Metadata
    from pixart.pipeline.pictures import write_picture
    from pixart.pipeline.request import Request
    from pixart.sampler.loop import Progress

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
    opened: dict[str, Any] = dict.fromkeys(MODEL_OPTIONS) | {"model": pipe.source}
    opened |= {"lora": [], "control": [], "preprocessor_weights": []}
    write_picture(drawn.image, path, Metadata.of(drawn, pipe, Request(PROMPT), opened))
    stages.end("write")
    stages.seconds["whole"] = sum(stages.seconds.values())
    assert open_picture(path, str(path)).tobytes() == drawn.image.tobytes()
    return pipe, drawn


@contextmanager
def _opened(model: str, device: torch.device) -> Iterator[str | Path]:
    """What from_pretrained opens: the embedded model, or a pipeline of that size, written here."""
    if model == "embedded":
        yield EMBEDDED
        return
    if model not in MERGED:
        yield pipelines.directory(model, device)
        return
    with tempfile.TemporaryDirectory() as folder:
        pipelines.write(Path(folder), model, sizes.Compression(), device)
        yield Path(folder)


def _draw_often(model: str, context: Context) -> None:
    what: Row = {"what": "picture", "shape": {"size": model, "batch": 1}, "dtype": None}
    try:
        with _opened(model, context.device) as source:
            _time_stages(source, context)
    except (torch.OutOfMemoryError, ImportError) as error:  # too small a GPU, or no diffusers
        for stage in STAGES:
            context.row(stage, failed(error).replace("failed", "not measured"), **what)


def _time_stages(source: str | Path, context: Context) -> None:
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
        what = _describe(source, pipe, drawn)
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
        result = timing.summarize([run.seconds[stage] for run in runs], "wall")
        row = measured(context, result, *work.get(stage, (0, 0)), dtype)
        peaks = [peak for run in runs if (peak := run.peaks.get(stage)) is not None]
        context.row(stage, **what, **row, peak_bytes=max(peaks, default=None))


def _describe(source: str | Path, pipe: Any, drawn: Any) -> Row:
    """What is drawn, and how the pipeline chose to: by the memory that was free."""
    merge, side = pipe.opened.config.kv_compression, pipe.native
    return {
        "what": "picture",
        "shape": {"size": str(side), "batch": 1, "height": side, "width": side},
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "weights": "trained" if source == EMBEDDED else "random",
        "kv_compression": None if merge is None else asdict(merge),
        "prompt": PROMPT,
        "batched": drawn.request.batched,
        "tile": drawn.request.tile,
    }


def _flops(pipe: Any) -> int:
    """Of all steps; guidance takes two samples a step, each with the tokens of its own caption."""
    from pixart.pipeline.request import Request

    side = pipe.native // pipe.multiple
    once = sum(
        cost.forward_flops(pipe.opened.config, (side, side), tokens, encoded=True)
        for tokens in pipe.caption_tokens(PROMPT)
    )
    return pipe.resolve(Request(PROMPT)).steps * once


def _run_start(arguments: tuple[str, ...], word: str) -> None:
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
    calls = {name: [partial(_run_start, *one)] for name, one in context.choose(STARTS).items()}
    times = timing.measure(calls, torch.device("cpu"), seconds=context.seconds)
    for name, result in times.items():
        what: Row = {"what": "start of a process", "shape": {}, "dtype": None}
        command = ["python", *STARTS[name][0]]
        context.row(name, **what, command=command, **measured(context, result))
