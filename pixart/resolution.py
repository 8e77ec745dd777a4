"""Image sizes: aspect-ratio buckets, what `--size` and `--aspect` mean, position tables.

Ratios in the tables are height / width, as published. People write the width first (`16:9`,
`3840x2160`), and so do all texts that this module reads and writes; its arguments and results are
height, then width.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

# Units of resolution / 16 px: the published tables for 256, 512, 1024 and 2048 px are this grid
# times 16, 32, 64 and 128 px. Keys are the published labels of height / width.
# fmt: off
_COMMON_GRID = {
    0.25: (8, 32), 0.26: (8, 31), 0.27: (8, 30), 0.28: (8, 29), 0.32: (9, 28), 0.33: (9, 27),
    0.35: (9, 26), 0.4: (10, 25), 0.42: (10, 24), 0.48: (11, 23), 0.5: (11, 22), 0.52: (11, 21),
    0.57: (12, 21), 0.6: (12, 20), 0.68: (13, 19), 0.72: (13, 18), 0.78: (14, 18), 0.82: (14, 17),
    0.88: (15, 17), 0.94: (15, 16), 1.0: (16, 16), 1.07: (16, 15), 1.13: (17, 15), 1.21: (17, 14),
    1.29: (18, 14), 1.38: (18, 13), 1.46: (19, 13), 1.67: (20, 12), 1.75: (21, 12), 2.0: (22, 11),
    2.09: (23, 11), 2.4: (24, 10), 2.5: (25, 10), 2.89: (26, 9), 3.0: (27, 9), 3.11: (28, 9),
    3.62: (29, 8), 3.75: (30, 8), 3.88: (31, 8), 4.0: (32, 8),
}
# Units of 64 px. Some labels (4.0 for 90:22) are off by up to 0.09; they still decide the bucket.
_GRID_2880 = {
    0.25: (22, 90), 0.26: (22, 87), 0.27: (22, 84), 0.28: (22, 81), 0.32: (25, 78), 0.33: (25, 75),
    0.34: (25, 73), 0.4: (28, 70), 0.42: (28, 67), 0.47: (30, 64), 0.49: (30, 61), 0.51: (30, 59),
    0.55: (33, 60), 0.59: (33, 56), 0.68: (36, 53), 0.72: (36, 50), 0.78: (39, 50), 0.83: (39, 47),
    0.89: (42, 47), 0.93: (42, 45), 1.0: (45, 45), 1.07: (45, 42), 1.12: (47, 42), 1.21: (47, 39),
    1.28: (50, 39), 1.39: (50, 36), 1.47: (53, 36), 1.7: (56, 33), 1.82: (60, 33), 2.03: (61, 30),
    2.13: (64, 30), 2.39: (67, 28), 2.5: (70, 28), 2.92: (73, 25), 3.0: (75, 25), 3.12: (78, 25),
    3.68: (81, 22), 3.82: (84, 22), 3.95: (87, 22), 4.0: (90, 22),
}
# fmt: on


def _scale_grid(grid: dict[float, tuple[int, int]], unit: int) -> dict[float, tuple[int, int]]:
    return {label: (rows * unit, cols * unit) for label, (rows, cols) in grid.items()}


# resolution -> {label of height / width: (height, width) in pixels}. The table for 4096 is ours:
# none was published, and the common grid times 256 px continues the others.
ASPECT_RATIOS = {
    **{side: _scale_grid(_COMMON_GRID, side // 16) for side in (256, 512, 1024, 2048, 4096)},
    2880: _scale_grid(_GRID_2880, 64),
}
RESOLUTIONS = {"256": 256, "512": 512, "1k": 1024, "2k": 2048, "2880": 2880, "4k": 4096}
MAX_RESOLUTION = 4096
MAX_SIDE = 8192  # pixels: the long side of the 4:1 bucket at 4096
MIN_TOKENS = 4  # per side: 64 px with an f8 VAE; below that there is nothing to see


def aspect_ratios(resolution: int, multiple: int = 16) -> dict[float, tuple[int, int]]:
    """Return {height / width: (height, width)} of the buckets with about resolution² pixels.

    The published table where there is one and its sides are multiples of `multiple`; otherwise the
    common grid scaled to `resolution`, each side rounded to a multiple.
    """
    table = ASPECT_RATIOS.get(resolution)
    if table and not any(side % multiple for size in table.values() for side in size):
        return table
    unit = resolution / 16 / multiple
    sizes = [
        # Halves go up: round() would take them to the even number.
        tuple(max(1, int(count * unit + 0.5)) * multiple for count in cell)
        for cell in _COMMON_GRID.values()
    ]
    return {height / width: (height, width) for height, width in sizes}


def nearest_bucket(
    height: float, width: float, resolution: int, multiple: int = 16
) -> tuple[int, int]:
    """Return (height, width) of the bucket whose label is nearest to height / width.

    Nearest on a linear scale and by the published labels, not by the true ratios, as in training.
    """
    table = aspect_ratios(resolution, multiple)
    return table[min(table, key=lambda label: abs(label - height / width))]


@dataclass(frozen=True)
class Resolved:
    """A size to generate, in pixels. note: one line for the user on where it comes from."""

    height: int
    width: int
    note: str


def resolve_size(
    size: str | int | None = None,
    aspect: str | None = None,
    resolution: str | int | None = None,
    *,
    native: int,
    multiple: int = 16,
) -> Resolved:
    """Turn what a user typed into a size.

    size: "1024" (a square) or "3840x2160" (WIDTHxHEIGHT), taken exactly.
    aspect, resolution: "16:9" (WIDTH:HEIGHT) and "256", "512", "1k", "2k", "2880", "4k" or pixels;
    the nearest bucket. Without an aspect a square, without a resolution that of the model.
    native: side in pixels of the square that the model was made for; the size if nothing is asked.
    multiple: sides must be multiples of it: VAE factor times patch size.
    Raises ValueError for anything else, with a way out.
    """
    if size is not None and (aspect is not None or resolution is not None):
        other = "an aspect" if aspect is not None else "a resolution"
        raise ValueError(
            f"size must be given without aspect and resolution, got {size} and {other}"
        )
    # A tiny model may draw its own size, however small.
    low = min(MIN_TOKENS * multiple, native)
    if size is not None:
        height, width = _parse_size(size)
        _check_sides(size, height, width, low, multiple)
        note = f"{width}x{height}, exactly as asked"
        return Resolved(height, width, note + _compare_area(height, width, native))
    side = native if resolution is None else _parse_resolution(resolution, low, multiple)
    height, width = side, side
    note = f"{width}x{height}, " + (
        "the model's own size" if resolution is None else "the square bucket"
    )
    if aspect is not None:
        height, width = nearest_bucket(*_parse_aspect(aspect), side, multiple)
        note = f"nearest {side}-px bucket to {aspect}: {width}x{height}"
    return Resolved(height, width, note + _compare_area(height, width, native))


def _parse_size(size: str | int) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})(?:\s*[x×]\s*(\d{1,9}))?", str(size).strip().lower())
    if match is None:
        is_resolution = str(size).strip().lower() in RESOLUTIONS
        raise ValueError(
            f"size must be a side (1024) or WIDTHxHEIGHT (1344x768) in whole pixels, got {size!r}"
            + (f"; give resolution {size} for that" if is_resolution else "")
        )
    width, height = match[1], match[2] or match[1]
    return int(height), int(width)


def _check_sides(size: str | int, height: int, width: int, low: int, multiple: int) -> None:
    if min(height, width) < low or max(height, width) > MAX_SIDE:
        inside = _format_size(
            *(min(max(side, low), MAX_SIDE) // multiple * multiple for side in (height, width))
        )
        raise ValueError(f"size must be {low} to {MAX_SIDE} px a side, got {size}; try {inside}")
    if height % multiple or width % multiple:
        below = _format_size(height // multiple * multiple, width // multiple * multiple)
        above = _format_size(_round_up(height, multiple), _round_up(width, multiple))
        raise ValueError(
            f"size must be a multiple of {multiple} on both sides, got {size}; "
            f"try {below} or {above}"
        )


def _parse_aspect(aspect: str) -> tuple[float, float]:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*:\s*(\d+(?:\.\d+)?)", aspect.strip())
    width, height = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if not width or not height:
        raise ValueError(
            f"aspect must be WIDTH:HEIGHT, two numbers above 0 such as 16:9, got {aspect!r}"
        )
    if not 0.25 <= height / width <= 4:
        raise ValueError(
            f"aspect must be between 4:1 and 1:4, where the buckets end, got {aspect}; "
            "give the size as WIDTHxHEIGHT instead"
        )
    return height, width


def _parse_resolution(resolution: str | int, low: int, multiple: int) -> int:
    text = str(resolution).strip().lower()
    if text not in RESOLUTIONS and not re.fullmatch(r"\d{1,9}", text):
        names = ", ".join(RESOLUTIONS)
        raise ValueError(f"resolution must be {names} or a number of pixels, got {resolution!r}")
    side = RESOLUTIONS[text] if text in RESOLUTIONS else int(text)
    if not low <= side <= MAX_RESOLUTION:
        raise ValueError(
            f"resolution must be {low} to {MAX_RESOLUTION} px, got {resolution}; "
            f"a size may have sides of up to {MAX_SIDE} px"
        )
    if side % multiple:
        below, above = side // multiple * multiple, _round_up(side, multiple)
        raise ValueError(
            f"resolution must be a multiple of {multiple}, got {resolution}; try {below} or {above}"
        )
    return side


def _round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _format_size(height: int, width: int) -> str:
    return f"{width}x{height}"


def _compare_area(height: int, width: int, native: int) -> str:
    factor = height * width / native**2
    if 0.5 <= factor <= 2:
        return ""
    return f" ({factor:.2g} times the pixels of this model's {native}x{native})"


def position_scale(resolution: int, family: str = "sigma") -> float:
    """Return `pe_interpolation` of the released models at a resolution in pixels.

    With base_size = resolution / 16, PixArt-Σ keeps every coordinate in [0, 32): resolution / 512.
    PixArt-α never goes below 1, so that its 256-px models span [0, 16).
    """
    if family not in ("sigma", "alpha"):
        raise ValueError(f'family must be "sigma" or "alpha", got {family!r}')
    return max(resolution / 512, 1.0) if family == "alpha" else resolution / 512


def position_embedding(
    dim: int,
    grid: tuple[int, int],
    base_size: int,
    pe_interpolation: float,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the fixed position table of a (rows, cols) token grid: (rows·cols, dim), float32.

    Row i has the coordinate i / (rows / base_size) / pe_interpolation, column j the same with cols.
    Both axes therefore span [0, base_size / pe_interpolation) whatever the grid, [0, 32) in every
    PixArt-Σ model: at another size or shape a model still meets only coordinates of the range that
    it was trained on, denser or sparser, and a non-square image is squeezed into the same square.

    A line of the table is [sin column | cos column | sin row | cos row], dim / 4 frequencies
    10000^(-4k / dim) each. Coordinates are float32 and angles float64, as published; of `device`,
    which is not the default one because MPS has no float64.
    """
    rows, cols = grid
    if dim < 4 or dim % 4:
        raise ValueError(f"dim must be a positive multiple of 4, got {dim}")
    if rows < 1 or cols < 1:
        raise ValueError(f"grid must have at least one row and one column, got {grid}")
    if base_size <= 0 or pe_interpolation <= 0:
        raise ValueError(
            "base_size and pe_interpolation must be positive, "
            f"got {base_size} and {pe_interpolation}"
        )
    scales = (base_size, pe_interpolation, device)
    row_part = _encode_axis(dim // 2, rows, *scales).unsqueeze(1).expand(rows, cols, -1)
    col_part = _encode_axis(dim // 2, cols, *scales).unsqueeze(0).expand(rows, cols, -1)
    return torch.cat([col_part, row_part], dim=2).flatten(0, 1)


def _encode_axis(
    dim: int, length: int, base_size: int, pe_interpolation: float, device: torch.device | str
) -> Tensor:
    index = torch.arange(length, dtype=torch.float32, device=device)
    coordinate = index / (length / base_size) / pe_interpolation
    exponent = torch.arange(dim // 2, dtype=torch.float64, device=device) / (dim // 2)
    angle = torch.outer(coordinate.double(), 10000.0**-exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()
