"""Attention's backward on Hopper from the host on: its launches in Triton's interpreter, and in the
simulator of Gluon kernels, against the reference's gradients in fp64."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pixart_kernels import flash_attention_reference
from pixart_kernels.attention import hopper_gradients
from pixart_kernels.attention.hopper_gradients import BACKWARD_CANDIDATES, serves_backward
from pixart_kernels.dispatch.registration import INTERPRETED

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from backward_problem import HIDE, ONE_PASS, TWO_PASSES, columns
from gluon_simulator import Descriptor, Kernel, Pointer, launch

interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter: TRITON_INTERPRET=1")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LOG2_E = 1.4426950408889634


class Simulated:
    """In place of a Gluon kernel: launched on tensors and boxes as that would be."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.arg_names = getattr(importlib.import_module(kernel.module), kernel.name).arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
            assert num_warps == 4 and enable_fp_fusion
            tensors = {id(x): x for x in arguments if isinstance(x, Tensor) and x.is_contiguous()}
            arrays = {key: _array(x).ravel() for key, x in tensors.items()}

            def simulated(x: Any) -> Any:
                if isinstance(x, Tensor):  # others are seen through boxes only
                    array = arrays.get(id(x))
                    dtype = NAMES.get(x.dtype, "int64")
                    return None if array is None else Pointer(array, dtype=dtype)
                if hasattr(x, "block_shape"):
                    seen = x.base.as_strided(x.shape, x.strides)
                    return Descriptor(_array(seen), x.block_shape, NAMES[x.base.dtype])
                return x

            launch(
                self.kernel, grid[:2], *map(simulated, arguments),
                together=self.kernel is ONE_PASS, **constants,
            )  # fmt: skip
            for key, x in tensors.items():
                x.copy_(torch.from_numpy(arrays[key]).view(x.shape))

        return run


def _array(x: Tensor) -> np.ndarray:
    return (x.float() if x.is_floating_point() else x.clone()).numpy()


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from pixart_kernels.attention import hopper_backward, hopper_sums

    monkeypatch.setattr(hopper_backward, "hopper_backward_kernel", Simulated(TWO_PASSES))
    monkeypatch.setattr(hopper_sums, "hopper_sums_kernel", Simulated(ONE_PASS))
    monkeypatch.setattr(hopper_gradients, "ENOUGH_PROGRAMS", 2)  # else too few for one pass
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is not written is NaN
    yield
    torch.use_deterministic_algorithms(False)


def operands(
    queries: int, keys: int, dtype: torch.dtype, batch: int = 2, dim: int = 72
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_out, and q, k, v with the strides of views of projections."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, queries, 1, 72, generator=generator).to(dtype)[..., :dim]
    kv = torch.randn(batch, keys, 2, 1, 72, generator=generator).to(dtype)[..., :dim]
    grad = torch.randn(batch, queries, 1, dim, generator=generator).to(dtype)
    return grad, q, *kv.unbind(2)


def outcome(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output in q's dtype, and what logarithm of its sums the forward gives: -inf without keys."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * q.shape[3] ** -0.5
    if lengths is not None:
        scores.masked_fill_(torch.arange(k.shape[1]) >= lengths.view(-1, 1, 1, 1), -torch.inf)
    out = flash_attention_reference(*(x.double() for x in (q, k, v)), kv_lengths=lengths)
    return out.to(q.dtype), (scores.logsumexp(-1) * LOG2_E).float()


def expected(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None
) -> tuple[Tensor, ...]:
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = flash_attention_reference(*leaves, kv_lengths=lengths)
    return torch.autograd.grad(out, leaves, grad.double())


@interpreted
@pytest.mark.parametrize("lengths", [None, [130, 70]], ids=["all", "lengths"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("candidate", [BACKWARD_CANDIDATES[i] for i in (0, 2, 4)], ids=str)
def test_gradients_are_those_of_the_reference(
    simulated: None, candidate: dict[str, Any], dtype: torch.dtype, lengths: list[int] | None
) -> None:
    grad, q, k, v = operands(150, 200, dtype)
    lengths = None if lengths is None else torch.tensor(lengths)
    out, lse = outcome(q, k, v, lengths)
    want = expected(grad, q, k, v, lengths)
    if lengths is not None:
        for sample, length in enumerate(lengths):
            k[sample, length:] = v[sample, length:] = torch.nan
    prepare = hopper_gradients.prepare_backward
    compute = prepare(grad, q, k, v, lengths, q.shape[3] ** -0.5, candidate=candidate)
    got = compute(grad, q, k, v, out, lse, lengths)
    for gradient, exact, x in zip(got, want, (q, k, v), strict=True):
        assert gradient.dtype == dtype and gradient.shape == x.shape and gradient.is_contiguous()
        limit = (1e-2 if dtype == torch.bfloat16 else 2e-3) * exact.abs().max()
        assert (gradient.double() - exact).abs().max() < limit
    if lengths is not None:
        for sample, length in enumerate(lengths):
            assert not got[1][sample, length:].any() and not got[2][sample, length:].any()


@interpreted
def test_q_that_is_scaled_already_and_odd_operands(simulated: None) -> None:
    """An output's gradient that is one number; a head dimension of 66; a sample without keys."""
    _, q, k, v = operands(70, 90, torch.float16, dim=66)
    grad = torch.ones((), dtype=torch.float16).expand(q.shape)
    lengths = torch.tensor([0, 1])
    scale = 66**-0.5
    scaled_q = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype).copy_(
        q.double() * scale * LOG2_E
    )
    as_given = scaled_q.double() / (scale * LOG2_E)
    out, lse = outcome(as_given, k, v, lengths)
    want = expected(grad, as_given, k, v, lengths)
    for candidate in (BACKWARD_CANDIDATES[0], BACKWARD_CANDIDATES[4]):
        prepare = hopper_gradients.prepare_backward
        compute = prepare(grad, scaled_q, k, v, lengths, 99.0, scaled=True, candidate=candidate)
        dq, dk, dv = compute(grad, scaled_q, k, v, out.half(), lse, lengths)
        assert not dq.any() and not dk.any()  # no key, or an only one
        assert (dv - want[2]).abs().max() < 2e-3 * want[2].abs().max()
        compute = prepare(grad, scaled_q, k, v, None, 99.0, scaled=True, candidate=candidate)
        out_of_all, lse_of_all = outcome(as_given, k, v, None)
        dq, dk, dv = compute(grad, scaled_q, k, v, out_of_all.half(), lse_of_all, None)
        of_all = expected(grad, as_given, k, v, None)
        exact = of_all[0] / (scale * LOG2_E)
        assert (dq - exact).abs().max() < 2e-3 * exact.abs().max()
        assert (dk - of_all[1]).abs().max() < 2e-3 * of_all[1].abs().max()


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_columns_hold_lse_delta_and_the_mask(dtype: torch.dtype) -> None:
    grad, q, k, v = operands(70, 90, dtype)
    lengths = torch.tensor([90, 33])
    out, lse = outcome(q, k, v, lengths)
    lse *= 1e4  # beyond what fp16 holds as one number
    lse[0, 0, 3] = -torch.inf
    compute = hopper_gradients._prepare_columns(q.device, grad, q, k, v, True, 0.17)
    k_copy, v_copy, of_q, of_grad, of_keys = compute(grad, k, v, out, lse, lengths)
    assert (k_copy[1, 33:] == 0).all() and torch.equal(k_copy[1, :33], k[1, :33])
    assert (v_copy[1, 33:] == 0).all() and torch.equal(v_copy[0], v[0])
    lse[0, 0, 3] = 0
    of_q, of_grad, of_keys = (x.transpose(1, 2) for x in (of_q, of_grad, of_keys))
    want = columns((-lse * torch.tensor(1 / 0.17)).numpy(), HIDE, NAMES[dtype])
    np.testing.assert_array_equal(of_q.float().numpy(), want)
    values = of_grad.double() @ of_keys[0, 0, 0].double()
    delta = (grad.double() * out.double()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(values, -delta, atol=1e-5, rtol=1e-5)
    scores = of_q.double() @ of_keys.double().mT  # (B, 1, N, M)
    assert (scores[1, :, :, 33:] < -1e8).all() and (scores[0].amin() > -1e8)
    assert k_copy.stride()[:3] == (90 * 72, 72, 72)


def test_what_is_not_served_has_a_reason() -> None:
    _, q, k, v = operands(8, 8, torch.bfloat16)
    assert serves_backward("sm_90", q, k, v) is None
    assert "sm_100" in serves_backward("sm_100", q, k, v)
    assert "float32" in serves_backward("sm_90", q.float(), k.float(), v.float())
    assert "64" in serves_backward("sm_90", *(x[..., :64] for x in (q, k, v)))
    narrow = [x[..., :71].contiguous() for x in (q, k, v)]
    assert "strides" in serves_backward("sm_90", *narrow)
    assert "nothing" in serves_backward("sm_90", q, k[:, :0], v[:, :0])
    assert serves_backward("sm_90", *(x[..., :71] for x in (q, k, v))) is None
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    assert "16 bytes" in serves_backward("sm_90", shifted, k, v)


def test_an_old_triton_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_gradients, "TRITON", (3, 5))
    assert "Triton 3.6" in serves_backward("sm_90", *operands(8, 8, torch.bfloat16)[1:])


def test_nothing_to_sum_over_gives_zeros() -> None:
    grad, q, k, v = operands(5, 0, torch.bfloat16)
    compute = hopper_gradients.prepare_backward(grad, q, k, v, None, 1.0)
    dq, dk, dv = compute(grad, q, k, v, q, q, None)
    assert not dq.any() and dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape


def test_parts_follow_the_shape_alone() -> None:
    assert hopper_gradients.parts_of(4096, 300, 16) == (5, 896)
    assert hopper_gradients.parts_of(4096, 4096, 16) == (1, 4096)
    assert hopper_gradients.parts_of(100, 1, 1) == (1, 128)
