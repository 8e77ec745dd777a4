"""What a model takes where a request leaves something open, and whether it can draw it at all."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pixart.pipeline.request import Request
from pixart.resolution import Resolved, resolve_size
from pixart.sampler.loop import check_sampling
from pixart.sampler.schedulers import (
    SCHEDULERS,
    Scheduler,
    default_guidance,
    default_steps,
    make_scheduler,
)


def size_of(request: Request, *, native: int, multiple: int) -> Resolved:
    """The size in pixels that a request asks for, with a note for people.

    native: side of the square that is drawn if it asks for none. multiple: of which sides must be;
    ValueError if they are not.
    """
    height, width = request.height, request.width
    if height is None and width is None:
        asked = request.size, request.aspect, request.resolution
        return resolve_size(*asked, native=native, multiple=multiple)
    height = native if height is None else height
    width = native if width is None else width
    for name, side in (("height", height), ("width", width)):
        if side % multiple or side < multiple:
            raise ValueError(f"{name} must be a multiple of {multiple} pixels, got {side}")
    return Resolved(height, width, f"{width}x{height}, exactly as asked")


def with_defaults(
    request: Request, size: Resolved, solver: Scheduler, scheduler: str | None
) -> Request:
    """The request with its size in pixels, the name of its scheduler, steps and guidance. ValueError
    for what the scheduler cannot sample."""
    steps = default_steps(solver) if request.steps is None else request.steps
    guidance = default_guidance(solver) if request.guidance is None else request.guidance
    check_sampling(solver, steps, guidance, request.guidance_interval)
    return replace(
        request, size=None, aspect=None, resolution=None, height=size.height, width=size.width,
        steps=steps, guidance=guidance, scheduler=scheduler,
    )  # fmt: skip


def name_of_scheduler(own: Scheduler, config: Mapping[str, Any]) -> str | None:
    """The name under which make_scheduler gives the very solver that the pipeline has of its own."""
    accepted = inspect.signature(type(own).__init__).parameters

    def facts(scheduler: Scheduler) -> list[object]:
        return [scheduler.config.get(key) for key in accepted]

    names = [name for name, one in SCHEDULERS.items() if one.class_name == type(own).__name__]
    return next((n for n in names if facts(make_scheduler(n, config)) == facts(own)), None)
