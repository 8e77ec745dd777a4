"""Projections whose queries come out multiplied by the factor that attention would multiply scores by.

    q = factor · (x Wᵀ + b),   factor = log2(e) / √D

The product's own factor (alpha and beta of a GEMM) is applied in fp32 before the only rounding: q is as
close to its exact value as it is without, and attention saves a product for each of its N · M scores.
"""

import math

import torch
from torch import Tensor, nn

from pixart.model.mlp import is_plain
from pixart_kernels import takes_scaled_queries


def scales_queries(x: Tensor, linear: nn.Module, head_dim: int) -> bool:
    """Whether a projection of x: (B, N, C) scales the queries: where attention gains by it, for a plain
    layer, and without gradients, since those of parts of a weight cost more than is gained."""
    return takes_scaled_queries(x, head_dim) and not torch.is_grad_enabled() and is_plain(linear, x)


def scaled_queries(x: Tensor, weight: Tensor, bias: Tensor, head_dim: int) -> Tensor:
    """x: (B, N, C); weight: (C', C); bias: (C',). Returns q: (B, N, C') in x's dtype, for
    flash_attention with scale=SCALE_OF_SCALED."""
    factor = math.log2(math.e) / math.sqrt(head_dim)
    q = torch.addmm(bias, x.reshape(-1, x.shape[2]), weight.t(), beta=factor, alpha=factor)
    return q.view(*x.shape[:2], -1)
