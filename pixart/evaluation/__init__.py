"""How good a model is: METRICS, a module each."""

from dataclasses import dataclass

# Name -> module, which has `evaluate(pipe, settings)`: the result in words, and values for JSON.
METRICS: dict[str, str] = {
    "caption-accuracy": "pixart.evaluation.caption_accuracy",
}


@dataclass(frozen=True)
class Settings:
    """What every metric is told, and heeds."""

    count: int = 300
    """Captions of each task."""
    seed: int = 1_000_000
    """Of the captions and of the first picture."""
    steps: int = 20
    guidance: float = 4.5
    sizes: tuple[int, ...] = ()
    """Sides in pixels, instead of the metric's own."""
