"""Merging of keys and values, and the projection folded into it."""

from pixart_kernels.compression.operator import compress_kv, compress_kv_reference, fold_projection

__all__ = ["compress_kv", "compress_kv_reference", "fold_projection"]
