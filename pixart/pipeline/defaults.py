"""What a model takes where a request leaves something open, and whether it can draw it at all."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pixart.pipeline.limits import parse_blocks
from pixart.pipeline.request import Request, check_keys
from pixart.resolution import Resolved, resolve_size
from pixart.sampler.guidance import APG
from pixart.sampler.schedulers import (
    GUIDANCE,
    SCHEDULERS,
    STEPS,
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


@dataclass(frozen=True)
class Sampling:
    """What a pipeline is drawn with best, where a request leaves it open: its `sampling.json`.

    None: what the scheduler is published with. A number that is a scheduler's own (the 4 steps of lcm,
    and that it takes no guidance) stays where it is not the pipeline's.
    """

    steps: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Sampling":
        """ValueError for a key that is unknown, or a value that nothing could be drawn with."""
        names = [one.name for one in fields(cls)]
        check_keys(values, names)
        like = Request("", **values)
        return cls(*(getattr(like, name) for name in names))

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def with_defaults(
    request: Request,
    size: Resolved,
    solver: Scheduler,
    scheduler: str | None,
    own: Sampling,
    is_guest: bool,
) -> Request:
    """The request with its size in pixels, the name of its scheduler, steps, guidance and interval.

    own: what the pipeline is drawn with. is_guest: whether the scheduler is another than the pipeline's.
    """
    published = default_steps(solver), default_guidance(solver)
    if is_guest and published[0] != STEPS:
        own = replace(own, steps=None)
    if is_guest and published[1] != GUIDANCE:
        own = replace(own, guidance=None, guidance_interval=None)
    steps = _first(request.steps, own.steps, published[0])
    guidance = _first(request.guidance, own.guidance, published[1])
    interval = _first(request.guidance_interval, own.guidance_interval, (0.0, 1.0))
    return replace(
        request, size=None, aspect=None, resolution=None, height=size.height, width=size.width,
        steps=steps, guidance=guidance, guidance_interval=interval, scheduler=scheduler,
    )  # fmt: skip


def with_guidance(request: Request, depth: int) -> Request:
    """The request with the numbers of the guidance that it asks for, for a model of so many blocks.

    ValueError for --pag-blocks that it does not have.
    """
    if request.apg:
        apg = APG()
        for field in fields(APG):
            if getattr(request, f"apg_{field.name}") is None:
                request = replace(request, **{f"apg_{field.name}": getattr(apg, field.name)})
    if request.pag:
        blocks = request.pag_blocks or str(depth // 2)
        if parse_blocks(blocks)[-1] >= depth:
            raise ValueError(
                f"pag_blocks must be from 0 to {depth - 1} for this model, got {blocks}"
            )
        request = replace(request, pag_blocks=blocks)
    return request


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def name_of_scheduler(own: Scheduler, config: Mapping[str, Any]) -> str | None:
    """The name under which make_scheduler gives the very solver that the pipeline has of its own."""
    accepted = inspect.signature(type(own).__init__).parameters

    def facts(scheduler: Scheduler) -> list[object]:
        return [scheduler.config.get(key) for key in accepted]

    names = [name for name, one in SCHEDULERS.items() if one.class_name == type(own).__name__]
    return next((n for n in names if facts(make_scheduler(n, config)) == facts(own)), None)
