"""PixArt-Σ and PixArt-α, fast: run, convert and train them, with KV token compression.

Everything here is imported on first use, so that `import pixart` and `--help` cost little.
"""

from pixart.lazy import lazily

TYPE_CHECKING = False  # type checkers take it for typing's, whose import takes a while
if TYPE_CHECKING:
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


__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
