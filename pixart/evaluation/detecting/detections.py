"""What a detector found in pictures: a file of JSON lines, a line for each picture.

    {"key": "00017/0000", "width": 512, "height": 512, "detector": "hf-mask2former-...",
     "detections": [{"class": "dog", "score": 0.98, "box": [12.0, 40.5, 200.0, 310.0], "color": "brown",
                     "mask": {"size": [512, 512], "counts": [81920, 3, ...]}}, ...]}

A picture in which nothing was found has an empty list: a picture without a line is an error. box: left, top,
right, bottom in pixels, a class's detections in any order. color, mask: null or absent where nobody looked.
mask: run lengths by columns from the top left, as COCO's uncompressed ones, of zeros first.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.evaluation.judges.prompt_questions import lines_of
from pixart.evaluation.metric import Context
from pixart.evaluation.needs import MissingError, Need
from pixart.files import digest, listed, written_aside
from pixart.shapes.checker import distance, ground_of, read, things

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

CHECKER = "checker-1"
MOST_PIXELS = 2**28
HOW = "python -m pixart.evaluate detect, or a detector of yours"
_LINE = {"key", "width", "height", "detector", "detections"}
_DETECTION = {"class", "score", "box", "color", "mask"}


@dataclass(frozen=True)
class Mask:
    """rows, columns, and run lengths by columns, of zeros first."""

    rows: int
    columns: int
    counts: tuple[int, ...]

    def pixels(self) -> "np.ndarray":
        """(rows, columns), bool."""
        import numpy as np

        values = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(values, self.counts).reshape(self.columns, self.rows).T

    @classmethod
    def of(cls, pixels: "np.ndarray") -> "Mask":
        """Of (rows, columns), bool."""
        import numpy as np

        flat = pixels.astype(bool).T.ravel()
        changes = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *changes, flat.size]).tolist()
        rows, columns = pixels.shape
        return cls(rows, columns, tuple([0, *counts] if flat.size and flat[0] else counts))


@dataclass(frozen=True)
class Detection:
    """name: of the class. box: left, top, right, bottom in pixels. color: a word, None where nobody looked."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None
    mask: Mask | None = None


@dataclass(frozen=True)
class Picture:
    """What was found in one picture, the likeliest first. width, height: pixels."""

    width: int
    height: int
    detections: tuple[Detection, ...]
    detector: str = ""


def read_detections(path: Path) -> dict[str, Picture]:
    """By key. ValueError with file and line for what is wrong, MissingError where there is no file."""
    if not path.is_file():
        raise MissingError("detections", [Need(str(path), HOW, "--file detections=FILE")])
    found: dict[str, Picture] = {}
    for place, values in lines_of(path):
        try:
            key, picture = _picture(values)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if key in found:
            raise ValueError(f"{place}: key must be there once, got {key!r} again")
        found[key] = picture
    detectors = sorted({one.detector for one in found.values()})
    if len(detectors) > 1:
        raise ValueError(f"{path}: must be of one detector, got {listed(detectors)}")
    return found


def write_detections(path: Path, pictures: Iterable[tuple[str, Picture]]) -> None:
    """A file that `read_detections` reads. OSError if the disk refuses."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        for key, picture in pictures:
            file.write(json.dumps(_line(key, picture), ensure_ascii=False) + "\n")


def _line(key: str, picture: Picture) -> dict[str, Any]:
    detections = []
    for one in picture.detections:
        values: dict[str, Any] = {"class": one.name, "score": one.score, "box": list(one.box)}
        values |= {"color": one.color} if one.color is not None else {}
        if (mask := one.mask) is not None:
            values["mask"] = {"size": [mask.rows, mask.columns], "counts": list(mask.counts)}
        detections.append(values)
    head = {"key": key, "width": picture.width, "height": picture.height}
    return head | {"detector": picture.detector, "detections": detections}


def _picture(values: Mapping[str, Any]) -> tuple[str, Picture]:
    _check_names("line", values, _LINE)
    key, detector = values.get("key"), values.get("detector", "")
    width: Any = values.get("width")
    height: Any = values.get("height")
    if not isinstance(key, str) or not key or not isinstance(detector, str):
        raise ValueError(f"key and detector must be text, got {key!r:.80} and {detector!r:.80}")
    if not _is_count(width) or not _is_count(height) or not width or not height:
        raise ValueError(f"width and height must be pixels, got {width!r:.40} and {height!r:.40}")
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"width times height must be at most {MOST_PIXELS:,}, got {width * height:,}"
        )
    some = values.get("detections")
    if not isinstance(some, list):
        raise ValueError(f"detections must be a list, got {some!r:.80}")
    # A list in any order is put into one; equal scores keep theirs.
    found = sorted((_detection(one, width, height) for one in some), key=lambda one: -one.score)
    return key, Picture(width, height, tuple(found), detector)


def _detection(values: Any, width: int, height: int) -> Detection:
    if not isinstance(values, Mapping):
        raise ValueError(f"detection must be a JSON object, got {values!r:.80}")
    _check_names("detection", values, _DETECTION)
    name, color, mask = (values.get(one) for one in ("class", "color", "mask"))
    score: Any = values.get("score")
    box: Any = values.get("box")
    if not isinstance(name, str) or not name or not isinstance(color, str | None):
        raise ValueError(f"class and color must be text, got {name!r:.80} and {color!r:.80}")
    if not _is_number(score) or not 0 <= score <= 1:
        raise ValueError(f"score must be a number from 0 to 1, got {score!r:.80}")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(f"box must be 4 finite numbers, got {box!r:.120}")
    left, top, right, bottom = map(float, box)
    if left > right or top > bottom:
        raise ValueError(f"box must be left, top, right, bottom, got {box!r:.120}")
    parsed = None if mask is None else _mask(mask, width, height)
    return Detection(name, float(score), (left, top, right, bottom), color, parsed)


def _mask(values: Any, width: int, height: int) -> Mask:
    size, counts = (
        (values.get("size"), values.get("counts")) if isinstance(values, Mapping) else (None, None)
    )
    if size != [height, width]:
        raise ValueError(f"mask must have the picture's size [{height}, {width}], got {size!r:.80}")
    if not isinstance(counts, list) or not all(map(_is_count, counts)):
        raise ValueError(f"mask must have counts as a list of whole numbers, got {counts!r:.80}")
    if sum(counts) != width * height:
        raise ValueError(f"mask must have {width * height} pixels, its counts have {sum(counts)}")
    return Mask(height, width, tuple(counts))


def _check_names(what: str, values: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(map(str, values.keys() - known)):
        raise ValueError(f"{what} must have {', '.join(sorted(known))} only, got {listed(unknown)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class Found:
    """What was found in each picture: by a file (`--file detections=FILE`), or in pictures of the embedded
    world by its exact checker (`--judge checker`), which needs none. Nothing is read before it is asked
    for. Lines about other pictures are of no concern; a picture without a line is an error."""

    def __init__(self, context: Context) -> None:
        self._file = context.files.get("detections")
        self._is_checker = self._file is None and context.judge == "checker"

    def needs(self) -> Sequence[Need]:
        if self._is_checker or (self._file is not None and self._file.is_file()):
            return ()
        return [Need(str(self._file or "detections.jsonl"), HOW, "--file detections=FILE")]

    @property
    def detector(self) -> str:
        """Who found it: "checker-1", "hf-mask2former:MODEL", "unnamed", "" where there is no file."""
        if self._is_checker:
            return CHECKER
        if self._file is None or not self._file.is_file():
            return ""
        return next((one.detector for one in self._by_key.values()), "") or "unnamed"

    @property
    def digest(self) -> str:
        """Of the file, "" without one."""
        if self._file is None or not self._file.is_file():
            return ""
        return digest(self._file.read_bytes())[:16]

    def of(self, entry: "Entry", image: "Image") -> Picture:
        """ValueError for a picture without a line, and for one of another size."""
        if self._is_checker:
            return checked_picture(image)
        if self._file is None:
            raise MissingError("detections", self.needs())
        picture = self._by_key.get(entry.key)
        if picture is None:
            raise ValueError(f"{self._file}: must have a line for picture {entry.key}, it has none")
        if (picture.width, picture.height) != image.size:
            raise ValueError(
                f"{self._file}: {entry.key} must be {image.width}x{image.height} as the picture, got "
                f"{picture.width}x{picture.height}"
            )
        return picture

    @cached_property
    def _by_key(self) -> dict[str, Picture]:
        assert self._file is not None
        return read_detections(self._file)


def checked_picture(image: "Image") -> Picture:
    """What the exact checker finds in a picture of the embedded world. Each thing is of several classes: its
    shape ("star"), and with its colour ("red star"); what has no name is of none."""
    import numpy as np

    pixels = np.asarray(image.convert("RGB"))
    regions = things(distance(pixels.astype(np.float32), ground_of(pixels.astype(np.float32))))
    found = []
    for thing, region in zip(read(pixels).things, regions, strict=True):
        rows, columns = np.nonzero(region)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        corners = tuple(map(float, box))
        names = [thing.shape, f"{thing.colour} {thing.shape}" if thing.colour else None]
        for name in names if thing.shape else ():
            if name:
                found.append(Detection(name, 1.0, corners, thing.colour, Mask.of(region)))  # type: ignore[arg-type]
    return Picture(image.width, image.height, tuple(found), CHECKER)
