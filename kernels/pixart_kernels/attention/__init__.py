"""Flash attention for head dimensions up to 128, tuned for 72."""

from pixart_kernels.attention.operator import flash_attention, flash_attention_reference

__all__ = ["flash_attention", "flash_attention_reference"]
