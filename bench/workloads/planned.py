"""Denoising a picture with XL/2 by the plans of any model: from the times of the evaluations that it is made of.

Random weights, which take as long as trained ones. Each kind of evaluation is timed in turn with the others, and
a round's picture is the sum of them as often as they come; solver, captions and VAE are left out, which are the
same for all but for the number of steps. Seconds are those of the process on the CPU, of all its threads, which
what else the machine does changes little.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from bench.measure import timing
from bench.measure.case import Case, Context, measured
from bench.measure.results import Row
from bench.workloads import models, sizes
from bench.workloads.models import OURS
from pixart import cost
from pixart.plans.plan import OF_ANY_MODEL
from pixart.plans.reuse import BlockReuse
from pixart.sampler.denoiser import PictureDenoiser, StepReuse
from pixart.sampler.guidance import Captions
from pixart.sampler.schedulers import STEPS, make_scheduler
from pixart.sampler.walk import Walk
from pixart.text.encoder import PromptEmbeddings

TOKENS = {"conditional": 40, "unconditional": 1}  # of a caption, and of none, at most
Kind = tuple[Captions, int]  # which captions, how many blocks


@dataclass(frozen=True)
class Way:
    """How a picture is drawn."""

    steps: int
    interval: tuple[float, float] = (0.0, 1.0)
    reuse: BlockReuse | None = None

    def evaluations(self, depth: int) -> Counter[Kind]:
        """How often each kind comes."""
        found: Counter[Kind] = Counter()
        blocks = None if self.reuse is None else self.reuse.counter(depth)
        for step, at in enumerate(Walk(make_scheduler(), self.steps).evaluations, 1):
            is_guided = self.interval[0] <= at.share < self.interval[1]
            captions: Captions = "both" if is_guided else "conditional"
            halves = ("conditional", "unconditional")[: 1 + is_guided]
            found[captions, depth if blocks is None else blocks(step, halves)] += 1
        return found


WAYS: dict[str, Way] = {
    OURS: Way(STEPS),
    **{
        f"{OURS}, {name}": Way(plan.steps, plan.guidance_interval)
        for name, plan in OF_ANY_MODEL.items()
    },
    f"{OURS}, blocks reused every 2nd step": Way(STEPS, reuse=BlockReuse.parse("1:3-19/2")),
}


def case(size: str, dtype: torch.dtype) -> Case:
    name = str(dtype).removeprefix("torch.")
    return Case(f"picture/{size}/{name}", partial(_measure, size, dtype), tuple(WAYS))


def _measure(size: str, dtype: torch.dtype, context: Context) -> None:
    config = sizes.config(size)
    ways = context.choose(WAYS)
    counts = {name: way.evaluations(config.depth) for name, way in ways.items()}
    kinds = sorted(set().union(*counts.values()))
    calls = _calls(size, dtype, context, kinds)
    rounds = [_round(calls) for _ in range(1 + (context.least_rounds or 3))][1:]
    for name, found in counts.items():
        row: Row = {
            "what": "denoising a picture", "dtype": str(dtype).removeprefix("torch."),
            "shape": {"size": size, "batch": 1, "tokens": sizes.tokens(size)},
        }  # fmt: skip
        spent, waited = (
            timing.summarize([_sum(found, one, place) for one in rounds], method)
            for place, method in enumerate(("CPU", "wall"))
        )
        flops = sum(count * _flops(size, kind) for kind, count in found.items())
        facts: Row = {"steps": ways[name].steps, "evaluations": _halves(found)}
        facts |= {"seconds_of_wall": waited.summary()}
        context.row(name, **row, **measured(context, spent, flops, dtype=dtype), **facts)


def _round(calls: Mapping[Kind, timing.Call]) -> dict[Kind, tuple[float, float]]:
    """CPU and wall seconds of each kind."""
    found = {}
    for kind, call in calls.items():
        spent, waited = time.process_time(), time.perf_counter()
        call()
        found[kind] = time.process_time() - spent, time.perf_counter() - waited
    return found


def _sum(counts: Counter[Kind], times: Mapping[Kind, tuple[float, float]], place: int) -> float:
    return sum(count * times[kind][place] for kind, count in counts.items())


@torch.no_grad()
def _calls(
    size: str, dtype: torch.dtype, context: Context, kinds: list[Kind]
) -> Mapping[Kind, timing.Call]:
    device, depth = context.device, sizes.config(size).depth
    model = models.build_ours(sizes.config(size), device).to(dtype).eval()
    features = models.random_caption(size, device, dtype)
    prompts: dict[Captions, PromptEmbeddings] = {}
    for name, count in TOKENS.items():
        own = features[:, :count]
        kept = torch.ones(own.shape[:2], dtype=torch.bool)
        prompts[name] = PromptEmbeddings(own, kept)  # type: ignore[index]
    halves = [prompts["unconditional"], prompts["conditional"]]
    prompts["both"] = PromptEmbeddings.concatenate(halves)
    side = sizes.PIXELS[size]
    plain = PictureDenoiser(model, prompts, side, side, device)
    latents = models.random_latents(size, device)

    def call(kind: Kind) -> timing.Call:
        captions, blocks = kind
        given = latents.repeat(2 if captions == "both" else 1, 1, 1, 1)
        timesteps = torch.full((len(given),), 500.0, device=device)
        denoise = plain
        if blocks < depth:
            reuse = StepReuse(blocks, frozenset({500.0}))
            denoise = PictureDenoiser(model, prompts, side, side, device, reuse=reuse)
            torch.no_grad()(denoise)(given, timesteps + 1, captions)  # what it reuses
        return torch.no_grad()(lambda: denoise(given, timesteps, captions))

    return {kind: call(kind) for kind in kinds}


def _flops(size: str, kind: Kind) -> int:
    captions, blocks = kind
    names = TOKENS if captions == "both" else ("conditional",)
    config, grid = sizes.config(size), sizes.grid(size)
    return sum(
        cost.forward_flops(config, grid, TOKENS[name], encoded=True, blocks=blocks)
        for name in names
    )


def _halves(counts: Counter[Kind]) -> int:
    return sum(count * (2 if captions == "both" else 1) for (captions, _), count in counts.items())
