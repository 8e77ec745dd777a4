"""What goes over the wire where processes share a picture's tokens: computed from the sizes, never measured."""

from collections.abc import Iterator

from bench.reporting.text import table
from bench.workloads import sizes
from pixart.config import PixArtConfig
from pixart.model.exchange import layer_bytes

PROCESSES = (2, 4, 8)
SIZES = ("1k", "2k", "2880", "4k")
ITEM = 2  # bytes of bf16
MODELS = {
    "dense": None,
    "R2 in half": sizes.Compression(),
    "R2 everywhere": sizes.Compression(everywhere=True),
    "R4 everywhere": sizes.Compression(4, everywhere=True),
}


def overview() -> str:
    """A line for each size and model: the way that is taken, in brackets each way alone."""
    columns = ["image", "model", *(f"{count} processes" for count in PROCESSES)]
    return table(columns, _lines())


def _lines() -> Iterator[list[str]]:
    for size in SIZES:
        for name, compression in MODELS.items():
            config = sizes.config(size, compression)
            cells = [_cell(config, sizes.grid(size), count) for count in PROCESSES]
            yield [size, name, *cells]


def _cell(config: PixArtConfig, grid: tuple[int, int], processes: int) -> str:
    layers = [layer_bytes(config, layer, grid, processes, ITEM) for layer in range(config.depth)]
    best = sum(min(one) for one in layers)
    gather, heads = (sum(way) for way in zip(*layers, strict=True))
    return f"**{_shown(best)}** (gather {_shown(gather)}, heads {_shown(heads)})"


def _shown(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
