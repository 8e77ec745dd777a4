"""The element-wise work of a block in adaLN-single: LayerNorm, scale, shift, gate."""

from pixart_kernels.modulation.operator import (
    gate_add,
    gate_add_modulate,
    gate_add_modulate_reference,
    gate_add_reference,
    modulate,
    modulate_reference,
)

__all__ = [
    "gate_add",
    "gate_add_modulate",
    "gate_add_modulate_reference",
    "gate_add_reference",
    "modulate",
    "modulate_reference",
]
