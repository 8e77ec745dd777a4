"""What the numbers of a recipe and the names of its stages may be."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_SIDE = 16384  # pixels
MAX_IMAGES = 10**6  # of a step
MAX_STEPS = 10**8 - 1  # eight digits, by whose order states are found
MAX_NAME = 100  # bytes of a stage's name


@dataclass(frozen=True)
class Bounds:
    """From `least` to `most`; above: `least` itself is none of them."""

    least: float
    most: float
    above: bool = False

    def problem(self, value: float) -> str | None:
        """What a number must be, None where it is so."""
        if self.above and not value > self.least:  # nor NaN
            return "must be positive" if self.least == 0 else f"must be above {self.least:g}"
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if value < self.least:
            at_least = f"must be at least {self.least}"
            return "must not be negative" if self.least == 0 else at_least
        return None if value <= self.most else f"must be at most {self.most}"


def number_problems(
    settings: object, bounds: Mapping[str, Bounds], prefix: str = ""
) -> Iterator[str]:
    """Yield what is wrong with the fields of settings that `bounds` names: numbers, lists of numbers, or
    pairs of a name and a number. None is no number."""
    for field, allowed in bounds.items():
        for name, value in _numbers(f"{prefix}{field}", getattr(settings, field)):
            if rule := allowed.problem(value):
                yield f"{name} {rule}, got {_shown(value)}"


def _numbers(name: str, value: object) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, tuple):
        for place, one in enumerate(value):
            if isinstance(one, tuple):
                yield f"{name}.{one[0]}", one[1]
            else:
                yield f"{name}[{place}]", one


def _shown(value: float) -> str:
    """Python refuses to write out integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {value.bit_length()} bits"
    return str(value)


def name_problems(name: str) -> Iterator[str]:
    """Yield what is wrong with the name of a stage, which its folder has."""
    is_folder = name not in ("", ".", "..") and Path(name).name == name and "\\" not in name
    if not is_folder or not name.isprintable():
        yield f"name must be that of a folder, got {name!r}"
    elif len(name.encode()) > MAX_NAME:
        yield f"name must have at most {MAX_NAME} bytes, got {len(name.encode())}"
