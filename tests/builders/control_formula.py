"""The published ControlNet-Transformer and the base that it steers, evaluated from a state dict with the
published names, in plain PyTorch: nothing here is the project's."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def evaluate(
    state: Mapping[str, Tensor],
    latents: Tensor,
    timesteps: Tensor,
    caption: Tensor,
    hint: Tensor,
    *,
    heads: int,
    scale: float = 1.0,
    sizes: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The prediction (B, out, h, w). state: `base_model.*` and `controlnet.*`. sizes: (B, 3), height,
    width and aspect ratio. positions: (N, C), those of the base's own table if None."""
    base = {n.removeprefix("base_model."): t for n, t in state.items() if n.startswith("base_")}
    table = base["pos_embed"][0] if positions is None else positions
    x, c = (_patches(base, "x_embedder.proj", each) + table for each in (latents, hint))
    t = _perceptron(base, "t_embedder.mlp", _waves(timesteps))
    if sizes is not None:
        parts = [_perceptron(base, "csize_embedder.mlp", _waves(sizes[:, k])) for k in (0, 1)]
        parts.append(_perceptron(base, "ar_embedder.mlp", _waves(sizes[:, 2])))
        t = t + torch.cat(parts, 1)
    t0 = _linear(base, "t_block.1", F.silu(t))
    y = _linear(base, "y_embedder.y_proj.fc1", caption)
    y = _linear(base, "y_embedder.y_proj.fc2", F.gelu(y, approximate="tanh"))
    depth = 1 + max(int(n.split(".")[1]) for n in base if n.startswith("blocks."))
    copies = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("controlnet."))
    for layer in range(depth):
        if 1 <= layer <= copies:
            place = f"controlnet.{layer - 1}"
            given = x + _linear(state, f"{place}.before_proj", c) if layer == 1 else c
            c = _block(state, f"{place}.copied_block", given, y, t0, heads)
            x = x + scale * _linear(state, f"{place}.after_proj", c)
        x = _block(base, f"blocks.{layer}", x, y, t0, heads)
    shift, scaling = (base["final_layer.scale_shift_table"] + t[:, None]).chunk(2, 1)
    x = _linear(base, "final_layer.linear", _normed(x) * (1 + scaling) + shift)
    side = base["x_embedder.proj.weight"].shape[-1]
    rows, columns = latents.shape[2] // side, latents.shape[3] // side
    x = x.reshape(len(x), rows, columns, side, side, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, rows * side, columns * side)


def _linear(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _patches(state: Mapping[str, Tensor], name: str, latents: Tensor) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.conv2d(latents, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def _waves(numbers: Tensor) -> Tensor:
    angles = numbers[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128).to(numbers)
    return torch.cat([angles.cos(), angles.sin()], 1)


def _perceptron(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return _linear(state, f"{name}.2", F.silu(_linear(state, f"{name}.0", x)))


def _normed(x: Tensor) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-6).sqrt()


def _block(
    state: Mapping[str, Tensor], name: str, x: Tensor, y: Tensor, t0: Tensor, heads: int
) -> Tensor:
    rows = state[f"{name}.scale_shift_table"] + t0.reshape(len(t0), 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = rows.chunk(6, 1)
    q, k, v = _linear(state, f"{name}.attn.qkv", _normed(x) * (1 + scale) + shift).chunk(3, -1)
    x = x + gate * _linear(state, f"{name}.attn.proj", _attention(q, k, v, heads))
    q = _linear(state, f"{name}.cross_attn.q_linear", x)
    k, v = _linear(state, f"{name}.cross_attn.kv_linear", y).chunk(2, -1)
    x = x + _linear(state, f"{name}.cross_attn.proj", _attention(q, k, v, heads))
    hidden = _linear(state, f"{name}.mlp.fc1", _normed(x) * (1 + scale_mlp) + shift_mlp)
    return x + gate_mlp * _linear(state, f"{name}.mlp.fc2", F.gelu(hidden, approximate="tanh"))


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)
