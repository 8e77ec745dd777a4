"""Make Triton's interpreter right for bfloat16 and for the fp8 that attention uses, e4m3.

TRITON_INTERPRET=1 runs kernels on CPU tensors. Up to Triton 3.9 it keeps both as their bits, and some
operations take them for what they are not: `tl.dot` multiplies the bits of bfloat16 as integers and
takes a NaN of fp8 for 480, and the casts from fp32 drop low bits, or let a carry spoil the exponent,
where hardware rounds to nearest even.
"""

from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

np: Any = interpreter.np  # the interpreter needs NumPy; kernels do not


def correct_bfloat16() -> None:
    """Replace the operations; a second call does nothing."""
    builder: Any = interpreter.InterpreterBuilder
    if hasattr(builder, "_pixart_corrected"):
        return
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl
    plain_fp_cast = builder.create_fp_to_fp

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if not {tl.bfloat16, tl.float8e4nv} & {a.dtype.scalar, b.dtype.scalar}:
            return plain_dot(self, a, b, d, *options)
        product = np.matmul(_widen(a), _widen(b), dtype=np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_round(src.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widen(src), tl.float32)
        return plain_cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.float8e4nv):
            return plain_fp_cast(self, src, dst_type, rounding_mode)
        return interpreter.TensorHandle(_round_to_e4m3(src.data), tl.float8e4nv)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
    builder._pixart_corrected = True


def _widen(handle: Any) -> Any:
    if handle.dtype.scalar == tl.float8e4nv:
        bits = torch.from_numpy(np.ascontiguousarray(handle.data))
        return bits.view(torch.float8_e4m3fn).float().numpy()
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _round(values: Any) -> Any:
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    # Half of the last kept bit, less one if that bit is even; the carry may reach the exponent.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40  # rounding could carry a NaN into infinity
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def _round_to_e4m3(values: Any) -> Any:
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    # A GPU's cast gives the largest number for what is larger, where PyTorch's gives NaN.
    return wide.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
