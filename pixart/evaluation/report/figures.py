"""Figures as SVG, text as text, in the colours of a light or a dark page: figures.css.

Written by hand and not by matplotlib: the same bytes everywhere, nothing to install, letters that a reader
can enlarge, select and hear, and one drawing for both colour schemes. 360 wide, so that a telephone shows
them in their own size.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixart.evaluation.metric import Estimate
from pixart.evaluation.report import numbers
from pixart.evaluation.report.markup import Html, joined, shortened, styles, tag

WIDTH, MARGIN = 360, 14
LETTER = 6.3  # width of one of a bar's number, which stands behind the bar; of any font
LINE, BAR, GAP = 18, 15, 9
SERIES = 4  # colours; the fifth folder has the first's again
PAD = 8  # on both sides of a strip: room for a diamond
LEFT, TOP, SIDE = 52, 6, 284  # of a scatter's frame
EDGE = 18  # between it and the ends of the axes: room for points there
LARGEST = 15.0  # radius of a point that stands for many
TOLD = 9  # places that have room for a number each


@dataclass(frozen=True)
class Axis:
    """From low to high over `length` units. ticks: at round numbers. places: of their labels."""

    low: float
    high: float
    ticks: tuple[float, ...]
    places: int
    length: float

    def __call__(self, value: float) -> float:
        """Where a value lies, from 0 to length; what is outside lies on the edge."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.length * min(1.0, max(0.0, share)), 2)

    def label(self, tick: float) -> str:
        return numbers.written(tick, self.places)


def axis(values: Sequence[float], length: float, steps: int = 4) -> Axis:
    """Round ends around finite values. From zero where that costs little of the picture."""
    values = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(values), max(values)
    if low > 0 and low < 0.6 * high:
        low = 0.0
    if high < 0 and high > 0.6 * low:
        high = 0.0
    if high == low:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    step = _round_step((high - low) / steps)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(step * k for k in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks, max(0, -math.floor(math.log10(step) + 1e-9)), length)


def bars(
    title: str,
    groups: Mapping[str, Sequence[Estimate | None]],
    series: Sequence[str],
    unit: str = "",
    paper: Mapping[str, float] | None = None,
) -> Html:
    """A number with its interval for each group and each series (folder): bars where the axis begins at
    zero, points where it does not. paper: published numbers by group, as diamonds."""
    paper = paper or {}
    shown = [one for row in groups.values() for one in row if one is not None]
    ends = [end for one in shown for end in (one.low, one.high, one.value)] + list(paper.values())
    longest = max((len(numbers.estimate(one, unit)) for one in shown), default=0)
    scale = axis(ends, round(WIDTH - 2 * MARGIN - 8 - LETTER * longest))
    from_zero = scale.low <= 0 <= scale.high
    parts: list[Html] = []
    y = float(MARGIN)
    if len(series) > 1:
        for number, name in enumerate(series):
            parts += [_circle(MARGIN + 6, y + 8, 5, f"fill{number % SERIES}"),
                      _text(MARGIN + 18, y + 13, shortened(name, 44))]  # fmt: skip
            y += LINE
        y += 4
    top = y
    for group, row in groups.items():
        parts.append(_text(MARGIN, y + 13, shortened(group, 46), "label"))
        y += LINE
        for number, one in enumerate(row):
            if one is not None:
                parts += _bar(scale, one, y, number % SERIES, from_zero, unit)
            if group in paper:
                parts.append(_diamond(MARGIN + scale(paper[group]), y + BAR / 2 - 1))
            y += BAR
        y += GAP
    grid = [
        tag("line", x1=MARGIN + scale(tick), x2=MARGIN + scale(tick), y1=top, y2=y, class_="grid")
        for tick in scale.ticks
    ]
    parts += [
        _text(MARGIN + scale(tick), y + 13, scale.label(tick), "tick", "middle")
        for tick in scale.ticks
    ]
    y += LINE
    if not from_zero:
        parts.append(_text(MARGIN, y + 13, "The axis does not begin at zero.", "tick"))
        y += LINE
    return _figure(title, _spoken(groups, series, unit, paper), WIDTH, y + MARGIN, [*grid, *parts])


def strip(
    scale: Axis, one: Estimate, paper: float | None = None, series: int = 0, zero: bool = False
) -> Html:
    """An interval on a line, small enough for a table, the paper's number as a diamond, and a mark at
    zero. The same is said in the table in words."""
    height, middle = 18, 9
    left, right = PAD + scale(one.low), PAD + scale(one.high)
    parts = [
        tag("line", x1=PAD, x2=PAD + scale.length, y1=middle, y2=middle, class_="grid"),
        tag("rect", x=left, y=middle - 4, width=round(max(1.0, right - left), 2), height=8, rx=4,
            class_=f"soft{series % SERIES}"),
        _circle(PAD + scale(one.value), middle, 4, f"fill{series % SERIES}"),
    ]  # fmt: skip
    if zero:
        parts.append(
            tag("line", x1=PAD + scale(0), x2=PAD + scale(0), y1=0, y2=height, class_="whisker")
        )
    if paper is not None:
        parts.append(_diamond(PAD + scale(paper), middle))
    return tag(
        "svg", joined(parts), class_="figure strip", width=scale.length + 2 * PAD, height=height,
        viewBox=f"0 0 {scale.length + 2 * PAD} {height}", aria_hidden="true", focusable="false",
    )  # fmt: skip


def scatter(
    title: str, points: Sequence[tuple[float, float]], names: tuple[str, str], higher: bool
) -> Html:
    """Each prompt as a point: its score in A to the right, in B upwards. Points at one place are one,
    larger by their number; of few places the numbers stand beside them."""
    scale = axis([value for point in points for value in point], SIDE - 2 * EDGE)
    parts = _cross(scale)
    places = Counter((scale(a), scale(b)) for a, b in points)
    most = max(places.values(), default=1)
    told = len(places) <= TOLD < len(points)
    for (x, y), count in sorted(places.items(), key=lambda one: (-one[1], one[0])):
        gap = (y - x) if higher else (x - y)
        side = "even" if gap == 0 else "fill1" if gap > 0 else "fill0"
        radius = min(max(2.5, LARGEST * math.sqrt(count / most)), 3.0 * math.sqrt(count))
        at, up = LEFT + EDGE + x, TOP + SIDE - EDGE - y
        parts.append(_circle(at, up, round(radius, 2), f"{side} point"))
        if told:
            is_right = x > scale.length / 2
            beside = at - radius - 5 if is_right else at + radius + 5
            parts.append(_text(beside, up + 4, str(count), "label", "end" if is_right else "start"))
    a, b = (shortened(name, 34) for name in names)
    middle = TOP + SIDE / 2
    parts += [
        _text(LEFT + SIDE / 2, TOP + SIDE + 32, f"A: {a}", "label", "middle"),
        tag("text", f"B: {b}", x=12, y=middle, class_="label", text_anchor="middle",
            transform=f"rotate(-90 12 {middle})"),
    ]  # fmt: skip
    above = sum((b > a) if higher else (b < a) for a, b in points)
    below = sum((b < a) if higher else (b > a) for a, b in points)
    spoken = f"{above} prompts are better in B, {below} in A, {len(points) - above - below} even."
    return _figure(title, spoken, WIDTH, TOP + SIDE + 40, parts)


def _cross(scale: Axis) -> list[Html]:
    """The grid of a scatter, its labels, and the line on which both are equal."""
    parts: list[Html] = []
    for tick in scale.ticks:
        x, y = LEFT + EDGE + scale(tick), TOP + SIDE - EDGE - scale(tick)
        parts += [
            tag("line", x1=x, x2=x, y1=TOP, y2=TOP + SIDE, class_="grid"),
            tag("line", x1=LEFT, x2=LEFT + SIDE, y1=y, y2=y, class_="grid"),
            _text(x, TOP + SIDE + 14, scale.label(tick), "tick", "middle"),
            _text(LEFT - 6, y + 4, scale.label(tick), "tick", "end"),
        ]
    parts.append(tag("line", x1=LEFT, x2=LEFT + SIDE, y1=TOP + SIDE, y2=TOP, class_="diagonal"))
    return parts


def standalone(figure: Html) -> str:
    """The figure as a file of its own, with its colours."""
    opening, _, rest = figure.partition(">")
    namespace = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    ground = '<rect class="ground" width="100%" height="100%"></rect>'
    return f"{namespace}>\n<style>\n{styles('figures.css')}</style>\n{ground}{rest}\n"


def _bar(
    scale: Axis, one: Estimate, y: float, series: int, from_zero: bool, unit: str
) -> list[Html]:
    number = _text(WIDTH - MARGIN, y + BAR / 2 + 3, numbers.estimate(one, unit), "number", "end")
    if not math.isfinite(one.value):
        return [number]
    middle, zero = y + BAR / 2 - 1, scale(max(scale.low, min(scale.high, 0.0)))
    at, low, high = scale(one.value), scale(one.low), scale(one.high)
    parts = []
    if from_zero:
        width = round(abs(at - zero), 2)
        parts.append(tag("rect", x=MARGIN + min(at, zero), y=middle - 5, width=width, height=10,
                         rx=2, class_=f"soft{series}"))  # fmt: skip
    parts += [
        tag("line", x1=MARGIN + low, x2=MARGIN + high, y1=middle, y2=middle, class_="whisker"),
        *(
            tag(
                "line", x1=MARGIN + x, x2=MARGIN + x, y1=middle - 4, y2=middle + 4, class_="whisker"
            )
            for x in (low, high)
        ),
        _circle(MARGIN + at, middle, 3.5, f"fill{series}"),
        number,
    ]
    return parts


def _figure(title: str, spoken: str, width: float, height: float, parts: Sequence[Html]) -> Html:
    return tag(
        "svg", joined(parts), class_="figure", role="img", aria_label=f"{title}. {spoken}",
        width=width, height=_short(height), viewBox=f"0 0 {width} {_short(height)}",
    )  # fmt: skip


def _spoken(
    groups: Mapping[str, Sequence[Estimate | None]],
    series: Sequence[str],
    unit: str,
    paper: Mapping[str, float],
) -> str:
    lines = []
    for group, row in groups.items():
        said = [
            (f"{name} " if len(series) > 1 else "") + numbers.estimate(one, unit)
            for name, one in zip(series, row, strict=True)
            if one is not None
        ]
        if group in paper:
            said.append(f"the paper {numbers.plain(paper[group])}")
        lines.append(f"{shortened(group, 60)}: {', '.join(said) or 'none'}")
    return "; ".join(lines) + "."


def _text(x: float, y: float, words: str, class_: str = "", anchor: str | None = None) -> Html:
    return tag(
        "text", words, x=_short(x), y=_short(y), class_=class_ or None, text_anchor=anchor,
        direction="ltr",
    )  # fmt: skip


def _circle(x: float, y: float, radius: float, class_: str) -> Html:
    return tag("circle", cx=_short(x), cy=_short(y), r=_short(radius), class_=class_)


def _diamond(x: float, y: float) -> Html:
    return tag("path", d=f"M{_short(x)} {_short(y - 6)}l6 6l-6 6l-6-6z", class_="paper")


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _round_step(size: float) -> float:
    """1, 2 or 5 times a power of ten, at least as large."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= size * (1 - 1e-9))
