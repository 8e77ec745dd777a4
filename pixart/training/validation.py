"""What a stage is looked at by, every so often, while it trains: settings and their rules."""

from collections.abc import Iterator
from dataclasses import dataclass

from pixart.diffusion import NUM_TIMESTEPS
from pixart.training.bounds import MAX_IMAGES, MAX_STEPS, Bounds, number_problems
from pixart.training.problems import refuse


@dataclass(frozen=True)
class Validation:
    """What is looked at every so often: a loss on fixed noise and timesteps, pictures, and what metrics
    say of them."""

    __pydantic_config__ = {"extra": "forbid"}

    every: int = 0
    """Steps; 0 never."""
    images: int = 64
    """Held out of the data for the loss."""
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    prompts: tuple[str, ...] = ()
    guidance: float | None = None
    """None: what the pipeline is drawn with by default."""
    sampling_steps: int | None = None
    metrics: tuple[str, ...] = ()
    """Metrics of `pixart evaluate` that score the pictures of the prompts, or where data are drawn of
    captions that are drawn with them, the same every time."""
    metric_count: int = 16
    """Captions that are drawn for metrics."""
    metric_reference: str = ""
    """A folder of pictures that metrics of sets (kid) compare with. Drawn "shapes" have their own."""
    metric_options: tuple[str, ...] = ()
    """Constants of metrics, NAME=VALUE each, as `pixart evaluate --option` takes them."""
    metric_weights: str = ""
    """A folder of weights that metrics need, as `pixart evaluate --weights`."""
    best: str = ""
    """One of the metrics: the state that it finds best is kept, whatever --keep says, and `best` in the
    stage's folder leads to it."""
    patience: int | None = None
    """So many validations in a row that `best` finds worse than the best one, by more than its interval, end
    the stage with an error: it runs away. None goes on."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        bounds = {
            "every": Bounds(0, MAX_STEPS),
            "images": Bounds(0, MAX_IMAGES),
            "guidance": Bounds(0, 1000),
            "sampling_steps": Bounds(1, NUM_TIMESTEPS),
            "metric_count": Bounds(2, 10_000),
            "patience": Bounds(1, MAX_STEPS),
        }
        yield from number_problems(self, bounds, "validation.")
        if not self.timesteps or not all(0 <= t < NUM_TIMESTEPS for t in self.timesteps):
            last = NUM_TIMESTEPS - 1
            yield f"validation.timesteps must be from 0 to {last}, got {self.timesteps}"
        if self.every and not self.images and not self.prompts:
            yield "validation.images must be positive without validation.prompts, got 0"
        if self.prompts and not self.every:
            yield "validation.every must be positive to draw validation.prompts, got 0"
        yield from self._metric_problems()

    def _metric_problems(self) -> Iterator[str]:
        if self.metrics and not self.every:
            yield "validation.every must be positive to score by validation.metrics, got 0"
        if len(set(self.metrics)) < len(self.metrics):
            yield f"validation.metrics must differ, got {', '.join(self.metrics)}"
        if self.best and self.best not in self.metrics:
            known = ", ".join(self.metrics) or "none"
            yield f"validation.best must be one of validation.metrics ({known}), got {self.best!r}"
        if self.patience is not None and not self.best:
            yield f"validation.patience must be None without validation.best, got {self.patience}"
        if wrong := [one for one in self.metric_options if not one.partition("=")[1]]:
            yield f"validation.metric_options must be NAME=VALUE each, got {wrong[0]!r}"
