"""Transformers whose linear layers torchao has quantised, on a CPU: every product is the layer's own."""

from collections import Counter
from typing import Any

import pytest
import torch
from small_model import build, inputs, relative_error
from torch import Tensor, nn

from pixart.config import KVCompression
from pixart.model.transformer import PixArt

quantization = pytest.importorskip(
    "torchao.quantization", reason="needs torchao: pip install 'pixart-fast[train]'"
)

CONFIGS = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")
CONV = KVCompression((0,), 2, "conv")


def _quantised(config: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PixArt:
    model = build(**changes).to(dtype)
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def _dequantised(model: PixArt, **changes: Any) -> PixArt:
    """A plain model with the numbers that the quantised weights stand for."""
    plain = build(**changes)
    for name, parameter in model.named_parameters():
        is_plain = type(parameter) is nn.Parameter
        values = parameter if is_plain else parameter.dequantize()
        plain.get_parameter(name).data = values.detach().float()
    return plain


# 32 × 32 tokens: enough for keys and values to be projected and merged as one product.
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("compression", [None, CONV])
@torch.no_grad()
def test_a_quantised_model_computes_what_its_weights_stand_for(
    config: str, compression: KVCompression | None
) -> None:
    changes = {"depth": 1, "kv_compression": compression}
    model = _quantised(config, **changes)
    given = inputs(1, 64, 64)
    expected = _dequantised(model, **changes)(*given)
    # Weights are exact here, so that only rounding differs; activations of 8 bits have steps of 1/127 of a
    # token's largest number.
    bound = 1e-5 if "WeightOnly" in config else 0.03
    error = relative_error(model(*given), expected)
    assert error < bound and (bound < 1e-4 or error > 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_quantised_layer_is_called(dtype: torch.dtype, monkeypatch: Any) -> None:
    model = _quantised(CONFIGS[0], dtype, depth=1, kv_compression=CONV)
    calls: Counter[int] = Counter()
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        calls[id(self)] += 1
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    assert model(*inputs(1, 64, 64)).isfinite().all()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert all(type(layer.weight) is not nn.Parameter for layer in layers)
    assert [calls[id(layer)] for layer in layers] == [1] * len(layers)


@torch.no_grad()
def test_a_model_that_is_not_quantised_still_fuses(monkeypatch: Any) -> None:
    """Or the test above would hold of a model that never does."""
    model = build(depth=1, kv_compression=CONV)
    calls: Counter[int] = Counter()
    monkeypatch.setattr(
        nn.Linear,
        "forward",
        lambda self, x: calls.update([id(self)]) or x @ self.weight.t() + self.bias,
    )
    model(*inputs(1, 64, 64))
    assert calls[id(model.get_submodule("blocks.0.attn.qkv"))] == 0
