"""How a model is distilled into few steps: settings of a stage whose `trains` is tdm or lcm, and their rules."""

from collections.abc import Iterator
from dataclasses import dataclass

from pixart.few_step import check_timesteps
from pixart.training.bounds import MAX_STEPS, Bounds, number_problems
from pixart.training.distillation import even_timesteps
from pixart.training.problems import problems_of, refuse

MAX_FEW = 8  # steps that a model is distilled for; more need no distillation


@dataclass(frozen=True)
class DistilSettings:
    """A student that learns of a teacher, which stays as it is, to draw in a few steps."""

    __pydantic_config__ = {"extra": "forbid"}

    steps: int | None = None
    """Steps that the student is drawn in, evenly from timestep 999 on; 4 where no timesteps are named."""
    timesteps: tuple[int, ...] = ()
    """The timesteps themselves instead, falling."""
    also: tuple[int, ...] = ()
    """Numbers of steps that it learns beside, as often (tdm): one checkpoint then serves --steps of each."""
    teacher: str = ""
    """The teacher: a checkpoint as --start takes it. Empty: what the stage starts from; after a stage that
    distilled, that one's teacher."""
    guidance: float = 1.0
    """Of the teacher, which the student then has inside; 1 is none."""
    fake_rate: float = 6.0
    """The learning rate of the fake, times the student's (tdm). Too low a one lets the student run away."""
    fake_first: int = 25
    """Steps in which the fake learns alone what the student draws (tdm)."""
    ddim_steps: int = 50
    """The grid of timesteps whose neighbours are to agree (lcm); with fewer the step is wider."""
    huber: float = 1e-3
    """The distance at which squares turn into absolute values (lcm)."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        bounds = {
            "steps": Bounds(1, MAX_FEW),
            "also": Bounds(1, MAX_FEW),
            "guidance": Bounds(1, 1000),
            "fake_rate": Bounds(0, 1e3, above=True),
            "fake_first": Bounds(0, MAX_STEPS),
            "huber": Bounds(0, 1e3, above=True),
        }
        yield from number_problems(self, bounds, "distil.")
        if self.ddim_steps < 2 or 1000 % self.ddim_steps:
            yield f"distil.ddim_steps must be from 2 on and divide 1000, got {self.ddim_steps}"
        if self.timesteps:
            yield from problems_of(lambda: check_timesteps("distil.timesteps", self.timesteps))
            if len(self.timesteps) > MAX_FEW:
                yield f"distil.timesteps must be at most {MAX_FEW}, got {len(self.timesteps)}"
            if self.steps not in (None, len(self.timesteps)):
                yield (
                    f"distil.steps must be left out beside distil.timesteps, {len(self.timesteps)} of them, "
                    f"got {self.steps}"
                )
        if len(set(self.also)) < len(self.also) or self.count in self.also:
            yield f"distil.also must be other numbers than distil.steps, each once, got {self.also}"

    @property
    def count(self) -> int:
        """Steps that the student is drawn in."""
        return len(self.timesteps) or self.steps or 4

    @property
    def walk(self) -> tuple[int, ...]:
        """The timesteps that the student is drawn at."""
        return self.timesteps or even_timesteps(self.count)

    @property
    def walks(self) -> list[tuple[int, ...]]:
        """All that it learns, the one that it is drawn with first."""
        return [self.walk, *map(even_timesteps, self.also)]
