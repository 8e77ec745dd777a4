"""Transformers with weights of 8 bits, by torchao: each linear layer keeps its weight in int8 or fp8 (e4m3), with
a scale for each output, and multiplies in the dtype of its input.

Biases, tables and convolutions stay as they are. Weights are read whole and then quantised layer by layer, so that
loading takes as much memory as ever.
"""

import importlib.util
from typing import Literal, get_args

import torch
from torch import nn

Quantized = Literal["int8", "fp8"]


def check_quantize(
    wanted: str | None, dtype: torch.dtype | None, device: torch.device, is_planned: bool = False
) -> None:
    """Raise ValueError if weights cannot be quantised like this here, or torchao is not installed. dtype: None for
    the device's own. is_planned: for a plan of memory, which opens no weights."""
    if wanted is None:
        return
    if wanted not in get_args(Quantized):
        raise ValueError(f"quantize must be int8 or fp8, got {wanted!r}")
    if dtype is torch.float16:
        # torchao 0.18 sums int8 products in the dtype of the input and multiplies by the scale last. Its fp8 is
        # scaled first, as that of others is not (huggingface/optimum-quanto#231), and was tried in bf16 and fp32.
        raise ValueError(
            f"quantize must be left out for fp16, got {wanted}: sums of products that are scaled last leave its "
            "range; take bf16 or fp32"
        )
    if wanted == "fp8" and device.type == "mps":
        raise ValueError('quantize must be "int8" or left out on mps, which has no fp8 numbers')
    if is_planned:
        raise ValueError(
            f"quantize must be left out of a plan of memory (--plan), got {wanted}: what torchao's products "
            "take is not known to it; plan without, weights of 8 bits are about half of those of bf16"
        )
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(
            f"quantize must be left out without torchao, got {wanted}; pip install 'pixart-fast[quant]'"
        )


def quantize_linear(model: nn.Module, kind: Quantized) -> None:
    """Replace the weight of every linear layer, in place. ValueError where torchao cannot be imported."""
    try:
        from torchao.quantization import (
            Float8WeightOnlyConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError as error:
        raise ValueError(
            f"quantize must be left out without a torchao that has weights of 8 bits, got {kind} ({error}); "
            "pip install --upgrade 'pixart-fast[quant]'"
        ) from error
    config = Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig
    # Its settings for the compiler would be those of the whole process.
    quantize_(model, config(set_inductor_config=False))
