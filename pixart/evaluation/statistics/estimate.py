"""A number with its interval."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval [low, high]. n: what it was made of (prompts, or pictures where they
    have none). method: how the interval was made, in a word ("bootstrap over prompts", "jackknife",
    "Wilson"). notes: what a reader must know, each a sentence."""

    value: float
    low: float
    high: float
    n: int
    method: str
    notes: tuple[str, ...] = ()
