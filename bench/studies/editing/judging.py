"""What edited pictures are judged by: statements that hold, pixels that stay, lines that do not show.

Pictures are (height, width, 3) uint8. A step is the mean absolute difference of two neighbouring columns,
in levels of 0 to 255, over the rows where no thing lies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pixart.evaluation.metrics.shapes import check_caption
from pixart.shapes import checker
from pixart.shapes.caption import Statement
from pixart.shapes.scene import POSITIONS

LOOKS = ("shape", "colour", "size")  # what is stated of one thing by itself
CLEARANCE = 3  # pixels around a thing in which its edge may still fade
CLEAR = 0.25  # share of rows without a thing, from which on columns are compared
NEAR = 8  # columns before a border in which a thing counts as lying across it
LEVEL = 1.0  # the least difference that 8 bits can show
REACH = 4  # columns on each side whose means are compared


def is_right(picture: np.ndarray, caption: str) -> bool:
    """Whether every statement of the caption holds."""
    return check_caption(picture, caption).is_right


def of_thing(picture: np.ndarray, caption: str, subject: int) -> list[bool]:
    """Of the statements about the shape, colour and size of one thing of the caption, which hold."""
    return [held for told, held in _told(picture, caption) if _is_about(told, subject)]


def is_right_but_for(picture: np.ndarray, caption: str, subject: int) -> bool:
    """Whether all statements hold but those about the looks of one thing of the caption."""
    return all(held for told, held in _told(picture, caption) if not _is_about(told, subject))


def _told(picture: np.ndarray, caption: str) -> Iterator[tuple[Statement, bool]]:
    checked = check_caption(picture, caption)
    return zip(checked.statements, checked.holds, strict=True)


def _is_about(told: Statement, subject: int) -> bool:
    return told.kind in LOOKS and told.subject == subject


def is_taken(picture: np.ndarray, position: str) -> bool:
    """Whether any thing lies at a named position, whatever it is."""
    x, y = POSITIONS[position]
    things = checker.read(picture).things
    return any(
        abs(thing.x - x) < checker.REACH and abs(thing.y - y) < checker.REACH for thing in things
    )


@dataclass(frozen=True)
class Line:
    """How much shows where two parts of a picture meet, beside the same measure elsewhere in it.

    step: across the border; usual, most: the median and the largest of the steps elsewhere. drift, most_drift:
    the same for the difference of the means of REACH columns on each side, which a soft edge has too.
    """

    step: float
    usual: float
    most: float
    drift: float
    most_drift: float

    @property
    def is_within(self) -> bool:
        """Whether the picture itself has as large a step, and as large a drift, elsewhere."""
        return self.step <= self.most and self.drift <= self.most_drift

    @property
    def is_seen(self) -> bool:
        """Whether it is neither within the picture's own nor below LEVEL: a ground that was decoded is
        flat to a hundredth of a level, and anything would stand out of that."""
        return self.step > max(self.most, LEVEL) or self.drift > max(self.most_drift, LEVEL)


def border_of(picture: np.ndarray, own: int) -> Line | None:
    """The line between the first `own` columns, which a file gave, and those after them; compared with
    what there is between the file's own columns. None where things leave too little to see.

    A thing of the new part does not count as a thing here: a line from top to bottom could be one.
    """
    free = _free(picture[:, :own])
    beside = np.all(free[:, max(0, own - NEAR) :], axis=1)
    steps, drifts = _changes(picture[:, :own], free)
    here, drift = _change_at(picture, own, beside)
    if np.isnan(here) or not np.isfinite(steps).any() or not np.isfinite(drifts).any():
        return None
    return _line([here], [drift], steps, drifts)


def seams_of(picture: np.ndarray, borders: Sequence[int]) -> Line | None:
    """The most that shows at columns where windows begin or end, compared with all other columns; None
    where things leave too little to see."""
    free = _free(picture)
    steps, drifts = _changes(picture, free)
    at = np.zeros(len(steps), bool)
    at[[border - 1 for border in borders]] = True
    if not np.isfinite(steps[at]).any() or not np.isfinite(steps[~at]).any():
        return None
    return _line(steps[at], drifts[at], steps[~at], drifts[~at])


def turned(picture: np.ndarray, side: str) -> np.ndarray:
    """The picture with its "left", "right", "top" or "bottom" side on the right."""
    if side in ("top", "bottom"):
        picture = picture.transpose(1, 0, 2)
    return picture[:, ::-1] if side in ("left", "top") else picture


def _line(
    here: Sequence[float] | np.ndarray,
    drift: Sequence[float] | np.ndarray,
    steps: np.ndarray,
    drifts: np.ndarray,
) -> Line:
    return Line(
        float(np.nanmax(here)),
        float(np.nanmedian(steps)),
        float(np.nanmax(steps)),
        float(np.nanmax(drift)),
        float(np.nanmax(drifts)),
    )


def _free(picture: np.ndarray) -> np.ndarray:
    """Where no thing lies, nor within CLEARANCE of one: (height, width) bool."""
    pixels = picture.astype(np.float32)
    taken = np.zeros(picture.shape[:2], bool)
    for region in checker.things(checker.distance(pixels, checker.ground_of(pixels))):
        taken |= region
    reach = CLEARANCE * max(1, min(taken.shape) // 128)
    for axis in (0, 1):
        for _ in range(reach):
            padded = np.pad(taken, [(1, 1) if a == axis else (0, 0) for a in (0, 1)])
            before, after = (
                np.take(padded, np.arange(taken.shape[axis]) + offset, axis) for offset in (0, 2)
            )
            taken = taken | before | after
    return ~taken


def _changes(picture: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Step and drift between columns k and k + 1 for each k, NaN where too few rows are free."""
    found = []
    for column in range(1, picture.shape[1]):
        rows = np.all(free[:, max(0, column - REACH) : column + REACH], axis=1)
        found.append(_change_at(picture, column, rows))
    steps, drifts = np.array(found).T
    return steps, drifts


def _change_at(picture: np.ndarray, column: int, rows: np.ndarray) -> tuple[float, float]:
    """Step and drift between the columns before and from `column` on, over these rows."""
    if rows.mean() < CLEAR or not REACH <= column <= picture.shape[1] - REACH:
        return np.nan, np.nan
    pixels = picture[rows].astype(np.float32)
    step = np.abs(pixels[:, column] - pixels[:, column - 1]).mean()
    before = pixels[:, column - REACH : column].mean(axis=(0, 1))
    after = pixels[:, column : column + REACH].mean(axis=(0, 1))
    return float(step), float(np.abs(after - before).mean())
