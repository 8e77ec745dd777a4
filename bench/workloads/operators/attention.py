"""flash_attention: among image tokens, over merged ones, over the caption, over captions of any length;
and where one key has nearly all of a query's weight, which shows how weights are rounded."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.measure.case import Unavailable
from bench.workloads import sizes
from bench.workloads.operators.workload import (
    SHORT,
    Draw,
    Inputs,
    Operator,
    Oracle,
    Variant,
    Workload,
    compile_once,
    output_gradients,
    unavailable,
)
from pixart import cost
from pixart.resolution import RESOLUTIONS
from pixart_kernels import flash_attention, flash_attention_reference

ORACLE_BYTES = 2 << 30  # of one chunk of scores
HEADS_CHECKED = 3
BACKENDS = {
    "sdpa cudnn": [SDPBackend.CUDNN_ATTENTION],
    "sdpa flash": [SDPBackend.FLASH_ATTENTION],
    "sdpa efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "sdpa default": None,
}
PACKAGES = {"fa2": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}


def _keys(work: Workload) -> int:
    if work.kind in ("self", "compressed", "peaked"):
        return sizes.tokens(work.size, work.ratio if work.kind == "compressed" else 1)
    return work.config.model_max_length


def _lengths(work: Workload) -> list[int]:
    """Keys of each sample; of a masked attention a full caption's, then those of short ones."""
    keys = _keys(work)
    if work.kind != "masked":
        return [keys] * work.batch
    return [keys if not sample else keys // (3 * sample) for sample in range(work.batch)]


def _shape(work: Workload) -> dict[str, Any]:
    heads, head_dim = work.heads
    return {"keys": _keys(work), "heads": heads, "head_dim": head_dim}


def _inputs(work: Workload, draw: Draw) -> Inputs:
    batch, dtype, keys = work.batch, work.dtype, _keys(work)
    if work.kind in ("self", "compressed", "peaked"):
        q, k, v = draw(batch, work.tokens, 3, *work.heads, dtype=dtype).unbind(2)
    if work.kind == "peaked":
        q = (3 * k.roll(1, dims=1) + q / 2).to(dtype)
    if work.kind == "compressed":
        k, v = (draw(batch, keys, *work.heads, dtype=dtype) for _ in range(2))
    if work.kind in ("cross", "masked"):
        q = draw(batch, work.tokens, *work.heads, dtype=dtype)
        k, v = draw(batch, keys, 2, *work.heads, dtype=dtype).unbind(2)
    lengths = None
    if work.kind == "masked":
        lengths = torch.tensor(_lengths(work), dtype=torch.int32, device=draw.device)
    return {"q": q, "k": k, "v": v} | ({} if lengths is None else {"kv_lengths": lengths})


def _flops(work: Workload, backward: bool) -> int:
    keys = sum(_lengths(work))
    return cost.attention_flops(work.tokens, keys, work.width, backward=backward)


def _bytes(work: Workload, backward: bool) -> int:
    size = work.dtype.itemsize
    once = cost.attention_bytes(work.tokens, _keys(work), work.width, size, backward=backward)
    return work.batch * once


def _peers(work: Workload, hurried: bool) -> dict[str, Variant]:
    found: dict[str, Variant] = {name: partial(_sdpa, use) for name, use in BACKENDS.items()}
    found |= {f"ours {name}": partial(_in_8_bits, name) for name in ("int8", "fp8")}
    found["flex"] = partial(_flex, work.size)
    if hurried and (work.kind != "self" or work.size in ("2k", "512")):
        found["flex"] = unavailable("not measured: compiles for seconds at every shape")
    return found | {name: partial(_package, module) for name, module in PACKAGES.items()}


def _sdpa(backends: list[SDPBackend] | None, inputs: Inputs) -> Callable[[], Tensor]:
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    lengths, mask = inputs.get("kv_lengths"), None
    if lengths is not None:
        keys = torch.arange(k.shape[2], device=k.device)
        mask = keys < lengths.view(-1, 1, 1, 1)  # (B, 1, 1, M)
    attend = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)

    def call() -> Tensor:
        if backends is None:
            return attend().transpose(1, 2)
        with sdpa_kernel(backends):
            return attend().transpose(1, 2)

    return call


def _in_8_bits(precision: str, inputs: Inputs) -> Callable[[], Tensor]:
    """Forward alone. Its errors are those of quantisation: it is judged as a peer is."""
    try:
        flash_attention(**inputs, precision=precision)
    except ValueError as error:  # no derivative; no such products on this GPU
        raise Unavailable(str(error)) from None
    return partial(flash_attention, **inputs, precision=precision)


def _flex(size: str, inputs: Inputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    lengths, mask = inputs.get("kv_lengths"), None
    if lengths is not None:

        def exists(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key < lengths[batch]

        mask = create_block_mask(exists, q.shape[0], None, q.shape[2], k.shape[2], q.device.type)
    attend = compile_once(flex_attention, size)
    return lambda: attend(q, k, v, block_mask=mask).transpose(1, 2)


def _package(module: str, inputs: Inputs) -> Callable[[], Tensor]:
    if "kv_lengths" in inputs:
        raise Unavailable("takes no padded keys in this layout")
    try:
        attend = import_module(module).flash_attn_func
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"not installed: {error}") from None
    call = partial(attend, *(inputs[name] for name in "qkv"))

    def first() -> Tensor:
        out = call()
        return out[0] if isinstance(out, tuple) else out

    return first


def _oracle(inputs: Inputs, backward: bool) -> Oracle:
    """Of some heads only, the first and the last among them, every row of them: at 4K a head has 4
    billion scores."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    lengths = inputs.get("kv_lengths")
    pairs = _pairs(q.shape[0], q.shape[2])

    def select(result: Tensor) -> Tensor:
        return torch.stack([result[batch, :, head] for batch, head in pairs])

    gradient = output_gradients((q,))[0] if backward else None
    columns: dict[str, list[Tensor]] = {}
    for batch, head in pairs:
        count = k.shape[1] if lengths is None else int(lengths[batch])
        grad_out = None if gradient is None else gradient[batch, :, head].double()
        one = [tokens.detach()[batch, :, head].double() for tokens in (q, k, v)]
        for name, tensor in _one_head(one[0], one[1], one[2], count, grad_out).items():
            columns.setdefault(name, []).append(tensor)
    return Oracle({name: torch.stack(tensors) for name, tensors in columns.items()}, select)


def _pairs(batch: int, heads: int) -> list[tuple[int, int]]:
    """Samples and heads, evenly spread from the first to the last."""
    last = batch * heads - 1
    count = min(HEADS_CHECKED, last + 1)
    flat = {round(i * last / max(count - 1, 1)) for i in range(count)}
    return [divmod(index, heads) for index in sorted(flat)]


def _one_head(
    q: Tensor, k: Tensor, v: Tensor, count: int, grad_out: Tensor | None
) -> dict[str, Tensor]:
    """q: (N, D), k, v: (M, D), of which the first `count` keys exist; all fp64."""
    scale, out = q.shape[1] ** -0.5, torch.zeros_like(q)
    named = {"out0": out}
    if grad_out is not None:
        named |= {"d_q": torch.zeros_like(q), "d_k": torch.zeros_like(k)}
        named["d_v"] = torch.zeros_like(v)
    rows = max(1, ORACLE_BYTES // (8 * max(count, 1)))
    for begin in range(0, q.shape[0] if count else 0, rows):
        part = slice(begin, begin + rows)
        weights = (scale * q[part] @ k[:count].T).softmax(dim=1)
        out[part] = weights @ v[:count]
        if grad_out is None:
            continue
        named["d_v"][:count] += weights.T @ grad_out[part]
        inner = (grad_out[part] * out[part]).sum(dim=1, keepdim=True)
        weights *= grad_out[part] @ v[:count].T - inner
        named["d_q"][part] = scale * weights @ k[:count]
        named["d_k"][:count] += scale * weights.T @ q[part]
    return named


def _compiled(operator: Operator) -> list[Workload]:
    kinds = ("self", "compressed", "cross", "masked")
    calls = [Workload(operator, size, kind, 2) for size in RESOLUTIONS for kind in kinds]
    others = ((torch.bfloat16, 64), (torch.bfloat16, 96), (torch.float16, 72), (torch.float32, 72))
    return calls + [
        Workload(operator, "1k", "self", 2, dtype, head_dim=head_dim) for dtype, head_dim in others
    ]


ATTENTION = Operator(
    "flash_attention",
    ours=flash_attention,
    reference=flash_attention_reference,
    inputs=_inputs,
    bytes=_bytes,
    peers=_peers,
    flops=_flops,
    kinds=("self", "compressed", "cross"),
    batched=("masked",),
    tuned=("self", "compressed"),
    more=lambda operator: [Workload(operator, size, "masked", 2) for size in ("1k", "4k")],
    checked=lambda operator: [Workload(operator, "1k", "peaked")],
    compiled=_compiled,
    label=lambda work: f"{work.kind}-{SHORT[work.dtype]}-{work.heads[1]}",
    shape=_shape,
    oracle=_oracle,
)


def _eight_bit(precision: str) -> Operator:
    """For bench.resources: timed, it is among the peers of flash_attention."""

    def attend(**inputs: Any) -> Tensor:
        with torch.no_grad():
            return _in_8_bits(precision, inputs)()

    return Operator(
        f"flash_attention_{precision}",
        ours=attend,
        reference=flash_attention_reference,
        inputs=_inputs,
        bytes=_bytes,
        peers=lambda work, hurried: {},
        flops=_flops,
        kinds=(),
        compiled=lambda operator: [
            Workload(operator, "1k", "self", 2, head_dim=head_dim) for head_dim in (64, 72, 96, 128)
        ],
        label=lambda work: f"{precision}-{SHORT[work.dtype]}-{work.heads[1]}",
        has_backward=False,
    )


OPERATORS = (ATTENTION, _eight_bit("int8"), _eight_bit("fp8"))
