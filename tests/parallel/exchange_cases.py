"""Run by test_exchange.py: models whose tokens are shared among 2, 3 and 4 processes, against themselves
alone. Prints a line of JSON for each case."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from forked import among
from small_model import build, inputs, mask_of, relative_error, sizes
from torch import Tensor, nn

from pixart.config import KVCompression
from pixart.distributed import rank, world_size
from pixart.model import exchange
from pixart.model.control import Control
from pixart.model.exchange import TokenExchange
from pixart.model.transformer import PixArt

SQUARE, ODD = (32, 32), (26, 14)  # latents; of 16 × 16 and 13 × 7 tokens
HEADS = {"num_heads": 12, "depth": 3}  # which 2, 3 and 4 divide


def compressed(
    ratio: int, layers: tuple[int, ...] = (0, 1, 2), how: str = "conv"
) -> dict[str, Any]:
    return {"kv_compression": KVCompression(layers, ratio, how)}


MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense of 2 heads": {"num_heads": 2},
    "R2": compressed(2),
    "R3": compressed(3),
    "R4": compressed(4),
    "mixed": compressed(2, (1,)),
    "average": compressed(2, how="average"),
    "uniform": compressed(2, how="uniform"),
    "every fourth": compressed(4, how="uniform_every"),
    "normed": {"qk_norm": True, **compressed(2, (0,))},
}


def cases() -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    for name, changes in MODELS.items():
        for size, batch in ((SQUARE, 1), (ODD, 2)):
            case = f"{name}, {size[0]}x{size[1]}, batch {batch}"
            yield (
                case,
                partial(lambda *how: drawn(model_of(how[0]), *how[1:]), changes, size, batch),
            )
    mixed = MODELS["mixed"]
    sized = model_of({"micro_condition": True})
    yield "sizes", lambda: drawn(sized, ODD, 2, **sizes())
    mask = mask_of([[0, 1, 4], [1, 3, 4, 9]])
    yield "masked", lambda: drawn(model_of(mixed), ODD, 2, caption_mask=mask)
    yield "perturbed", lambda: drawn(model_of(mixed), ODD, 1, perturbed=(1,))
    for ratios in ((2, 4, 1), (4, 2, 2)):
        again = partial(drawn, model_of(mixed), kv_ratios=ratios)
        yield f"merged {ratios}", partial(again, ODD, 2)
        yield f"merged {ratios}, square", partial(again, SQUARE, 1)
    yield "int8", lambda: in_eight_bits(model_of(mixed))
    yield "bf16", lambda: drawn(model_of(mixed).bfloat16(), ODD, 2)
    yield "controlled", lambda: controlled(model_of(mixed))
    for name in ("dense", "dense of 2 heads", "R2", "mixed"):
        yield f"trained {name}", partial(lambda n: trained(model_of(MODELS[n])), name)
    yield "trained in checkpoints", lambda: trained(model_of(mixed), checkpoints=1)
    yield "broken gather", lambda: broken("_gathered", model_of(MODELS["R4"]))
    yield "broken swap", lambda: broken("_swapped", model_of({}))


def model_of(changes: dict[str, Any]) -> PixArt:
    return build(**({**HEADS, "class_dropout_prob": 0.0} | changes))


@torch.no_grad()
def drawn(model: PixArt, size: tuple[int, int], batch: int, **settings: Any) -> dict[str, float]:
    given = [x.to(model.dtype) if x.dim() == 3 else x for x in inputs(batch, *size)]
    alone = model(*given, **settings)
    shared = model(*given, **settings, exchange=TokenExchange())
    return {"error": relative_error(shared, alone)}


def in_eight_bits(model: PixArt) -> dict[str, float]:
    model.set_attention("int8")
    return drawn(model, SQUARE, 1)


def controlled(model: PixArt) -> dict[str, float]:
    network = model.new_control(2)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    hint = torch.randn(1, 4, *ODD, generator=generator)
    return drawn(model, ODD, 2, controls=(Control(network, hint, 0.7),))


def trained(model: PixArt, checkpoints: int = 0) -> dict[str, float]:
    """Losses, and the gradients of all weights and of the captions."""
    found: list[list[Tensor]] = []
    model.train()
    model.gradient_checkpointing = checkpoints
    for shared in (None, TokenExchange()):
        latents, timesteps, caption = inputs(2, *ODD)
        caption.requires_grad_()
        model.zero_grad()
        loss = model(latents, timesteps, caption, exchange=shared).square().mean()
        loss.backward()
        gradients = [x.grad for x in (caption, *model.parameters()) if x.grad is not None]
        if shared is not None:
            for gradient in gradients:
                torch.distributed.all_reduce(gradient)
                gradient /= world_size()
        found.append([loss.detach(), *(gradient.clone() for gradient in gradients)])
    return {"error": max(map(relative_error, *reversed(found))), "tensors": len(found[0])}


def broken(name: str, model: PixArt) -> dict[str, float]:
    """The same comparison where what other processes send is lost."""
    whole = getattr(exchange, name)

    def lossy(own: Tensor, *counts: Any) -> Tensor:
        received = whole(own, *counts)
        sizes = counts[-2]
        start = sum(sizes[: rank()])
        lost = torch.zeros_like(received)
        lost[start : start + sizes[rank()]] = received[start : start + sizes[rank()]]
        return lost if received.dim() == 5 else received  # not of the prediction at the end

    setattr(exchange, name, lossy)
    try:
        return drawn(model, SQUARE, 1)
    finally:
        setattr(exchange, name, whole)


def run_cases() -> None:
    ways: list[bool] = []
    rule = exchange.gathers

    def noted(*sizes: int) -> bool:
        ways.append(rule(*sizes))
        return ways[-1]

    exchange.gathers = noted  # type: ignore[assignment]
    for name, case in cases():
        ways.clear()
        found = case()
        if rank() == 0:
            way = "".join("g" if gathers else "h" for gathers in ways)[:3]
            print(json.dumps({"case": name, "processes": world_size(), "ways": way, **found}))


if __name__ == "__main__":
    for count in map(int, sys.argv[1:]):
        among(count, run_cases)
