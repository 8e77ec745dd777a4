"""From a prompt to a picture. What needs torch is imported on first use; `request` does not."""

from typing import TYPE_CHECKING

from pixart.lazy import lazily

if TYPE_CHECKING:
    from pixart.pipeline.request import Request
    from pixart.pipeline.text_to_image import OPENING, Drawn, Pipeline

__all__ = ["Drawn", "OPENING", "Pipeline", "Request"]


__getattr__ = lazily(
    __name__,
    dict.fromkeys(__all__, "pixart.pipeline.text_to_image")
    | {"Request": "pixart.pipeline.request"},
)
