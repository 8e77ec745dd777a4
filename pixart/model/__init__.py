"""The transformer, under the tensor names of the published checkpoints."""

from pixart.model.transformer import PixArt

__all__ = ["PixArt"]
