"""Numbers in words: as many digits as their interval bears out, and never without it."""

import math

from pixart.evaluation.metric import Estimate

MINUS = "\u2212"
MOST_DIGITS = 8


def digits(low: float, high: float, value: float) -> int:
    """Places behind the point: two figures of the interval's width, four of the value where it has none."""
    width = high - low
    if math.isfinite(width) and width > 0:
        return _places(width, 2)
    return _places(abs(value), 4) if value and math.isfinite(value) else 2


def written(value: float, places: int) -> str:
    """With a real minus, and without one before nothing."""
    if not math.isfinite(value):
        return "\u221e" if value > 0 else f"{MINUS}\u221e"
    text = f"{value:.{places}f}"
    if not float(text):
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def plain(value: float) -> str:
    """A number that has no interval because it is one picture's, or printed in a paper."""
    return f"{value:.4g}".replace("-", MINUS)


def interval(low: float, high: float, places: int) -> str:
    return f"[{written(low, places)}, {written(high, places)}]"


def estimate(one: Estimate, unit: str = "") -> str:
    """ "0.280 [0.271, 0.289]", with the unit behind the number."""
    places = digits(one.low, one.high, one.value)
    return f"{written(one.value, places)}{spaced(unit)} {interval(one.low, one.high, places)}"


def signed(value: float, places: int) -> str:
    text = written(value, places)
    return text if text.startswith(MINUS) or not float(text) else f"+{text}"


def spaced(unit: str) -> str:
    return f" {unit}" if unit else ""


def _places(size: float, figures: int) -> int:
    return min(MOST_DIGITS, max(0, figures - 1 - math.floor(math.log10(size))))
