import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart.model.mlp import MLP, linear_gelu


def oracle(x: Tensor, linear: nn.Linear) -> Tensor:
    assert linear.bias is not None
    product = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    return F.gelu(product, approximate="tanh")


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3), (torch.float64, 1e-15)],
)
@pytest.mark.parametrize("shape", [(2, 7, 40), (3, 40), (2, 0, 40), (40,)])
def test_the_fused_gelu_is_the_tanh_form(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 24).to(dtype), (2 * torch.randn(shape)).to(dtype)
    expected = oracle(x, linear)
    with torch.no_grad():
        fused = linear_gelu(x, linear)
    assert fused.dtype == dtype and fused.shape == expected.shape
    for result in (fused, linear_gelu(x, linear)):
        assert x.numel() == 0 or error(result, expected) < tolerance


@pytest.mark.parametrize("with_gradient", [False, True])
def test_the_meta_device_has_shapes_and_no_numbers(with_gradient: bool) -> None:
    with torch.device("meta"), torch.set_grad_enabled(with_gradient):
        found = MLP(40, 24, 8)(torch.empty(2, 7, 40))
    assert found.shape == (2, 7, 8) and found.is_meta


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="oneDNN is not asked elsewhere"
)
def test_a_cpu_without_products_in_bf16_gets_the_plain_call() -> None:
    code = """
import torch
from torch import nn
from pixart.model.mlp import linear_gelu
with torch.no_grad():
    for dtype in (torch.float32, torch.bfloat16):
        print(linear_gelu(torch.ones(2, 8, dtype=dtype), nn.Linear(8, 16).to(dtype)).dtype)
"""
    root = Path(__file__).parent.parent.parent
    emulated = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    environment = {**os.environ, **emulated, "PYTHONPATH": f"{root / 'kernels'}:{root}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["torch.float32", "torch.bfloat16"], done.stderr


def test_gradients_pass() -> None:
    mlp, x = MLP(8, 16, 4).double(), torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mlp, (x,))


def test_strided_tokens_need_no_copy_by_the_caller() -> None:
    linear, x = nn.Linear(8, 16), torch.randn(2, 5, 24)[..., 8:16]
    with torch.no_grad():
        assert error(linear_gelu(x, linear), oracle(x, linear)) < 2e-6


def test_what_is_hooked_onto_the_layer_still_runs() -> None:
    linear, x = nn.Linear(8, 16), torch.randn(2, 8)
    linear.register_forward_hook(lambda module, args, output: output + 1)
    with torch.no_grad():
        assert torch.equal(linear_gelu(x, linear), F.gelu(linear(x), approximate="tanh"))
        assert error(linear_gelu(x, linear), oracle(x, linear)) > 0.1


def test_autocast_decides_the_dtype() -> None:
    linear, x = nn.Linear(8, 16), torch.randn(2, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear_gelu(x, linear).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_into_one_graph(backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler on a CPU")
    mlp, x = MLP(8, 16, 4).eval(), torch.randn(3, 8)
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.allclose(compiled(x), mlp(x), atol=1e-6)


def test_the_fused_gelu_keeps_tangents_without_gradients() -> None:
    torch.manual_seed(0)
    linear, x, direction = nn.Linear(8, 8), torch.randn(3, 8), torch.randn(3, 8)

    def tangent() -> Tensor:
        return torch.func.jvp(lambda x: linear_gelu(x, linear), (x,), (direction,))[1].detach()

    expected = tangent()
    with torch.no_grad():
        assert torch.equal(tangent(), expected)
    assert expected.count_nonzero() > 0
