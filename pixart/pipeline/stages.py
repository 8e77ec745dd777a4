"""In which denoisings a request is drawn: from noise or from a picture, and then larger and larger."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pixart.pipeline.editing import canvas_size, fit_of, strength_of
from pixart.pipeline.guidance import guidance_of, upscale_guidance_of
from pixart.pipeline.request import Request
from pixart.pipeline.upscale import (
    UPSCALE_GUIDANCE,
    UPSCALE_STRENGTH,
    sizes_between,
    upscaled_size,
)
from pixart.resolution import MIN_TOKENS
from pixart.sampler.guidance import Guidance
from pixart.sampler.loop import check_sampling
from pixart.sampler.schedulers import Scheduler
from pixart.sampler.walk import Steps, Walk


@dataclass(frozen=True)
class Stage:
    """One denoising. height, width: pixels of the canvas. tiles: side of windows in it, None for the
    whole at once. strength: how much of what it begins with is drawn anew, None if that is noise.
    is_masked: whether a part of that is kept. is_larger: whether it makes a picture larger, whose coarse
    part it keeps."""

    height: int
    width: int
    tiles: int | None
    guidance: Guidance
    strength: float | None
    is_masked: bool = False
    is_larger: bool = False

    @property
    def seen(self) -> tuple[int, int]:
        """Pixels of what the transformer sees at once, high and wide."""
        if self.tiles is None:
            return self.height, self.width
        return min(self.tiles, self.height), min(self.tiles, self.width)

    @property
    def is_guided(self) -> bool:
        return self.guidance.scale > 1 or self.guidance.pag > 0

    def walk(self, solver: Scheduler, steps: Steps | None) -> Walk:
        """Its evaluations. ValueError for what the scheduler cannot make of them."""
        is_anew = self.strength == 1 and not self.is_masked
        return Walk(solver, steps, None if is_anew else self.strength)

    def count_steps(self, solver: Scheduler, steps: Steps | None) -> int:
        """How often a callback is called."""
        return len(self.walk(solver, steps).evaluations)


def stages_of(request: Request, multiple: int) -> list[Stage]:
    """Of a resolved request. Where --upscale makes the picture itself larger, nothing comes before."""
    assert request.height and request.width
    stages = []
    if not request.only_enlarges:
        tiles = request.tiles if request.upscale is None else None
        size = canvas_size(request.height, request.width, multiple)
        is_masked = request.mask is not None or request.outpaint is not None
        guidance = guidance_of(request)
        stages.append(Stage(*size, tiles, guidance, request.strength, is_masked))
    if request.upscale is not None:
        guidance, strength = upscale_guidance_of(request), request.upscale_strength
        smaller = request.height, request.width
        stages += [
            Stage(*size, request.tiles, guidance, strength, is_larger=True)
            for size in sizes_between(smaller, request.final_size, multiple)
        ]
    return stages


def with_stages(request: Request, multiple: int) -> Request:
    """A request of a known size with the numbers of what its picture is drawn from and made larger to.
    ValueError for an --upscale or --tiles that cannot be."""
    if request.image is not None:
        request = replace(request, fit=fit_of(request), strength=strength_of(request))
    if request.upscale is not None:
        assert request.height and request.width
        height, width = upscaled_size(request.upscale, request.height, request.width, multiple)
        strength = request.upscale_strength or UPSCALE_STRENGTH
        request = replace(request, upscale=f"{width}x{height}", upscale_strength=strength)
        if request.upscale_guidance is None and not request.only_enlarges:
            request = replace(request, upscale_guidance=UPSCALE_GUIDANCE)
    if request.tiles is None:
        return request
    least = MIN_TOKENS * multiple
    if request.tiles < least:
        raise ValueError(f"tiles must be at least {least} pixels, got {request.tiles}")
    return replace(request, tiles=round(request.tiles / multiple) * multiple)


def check_stages(request: Request, multiple: int, solver: Scheduler) -> None:
    """ValueError for what the scheduler cannot sample."""
    for stage in stages_of(request, multiple):
        strength, is_masked = stage.strength, stage.is_masked
        with _naming_strength(stage):
            check_sampling(
                solver, request.schedule, stage.guidance, strength=strength, is_masked=is_masked
            )


def shares_of(request: Request, multiple: int, solver: Scheduler) -> list[tuple[bool, list[float]]]:
    """Of each denoising whether it is guided, and how much of the trajectory lies before each evaluation that
    it makes. ValueError for a strength that leaves none."""
    found = []
    for stage in stages_of(request, multiple):
        with _naming_strength(stage):
            walk = stage.walk(solver, request.schedule)
        found.append((stage.is_guided, [one.share for one in walk.evaluations]))
    return found


@contextmanager
def _naming_strength(stage: Stage) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if stage.is_larger and str(error).startswith("strength "):
            raise ValueError(f"upscale_{error}") from error
        raise
