"""The operators of a PixArt transformer. Needs torch, and triton where there is a GPU; knows no model."""

from pixart_kernels.attention.operator import (
    SCALE_OF_SCALED,
    flash_attention,
    flash_attention_reference,
    takes_scaled_queries,
)
from pixart_kernels.compression.operator import compress_kv, compress_kv_reference, fold_projection
from pixart_kernels.modulation.operator import (
    gate_add,
    gate_add_modulate,
    gate_add_modulate_reference,
    gate_add_reference,
    modulate,
    modulate_reference,
)

__version__ = "0.1.0"  # the same as pixart.__version__; kernels/pyproject.toml reads it

__all__ = [
    "SCALE_OF_SCALED",
    "compress_kv",
    "compress_kv_reference",
    "flash_attention",
    "flash_attention_reference",
    "fold_projection",
    "gate_add",
    "gate_add_modulate",
    "gate_add_modulate_reference",
    "gate_add_reference",
    "modulate",
    "modulate_reference",
    "takes_scaled_queries",
]
