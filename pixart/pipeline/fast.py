"""Plans in a pipeline: which one `fast` names, and what a request takes from it where it leaves that open."""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from pixart.checkpoint.load import OpenedTransformer
from pixart.config import PixArtConfig
from pixart.few_step import FewStep
from pixart.files import CheckpointError
from pixart.pipeline.defaults import Sampling
from pixart.pipeline.request import Request
from pixart.plans.plan import FEWEST_STEPS, FOLDER, NAMES, OF_ANY_MODEL, OFF, Identity, Plan
from pixart.plans.reuse import BlockReuse
from pixart.quantize import Quantized
from pixart.sampler.denoiser import StepReuse
from pixart.sampler.schedulers import STEPS, Scheduler, adds_noise, default_steps
from pixart.sampler.walk import Walk


class NotWithPlan(ValueError):
    """A request that the plan says nothing of."""


class Planned(Protocol):
    """What of a `Pipeline` its plan is chosen and taken by."""

    opened: OpenedTransformer
    source: str
    sampling: Sampling
    plan: Plan | None
    quantize: Quantized | None

    @property
    def few_step(self) -> FewStep | None: ...

    @property
    def scheduler(self) -> str | None: ...

    @property
    def weights(self) -> dict[str, str]: ...

    @property
    def lora_weights(self) -> tuple[float, ...]: ...

    @property
    def own_scheduler(self) -> str | None: ...

    def solver(self, name: str | None) -> Scheduler: ...


def identity_of(pipe: Planned) -> Identity:
    """The model that a pipeline draws with. ValueError for one of the caller's, which has no files."""
    if "transformer" not in pipe.weights:
        raise ValueError(
            "fast must be off for a model that was read from no file: no plan knows it"
        )
    return Identity.of(pipe.weights, pipe.opened.config, pipe.source, pipe.lora_weights)


def check_word(word: str | Path | None) -> None:
    """ValueError for what is no name of a plan and no file: before a model is opened for it."""
    if word is None or str(word) in (OFF, *NAMES):
        return
    if word in ("", Path()) or not Path(word).exists():
        names = ", ".join((OFF, *NAMES))
        raise ValueError(f"fast must be {names} or the file of a plan, got {str(word)!r}")


def find_plan(word: str | Path | None, pipe: Planned, directory: Path) -> Plan | None:
    """The plan of "balanced" or "fast", or of a file, None for "off".

    directory: of the pipeline, whose plans/ is looked into; without a plan there that is of this very model,
    or with weights that were quantised since, it is the one of any model. ValueError for the file of another
    model, or that is no plan.
    """
    check_word(word)
    if word is None or str(word) == OFF:
        return None
    if word not in NAMES:
        path = Path(word)
        if pipe.quantize is not None:
            raise ValueError(
                f"fast must be {', '.join((OFF, *NAMES))} with quantize, got {path}: it was measured with weights "
                "that are not quantised"
            )
        return _checked(Plan.read(path), path, pipe)
    path = directory / FOLDER / f"{word}.json"
    if path.is_file() and "transformer" in pipe.weights and pipe.quantize is None:
        plan = Plan.read(path)
        if plan.model is not None and not plan.model.differs(identity_of(pipe)):
            return _checked(plan, path, pipe)
    return OF_ANY_MODEL[str(word)]


def _checked(plan: Plan, path: Path, pipe: Planned) -> Plan:
    try:
        plan.check(identity_of(pipe))
        if plan.kv_schedule is not None:
            plan.kv_schedule.check(pipe.opened.config)
        if plan.scheduler is not None and default_steps(pipe.solver(plan.scheduler)) < STEPS:
            raise ValueError(
                f"plan.scheduler must be of many steps, got {plan.scheduler}: there is nothing left to leave out"
            )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return plan


def with_plan(request: Request, pipe: Planned) -> Request:
    """The request with the settings of the pipeline's plan, if it has one, where it leaves them open: so it
    draws itself again. NotWithPlan where the plan says nothing of what it asks for."""
    plan, own = pipe.plan, pipe.sampling
    if plan is None:
        return request
    scheduler = request.scheduler or pipe.scheduler or pipe.own_scheduler
    solver = pipe.solver(request.scheduler)
    by_default = own.steps or default_steps(solver)
    if pipe.few_step is not None:
        by_default = len(pipe.few_step.timesteps)
    if default_steps(solver) < STEPS or by_default <= FEWEST_STEPS:
        name = scheduler or type(solver).__name__
        steps = min(by_default, default_steps(solver))
        raise NotWithPlan(
            f"fast must be off for a model or scheduler of {steps} steps ({name}): there is nothing left to "
            "leave out"
        )
    if plan.scheduler is not None and scheduler != plan.scheduler and request.scheduler is not None:
        raise NotWithPlan(
            f"scheduler must be left out with this plan, which was measured with {plan.scheduler}, got "
            f"{request.scheduler}"
        )
    steps, interval = plan.steps, plan.guidance_interval
    if plan.model is None:  # no more than the model takes by default
        start, end = own.guidance_interval or (0.0, 1.0)
        steps, interval = min(steps, by_default), (start, max(start, min(end, interval[1])))
    is_of_plan = request.schedule in (None, steps)
    request = replace(
        request,
        steps=steps if request.schedule is None else request.steps,
        guidance=plan.guidance if request.guidance is None else request.guidance,
        guidance_interval=request.guidance_interval or interval,
        scheduler=request.scheduler or plan.scheduler,
        kv_schedule=request.kv_schedule
        or (None if plan.kv_schedule is None else str(plan.kv_schedule)),
        # A list of steps, which says nothing of others.
        reuse_blocks=request.reuse_blocks
        or (str(plan.reuse_blocks) if plan.reuse_blocks is not None and is_of_plan else None),
    )
    count = request.steps if request.timesteps is None else len(request.timesteps)
    if count is not None and count <= FEWEST_STEPS:
        raise NotWithPlan(
            f"fast must be off with {FEWEST_STEPS} steps or fewer, got {count}: there is nothing left to "
            "leave out"
        )
    return request


def check_reuse(request: Request, config: PixArtConfig, solver: Scheduler) -> None:
    """ValueError where blocks cannot be reused in the steps of a resolved request."""
    if request.reuse_blocks is None:
        return
    walk, name = Walk(solver, request.schedule), request.scheduler or type(solver).__name__
    if adds_noise(solver):
        raise ValueError(
            f"reuse_blocks must be left out for a scheduler that adds noise at every step ({name})"
        )
    if len(walk.evaluations) != walk.steps:
        raise ValueError(
            f"reuse_blocks must be left out for a scheduler that evaluates a step more than once ({name})"
        )
    if walk.steps <= FEWEST_STEPS:
        raise ValueError(
            f"reuse_blocks must be left out with {FEWEST_STEPS} steps or fewer, got {walk.steps}: there is "
            "nothing left to leave out"
        )
    BlockReuse.parse(request.reuse_blocks).check(config, walk.steps)


def step_reuse(request: Request, solver: Scheduler) -> StepReuse | None:
    """Of a resolved request: where its stages add what blocks added before."""
    if request.reuse_blocks is None:
        return None
    reuse, walk = BlockReuse.parse(request.reuse_blocks), Walk(solver, request.schedule)
    # In float32, as the denoiser is given them.
    timesteps = [walk.evaluations[step - 1].timestep.float().item() for step in reuse.steps]
    return StepReuse(reuse.first, frozenset(timesteps))


def remarks_on(request: Request, plan: Plan | None) -> list[str]:
    """That a resolved request is not what the figures of the plan are of."""
    if plan is None or "cost" not in plan.measured:
        return []
    planned = {
        "size": plan.measured.get("size"),
        "steps": plan.steps,
        "guidance": plan.guidance,
        "guidance_interval": plan.guidance_interval,
        "scheduler": plan.scheduler,
    }
    # Of these none is said where the plan was measured without.
    of_blocks = {
        "kv_schedule": plan.kv_schedule and str(plan.kv_schedule),
        "reuse_blocks": plan.reuse_blocks and str(plan.reuse_blocks),
    }
    asked = {name: getattr(request, name) for name in (*planned, *of_blocks)}
    asked |= {"size": f"{request.width}x{request.height}", "steps": request.schedule}
    known = {name: value for name, value in planned.items() if value is not None}
    others = [
        f"{name} {_spelt(asked[name])}"
        for name, value in (known | of_blocks).items()
        if asked[name] != value
    ]
    return [f"the figures of the plan are not those of {', '.join(others)}"] if others else []


def _spelt(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{one:g}" for one in value)
    return "none" if value is None else str(value)


def note_of(plan: Plan) -> str:
    """What the plan does, and what was measured of it, for people."""
    start, end = plan.guidance_interval
    does = [f"{plan.steps} steps", f"guidance from {start:g} to {end:g}"]
    if plan.kv_schedule is not None:
        does.append(f"keys and values merged {plan.kv_schedule}")
    if plan.reuse_blocks is not None:
        does.append(f"blocks reused {plan.reuse_blocks}")
    found = plan.measured
    if "cost" not in found:
        return f"{', '.join(does)}; not measured with this model"
    said = [f"{found['cost']:.0%} of the FLOPs"]
    for name, right in (("accuracy", "right"), ("accuracy_by_default", "right by default")):
        if name in found:
            said.append(f"{found[name][0]} of {found[name][1]} captions {right}")
    said.append(f"measured on {found.get('images', 0)} pictures")
    if "size" in found:
        said[-1] += f" of {found['size']}"
    return f"{', '.join(does)}; {', '.join(said)}"
