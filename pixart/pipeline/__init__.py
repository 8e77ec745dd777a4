"""From a prompt to a picture. What needs torch is imported on first use; `request` does not."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixart.pipeline.request import Request
    from pixart.pipeline.text_to_image import OPENING, Drawn, Pipeline

__all__ = ["Drawn", "OPENING", "Pipeline", "Request"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pixart.pipeline' has no attribute {name!r}")
    from importlib import import_module

    home = "request" if name == "Request" else "text_to_image"
    return getattr(import_module(f"pixart.pipeline.{home}"), name)
