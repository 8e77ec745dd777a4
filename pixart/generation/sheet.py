"""A contact sheet: the pictures of a run side by side, each over a label that says what differs."""

import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.few_step import spelt
from pixart.files import written_aside
from pixart.generation.names import Places, stem_of
from pixart.generation.options import Options
from pixart.pictures import open_picture
from pixart.pipeline.limits import PICTURES
from pixart.pipeline.pictures import QUALITY, write_error
from pixart.pipeline.request import PER_CONTROL, Request

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

MAX_PICTURES = 400
# All but _LETTERS in pixels.
_LARGEST = 512  # of a picture's side
_SIDE = 6144  # of the sheet's own, about
_NARROWEST = 176  # of a label
_LETTERS = 20  # capitals that a label's line has room for
_SMALLEST_TEXT = 15
_GAP = 12
_LABEL_LINES, _TITLE_LINES = 6, 4
_WIDEST_ROW = 8  # pictures, where rows mean nothing
# Settings that a label says, where they have a value.
_NAMED = (
    "seed", "steps", "timesteps", "guidance", "guidance_interval", "scheduler", "negative", "image",
    "strength", "fit", "mask", "invert_mask", "mask_blur", "outpaint", "upscale_strength",
    "upscale_guidance", "tiles", "guidance_rescale", "apg", "apg_eta", "apg_momentum", "apg_norm", "pag",
    "pag_blocks", "kv_schedule", "reuse_blocks", "control_image", "control_preprocessor", "control_scale",
    "control_interval",
)  # fmt: skip
# For letters that Pillow's own font has not: what systems have, in the order of how much they know.
_FONTS = (
    "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf",
    "arial.ttf", "NotoSans-Regular.ttf",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A picture of the sheet. request: as it was drawn. swept: what --sweep set, as it was asked for."""

    path: Path
    request: Request
    swept: Mapping[str, Any]


def write_sheet(cells: Sequence[Cell], options: Options) -> Path:
    """Write the sheet beside the pictures, as grid.png or under a free name; returns its file. The same
    sheet is not written twice."""
    content, places = _encoded(draw_sheet(cells), options.format or "png"), Places()
    for cell in cells:
        places.take(cell.path)
    folder = Path(os.path.commonpath([os.path.abspath(cell.path.parent) for cell in cells]))
    if not cells[0].path.is_absolute():
        folder = Path(os.path.relpath(folder))
    wanted = folder / f"grid.{options.format or 'png'}"
    for path in places.there(wanted):
        if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
            return path
    while True:
        path = places.free(wanted, beside=not options.overwrite)
        try:
            with written_aside(path, replace=options.overwrite) as aside:
                aside.write_bytes(content)
            return path
        except OSError as error:
            if not (isinstance(error, FileExistsError) and os.path.lexists(path)):
                raise write_error(path, error) from error
            places.take(path)  # another process has, just now


def _encoded(sheet: "Image", kind: str) -> bytes:
    file = io.BytesIO()
    sheet.save(file, {"jpg": "JPEG"}.get(kind, kind.upper()), quality=QUALITY)
    return file.getvalue()


def draw_sheet(cells: Sequence[Cell]) -> "Image":
    """The pictures in rows, in RGB. The last thing that was varied runs along a row."""
    from PIL import Image, ImageDraw

    title, labels = _describe(cells)
    columns = _columns(cells)
    rows = math.ceil(len(cells) / columns)
    side = max(64, min(_LARGEST, _SIDE // max(columns, rows)))
    pictures = [_thumbnail(cell.path, side) for cell in cells]
    width = max(_NARROWEST, *(picture.width for picture in pictures))
    height = max(picture.height for picture in pictures)
    size = max(_SMALLEST_TEXT, width // _LETTERS)
    title_size = round(1.2 * size)
    texts = [_wrap(label, width, size, _LABEL_LINES) for label in labels]
    across = _GAP + columns * (width + _GAP)
    top = _wrap(title, across - 2 * _GAP, title_size, _TITLE_LINES)
    start = _GAP + len(top) * _line_height(title_size) + (_GAP if top else 0)
    step = height + _GAP // 2 + max(map(len, texts)) * _line_height(size) + _GAP
    sheet = Image.new("RGB", (across, start + rows * step), "white")
    canvas = ImageDraw.Draw(sheet)
    _write(canvas, top, _GAP, _GAP, title_size)
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(number, columns)
        x, y = _GAP + column * (width + _GAP), start + row * step
        lower = y + height - picture.height
        sheet.paste(picture, (x, lower))
        # White pictures end somewhere too.
        frame = (x - 1, lower - 1, x + picture.width, y + height)
        canvas.rectangle(frame, outline="silver")
        _write(canvas, text, x, y + height + _GAP // 2, size)
    return sheet


def _thumbnail(path: Path, side: int) -> "Image":
    image = open_picture(path, str(path)).convert("RGB")
    image.thumbnail((side, side))
    return image


def _columns(cells: Sequence[Cell]) -> int:
    """A row is what one setting makes of the rest, or several such; or no row means anything."""

    def prompt(cell: Cell) -> str:
        return "" if "prompt" in cell.swept else cell.request.prompt

    runs = (
        _run(cells, lambda cell: (prompt(cell), [*cell.swept.items()][:-1])),
        _run(cells, lambda cell: (prompt(cell), cell.swept)),
    )
    square = math.ceil(math.sqrt(len(cells)))
    run = next((run for run in runs if 1 < run <= _WIDEST_ROW and len(cells) % run == 0), None)
    if run is None:
        return len(cells) if len(cells) <= 5 else max(4, square)
    is_tall = len(cells) > 3 * run**2
    return run * math.ceil(square / run) if is_tall else run


def _run(cells: Sequence[Cell], kept: Callable[[Cell], object]) -> int:
    """How many of the first cells have the same of what is kept."""
    return next((n for n, cell in enumerate(cells) if kept(cell) != kept(cells[0])), len(cells))


def _describe(cells: Sequence[Cell]) -> tuple[str, list[str]]:
    """What all pictures have in common, and of each what others have not."""
    every = [_settings(cell) for cell in cells]
    names = list(dict.fromkeys(name for one in every for name in one))
    shared = {
        name
        for name in names
        if name not in cells[0].swept and all(one.get(name) == every[0].get(name) for one in every)
    }
    common = {name: text for name, text in every[0].items() if name in shared and text}
    if cells[0].request.guidance_interval == (0.0, 1.0):
        common.pop("guidance_interval", None)
    title = common.pop("prompt", ""), ", ".join(common.values())
    labels = [
        "\n".join(text for name, text in one.items() if name not in shared and text)
        for one in every
    ]
    return "\n".join(title), labels


def _settings(cell: Cell) -> dict[str, str]:
    """The words for each setting, the prompt first, what is swept next."""
    request = cell.request
    words = {"prompt": request.prompt} if "prompt" not in cell.swept else {}
    words |= {name: _words(name, value) for name, value in cell.swept.items()}
    for name in _NAMED:
        value = getattr(request, name)
        words.setdefault(name, "" if value in (None, "") else _words(name, value))
    words["size" if "size" in cell.swept else "pixels"] = _pixels(request)
    return words


def _pixels(request: Request) -> str:
    try:
        height, width = request.final_size
    except ValueError:  # of an older version, which did not say it
        return request.size or ""
    return f"{width}x{height}"


def _words(name: str, value: Any) -> str:
    called = name.replace("_", " ")
    if value is None:
        return f"{called} left open"
    if name in ("prompt", "scheduler"):
        return str(value)
    if name == "steps":
        return f"{value} step{'s' * (value != 1)}"
    if value == "":
        return f"no {called}"
    if name == "timesteps":
        value = spelt(value)
    elif name in PICTURES:
        value = " and ".join(map(stem_of, [value] if isinstance(value, str) else value))
    elif name in PER_CONTROL:
        value = " and ".join(map(_one_of, value))
    elif isinstance(value, tuple):
        value = _one_of(value)
    elif isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, float):
        value = f"{value:g}"
    return f"{called} {value}"


def _one_of(value: Any) -> str:
    """A number, a word, or an interval."""
    if isinstance(value, tuple):
        return " to ".join(map(_one_of, value))
    return value if isinstance(value, str) else f"{value:g}"


def _wrap(text: str, width: int, size: int, most: int) -> list[str]:
    """The text in lines that are no wider, cut with `…` after so many."""
    lines = [line for part in text.split("\n") if part for line in _lines(part, width, size)]
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and _width(last + "…", size) > width:
        last = last[:-1]
    return [*lines[: most - 1], last + "…"]


def _lines(text: str, width: int, size: int) -> Iterator[str]:
    line = ""
    for word in text.split()[:500]:
        longer = f"{line} {word}" if line else word
        if _width(longer, size) <= width:
            line = longer
            continue
        if line:
            yield line
        *full, line = _pieces(word, width, size)
        yield from full
    if line:
        yield line


def _pieces(word: str, width: int, size: int) -> list[str]:
    """A word, or a sentence without spaces, in parts that are no wider."""
    pieces = [""]
    for letter in word[:2000]:
        if pieces[-1] and _width(pieces[-1] + letter, size) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _width(text: str, size: int) -> float:
    return sum(font.getlength(part) for font, part in _runs(text, size))


def _line_height(size: int) -> int:
    return round(size * 1.35)


def _write(canvas: "ImageDraw", lines: Sequence[str], x: int, y: int, size: int) -> None:
    for number, line in enumerate(lines):
        along = float(x)
        for font, part in _runs(line, size):
            # From the base line, so that fonts stand on one.
            canvas.text((along, y + number * _line_height(size) + size), part, "black", font, "ls")
            along += font.getlength(part)


def _runs(text: str, size: int) -> "Iterator[tuple[FreeTypeFont, str]]":
    """The text in parts that one font can write; what none can is written as its number."""
    run, last = "", None
    whole = next((font for font in _fonts(size) if all(_has(font, x) for x in set(text))), None)
    for letter in text:
        font = whole or _font_of(letter, size)
        written = letter if font else f"U+{ord(letter):04X}"
        font = font or _fonts(size)[0]
        if last is not None and font is not last:
            yield last, run
            run = ""
        run, last = run + written, font
    if last is not None:
        yield last, run


def _font_of(letter: str, size: int) -> "FreeTypeFont | None":
    return next((font for font in _fonts(size) if _has(font, letter)), None)


@lru_cache(maxsize=4096)
def _has(font: "FreeTypeFont", letter: str) -> bool:
    if letter.isspace():
        return True
    # A letter that a font has not is drawn as the one that no font has.
    missing = font.getmask("\U0010ffff")
    mask = font.getmask(letter)
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))


@lru_cache
def _fonts(size: int) -> "tuple[FreeTypeFont, ...]":
    from PIL import ImageFont

    found: list[Any] = [ImageFont.load_default(size)]
    for name in _FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # not on this system
            continue
    return tuple(found)
