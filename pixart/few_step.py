"""How a distilled model is drawn: what its checkpoint, or a LoRA, says so that nobody need ask for it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

LAST_TIMESTEP = 999  # PixArt is trained with timesteps 0 to 999
# Names of pixart.sampler.SCHEDULERS whose walk may be given timestep by timestep.
TAKE_TIMESTEPS = ("dpm-solver++", "ddim", "euler", "heun", "lcm", "dmd")
_MOST_GUIDANCE = 1000.0


def check_timesteps(name: str, timesteps: object) -> tuple[int, ...]:
    """Timesteps as a tuple. ValueError, which begins with the name, unless they are whole numbers from
    LAST_TIMESTEP down to 0, each below the one before it, and the first above 0."""
    if not isinstance(timesteps, list | tuple):
        raise ValueError(f"{name} must be a list of whole numbers, got {timesteps!r:.60}")
    if not timesteps:
        raise ValueError(f"{name} must be one number at least, got none")
    for one in timesteps:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one <= LAST_TIMESTEP:
            raise ValueError(
                f"{name} must be whole numbers from 0 to {LAST_TIMESTEP}, got {one!r:.60}"
            )
    for before, after in zip(timesteps, timesteps[1:], strict=False):
        if after == before:
            raise ValueError(f"{name} must have each number once, got {after} twice")
        if after > before:
            raise ValueError(f"{name} must fall from noise to picture, got {after} after {before}")
    if timesteps[0] == 0:
        raise ValueError(f"{name} must begin above 0, where no noise is left, got 0")
    return tuple(timesteps)


def spelt(timesteps: Iterable[int]) -> str:
    """As --timesteps takes them."""
    return ",".join(map(str, timesteps))


@dataclass(frozen=True)
class FewStep:
    """What a model was distilled for: `few_step` in a checkpoint's configuration, in model_index.json or in
    a LoRA.

    scheduler: one of TAKE_TIMESTEPS. timesteps: where it is evaluated, falling. guidance: in our notation,
    1 for none (diffusers' 0 and 1). also: timesteps of other numbers of steps that it has learned beside.
    """

    scheduler: str
    timesteps: tuple[int, ...]
    guidance: float = 1.0
    also: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.scheduler, str) or self.scheduler not in TAKE_TIMESTEPS:
            raise ValueError(
                f"few_step.scheduler must be one of {', '.join(TAKE_TIMESTEPS)}, got "
                f"{self.scheduler!r:.60}"
            )
        found = check_timesteps("few_step.timesteps", self.timesteps)
        object.__setattr__(self, "timesteps", found)
        if self.scheduler == "dmd" and self.also:
            raise ValueError("few_step.also must be empty for dmd, which makes one step")
        if self.scheduler == "dmd" and len(found) > 1:
            raise ValueError(
                f"few_step.timesteps must be one number for dmd, which makes one step, got {len(found)}"
            )
        guidance = self.guidance
        is_number = isinstance(guidance, int | float) and not isinstance(guidance, bool)
        if not is_number or not 0 <= guidance <= _MOST_GUIDANCE or not math.isfinite(guidance):
            raise ValueError(
                f"few_step.guidance must be a number from 0 to {_MOST_GUIDANCE:g}, got {guidance!r:.60}"
            )
        object.__setattr__(self, "guidance", float(guidance))
        if not isinstance(self.also, list | tuple):
            raise ValueError(f"few_step.also must be a list of timesteps, got {self.also!r:.60}")
        others = tuple(check_timesteps("few_step.also", one) for one in self.also)
        object.__setattr__(self, "also", others)
        counts = [len(one) for one in self.walks]
        if len({*counts}) < len(counts):
            raise ValueError(
                f"few_step.also must be of other numbers of steps, each once, got {counts}"
            )

    @property
    def walks(self) -> tuple[tuple[int, ...], ...]:
        """All that it was distilled for, the timesteps that it is drawn with first."""
        return (self.timesteps, *self.also)

    def __str__(self) -> str:
        walks = " or ".join(map(spelt, self.walks))
        return f"{self.scheduler} at {walks}, guidance {self.guidance:g}"

    def is_drawn_as(self, other: "FewStep") -> bool:
        """Whether both are drawn alike where nobody asks for other steps."""
        return replace(self, also=()) == replace(other, also=())

    @classmethod
    def from_dict(cls, values: object) -> "FewStep":
        """The inverse of `to_dict`. ValueError, one line that begins with few_step, for anything else."""
        known = ("scheduler", "timesteps", "guidance", "also")
        if not isinstance(values, Mapping):
            raise ValueError(
                f"few_step must be a mapping of {', '.join(known)}, got {values!r:.60}"
            )
        if unknown := [str(key) for key in values if key not in known]:
            raise ValueError(
                f"few_step must have keys among {', '.join(known)}, got {unknown[0]:.60}"
            )
        if missing := [key for key in known[:2] if key not in values]:
            raise ValueError(f"few_step must have {missing[0]}, got none")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json.dumps takes."""
        values = {
            "scheduler": self.scheduler,
            "timesteps": list(self.timesteps),
            "guidance": self.guidance,
        }
        return values | ({"also": [list(one) for one in self.also]} if self.also else {})


def agreed(said: Iterable[tuple[str, FewStep | None]]) -> FewStep | None:
    """What all say that say anything; None if none does. said: whose it is, for messages. ValueError for two
    that differ: a model can be drawn in one way only."""
    found: tuple[str, FewStep] | None = None
    for name, one in said:
        if one is None:
            continue
        if found is not None and not found[1].is_drawn_as(one):
            raise ValueError(
                f"{name} was distilled for {one}, and {found[0]} for {found[1]}: they do not go together; "
                "leave one out"
            )
        if found is not None:  # what both have learned beside
            also = tuple(walk for walk in found[1].also if walk in one.also)
            one = replace(one, also=also)
        found = (name, one)
    return None if found is None else found[1]
