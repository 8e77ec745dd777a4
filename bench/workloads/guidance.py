"""What guidance costs: a denoising step of the embedded model, guided in each way that there is.

All draw the same picture of the same noise, by the pipeline's own sampler; a step's time is that of all
steps over their number, so that the interval, which guides half of them, has its share too.
"""

import time
from typing import Any

from bench.measure import timing
from bench.measure.case import Case, Context, measured
from bench.measure.results import Row
from bench.workloads.models import OURS
from pixart import cost
from pixart.config import EMBEDDED

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


def case() -> Case:
    return Case("guidance", _measure, tuple(WAYS))


def _measure(context: Context) -> None:
    from pixart import Pipeline
    from pixart.pipeline.request import Request

    pipe = Pipeline.from_pretrained(EMBEDDED, device=context.device, cache_dir=None)
    like = {"steps": STEPS, "guidance": SCALE, "guidance_interval": (0.0, 1.0), "batched": True}
    requests = {
        name: Request(PROMPT, **{**like, **settings})
        for name, (_, settings) in context.choose(WAYS).items()
    }
    samples: dict[str, list[float]] = {name: [] for name in requests}
    began = rounds = 0.0
    while rounds <= LEAST_ROUNDS or time.perf_counter() - began < context.seconds:
        for name, request in requests.items():  # in turn: what else the machine does meets all
            context.announce(name)
            samples[name].append(pipe.draw(request).seconds["denoise"] / STEPS)
        rounds += 1
        began = began or time.perf_counter()  # the first round warms up
    for name, found in samples.items():
        evaluations, settings = WAYS[name]
        result = timing.summarize(found[1:], "wall")
        flops = round(evaluations * _flops(pipe))
        row = measured(context, result, flops, dtype=pipe.transformer.dtype)
        context.row(name, **_describe(pipe), **row, evaluations=evaluations, settings=settings)


def _flops(pipe: Any) -> int:
    """Of one evaluation with the prompt."""
    side = pipe.native // pipe.multiple
    tokens, _ = pipe.caption_tokens(PROMPT)
    return cost.forward_flops(pipe.opened.config, (side, side), tokens, encoded=True)


def _describe(pipe: Any) -> Row:
    side = pipe.native
    return {
        "what": "guided step",
        "shape": {"size": str(side), "batch": 1, "tokens": (side // pipe.multiple) ** 2},
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "weights": "trained",
    }
