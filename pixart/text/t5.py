"""The encoder of T5 as functions of its weights, a block at a time.

Written from the description of the network (arXiv 1910.10683; T5 v1.1's gated feed-forward layer: arXiv
2002.05202), with the operations in the order in which transformers 5 has them, so that features have the bits
that it gives. No module holds the weights: a block is computed with whatever tensors its caller has ready.

Numerics. Norms are computed in fp32. In fp16 `wo` stays in fp32, as in transformers, and what is added to the
stream with it: there T5 overflows.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pixart.files import short
from pixart.text.stored import EMBEDDING

FINAL_NORM = "encoder.final_layer_norm.weight"
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_ATTENTION, _FEED_FORWARD = "layer.0.SelfAttention", "layer.1.DenseReluDense"
_NORMS = ("layer.0.layer_norm.weight", "layer.1.layer_norm.weight")
WO = f"{_FEED_FORWARD}.wo.weight"
# What transformers takes for what a config.json leaves out.
DEFAULTS = {
    "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
    "relative_attention_num_buckets": 32,
}  # fmt: skip
_DISTANCE, _EPSILON = 128, 1e-6
_MOST = 2**24  # of a size


def _gelu_new(x: Tensor) -> Tensor:
    """By a hyperbolic tangent, as the first BERT had it."""
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "silu": F.silu,
    "swish": F.silu,
}


@dataclass(frozen=True)
class T5Shape:
    """Sizes and settings of an encoder; width: of the features."""

    vocabulary: int
    width: int
    head: int
    inner: int
    layers: int
    heads: int
    buckets: int
    distance: int = _DISTANCE
    epsilon: float = _EPSILON
    activation: str = "gelu_new"
    is_gated: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "T5Shape":
        """As a config.json of transformers has it. ValueError for what no encoder has."""
        values = {**DEFAULTS, "relative_attention_max_distance": _DISTANCE, **config}
        names = (*DEFAULTS, "relative_attention_max_distance")
        for name in names:
            value = values[name]
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
                raise ValueError(f"{name} must be a whole number from 1, got {short(value)}")
        epsilon = check_epsilon("layer_norm_epsilon", values.get("layer_norm_epsilon", _EPSILON))
        activation, is_gated = _activation(values.get("feed_forward_proj", "relu"))
        buckets, distance = values[names[-2]], values[names[-1]]
        if buckets < 4 or distance <= buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance must be above a quarter of the buckets, of which there are 4 "
                f"at least, got {distance} and {buckets}"
            )
        return cls(
            values["vocab_size"], values["d_model"], values["d_kv"], values["d_ff"],
            values["num_layers"], values["num_heads"], buckets, distance, epsilon, activation,
            is_gated,
        )  # fmt: skip

    @classmethod
    def seen_in(cls, shapes: Mapping[str, tuple[int, ...]]) -> "T5Shape":
        """The sizes that tensors of transformers' names have, with the settings of T5 v1.1, or of T5 where
        the feed-forward layers have no gate. ValueError where they are no T5's."""
        numbers = [re.match(r"encoder\.block\.(\d{1,4})\.", name) for name in shapes]
        blocks = {int(found[1]) for found in numbers if found}
        try:
            vocabulary, width = shapes[EMBEDDING]
            buckets, heads = shapes[BIAS]
            rows, _ = shapes[f"encoder.block.0.{_ATTENTION}.q.weight"]
            _, inner = shapes[f"encoder.block.0.{WO}"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"must hold the encoder of T5, but has no {error}") from None
        if min(vocabulary, width, heads, rows, inner) < 1 or buckets < 4:
            raise ValueError(
                f"must hold the encoder of T5, but has tensors of the sizes {shapes[EMBEDDING]}, {shapes[BIAS]}, "
                f"{(rows, inner)}"
            )
        is_gated = f"encoder.block.0.{_FEED_FORWARD}.wi_0.weight" in shapes
        return cls(
            vocabulary, width, rows // max(heads, 1), inner, max(blocks) + 1, heads, buckets,
            activation="gelu_new" if is_gated else "relu", is_gated=is_gated,
        )  # fmt: skip

    def to_config(self) -> dict[str, Any]:
        """A config.json that transformers opens."""
        return {
            "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": self.vocabulary,
            "d_model": self.width, "d_kv": self.head, "d_ff": self.inner, "num_layers": self.layers,
            "num_heads": self.heads, "relative_attention_num_buckets": self.buckets,
            "relative_attention_max_distance": self.distance, "layer_norm_epsilon": self.epsilon,
            "feed_forward_proj": self._feed_forward, "dropout_rate": 0.1,
            "eos_token_id": 1, "pad_token_id": 0, "is_encoder_decoder": False,
        }  # fmt: skip

    @property
    def _feed_forward(self) -> str:
        if not self.is_gated:
            return self.activation
        return "gated-" + {"gelu_new": "gelu"}.get(self.activation, self.activation)

    @property
    def block(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a block, without the first one's position bias."""
        width, inner = self.width, self.heads * self.head
        ways_in = ("wi_0", "wi_1") if self.is_gated else ("wi",)
        return {
            **{f"{_ATTENTION}.{name}.weight": (inner, width) for name in "qkv"},
            f"{_ATTENTION}.o.weight": (width, inner),
            _NORMS[0]: (width,),
            **{f"{_FEED_FORWARD}.{name}.weight": (self.inner, width) for name in ways_in},
            WO: (width, self.inner),
            _NORMS[1]: (width,),
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """All tensors of the encoder."""
        return {
            EMBEDDING: (self.vocabulary, self.width),
            BIAS: (self.buckets, self.heads),
            FINAL_NORM: (self.width,),
            **{
                block_name(layer, name): shape
                for layer in range(self.layers)
                for name, shape in self.block.items()
            },
        }


def block_name(layer: int, name: str) -> str:
    return f"encoder.block.{layer}.{name}"


def check_epsilon(name: str, value: Any) -> float:
    """An infinite one makes every caption the same, all zeros."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number above 0, up to 1, got {value!r:.60}")
    return float(value)


def _activation(name: Any) -> tuple[str, bool]:
    """gelu_new and True of "gated-gelu", relu and False of "relu"."""
    is_gated = isinstance(name, str) and name.startswith("gated-")
    kind = name.removeprefix("gated-") if isinstance(name, str) else None
    if name == "gated-gelu":
        kind = "gelu_new"
    if kind not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(
            f"feed_forward_proj must be one of {known}, or gated- before it, got {short(name)}"
        )
    return kind, is_gated


def position_bias(weight: Tensor, length: int, padding: int, shape: T5Shape) -> Tensor:
    """What every block adds to the attention of each token to each other: (1, heads, length, length).

    weight: (buckets, heads), a number for each range of distances and each head. padding: tokens at the end
    that none attends to."""
    places = torch.arange(length, device=weight.device)
    bias = F.embedding(_buckets(places[None, :] - places[:, None], shape), weight)
    bias = bias.permute(2, 0, 1).unsqueeze(0)
    if padding:
        seen = places < length - padding
        bias = torch.where(seen, bias, torch.finfo(bias.dtype).min)
    return bias.contiguous()


def _buckets(distance: Tensor, shape: T5Shape) -> Tensor:
    """A half of the buckets for either direction: in it a half for each distance from 0 on, and the rest for
    ranges that grow with the logarithm up to `shape.distance`, which all beyond share."""
    half = shape.buckets // 2
    exact, far = half // 2, distance.abs()
    share = torch.log(far.float() / exact) / math.log(shape.distance / exact)
    ranges = (exact + (share * (half - exact)).to(torch.long)).clamp(max=half - 1)
    return (distance > 0).to(torch.long) * half + torch.where(far < exact, far, ranges)


def run_block(x: Tensor, weights: Mapping[str, Tensor], bias: Tensor, shape: T5Shape) -> Tensor:
    """A block on the stream of one prompt: x (1, L, width). weights: as `T5Shape.block` names them."""
    seen = norm(x, weights[_NORMS[0]], shape)
    heads = (1, -1, shape.heads, shape.head)
    q, k, v = (
        F.linear(seen, weights[f"{_ATTENTION}.{name}.weight"]).view(heads).transpose(1, 2)
        for name in "qkv"
    )
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # T5 scales nothing
    mixed = mixed.transpose(1, 2).reshape(1, x.shape[1], -1)
    x = _bounded(x + F.linear(mixed, weights[f"{_ATTENTION}.o.weight"]))
    seen = norm(x, weights[_NORMS[1]], shape)
    activation = _ACTIVATIONS[shape.activation]
    if shape.is_gated:
        gate = activation(F.linear(seen, weights[f"{_FEED_FORWARD}.wi_0.weight"]))
        inner = gate * F.linear(seen, weights[f"{_FEED_FORWARD}.wi_1.weight"])
    else:
        inner = activation(F.linear(seen, weights[f"{_FEED_FORWARD}.wi.weight"]))
    return _bounded(x + F.linear(inner.to(weights[WO].dtype), weights[WO]))


def norm(x: Tensor, weight: Tensor, shape: T5Shape) -> Tensor:
    """By the root of the mean square, in fp32; no mean is taken away and no bias added."""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + shape.epsilon)
    return weight * (x if weight.dtype == torch.float32 else x.to(weight.dtype))


def _bounded(x: Tensor) -> Tensor:
    """What overflows in fp16 is the largest number, or a little less."""
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(x.dtype).max
    bound = torch.where(x.isinf().any(), most - 1000, most)
    return torch.clamp(x, min=-bound, max=bound)
