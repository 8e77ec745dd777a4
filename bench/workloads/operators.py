"""The operators at the sizes that a PixArt model gives them: inputs, work, who else computes the same.

A workload names an operator and a shape. Its inputs have the layout that they have in the model:
q, k and v are views of one packed projection.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import pixart_kernels
from bench.workloads import sizes as shapes

Inputs = dict[str, Any]


class Workload(NamedTuple):
    """kind: of attention, what the keys are ("self", "compressed", "cross", "masked"); of
    gate_add_modulate, "gated" or "plain"; otherwise empty."""

    operator: str
    resolution: str
    kind: str = ""
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    ratio: int = shapes.RATIO

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [self.operator, self.kind, self.resolution, f"b{self.batch}", dtype]
        if self.operator == "compress_kv":
            parts.append(f"r{self.ratio}")
        return "/".join(part for part in parts if part)

    @property
    def model(self) -> shapes.Model:
        return shapes.model(self.resolution)

    @property
    def queries(self) -> int:
        return shapes.tokens(self.resolution)

    @property
    def keys(self) -> int:
        return shapes.keys(self.kind, self.resolution, self.ratio)

    @property
    def key_lengths(self) -> list[int]:
        """Of a masked attention: a full caption, then short ones."""
        return [self.keys if not i else self.keys // (3 * i) for i in range(self.batch)]

    @property
    def shape(self) -> dict[str, Any]:
        """For a row of results."""
        sizes: dict[str, Any] = {"batch": self.batch, "tokens": self.queries}
        if self.operator == "flash_attention":
            heads = {"keys": self.keys, "heads": self.model.heads, "head_dim": self.model.head_dim}
            return sizes | heads
        channels: dict[str, Any] = {"channels": self.model.hidden_size}
        if self.operator in ("compress_kv", "project_kv"):
            channels |= {"ratio": self.ratio, "grid": list(shapes.grid(self.resolution))}
        return sizes | channels

    @property
    def options(self) -> Inputs:
        """The operator's arguments that are no tensors."""
        if self.operator in ("compress_kv", "project_kv"):
            return {"grid": shapes.grid(self.resolution), "ratio": self.ratio}
        return {"gate": None} if self.kind == "plain" else {}

    def flops(self, backward: bool) -> int:
        width = self.model.hidden_size
        if self.operator == "project_kv":
            return 2 * self.batch * self.queries * width * 2 * width
        if self.operator != "flash_attention":
            return 0
        keys = self.key_lengths if self.kind == "masked" else [self.keys] * self.batch
        return shapes.attention_flops(1, self.queries, sum(keys), width, backward)

    def bytes(self, backward: bool) -> int:
        width, size = self.model.hidden_size, self.dtype.itemsize
        if self.operator == "flash_attention":
            return shapes.attention_bytes(
                self.batch, self.queries, self.keys, width, size, backward
            )
        if self.operator == "compress_kv":
            grid = shapes.grid(self.resolution)
            return shapes.compress_bytes(self.batch, grid, self.ratio, width, size, backward)
        if self.operator == "project_kv":
            tokens = self.queries + 2 * shapes.tokens(self.resolution, self.ratio)
            return self.batch * tokens * width * size
        name = "add_modulate" if self.kind == "plain" else self.operator
        return shapes.elementwise_bytes(name, self.batch, self.queries, width, size, backward)

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        """Keyword arguments for the operator; tensors are random, floating-point ones want a gradient."""
        generator = torch.Generator(device).manual_seed(seed)
        tensors = _INPUTS[self.operator](self, generator)
        for tensor in tensors.values():
            tensor.requires_grad_(tensor.is_floating_point())
        return {**tensors, **self.options}

    @property
    def ours(self) -> Callable[..., Any]:
        if self.operator == "project_kv":
            return partial(project_kv, pixart_kernels.compress_kv)
        return getattr(pixart_kernels, self.operator)

    @property
    def reference(self) -> Callable[..., Any]:
        if self.operator == "project_kv":
            return partial(project_kv, pixart_kernels.compress_kv_reference)
        return getattr(pixart_kernels, f"{self.operator}_reference")


def project_kv(
    compress: Callable[..., Any], x: Tensor, projection: Tensor, offset: Tensor, **merge: Any
) -> tuple[Tensor, Tensor]:
    """What a compressed block does to tokens before attention: the projection, then compress_kv."""
    k, v = F.linear(x, projection, offset).chunk(2, dim=2)
    return compress(k, v, **merge)


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def differentiable(inputs: Inputs) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.requires_grad
    }


def output_gradients(outputs: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return tuple(_random(generator, *out.shape, dtype=out.dtype) for out in outputs)


def _random(generator: Generator, *size: int, dtype: torch.dtype, scale: float = 1) -> Tensor:
    numbers = torch.randn(size, generator=generator, device=generator.device, dtype=torch.float32)
    return (scale * numbers).to(dtype)


def _attention(work: Workload, generator: Generator) -> Inputs:
    heads, width = (work.model.heads, work.model.head_dim), work.dtype
    sizes = (work.batch, work.queries)
    if work.kind in ("self", "compressed"):
        q, k, v = _random(generator, *sizes, 3, *heads, dtype=width).unbind(2)
    if work.kind == "compressed":
        k, v = (_random(generator, work.batch, work.keys, *heads, dtype=width) for _ in range(2))
    if work.kind in ("cross", "masked"):
        q = _random(generator, *sizes, *heads, dtype=width)
        k, v = _random(generator, work.batch, work.keys, 2, *heads, dtype=width).unbind(2)
    tensors = {"q": q, "k": k, "v": v}
    if work.kind == "masked":
        tensors["kv_lengths"] = torch.tensor(
            work.key_lengths, dtype=torch.int32, device=generator.device
        )
    return tensors


def _compression(work: Workload, generator: Generator) -> Inputs:
    width, ratio = work.model.hidden_size, work.ratio
    _, k, v = _random(generator, work.batch, work.queries, 3 * width, dtype=work.dtype).chunk(
        3, dim=2
    )
    rows = {
        name: _random(generator, width, dtype=work.dtype, scale=0.1)
        for name in ("bias", "norm_weight", "norm_bias")
    }
    weight = _random(generator, width, 1, ratio, ratio, dtype=work.dtype, scale=1 / ratio)
    return {"k": k, "v": v, "weight": weight, **rows}


def _projection(work: Workload, generator: Generator) -> Inputs:
    merge = _compression(work, generator)
    width, dtype = work.model.hidden_size, work.dtype
    x = _random(generator, work.batch, work.queries, width, dtype=dtype)
    projection = _random(generator, 2 * width, width, dtype=dtype, scale=width**-0.5)
    offset = _random(generator, 2 * width, dtype=dtype, scale=0.1)
    del merge["k"], merge["v"]
    return {"x": x, "projection": projection, "offset": offset, **merge}


def _elementwise(work: Workload, generator: Generator) -> Inputs:
    rows = ["gate"] if work.operator != "modulate" and work.kind != "plain" else []
    rows += ["shift", "scale"] if work.operator != "gate_add" else []
    sizes = (work.batch, work.queries, work.model.hidden_size)
    tensors = {"x": _random(generator, *sizes, dtype=work.dtype)}
    if work.operator != "modulate":
        tensors["branch"] = _random(generator, *sizes, dtype=work.dtype)
    for name in rows:
        # In the model these rows are slices of fp32 tables, whatever the tokens' dtype.
        table = _random(generator, work.batch, 6, sizes[2], dtype=torch.float32, scale=0.5)
        tensors[name] = table[:, 1]
    return tensors


_INPUTS: dict[str, Callable[[Workload, Generator], Inputs]] = {
    "flash_attention": _attention,
    "compress_kv": _compression,
    "project_kv": _projection,
    "modulate": _elementwise,
    "gate_add": _elementwise,
    "gate_add_modulate": _elementwise,
}
