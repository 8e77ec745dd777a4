"""How much one request, and all that are kept, may ask of the machine."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pixart.pipeline.request import Request
from pixart.serving.refusal import Refusal

MOST_LORAS, MAX_WEIGHT = 8, 16  # of one order; of a LoRA, to either side
MOST_TILES = 4096  # of one picture: each is begun and joined on its own, however small


@dataclass(frozen=True)
class Limits:
    """pixels: of one picture, its enlargement too. undivided: of these, what the VAE may be told to decode
    as one. images: of one order. steps: of one picture, those of its enlargement too. prompt: characters of
    it, and of what not to draw. body: bytes of one request. picture_pixels: of a picture that is sent.
    queue: orders that wait. queue_of_client: of these, those of one client. rate: requests a minute that
    one client may make, those for progress not counted. keep_seconds, keep_bytes: how long, and how much at
    most, finished orders are kept; the pictures of orders that wait may take as much again, half of it those
    of one client.
    """

    pixels: int = 17_000_000
    undivided: int = 2_000_000
    images: int = 16
    steps: int = 200
    prompt: int = 20_000
    body: int = 20_000_000
    picture_pixels: int = 34_000_000
    queue: int = 64
    queue_of_client: int = 32
    rate: int = 240
    keep_seconds: float = 3600.0
    keep_bytes: int = 2**30


def check_asked(requests: Iterable[Request], limits: Limits) -> None:
    """Refusal (400) for what is too much whatever the model makes of it: before anything is opened."""
    requests = list(requests)
    _check("n", len(requests), limits.images, "pictures")
    for request in requests[:1]:  # the others differ in their seeds
        _check("prompt", len(request.prompt), limits.prompt, "characters")
        _check("negative", len(request.negative), limits.prompt, "characters")
        _check("steps", request.steps or 0, limits.steps, "steps")
        _check("timesteps", len(request.timesteps or ()), limits.steps, "steps")
        if request.height and request.width:
            _check("height", request.height * request.width, limits.pixels, "pixels with width")


def check_resolved(requests: Iterable[Request], limits: Limits) -> None:
    """Refusal (400) for a request that comes to too much, once a model has resolved it."""
    for request in requests:
        height, width = request.final_size
        field = "size" if request.upscale is None else "upscale"
        _check(field, height * width, limits.pixels, f"pixels, of which {width}x{height} has")
        _check("steps", _steps_of(request), limits.steps, "steps, those of upscale too")
        for name in ("tile", "tiles"):
            _check_tile(name, getattr(request, name), height * width, limits)


def _check(field: str, value: int, most: int, unit: str) -> None:
    if value > most:
        raise Refusal(
            400,
            f"{field} must be at most {most:,} {unit}, got {value:,}",
            code="over_limit",
            field=field,
        )


def _steps_of(request: Request) -> int:
    """Every doubling of the sides is a pass of its own."""
    assert request.steps and request.height and request.width
    if request.upscale is None:
        return request.steps
    larger, smaller = request.final_size, (request.height, request.width)
    factor = max(large / small for large, small in zip(larger, smaller, strict=True))
    passes = max(1, math.ceil(math.log2(factor) - 1e-9))
    first = 0 if request.only_enlarges else request.steps
    return first + passes * math.ceil(request.steps * (request.upscale_strength or 1))


def _check_tile(name: str, tile: int | bool | None, pixels: int, limits: Limits) -> None:
    if tile is None or tile is True:
        return
    at_once = pixels if tile is False else min(tile**2, pixels)
    if name == "tile" and at_once > limits.undivided:
        reason = (
            f"tile must be at most {math.isqrt(limits.undivided)} pixels for a picture of {pixels:,}, got "
            f"{tile}; leave it out, and free memory decides"
        )
        raise Refusal(400, reason, code="over_limit", field=name)
    if pixels > MOST_TILES * at_once:
        reason = f"{name} must make at most {MOST_TILES} parts of {pixels:,} pixels, got {tile}"
        raise Refusal(400, reason, code="over_limit", field=name)
