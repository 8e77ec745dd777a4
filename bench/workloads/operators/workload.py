"""An operator as the benches know it, and the calls of it that a PixArt makes.

The inputs of a call have the layout that they have in the model: q, k and v are views of one packed
projection. Peers are whoever computes the same; what they want in another layout is made once,
outside of what is timed.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure.case import Unavailable
from bench.workloads import sizes
from pixart.config import PixArtConfig

Inputs = dict[str, Any]
Variant = Callable[[Inputs], Callable[[], Any]]
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Oracle(NamedTuple):
    """expected: fp64 results by name ("out0", "out1", "d_q", ...); select: what of a result they
    are compared with."""

    expected: dict[str, Tensor]
    select: Callable[[Tensor], Tensor]


class Operator(NamedTuple):
    """kinds: of calls, compared and checked at every size; batched: those that need several samples.
    tuned: those whose configurations are timed one by one. more: further calls that are compared on a
    GPU; checked: further ones that are checked. compiled: calls that bench.resources compiles, under
    the name that `label` gives. inputs(work, draw): keyword arguments of a call. oracle: fp64 results,
    where those of the reference would not fit into memory.
    """

    name: str
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[["Workload", "Draw"], Inputs]
    bytes: Callable[["Workload", bool], int]
    peers: Callable[["Workload", bool], dict[str, Variant]]
    flops: Callable[["Workload", bool], int] = lambda work, backward: 0
    kinds: tuple[str, ...] = ("",)
    batched: tuple[str, ...] = ()
    tuned: tuple[str, ...] = ()
    more: "Calls" = lambda operator: ()
    checked: "Calls" = lambda operator: ()
    compiled: "Calls" = lambda operator: ()
    label: Callable[["Workload"], str] = lambda work: work.operator.name
    shape: Callable[["Workload"], dict[str, Any]] = lambda work: {}
    oracle: Callable[[Inputs, bool], Oracle] | None = None
    has_backward: bool = True


Calls = Callable[[Operator], "Sequence[Workload]"]


class Workload(NamedTuple):
    """A call of an operator. ratio: of compression. head_dim: another one than the model's."""

    operator: Operator
    size: str
    kind: str = ""
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    ratio: int = sizes.RATIO
    head_dim: int | None = None

    @property
    def name(self) -> str:
        shape = self.operator.shape(self)
        parts = [self.operator.name, self.kind, self.size, f"b{self.batch}", self.dtype_name]
        parts += [f"r{self.ratio}"] if "ratio" in shape else []
        return "/".join(part for part in parts if part)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def config(self) -> PixArtConfig:
        return sizes.config(self.size)

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def heads(self) -> tuple[int, int]:
        """How many, and how wide."""
        head_dim = self.head_dim or self.config.head_dim
        return self.width // head_dim, head_dim

    @property
    def tokens(self) -> int:
        return sizes.tokens(self.size)

    @property
    def grid(self) -> tuple[int, int]:
        return sizes.grid(self.size)

    @property
    def shape(self) -> dict[str, Any]:
        """For a row of results."""
        shared = {"size": self.size, "batch": self.batch, "tokens": self.tokens}
        return shared | self.operator.shape(self)

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        """Keyword arguments; tensors are random, floating-point ones want a gradient."""
        found = self.operator.inputs(self, Draw(device, seed))
        for value in found.values():
            if isinstance(value, Tensor):
                value.requires_grad_(value.is_floating_point())
        return found

    def variants(self, hurried: bool = False) -> dict[str, Variant]:
        """Ours and every peer, by name. hurried: without those that compile at every shape."""
        ours: dict[str, Variant] = {"ours": bound(self.operator.ours)}
        return ours | self.operator.peers(self, hurried)

    def flops(self, backward: bool) -> int:
        return self.operator.flops(self, backward)

    def bytes(self, backward: bool) -> int:
        return self.operator.bytes(self, backward)


class Draw:
    """Makes tensors of normal numbers; on the device "meta", tensors without data."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        has_data = device.type != "meta"
        self.generator = torch.Generator(device).manual_seed(seed) if has_data else None

    def __call__(self, *size: int, dtype: torch.dtype, scale: float = 1) -> Tensor:
        if self.generator is None:
            return torch.empty(size, dtype=dtype, device=self.device)
        numbers = torch.randn(size, generator=self.generator, device=self.device)
        return (scale * numbers).to(dtype)


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def differentiable(inputs: Inputs) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.requires_grad
    }


def output_gradients(outputs: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    draw = Draw(outputs[0].device, seed)
    return tuple(draw(*out.shape, dtype=out.dtype) for out in outputs)


def bound(run: Callable[..., Any]) -> Variant:
    return lambda inputs: partial(run, **inputs)


def compiled(run: Callable[..., Any], work: Workload) -> Variant:
    return lambda inputs: partial(compile_once(run, work.size), **inputs)


def compiles(variant: str) -> bool:
    """Whether a variant generates code at every shape, for seconds."""
    return "compiled" in variant or variant == "flex"


def unavailable(reason: str) -> Variant:
    def refuse(inputs: Inputs) -> Callable[[], Any]:
        raise Unavailable(reason)

    return refuse


@cache  # one compilation for all copies of the inputs
def compile_once(function: Callable[..., Any], size: str) -> Callable[..., Any]:
    return torch.compile(function, **compile_options(size))


def compile_options(size: str) -> dict[str, Any]:
    """torch.compile for these very shapes; without code generation at the tiny one, which is there
    to try things out."""
    from torch._functorch import config

    config.donated_buffer = False  # or a backward pass could be timed only once
    torch._dynamo.config.recompile_limit = 64  # shapes, with and without gradients
    return {"backend": "aot_eager" if size == sizes.TINY else "inductor", "dynamic": False}
