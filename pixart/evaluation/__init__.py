"""How good a model is: METRICS, a module each."""

from dataclasses import dataclass
from typing import Any

from pixart.pipeline.request import Request, as_options

# Name -> module, which has `evaluate(pipe, settings)`: the result in words, and values for JSON.
METRICS: dict[str, str] = {
    "caption-accuracy": "pixart.evaluation.caption_accuracy",
}
SAMPLING = (
    "steps",
    "guidance",
    "guidance_interval",
)  # of a Request; what is not given is left to the model
_Sampling: Any = as_options(SAMPLING)


@dataclass(frozen=True)
class Settings(_Sampling):
    """What every metric takes and heeds."""

    count: int = 300
    """Captions of each task."""
    seed: int = 1_000_000
    """Of the captions and of the first picture."""
    sizes: tuple[int, ...] = ()
    """Sides in pixels, instead of the metric's own."""

    @property
    def like(self) -> Request:
        """What all pictures are drawn like: a request from the first seed, without its prompt."""
        given = {name: getattr(self, name) for name in SAMPLING}
        return Request("", seed=self.seed, **given)
