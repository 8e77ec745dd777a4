"""Pictures in terminals that can show them: kitty's graphics protocol, iTerm2's inline images, sixel.

Which one a terminal speaks is told by what it sets in the environment, and asked of nobody: an answer
would arrive among the keys that are typed. Where it is not sure, nothing is shown.
"""

import base64
import io
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS = 16  # of text that a picture takes, at most
_LEAST_ROWS = 4
_CELL, _SMALLEST_CELL = (10, 20), (6, 12)  # pixels, where the terminal does not say
_CHUNK = 4096  # characters of base64, the most that kitty takes at once
_COLOURS = 64  # of a sixel picture
_HIDE_REPLIES = "q=2"  # kitty's answers would be typed into the shell

_BY_PROGRAM = {
    "ghostty": "kitty",
    "iTerm.app": "iterm2",
    "WezTerm": "iterm2",
    "mintty": "iterm2",
}
_BY_TERM = {
    "xterm-kitty": "kitty",
    "xterm-ghostty": "kitty",
    "foot": "sixel",
    "foot-extra": "sixel",
    "mlterm": "sixel",
    "mlterm-256color": "sixel",
    "contour": "sixel",
    "yaft-256color": "sixel",
    "vt340": "sixel",
}


def protocol_of(environment: Mapping[str, str]) -> str | None:
    """Whether a terminal speaks "kitty", "iterm2" or "sixel"; None where that is not sure. tmux and screen
    pass none on, whatever the terminal around them says."""
    term = environment.get("TERM", "")
    if environment.get("TMUX") or environment.get("STY") or term.startswith(("tmux", "screen")):
        return None
    if environment.get("KITTY_WINDOW_ID"):
        return "kitty"
    if environment.get("LC_TERMINAL") == "iTerm2":  # which ssh hands on
        return "iterm2"
    return _BY_PROGRAM.get(environment.get("TERM_PROGRAM", "")) or _BY_TERM.get(term)


@dataclass(frozen=True)
class _Window:
    """Columns and rows of text, and the pixels of one letter's cell, None if unknown."""

    columns: int
    rows: int
    cell: tuple[int, int] | None

    def area(self, size: tuple[int, int], cell: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """How many rows a picture of that width and height takes, and its size in pixels there."""
        width, height = size
        tallest = self.columns * cell[0] * height // width
        rows = max(1, min(ROWS, self.rows // 2, tallest // cell[1]))
        tall = rows * cell[1]
        tall -= tall % 6  # a band of sixels: a part of one would reach into the next row
        return rows, (max(1, tall * width // height), tall)


class TerminalPicture:
    """A place above the bar in which each picture replaces the one before."""

    def __init__(self, stream: TextIO, protocol: str) -> None:
        self._stream, self._protocol = stream, protocol
        self._rows = 0  # of the place, 0 where there is none
        self._number = 0

    @classmethod
    def on_standard_error(cls) -> "TerminalPicture | None":
        """None unless somebody watches, in a terminal that can show pictures."""
        try:
            is_watched = sys.stderr is not None and sys.stderr.isatty()
        except ValueError:  # closed
            return None
        protocol = protocol_of(os.environ) if is_watched else None
        return None if protocol is None else cls(sys.stderr, protocol)

    def show(self, image: "Image") -> None:
        """Nothing is raised where it cannot be written."""
        try:
            self._show(image)
        except (OSError, ValueError):  # the terminal is gone, or it was closed
            return

    def leave(self) -> None:
        """Let what is shown stand: the next picture comes below, as lines have been written since."""
        self._rows = 0

    def _show(self, image: "Image") -> None:
        from tqdm import tqdm

        window = _window(self._stream)
        if window.rows // 2 < _LEAST_ROWS:
            return
        # A guess that is too large would put sixels over the bar; the others count in rows themselves.
        guess = _SMALLEST_CELL if self._protocol == "sixel" else _CELL
        rows, size = window.area(image.size, window.cell or guess)
        if rows != self._rows:
            self._rows, self._number = rows, 1 + secrets.randbelow(2**31 - 1)
            tqdm.write("\n" * (rows - 1), file=self._stream)  # the bar moves down
        picture = _ENCODERS[self._protocol](image.convert("RGB").resize(size), rows, self._number)
        with tqdm.get_lock():
            # The cursor goes to the top of the place, and back to where the bar has left it.
            self._stream.write(f"\x1b7\r\x1b[{rows}A{picture}\x1b8")
            self._stream.flush()


def _window(stream: TextIO) -> _Window:
    columns, rows = os.get_terminal_size(stream.fileno())
    cell = None
    try:
        import fcntl
        import struct
        import termios

        packed = fcntl.ioctl(stream.fileno(), termios.TIOCGWINSZ, bytes(8))
        _, _, width, height = struct.unpack("4H", packed)
        if width >= columns and height >= rows:  # many terminals say 0
            cell = (width // columns, height // rows)
    except (ImportError, OSError):
        pass
    return _Window(columns, rows, cell)


def _png(image: "Image") -> bytes:
    written = io.BytesIO()
    image.save(written, "PNG", compress_level=1)
    return written.getvalue()


def _kitty(image: "Image", rows: int, number: int) -> str:
    """A picture of a number replaces the last one of that number. C=1 leaves the cursor in its place."""
    text = base64.b64encode(_png(image)).decode("ascii")
    chunks = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    head = f"a=T,f=100,i={number},p=1,r={rows},C=1,{_HIDE_REPLIES}"
    return "".join(
        f"\x1b_G{_HIDE_REPLIES if place else head},m={int(place < len(chunks) - 1)};{chunk}\x1b\\"
        for place, chunk in enumerate(chunks)
    )


def _iterm2(image: "Image", rows: int, number: int) -> str:
    content = _png(image)
    options = f"inline=1;size={len(content)};height={rows};preserveAspectRatio=1"
    return f"\x1b]1337;File={options}:{base64.b64encode(content).decode('ascii')}\x07"


def _sixel(image: "Image", rows: int, number: int) -> str:
    """Bands of six rows of pixels; in each, every colour draws its own."""
    reduced = image.quantize(_COLOURS)
    palette = np.asarray(reduced.getpalette(), dtype=int).reshape(-1, 3)
    pixels = np.asarray(reduced)
    height, width = pixels.shape
    colours = "".join(
        f"#{index};2;{red};{green};{blue}"
        for index, (red, green, blue) in enumerate((palette * 100 + 127) // 255)
    )
    bands = (pixels[top : top + 6] for top in range(0, height, 6))
    return f'\x1bP0;1q"1;1;{width};{height}{colours}{"-".join(map(_band, bands))}\x1b\\'


def _band(pixels: np.ndarray) -> str:
    weights = (1 << np.arange(len(pixels)))[:, None]
    return "$".join(
        f"#{colour}" + _run_lengths(((pixels == colour) * weights).sum(0))
        for colour in np.unique(pixels)
    )


def _run_lengths(columns: np.ndarray) -> str:
    """Each column's six bits as a letter from `?` on; `!5?` is five of them."""
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    lengths = np.diff(starts, append=len(columns))
    return "".join(
        f"!{length}{chr(63 + columns[start])}" if length > 3 else chr(63 + columns[start]) * length
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    )


_ENCODERS: dict[str, Callable[["Image", int, int], str]] = {
    "kitty": _kitty,
    "iterm2": _iterm2,
    "sixel": _sixel,
}
