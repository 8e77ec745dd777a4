"""What `clean` shows of a set: README.md with the funnel and how measurements are spread, and sheets of
pictures that each rule rejects, drawn by lot."""

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.dataset.expression import names_of
from pixart.dataset.funnel import NOT_VALUES, UNREADABLE, Funnel
from pixart.dataset.images import ImageError, decode
from pixart.dataset.measurement_store import identity
from pixart.dataset.samples import Item, Rejected, Sample, writable
from pixart.files import CheckpointError, printable, write_bytes, written_aside

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 20  # pictures of a sheet
_COLUMNS, _CELL, _LABEL, _MARGIN = 5, 192, 34, 6  # a sheet's, in pixels but for the first
_BARS = " ▁▂▃▄▅▆▇█"
_BINS = 24


@dataclass
class Overview:
    """What is seen while lines are written: 8 bytes a number, and SHOWN lines a rule."""

    numbers: dict[str, "array[float]"] = field(default_factory=dict)
    truths: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    met: int = 0  # lines
    shown: dict[int, list[tuple[int, int, dict[str, Any], str]]] = field(default_factory=dict)

    def take(self, line: dict[str, Any], taken: tuple[int, str] | None) -> None:
        """A line, and the step that rejects it with its reason."""
        self.met += 1
        for name, value in line.items():
            if name in NOT_VALUES or name in ("phash", "duplicate_of") or UNREADABLE in line:
                continue
            if isinstance(value, bool | str) or (value is None and name in self.truths):
                self.truths.setdefault(name, Counter())[str(value)] += 1
            elif value is not None:
                self.numbers.setdefault(name, array("d")).append(value)
        if taken is None:
            return
        step, reason = taken
        if step == 0:
            self.reasons[reason[:200]] += 1
            return
        # The highest of what is as good as random, and the same in every run. An index may name a picture
        # several times: what they are met as keeps lines, which have no order, from being compared.
        lot = heapq.heappush if len(self.shown.setdefault(step, [])) < SHOWN else heapq.heappushpop
        lot(self.shown[step], (identity(line["path"]), self.met, line, reason))


def write_overview(
    folder: Path,
    overview: Overview,
    funnel: Funnel,
    source: Callable[[], Iterable[Item]],
    failures: Sequence[Rejected],
) -> None:
    """Write README.md, and rejects-N-NAME.jpg of each rule that rejects something; those of earlier
    expressions are removed. The source is listed again for the pictures."""
    sheets = _sheets(overview, funnel, source)
    for old in folder.glob("rejects-*.jpg"):
        old.unlink()
    for name, sheet in sheets.items():
        with written_aside(folder / name) as aside:
            sheet.save(aside, "JPEG", quality=90)
    page = _page(overview, funnel, list(sheets), failures)
    write_bytes(folder / "README.md", page.encode("utf-8", "backslashreplace"))


def _page(
    overview: Overview, funnel: Funnel, sheets: Sequence[str], failures: Sequence[Rejected]
) -> str:
    parts = ["# What the pictures are like\n"]
    parts += ["## Funnel\n", funnel.table() + "\n"]
    if funnel.rules:
        parts += ["Rules apply in their order: what one rejects comes to no other.\n"]
    for name in sheets:
        parts += [f"![up to {SHOWN} rejected pictures, drawn by lot]({name})\n"]
    parts += ["## Measurements\n", _spread(overview), ""]
    for name, values in sorted(overview.truths.items()):
        said = ", ".join(f"{value} {count:,}" for value, count in values.most_common(10))
        parts.append(f"- {name}: {said}")
    if overview.reasons:
        parts += ["\n## Pictures that cannot be read\n"]
        parts += [f"- {n:,}: {printable(why)}" for why, n in overview.reasons.most_common(20)]
    if failures:
        parts += ["\n## Pictures that could not be scored\n"]
        parts += [f"- {printable(one.path)}: {printable(one.reason)}" for one in failures[:20]]
        more = len(failures) - 20
        parts += [f"- and {more:,} more"] if more > 0 else []
    return "\n".join(parts) + "\n"


def _spread(overview: Overview) -> str:
    """A row a measurement: of how many, quantiles, and how many lie where between the 1st and the 99th
    percentile."""
    import numpy as np

    rows = [
        "| measurement | pictures | least | 1 % | 10 % | half | 90 % | 99 % | most | 1 % to 99 % |"
    ]
    rows += ["|---|" + "---:|" * 8 + "---|"]
    for name, numbers in overview.numbers.items():
        values = np.frombuffer(numbers, np.float64)
        # A scorer may give what no two of can be subtracted: quantiles that are met, not those between.
        at = np.quantile(values, (0, 0.01, 0.1, 0.5, 0.9, 0.99, 1), method="inverted_cdf")
        told = " | ".join(f"{value:.4g}" for value in at)
        rows.append(f"| {name} | {len(values):,} | {told} | `{_bars(values, at[1], at[5])}` |")
    return "\n".join(rows)


def _bars(values: Any, low: float, high: float) -> str:
    import numpy as np

    if not high > low:
        return "all the same"
    if not math.isfinite(float(high) - float(low)):
        return "too far apart"
    counts = np.histogram(values, bins=_BINS, range=(float(low), float(high)))[0]
    heights = np.ceil(counts / max(1, counts.max()) * (len(_BARS) - 1)).astype(int)
    return "".join(_BARS[height] for height in heights)


def _sheets(
    overview: Overview, funnel: Funnel, source: Callable[[], Iterable[Item]]
) -> dict[str, "Image"]:
    wanted: dict[str, tuple[int, dict[str, Any], str]] = {}
    for step, lot in overview.shown.items():
        for _, _, line, reason in lot:
            wanted[line["path"]] = (step, line, reason)
    cells: dict[int, list[tuple[str, Image | None]]] = {step: [] for step in overview.shown}
    for item in source() if wanted else ():
        if isinstance(item, Sample) and item.key in wanted:
            step, line, _ = wanted.pop(item.key)
            label = _label(item.key, line, funnel, step)
            cells[step].append((label, _small(item)))
    names = {}
    for step, found in sorted(cells.items()):
        what = "-".join(sorted(names_of([funnel.rules[step - 1]])))[:60]
        if found:
            names[f"rejects-{step}-{what}.jpg"] = draw_sheet(funnel.steps[step].rule, found)
    return names


def _label(key: str, line: Mapping[str, Any], funnel: Funnel, step: int) -> str:
    values = []
    for name in sorted(names_of([funnel.rules[step - 1]])):
        value = line.get("duplicate_of") if name == "duplicate" else line.get(name)
        told = f"{value:.4g}" if isinstance(value, float) else str(value)
        values.append(f"{'of' if name == 'duplicate' else name} {told}")
    return f"{writable(key)}\n{', '.join(values)}"


def _small(sample: Sample) -> "Image | None":
    try:
        image = decode(sample.read())
    except (ImageError, CheckpointError, OSError):
        return None
    image.thumbnail((_CELL, _CELL))
    return image


def draw_sheet(title: str, cells: Sequence[tuple[str, "Image | None"]]) -> "Image":
    """Pictures in a table of five columns, each over two lines about it, under a title."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(11)
    rows = -(-len(cells) // _COLUMNS)
    wide, high = _CELL + 2 * _MARGIN, _CELL + _LABEL + 2 * _MARGIN
    columns = min(_COLUMNS, max(2, len(cells)))
    sheet = Image.new("RGB", (columns * wide, 28 + rows * high), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 7), _fitting(f"rejected by: {title}", sheet.width, font), "black", font)
    for number, (label, image) in enumerate(cells):
        row, column = divmod(number, _COLUMNS)
        left, top = column * wide + _MARGIN, 28 + row * high + _MARGIN
        draw.rectangle((left - 1, top - 1, left + _CELL, top + _CELL), (236, 236, 236))
        if image is not None:
            place = (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2)
            sheet.paste(image, place)
        for line, text in enumerate(label.split("\n")[:2]):
            at = (left, top + _CELL + 3 + 15 * line)
            draw.text(at, _fitting(printable(text), _CELL, font), "black", font)
    return sheet


def _fitting(text: str, width: int, font: Any) -> str:
    """The text, its middle left out where it is wider than that many pixels."""
    text = text if len(text) <= 200 else f"{text[:100]}...{text[-100:]}"
    cut = text
    half = len(text) // 2
    while font.getlength(cut) > width and half > 2:
        half -= 1
        cut = f"{text[:half]}...{text[-half:]}"
    return cut
