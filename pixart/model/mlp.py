"""The two-layer perceptron of blocks and captions, GELU in its tanh form between the layers."""

import platform
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pixart_kernels.dispatch.registration import in_forward_mode


def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes for which oneDNN's GELU is tuned on this CPU; elsewhere the plain call is quicker."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not (is_x86 and torch.backends.mkldnn.is_available()):
        return ()
    # Without AVX-512 it has no product in bf16 at all, and raises.
    in_16_bits = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if in_16_bits else (torch.float32,)


_ONEDNN = _onednn_dtypes()


class MLP(nn.Module):
    """fc2(GELU(fc1(x))). x: (..., in_size). Returns (..., out_size)."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(linear_gelu(x, self.fc1))  # (..., out_size), (..., hidden_size) in between


def linear_gelu(x: Tensor, linear: nn.Module) -> Tensor:
    """GELU(linear(x)), where it can be as the last step of the matrix product, before its one
    rounding and without a second pass over the result.

    PyTorch offers that for plain linear layers without a gradient: cuBLASLt's epilogue on a GPU,
    oneDNN's post-operation on a CPU (fc1 of XL/2, 1,024 tokens, torch 2.13, in 0.70 of the time in
    bf16 and 0.88 in fp32 on one Sapphire Rapids core, 0.88 and 0.85 on one of an EPYC of Zen 4).
    """
    if x.numel() and not torch.is_grad_enabled() and is_plain(linear, x):
        if x.device.type == "cuda":
            rows = torch._addmm_activation(
                linear.bias, x.reshape(-1, x.shape[-1]), linear.weight.t(), use_gelu=True
            )
            return rows.view(*x.shape[:-1], -1)
        # inductor has no lowering for the bare operator; it fuses the two calls below by itself.
        fused = x.dtype in _ONEDNN and not torch.compiler.is_compiling()
        if fused and x.device.type == "cpu":
            return torch.ops.mkldnn._linear_pointwise(
                x, linear.weight, linear.bias, "gelu", [], "tanh"
            )
    return F.gelu(linear(x), approximate="tanh")


def is_plain(linear: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether calling the layer would do nothing but the product of x: no hook, autocast or cast, no
    quantised weight, and no tangent, which fused products lose without a word. Whoever reads a weight
    instead of calling its layer asks this first."""
    return (
        type(linear) is nn.Linear
        # torchao's quantised weights are subclasses, which know the products of a Linear only.
        and _has_plain_weight(linear)
        and x.device.type != "meta"  # which has no autocast to ask for, and nothing to gain
        and not in_forward_mode()
        and linear.bias is not None
        and linear.weight.dtype == x.dtype
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not torch.is_autocast_enabled(x.device.type)
    )


def _has_plain_weight(linear: nn.Linear) -> bool:
    kind = type(linear.weight)
    # One without numbers asks what would be done; of a compiler's, the plain call becomes the program.
    return kind is nn.Parameter or (kind is FakeTensor and not torch.compiler.is_compiling())
