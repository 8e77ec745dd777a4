"""Projections that scale queries, for an attention that then multiplies no score."""

import math

import pytest
import torch
from small_model import PARITY_TOLERANCE, build, inputs, relative_error
from torch import Tensor

from pixart.config import KVCompression
from pixart.model import projection
from pixart_kernels import SCALE_OF_SCALED, flash_attention, takes_scaled_queries

HEAD_DIM = 72
MODELS = {
    "plain": {},
    "merged": {"kv_compression": KVCompression((0, 1))},
    "normed queries": {"qk_norm": True},
}


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Scale wherever it can be done; the inputs of the projections that were."""
    made: list[Tensor] = []
    plain = projection.scaled_queries

    def noted(x: Tensor, *rest: object) -> Tensor:
        made.append(x)
        return plain(x, *rest)

    monkeypatch.setattr(projection, "takes_scaled_queries", lambda x, head_dim: True)
    monkeypatch.setattr("pixart.model.blocks.scaled_queries", noted)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_did(name: str, scaling: list[Tensor]) -> None:
    model, given = build(**MODELS[name]), inputs()
    with torch.enable_grad():
        plain = model(*given).detach()
    assert not scaling, "with gradients, parts of a weight cost more than is gained"
    with torch.no_grad():
        scaled = model(*given)
    # Self-attention and cross-attention of two blocks; a norm of queries stands behind the projection.
    assert len(scaling) == (2 if name == "normed queries" else 4)
    assert relative_error(scaled, plain) < PARITY_TOLERANCE


@torch.no_grad()
def test_scaled_queries_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*size, generator=generator) for size in ((2, 70, 144), (144, 144), (144,))
    )
    exact = x.bfloat16().double() @ weight.bfloat16().double().t() + bias.bfloat16().double()
    exact *= math.log2(math.e) / math.sqrt(HEAD_DIM)
    once = projection.scaled_queries(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), HEAD_DIM)
    assert once.dtype == torch.bfloat16
    assert relative_error(once, exact) < 1.1 * relative_error(exact.bfloat16(), exact)


def test_attention_of_scaled_queries_is_that_of_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 9, 2, HEAD_DIM, generator=generator, requires_grad=True) for _ in range(3)
    )
    factor = math.log2(math.e) / math.sqrt(HEAD_DIM)
    expected = flash_attention(q, k, v)
    actual = flash_attention(q * factor, k, v, scale=SCALE_OF_SCALED)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (actual, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_scaled_where_no_kernel_gains_by_it() -> None:
    assert not takes_scaled_queries(torch.zeros(1, 2, 144), HEAD_DIM)
    assert not takes_scaled_queries(torch.zeros(1, 2, 144, dtype=torch.bfloat16), HEAD_DIM)
