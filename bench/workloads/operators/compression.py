"""compress_kv, and the projection before it, which an inference can fold into it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.case import Unavailable
from bench.workloads import sizes
from bench.workloads.operators.workload import (
    SHORT,
    Draw,
    Inputs,
    Operator,
    Variant,
    Workload,
    bound,
    compiled,
    unavailable,
)
from pixart import cost
from pixart.resolution import RESOLUTIONS
from pixart_kernels import compress_kv, compress_kv_reference, fold_projection


def _shape(work: Workload) -> dict[str, Any]:
    return {"channels": work.width, "ratio": work.ratio, "grid": list(work.grid)}


def _inputs(work: Workload, draw: Draw) -> Inputs:
    packed = draw(work.batch, work.tokens, 3 * work.width, dtype=work.dtype)
    _, k, v = packed.chunk(3, dim=2)
    return {"k": k, "v": v, **_merging(work, draw)}


def _merging(work: Workload, draw: Draw) -> Inputs:
    width, ratio = work.width, work.ratio
    weight = draw(width, 1, ratio, ratio, dtype=work.dtype, scale=1 / ratio)
    rows = ("bias", "norm_weight", "norm_bias")
    vectors = {name: draw(width, dtype=work.dtype, scale=0.1) for name in rows}
    return {"weight": weight, **vectors, "grid": work.grid, "ratio": ratio}


def _bytes(work: Workload, backward: bool) -> int:
    size = work.dtype.itemsize
    return work.batch * cost.merging_bytes(
        work.grid, work.ratio, work.width, size, backward=backward
    )


def _peers(work: Workload, hurried: bool) -> dict[str, Variant]:
    return {
        "eager": bound(compress_kv_reference),
        "compiled": compiled(compress_kv_reference, work),
        "official": bound(_as_published),
        "official compiled": compiled(_as_published, work),
        "diffusers": unavailable("diffusers has no key/value compression"),
    }


def _as_published(
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    grid: tuple[int, int],
    ratio: int,
) -> tuple[Tensor, Tensor]:
    """An image of C channels, a convolution, tokens again, a LayerNorm: in the tokens' dtype, for K
    and then for V. Drops the rows and columns that the ratio leaves over."""

    def merge(tokens: Tensor) -> Tensor:
        image = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        image = F.conv2d(image, weight, bias, stride=ratio, groups=tokens.shape[2])
        merged = image.flatten(2).permute(0, 2, 1)
        return F.layer_norm(merged, norm_weight.shape, norm_weight, norm_bias)

    return merge(k), merge(v)


def _compiled(operator: Operator) -> list[Workload]:
    calls = [Workload(operator, size, batch=2) for size in RESOLUTIONS]
    others = ((torch.bfloat16, 3), (torch.bfloat16, 4), (torch.float16, 2), (torch.float32, 2))
    return calls + [Workload(operator, "1k", "", 2, dtype, ratio) for dtype, ratio in others]


COMPRESSION = Operator(
    "compress_kv",
    ours=compress_kv,
    reference=compress_kv_reference,
    inputs=_inputs,
    bytes=_bytes,
    peers=_peers,
    tuned=("",),
    more=lambda operator: [Workload(operator, "2k", ratio=ratio) for ratio in (3, 4)],
    checked=lambda operator: [Workload(operator, "1k", batch=2, ratio=ratio) for ratio in (3, 4)],
    compiled=_compiled,
    label=lambda work: f"compress{work.ratio}-{SHORT[work.dtype]}",
    shape=_shape,
)


def _project(
    compress: Callable[..., Any], x: Tensor, projection: Tensor, offset: Tensor, **merging: Any
) -> tuple[Tensor, Tensor]:
    """What a compressed block does to tokens before attention: the projection, then compress_kv."""
    k, v = F.linear(x, projection, offset).chunk(2, dim=2)
    return compress(k, v, **merging)


def _project_ours(**inputs: Any) -> tuple[Tensor, Tensor]:
    return _project(compress_kv, **inputs)


def _project_reference(**inputs: Any) -> tuple[Tensor, Tensor]:
    return _project(compress_kv_reference, **inputs)


def _projection_inputs(work: Workload, draw: Draw) -> Inputs:
    width, dtype = work.width, work.dtype
    x = draw(work.batch, work.tokens, width, dtype=dtype)
    projection = draw(2 * width, width, dtype=dtype, scale=width**-0.5)
    offset = draw(2 * width, dtype=dtype, scale=0.1)
    return {"x": x, "projection": projection, "offset": offset, **_merging(work, draw)}


def _projection_flops(work: Workload, backward: bool) -> int:
    return cost.product_flops(work.batch * work.tokens, work.width, 2 * work.width)


def _projection_bytes(work: Workload, backward: bool) -> int:
    tokens = work.tokens + 2 * sizes.tokens(work.size, work.ratio)
    return work.batch * tokens * work.width * work.dtype.itemsize


def _folded(inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    """Convolution and projection as one product, over tokens that lie patch after patch."""
    (rows, cols), ratio = inputs["grid"], inputs["ratio"]
    if rows % ratio or cols % ratio:
        raise Unavailable("needs a grid that the ratio divides")
    x = inputs["x"].detach()
    patches = x.view(x.shape[0], rows // ratio, ratio, cols // ratio, ratio, x.shape[2])
    patches = patches.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2).contiguous()
    names = ("projection", "offset", "weight", "bias")
    weight, bias = fold_projection(*(inputs[name].detach() for name in names))
    norm_weight, norm_bias = inputs["norm_weight"], inputs["norm_bias"]

    def call() -> tuple[Tensor, Tensor]:
        merged = F.linear(patches, weight, bias).unflatten(2, (2, -1))
        k, v = F.layer_norm(merged, norm_weight.shape, norm_weight, norm_bias).unbind(2)
        return k, v

    return call


PROJECTION = Operator(
    "project_kv",
    ours=_project_ours,
    reference=_project_reference,
    inputs=_projection_inputs,
    bytes=_projection_bytes,
    peers=lambda work, hurried: {"eager": bound(_project_reference), "folded": _folded},
    flops=_projection_flops,
    shape=_shape,
    has_backward=False,  # folded for inference only
)
OPERATORS = (COMPRESSION, PROJECTION)
