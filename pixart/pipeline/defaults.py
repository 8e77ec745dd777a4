"""What a model takes where a request leaves something open, and whether it can draw it at all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pixart.few_step import FewStep, spelt
from pixart.pipeline.limits import idle, parse_blocks
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
    options_of,
    takes_timesteps,
)
from pixart.sampler.walk import Walk


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
    few_step: FewStep | None = None,
) -> Request:
    """The request with its size in pixels, the name of its scheduler, steps or timesteps, guidance and
    interval.

    own: what the pipeline is drawn with. is_guest: whether the scheduler is another than the pipeline's.
    few_step: what the model was distilled for, which comes before both. Another scheduler walks through the
    same timesteps, or where it chooses them itself as many; steps that it was not distilled for are where it
    chooses.
    """
    published = default_steps(solver), default_guidance(solver)
    if is_guest and published[0] != STEPS:
        own = replace(own, steps=None)
    if is_guest and published[1] != GUIDANCE:
        own = replace(own, guidance=None, guidance_interval=None)
    timesteps, steps = request.timesteps, request.steps
    if few_step is not None:
        count = len(few_step.timesteps)
        own = Sampling(steps=min(count, _most(solver)), guidance=few_step.guidance)
        learned = [one for one in few_step.walks if steps is None or steps == len(one)]
        if timesteps is None and learned and takes_timesteps(solver, learned[0]):
            timesteps = learned[0]
    steps = _first(steps, timesteps and len(timesteps), own.steps, published[0])
    guidance = _first(request.guidance, own.guidance, published[1])
    interval = _first(request.guidance_interval, own.guidance_interval, (0.0, 1.0))
    return replace(
        request, size=None, aspect=None, resolution=None, height=size.height, width=size.width,
        steps=steps, timesteps=timesteps, guidance=guidance, guidance_interval=interval,
        scheduler=scheduler,
    )  # fmt: skip


def _most(solver: Scheduler) -> int:
    """1 of dmd, whatever a model was distilled for."""
    most: int = solver.config.get("original_inference_steps", solver.config.num_train_timesteps)
    return most


Shares = Sequence[tuple[bool, Sequence[float]]]  # as `stages.shares_of` has them


def check_intervals(asked: Request, resolved: Request, solver: Scheduler) -> None:
    """ValueError for an interval that is asked for and holds none of the steps: nothing would be guided or
    controlled."""
    wanted = [("control_interval", one) for one in asked.control_interval or ()]
    if asked.guidance_interval is not None and _is_guided(resolved):
        wanted.insert(0, ("guidance_interval", asked.guidance_interval))
    if not wanted:
        return
    shares = [one.share for one in Walk(solver, resolved.schedule).evaluations]
    for name, interval in wanted:
        if not _within(shares, interval):
            begin = ", ".join(f"{share:g}" for share in shares[:8]) + ", ..." * (len(shares) > 8)
            raise ValueError(
                f"{name} must hold one of the steps, of which {len(shares)} begin at {begin}, got "
                f"{interval[0]:g} to {interval[1]:g}; take another interval"
            )


def remarks_on(request: Request, few_step: FewStep | None, denoisings: Shares) -> list[str]:
    """What is to be said of a resolved request that can be drawn, but hardly as it is meant."""
    found = []
    guided = [share for is_guided, shares in denoisings for share in shares if is_guided]
    interval = request.guidance_interval or (0.0, 1.0)
    if request.negative and not guided:
        found.append(f"guidance {request.guidance:g} is none: a negative prompt changes nothing")
    found += [f"{needed} is off: {name} changes nothing" for name, needed in idle(request)]
    if not guided and interval != (0.0, 1.0):
        found.append(f"guidance {request.guidance:g} is none: its interval changes nothing")
    every = [share for _, shares in denoisings for share in shares]
    wanted = [("controlled", one, every) for one in request.control_interval or ()]
    if guided:
        wanted.insert(0, ("guided", interval, guided))
    # Of what is begun with a picture, the first steps are not made.
    for what, (start, end), shares in wanted:
        if not _within(shares, (start, end)):
            found.append(
                f"nothing is {what}: none of the {len(shares)} steps, which begin at {min(shares):g}, lies within "
                f"{start:g} to {end:g}"
            )
    if few_step is None:
        return found
    if (request.guidance or 0) > 1 >= few_step.guidance:
        found.append(
            f"this model was distilled with guidance inside: guidance {request.guidance:g} on top of it takes "
            "twice the time and makes pictures glaring; 1 is none"
        )
    if request.timesteps not in few_step.walks:
        steps = f"{request.steps} step{'' if request.steps == 1 else 's'}"
        drawn = steps if request.timesteps is None else spelt(request.timesteps)
        learned = " or ".join(map(spelt, few_step.walks))
        found.append(f"this model was distilled for timesteps {learned} and is drawn in {drawn}")
    return found


def _is_guided(request: Request) -> bool:
    return (request.guidance or 0) > 1 or (request.pag or 0) > 0


def _within(shares: Sequence[float], interval: tuple[float, float]) -> int:
    return sum(interval[0] <= share < interval[1] for share in shares)


def with_guidance(request: Request, depth: int, denoisings: Shares) -> Request:
    """The request with the numbers of the guidance that it asks for, for a model of so many blocks.

    ValueError for --pag-blocks that it does not have, and for momentum where a single evaluation is guided.
    """
    if request.apg:
        apg = APG()
        interval = request.guidance_interval or (0.0, 1.0)
        counts = [_within(shares, interval) for is_guided, shares in denoisings if is_guided]
        if max(counts, default=0) == 1:
            if request.apg_momentum:
                raise ValueError(
                    "apg_momentum must be 0 or left out where one step is guided, which has none before it, "
                    f"got {request.apg_momentum:g}"
                )
            apg = replace(apg, momentum=0.0)
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
    accepted = options_of(type(own))

    def facts(scheduler: Scheduler) -> list[object]:
        return [scheduler.config.get(key) for key in accepted]

    names = [name for name, one in SCHEDULERS.items() if one.class_name == type(own).__name__]
    return next((n for n in names if facts(make_scheduler(n, config)) == facts(own)), None)
