"""From a prompt to a picture."""

from pixart.pipeline.text_to_image import OPENING, Drawn, Pipeline

__all__ = ["Drawn", "OPENING", "Pipeline"]
