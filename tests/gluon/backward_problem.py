"""Gradients of attention by the kernels for Hopper in the simulator, and what they should be in fp64."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from gluon_simulator import Descriptor, Kernel, Pointer, launch, rounded

LOG2_E = math.log2(math.e)
TWO_PASSES = Kernel("pixart_kernels.attention.hopper_backward", "hopper_backward_kernel")
ONE_PASS = Kernel("pixart_kernels.attention.hopper_sums", "hopper_sums_kernel")
FACTOR, HIDE = 2048.0, 32768.0  # of hopper_columns.py, which is compared with `columns`
REGISTERS = {"COPY_REGISTERS": 24, "REGISTERS": 240}
TOLERANCE = {"bf16": 1.2e-2, "fp16": 2.5e-3}  # of the largest element; seen: 6.3e-3, 1.1e-3


def columns(x: np.ndarray, last: np.ndarray | float, dtype: str) -> np.ndarray:
    """(..., 8): x in three numbers of dtype, and last."""
    out = np.zeros((*x.shape, 8), np.float32)
    out[..., 0] = rounded(x / FACTOR, dtype)
    rest = x - out[..., 0] * FACTOR
    out[..., 1] = rounded(rest, dtype)
    out[..., 2] = rounded(rest - out[..., 1], dtype)
    out[..., 3] = last
    return out


class Problem:
    """Random operands, (B, H, N or M, D), their gradients in fp64, and what the kernels are given.

    lengths: of each sample. scaled: q is multiplied by scale · log2(e) already. size: of q and k, which
    makes softmax as peaky as its square.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        queries: int,
        keys: int,
        *,
        batch: int = 1,
        heads: int = 1,
        dim: int = 72,
        dtype: str = "bf16",
        lengths: Sequence[int] | None = None,
        scaled: bool = False,
        size: float = 1.0,
    ) -> None:
        def draw(tokens: int, size: float = 1.0) -> np.ndarray:
            return rounded(rng.standard_normal((batch, heads, tokens, dim)) * size, dtype)

        self.dtype, self.scaled, self.lengths = dtype, scaled, lengths
        self.q, self.k, self.v, self.grad = (
            draw(queries, size),
            draw(keys, size),
            draw(keys),
            draw(queries),
        )
        scale = dim**-0.5
        if scaled:
            self.q = rounded(self.q * (scale * LOG2_E), dtype)
            scale = 1 / LOG2_E
        self.scale, self.factor = scale * LOG2_E, scale
        counts = np.ones((batch, keys), bool)
        if lengths is not None:
            counts = np.arange(keys) < np.asarray(lengths)[:, None]

        q, k, v, grad = (x.astype(np.float64) for x in (self.q, self.k, self.v, self.grad))
        scores = np.where(counts[:, None, None], q @ k.swapaxes(2, 3) * self.scale, -np.inf)
        top = np.maximum(scores.max(-1, keepdims=True), -1e30)
        p = np.exp2(scores - top)
        total = p.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse = (np.log2(total) + top)[..., 0]
        p /= np.maximum(total, 1e-300)
        out = p @ v
        ds = p * (grad @ v.swapaxes(2, 3) - (grad * out).sum(-1, keepdims=True))
        only = counts.sum(1) == 1  # whose gradient of q is 0, but for rounding in fp64
        ds[only] = 0
        self.want = [scale * ds @ k, scale * ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ grad]

        # As the operator has it: lse in fp32, δ of the rounded output, zeros beyond the lengths.
        delta = (self.grad * rounded(out, dtype)).sum(-1, dtype=np.float32)
        lse = np.where(np.isinf(lse), 0, lse).astype(np.float32)
        self.of_q = columns(-lse / np.float32(self.scale), HIDE, dtype)
        self.of_grad = columns(-delta, 0.0, dtype)
        self.of_keys = np.zeros((batch, 1, keys, 8), np.float32)
        self.of_keys[..., :3] = FACTOR, 1, 1
        self.of_keys[..., 3] = np.where(counts, 0, -HIDE)[:, None]
        self.k_given, self.v_given = (
            np.where(counts[:, None, :, None], x, 0) for x in (self.k, self.v)
        )

    def _boxes(self, rows: int, *, of_keys: bool) -> list[Descriptor]:
        if of_keys:
            sides = (self.k_given, self.of_keys), (self.v_given, self.of_keys)
        else:
            sides = (self.q, self.of_q), (self.grad, self.of_grad)
        return [
            Descriptor(x, (1, 1, rows, width), self.dtype)
            for main, extra in sides
            for x, width in ((main, 64), (main, 8), (extra, 8))
        ]

    def _lengths(self) -> Pointer | None:
        return None if self.lengths is None else Pointer(np.asarray(self.lengths), dtype="int64")

    def _tokens_first(self, parts: int, tokens: int) -> np.ndarray:
        batch, heads, _, dim = self.q.shape
        return np.full(parts * batch * tokens * heads * dim, np.nan, np.float32)

    def _heads_first(self, x: np.ndarray, tokens: int) -> np.ndarray:
        batch, heads, _, dim = self.q.shape
        return x.reshape(-1, batch, tokens, heads, dim).sum(0).swapaxes(1, 2)

    def one_of_two_passes(
        self,
        keys: bool,
        seed: int = 0,
        *,
        kernel: Kernel = TWO_PASSES,
        BLOCK: int = 64,
        CONSUMERS: int = 2,
        share: int | None = None,
        **constants: Any,
    ) -> list[np.ndarray]:
        """[dQ], or [dK, dV] where keys, in parts of `share` queries; (B, H, N or M, D)."""
        batch, heads, queries, dim = self.q.shape
        rows, others = (self.k.shape[2], queries) if keys else (queries, self.k.shape[2])
        share = share or others
        parts = -(-others // share)
        sums = [self._tokens_first(parts, rows) for _ in range(1 + keys)]
        dtype = self.dtype if parts == 1 else "fp32"
        grid = (-(-rows // (64 * CONSUMERS)) * batch * heads, parts)
        launch(
            kernel, grid, *(Pointer(x, dtype=dtype) for x in (sums[0], sums[-1])), self._lengths(),
            *[None] * 8, *self._boxes(64, of_keys=keys), *self._boxes(BLOCK, of_keys=not keys),
            self.scale, self.factor, heads, rows, others, share,
            seed=seed, KEYS=keys, HEAD_DIM=dim, BLOCK=BLOCK, CONSUMERS=CONSUMERS,
            SCALED=self.scaled, **REGISTERS, **_defaults(constants),
        )  # fmt: skip
        return [self._heads_first(x, rows) for x in sums]

    def two_passes(
        self, seed: int = 0, q: dict[str, Any] | None = None, kv: dict[str, Any] | None = None
    ) -> list[np.ndarray]:
        """dQ, dK and dV, with settings for each pass."""
        dq = self.one_of_two_passes(False, seed, **(q or {}))
        return dq + self.one_of_two_passes(True, seed, **(kv or {}))

    def one_pass(
        self,
        seed: int = 0,
        *,
        kernel: Kernel = ONE_PASS,
        resident: int | None = None,
        **constants: Any,
    ) -> list[np.ndarray]:
        """dQ, dK and dV by programs of which `resident` run together, or all."""
        block = 64
        (batch, heads, queries, dim), keys = self.q.shape, self.k.shape[2]
        blocks = -(-queries // block)
        dk, dv = (self._tokens_first(1, keys) for _ in range(2))
        sums = np.zeros(batch * heads * blocks * block * dim, np.float32)
        done, ticket = np.zeros(batch * heads * blocks, np.int64), np.zeros(1, np.int64)
        launch(
            kernel, (-(-keys // 128) * batch * heads,),
            Pointer(dk, dtype=self.dtype), Pointer(dv, dtype=self.dtype),
            Pointer(sums), Pointer(done, dtype="int32"), Pointer(ticket, dtype="int32"),
            self._lengths(), *[None] * 8, *self._boxes(64, of_keys=True), *self._boxes(block, of_keys=False),
            self.scale, self.factor, heads, keys, queries,
            seed=seed, together=True, resident=resident, HEAD_DIM=dim, BLOCK=block,
            SCALED=self.scaled, ADD_REGISTERS=80, **REGISTERS, **_defaults(constants),
        )  # fmt: skip
        lengths = np.full(batch, keys) if self.lengths is None else np.asarray(self.lengths)
        factor = np.where(lengths > 1, np.float32(self.factor), 0)[:, None, None, None]
        dq = rounded(sums.reshape(batch, heads, -1, dim)[:, :, :queries] * factor, self.dtype)
        return [dq, self._heads_first(dk, keys), self._heads_first(dv, keys)]

    def error(self, got: Sequence[np.ndarray], want: Sequence[np.ndarray] | None = None) -> float:
        """The largest difference, as a share of the largest element of each gradient; of zeros, none."""
        pairs = zip(got, want or self.want, strict=True)
        return max(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30) for x, y in pairs)


def _defaults(constants: dict[str, Any]) -> dict[str, Any]:
    return {"STAGES": 3, "TURNS": True, "OUT_TAIL": 8, **constants}
