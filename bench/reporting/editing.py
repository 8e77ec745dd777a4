"""Pictures made from pictures: the page of bench.studies.editing, and its part of BENCHMARKS.md."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.measure.results import Row, rows_of_kind
from bench.reporting.plots import Named
from bench.reporting.text import MISSING, percent, table
from pixart.evaluation.statistics.intervals import wilson

KIND = "studies.editing"
HOLDS, KEPT = "caption holds", "all else unchanged to the bit"
LINE = "no line"
TILES = "512 px, tiles"
FOLLOWS, SAME = "follows the outline", "the base's to the bit"
KEPT_THING = "statements of the kept thing"


@dataclass(frozen=True)
class Target:
    """A share that a column is to reach; `least` of 1 is all of them."""

    words: str
    part: str
    variant: str
    column: str
    least: float


TARGETS = (
    Target("img2img, strength 0.6: a moved thing follows the new caption", "move", "0.6", HOLDS, 0.9),
    Target("img2img, strength 0.8: the same", "move", "0.8", HOLDS, 0.9),
    Target("inpaint: the kept half is the file's to the bit", "inpaint", "0", KEPT, 1.0),
    Target("inpaint: the new thing is right", "inpaint", "0", "new thing right", 0.85),
    Target("recolour in a mask: the kept thing's statements", "recolour", "1", KEPT_THING, 0.95),
    Target("outpaint, one side: the picture is the file's to the bit", "outpaint", "one side", KEPT, 1.0),
    Target("outpaint, one side: no line", "outpaint", "one side", LINE, 0.95),
    Target("outpaint, two sides: no line", "outpaint", "two sides", LINE, 0.95),
    Target("128 → 256 px: all statements kept", "upscale", "256 px", HOLDS, 0.85),
    Target("128 → 512 px: all statements kept", "upscale", "512 px", HOLDS, 0.85),
    Target("128 → 512 px in windows of 256 px: all statements kept", "upscale", TILES, HOLDS, 0.85),
    Target("the same: no seam", "upscale", TILES, LINE, 0.95),
    Target("outline control: shapes and places, of which no caption tells", "control", "outline", FOLLOWS, 0.9),
    Target("outline control of scale 0: the base's to the bit", "control", "scale 0", SAME, 1.0),
)  # fmt: skip


def page(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each part; rows: each with the number of its run."""
    yield "## Targets"
    yield targets(rows)
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        columns = list(dict.fromkeys(name for row in own for name in row["figures"]))
        lines = [
            [
                row["variant"],
                str(row["cases"]),
                *(_cell(row["figures"].get(name)) for name in columns),
                row["run"],
            ]
            for row in own
        ]
        yield f"## {part.capitalize()}"
        yield table(("setting", "pictures", *columns, "run"), lines)


def overview(results: Sequence[Named]) -> str:
    """The targets, and what was found."""
    return targets(rows_of_kind(results, KIND))


def targets(rows: Sequence[Row]) -> str:
    """What was to be reached, what was, and whether."""
    found = {(row["part"], row["variant"]): row["figures"] for row in rows}
    lines = []
    for one in TARGETS:
        figure = found.get((one.part, one.variant), {}).get(one.column)
        goal = "all" if one.least == 1 else f"≥ {percent(one.least, 0)}"
        lines.append([one.words, goal, _share(figure), _verdict(figure, one.least)])
    lines.append(_compared(found))
    return table(("what", "target", "found (95 % interval)", ""), lines)


def _compared(found: Mapping[tuple[str, str], Row]) -> list[str]:
    """Whether strong projected guidance is as right as moderate guidance without."""
    high, low = (found.get(("guidance", name), {}).get(HOLDS) for name in ("APG 8", "CFG 4.5"))
    words = "guidance 8 with APG: as right as 4.5 without"
    goal = f"≥ {percent(_mean(low))}" if low else "≥ the other"
    return [words, goal, _share(high if low else None), _verdict(high, _mean(low)) if low else ""]


def _verdict(figure: Row | None, least: float) -> str:
    if figure is None:
        return ""
    return "reached" if _mean(figure) >= least else "**missed**"


def _mean(figure: Row) -> float:
    return float(figure["mean"] if "mean" in figure else figure["true"] / max(1, figure["of"]))


def _share(figure: Row | None) -> str:
    """Of statements there is no interval: several are of one picture."""
    if figure is None:
        return MISSING
    if "mean" in figure:
        return f"{percent(figure['mean'])} on average of {figure['of']}"
    if not figure["of"]:
        return MISSING
    low, high = wilson(figure["true"], figure["of"])
    return f"{percent(_mean(figure))} ({100 * low:.1f} to {100 * high:.1f}) of {figure['of']}"


def _cell(figure: Row | None) -> str:
    if figure is None or not figure["of"]:
        return ""
    if "true" in figure:
        return _share(figure)
    numbers = (f"{figure[name]:.3g}" for name in ("mean", "median", "p95", "most"))
    return " / ".join(numbers)
