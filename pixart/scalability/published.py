"""The laws that the scalability paper prints, and what constants of one digit can and cannot say.

arXiv 2404.02883, figure 11: S, the TIFA score, of the Pareto front, by compute, size and data.
"""

from dataclasses import asdict, dataclass
from typing import Any

ROUNDED = 0.005  # half of the last digit of every printed constant and exponent
STEPS_TO_COMPUTE = 3 * 2048  # a step is three forward passes of 2,048 pictures


@dataclass(frozen=True)
class PublishedLaw:
    """S = factor · x^exponent, both rounded to two places behind the point. of: what x is, with its unit."""

    name: str
    factor: float
    exponent: float
    of: str
    note: str

    def at(self, x: float) -> tuple[float, float, float]:
        """S as printed, and the least and the most that the digits of both constants leave open."""
        ends = [
            (self.factor + a) * x ** (self.exponent + b)
            for a in (-ROUNDED, ROUNDED)
            for b in (-ROUNDED, ROUNDED)
        ]
        return self.factor * x**self.exponent, min(ends), max(ends)

    def exponent_alone(self, x: float) -> tuple[float, float]:
        """S over exponent ± 0.005, with the factor as printed."""
        ends = [self.factor * x ** (self.exponent + b) for b in (-ROUNDED, ROUNDED)]
        return min(ends), max(ends)

    def doubled(self) -> tuple[float, float, float]:
        """What twice the x multiplies S with: as printed, least, most."""
        b = self.exponent
        return 2**b, 2 ** (b - ROUNDED), 2 ** (b + ROUNDED)

    def times_for(self, gain: float) -> tuple[float, float, float]:
        """How many times the x multiplies S with `gain`: as printed, least, most."""
        b = self.exponent
        return gain ** (1 / b), gain ** (1 / (b + ROUNDED)), gain ** (1 / (b - ROUNDED))


@dataclass(frozen=True)
class Point:
    """A point of the paper. tifa: as it prints it, None where it prints none there."""

    law: str
    model: str
    x: float
    tifa: float | None
    note: str = ""


LAWS = (
    PublishedLaw(
        "C", 0.47, 0.02, "training compute in GFLOP",
        "steps x 2,048 x 3 x GMACs of a forward pass, a multiply-add counted once",
    ),
    PublishedLaw(
        "N", 0.77, 0.11, "parameters in billions",
        "printed as of millions, with which S of every model would be above 1",
    ),
    PublishedLaw("D", 0.64, 0.03, "image-noun pairs in millions", ""),
)  # fmt: skip


def _compute(steps: float, gmacs: float) -> float:
    return steps * STEPS_TO_COMPUTE * gmacs


POINTS = (
    Point("C", "SDXL-C320, 150K steps", _compute(150e3, 198), 0.82),
    Point("C", "SDXL-C320, 600K steps", _compute(600e3, 198), 0.84),
    Point("C", "TD4_4, 600K steps", _compute(600e3, 143), None),
    Point("C", "SD2-C320, 250K steps", _compute(250e3, 86), 0.80),
    Point("C", "PixArt h1024-d56, 250K steps", _compute(250e3, 220), 0.78, "not on the front"),
    Point("N", "SD2-C320", 0.87, 0.80, "at 250K steps"),
    Point("N", "SDXL-C320", 2.39, 0.84, "at 600K steps"),
    Point("N", "SDXL-C384", 3.40, None),
    Point("D", "LensArt, 1.8 B pairs", 1.8e3, 0.84, "SDXL-C320 at 600K steps"),
    Point("D", "LensArt + SSTK, 3.9 B pairs", 3.9e3, None),
    Point("D", "the same with synthetic captions, 7.3 B pairs", 7.3e3, 0.82, "at 100K steps"),
)


def as_json() -> list[dict[str, Any]]:
    """Each law with its points."""
    return [
        asdict(law)
        | {"doubled": law.doubled(), "times_for_one_percent": law.times_for(1.01)}
        | {"points": [_point(law, point) for point in POINTS if point.law == law.name]}
        for law in LAWS
    ]


def describe() -> str:
    """The laws beside the paper's points, and what their digits can say."""
    lines = ["Published laws (arXiv 2404.02883, figure 11), S a TIFA score"]
    for law in LAWS:
        lines += ["", f"S = {law.factor:g} {law.name}^{law.exponent:g}, {law.name} {law.of}"]
        lines += [f"  {law.note}"] * bool(law.note)
        width = max(len(point.model) for point in POINTS if point.law == law.name)
        for point in POINTS:
            if point.law != law.name:
                continue
            value = law.at(point.x)[0]
            low, high = law.exponent_alone(point.x)
            printed = "" if point.tifa is None else f"; the paper's TIFA {point.tifa:.2f}"
            note = f", {point.note}" if point.note else ""
            lines.append(
                f"  {point.model:<{width}}  {law.name} = {point.x:#.3g}: S {value:.3f}, exponent "
                f"{law.exponent - ROUNDED:.3f} to {law.exponent + ROUNDED:.3f} [{low:.2f}, {high:.2f}]"
                f"{printed}{note}"
            )
        two, least, most = law.doubled()
        times, few, many = law.times_for(1.01)
        lines += [
            f"  can say: twice the {law.name} gives {two - 1:.1%} more S [{least - 1:.1%}, {most - 1:.1%}]; "
            f"1 % more S takes {times:.2f} times the {law.name} [{few:.2f}, {many:.2f}]",
            f"  cannot say: {_cannot(law)}",
        ]
    return "\n".join(lines)


def _cannot(law: PublishedLaw) -> str:
    largest = max(point.x for point in POINTS if point.law == law.name)
    _, low, high = law.at(largest)
    told = f"what S is at {law.name} = {largest:#.3g}, anything from {low:.2f} to {high:.2f}"
    seen = [point.tifa for point in POINTS if point.law == law.name and point.tifa is not None]
    if high - low > 2 * (max(seen) - min(seen)):
        return f"{told}, while the paper's own scores go from {min(seen):.2f} to {max(seen):.2f}"
    return told


def _point(law: PublishedLaw, point: Point) -> dict[str, Any]:
    value, low, high = law.at(point.x)
    return {
        "model": point.model,
        "x": point.x,
        "law": value,
        "over_exponent": law.exponent_alone(point.x),
        "over_both": (low, high),
        "paper": point.tifa,
        "note": point.note,
    }
