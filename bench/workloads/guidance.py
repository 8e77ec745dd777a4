"""What guidance costs: a denoising step of the embedded model, guided in each way that there is.

All draw the same picture of the same noise, by the pipeline's own sampler; a step's time is that of all
steps over their number, so that the interval, which guides half of them, has its share too.
"""

import time
from functools import partial
from typing import Any

from bench.measure import timing
from bench.measure.case import Case, Context, measured
from bench.measure.results import Row
from bench.workloads.models import OURS
from pixart import cost
from pixart.config import EMBEDDED
from pixart.pipeline.request import Request

PROMPT = "a small orange cross in the bottom right corner on black"
STEPS, SCALE, LEAST_ROUNDS = 8, 4.5, 3
# By variant: how many evaluations a step takes, and the settings. "ours" is classifier-free guidance alone.
WAYS: dict[str, tuple[float, dict[str, Any]]] = {
    OURS: (2, {}),
    f"{OURS}, in two calls": (2, {"batched": False}),
    f"{OURS}, without guidance": (1, {"guidance": 1.0}),
    f"{OURS}, interval 0 0.5": (1.5, {"guidance_interval": (0.0, 0.5)}),
    f"{OURS}, rescale": (2, {"guidance_rescale": 0.7}),
    f"{OURS}, APG": (2, {"apg": True}),
    f"{OURS}, PAG": (3, {"pag": 3.0}),
    f"{OURS}, PAG alone": (2, {"pag": 3.0, "guidance": 1.0}),
}


def case(size: str) -> Case:
    """size: side of the picture in pixels."""
    return Case(f"guidance/{size}", partial(_measure, int(size)), tuple(WAYS))


def request(way: str, side: int, steps: int = STEPS) -> Request:
    """What is drawn to time a way."""
    like: dict[str, Any] = {"guidance": SCALE, "guidance_interval": (0.0, 1.0), "batched": True}
    like |= {"height": side, "width": side, "steps": steps}
    return Request(PROMPT, **{**like, **WAYS[way][1]})


def _measure(side: int, context: Context) -> None:
    from pixart import Pipeline

    pipe = Pipeline.from_pretrained(EMBEDDED, device=context.device, cache_dir=None)
    requests = {name: request(name, side) for name in context.choose(WAYS)}
    samples: dict[str, list[float]] = {name: [] for name in requests}
    began = rounds = 0.0
    while rounds <= LEAST_ROUNDS or time.perf_counter() - began < context.seconds:
        for name, asked in requests.items():  # in turn: what else the machine does meets all
            context.announce(name)
            samples[name].append(pipe.draw(asked).seconds["denoise"] / STEPS)
        rounds += 1
        began = began or time.perf_counter()  # the first round warms up
    for name, found in samples.items():
        evaluations, settings = WAYS[name]
        result = timing.summarize(found[1:], "wall")
        flops = round(evaluations * _flops(pipe, side))
        row = measured(context, result, flops, dtype=pipe.transformer.dtype)
        context.row(
            name, **_describe(pipe, side), **row, evaluations=evaluations, settings=settings
        )


def _flops(pipe: Any, side: int) -> int:
    """Of one evaluation with the prompt."""
    grid = side // pipe.multiple, side // pipe.multiple
    tokens, _ = pipe.caption_tokens(PROMPT)
    return cost.forward_flops(pipe.opened.config, grid, tokens, encoded=True)


def _describe(pipe: Any, side: int) -> Row:
    return {
        "what": "guided step",
        "shape": {"size": str(side), "batch": 1, "tokens": (side // pipe.multiple) ** 2},
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "weights": "trained",
    }
