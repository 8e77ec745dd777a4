"""PixArt-Σ and PixArt-α, fast: run, convert and train them, with KV token compression.

Everything here is imported on first use, so that `import pixart` and `--help` cost little.
"""

TYPE_CHECKING = False  # type checkers take it for typing's, whose import takes a while
if TYPE_CHECKING:
    from typing import Any

    from pixart.config import KVCompression, PixArtConfig
    from pixart.model.transformer import PixArt
    from pixart.pipeline.text_to_image import Pipeline

__all__ = ["KVCompression", "PixArt", "PixArtConfig", "Pipeline"]
__version__ = "0.1.0"

_HOMES = {
    "KVCompression": "pixart.config",
    "PixArtConfig": "pixart.config",
    "PixArt": "pixart.model",
    "Pipeline": "pixart.pipeline",
}


def __getattr__(name: str) -> "Any":
    if name not in _HOMES:
        raise AttributeError(f"module 'pixart' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
