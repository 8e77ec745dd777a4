"""Attention to be computed by the Gluon kernel in the simulator, and what it may differ from fp64."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gluon_simulator import Descriptor, Kernel, Pointer, launch, rounded

FORWARD = Kernel("pixart_kernels.attention.hopper_forward", "forward")
UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}  # the largest relative error of rounding
SUBNORMAL = {"bf16": 0.0, "fp16": 2.0**-25}  # and the absolute one of weights that are nearly 0
BOUND_ROWS, BOUND_PARTS = 128, 8  # as in pixart_kernels.attention.bound


class Problem:
    """q (B, H, N, D), k and v (B, H, M, D), in dtype, and the answer in fp64.

    lengths: keys of each sample, of which what lies beyond is NaN. size: of q; scaled: q is multiplied
    by scale · log2(e) before it is rounded, and the kernel told so. outliers: queries in some blocks are
    as many times as long, so that no bound holds there.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        queries: int,
        keys: int,
        batch: int = 1,
        heads: int = 1,
        dim: int = 72,
        dtype: str = "bf16",
        scaled: bool = False,
        lengths: Sequence[int] | None = None,
        size: float = 1.0,
        outliers: float = 1.0,
    ) -> None:
        self.dtype, self.scaled, self.lengths = dtype, scaled, lengths
        scale = dim**-0.5 * np.log2(np.e)
        q, k, v = (rng.standard_normal((batch, heads, n, dim)) for n in (queries, keys, keys))
        q *= size
        for start in range(0, queries, BOUND_ROWS):
            if rng.integers(2):
                q[:, :, start : start + BOUND_ROWS] *= outliers
        self.q = rounded(q * (scale if scaled else 1), dtype)
        self.k, self.v = rounded(k, dtype), rounded(v, dtype)
        self.scale = np.float32(1.0 if scaled else scale)
        counted = np.full(batch, keys) if lengths is None else np.clip(lengths, 0, keys)
        self.counted = counted
        self._solve()
        for b, count in enumerate(counted):
            self.k[b, :, count:] = self.v[b, :, count:] = np.nan

    def _solve(self) -> None:
        q, k, v = (x.astype(float) for x in (self.q, self.k, self.v))
        mask = np.arange(k.shape[2]) < self.counted[:, None, None, None]
        scores = np.where(mask, q @ k.swapaxes(2, 3) * float(self.scale), -np.inf)
        peak = np.where(self.counted[:, None, None, None] == 0, 0.0, scores.max(-1, keepdims=True))
        weights = np.exp2(scores - peak)
        total = weights.sum(-1, keepdims=True)
        total = np.where(total == 0, 1.0, total)
        weights /= total
        self.out = weights @ v
        self.lse = (peak + np.log2(total))[..., 0]
        # A weight and the sum of all, rounded once each, and O: what each can change O by.
        unit, least = UNIT[self.dtype], SUBNORMAL[self.dtype]
        self.allowed = unit * (weights @ np.abs(v) + 2 * np.abs(self.out))
        # And scores in fp32, whose errors grow with them.
        largest = np.abs(np.where(mask, scores, 0.0)).max()
        self.allowed += least * np.abs(v).sum(2, keepdims=True) + 1e-5 * (1 + largest)
        self.allowed_lse = 1.5 * (unit + least * k.shape[2]) + 1e-5 * (1 + largest)

    def longest(self) -> tuple[np.ndarray, np.ndarray]:
        """|q|² and |k|² as the bound's kernels find them."""
        (batch, heads, queries, _), keys = self.q.shape, self.k.shape[2]
        squares = (self.q.astype(float) ** 2).sum(-1)
        ends = range(0, queries, BOUND_ROWS)
        longest_q = np.stack([squares[..., i : i + BOUND_ROWS].max(-1) for i in ends], -1)
        longest_k = np.zeros((batch, heads, BOUND_PARTS))
        squares = (self.k.astype(float) ** 2).sum(-1)
        size = -(-keys // (BOUND_PARTS * BOUND_ROWS)) * BOUND_ROWS
        for b, count in enumerate(self.counted):
            for part in range(BOUND_PARTS):
                some = squares[b, :, part * size : min((part + 1) * size, count)]
                longest_k[b, :, part] = some.max(-1, initial=0)
        return tuple(x.astype(np.float32).ravel() for x in (longest_q, longest_k))

    def attend(
        self,
        seed: int,
        kernel: Kernel = FORWARD,
        LIMIT: int = 0,
        with_lse: bool = True,
        **tuned: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(O, lse) by the kernel, NaN where it stored nothing."""
        (batch, heads, queries, dim), keys = self.q.shape, self.k.shape[2]
        out = np.full(batch * queries * heads * dim, np.nan, np.float32)
        lse = np.full(batch * heads * queries, np.nan, np.float32)
        rows = tuned["BLOCK_K"]
        sizes = ((self.q, 64, 16), (self.k, rows, 16), (self.v, rows, 8))
        boxes = [
            Descriptor(x, (1, 1, count, columns), self.dtype)
            for x, count, tail in sizes
            for columns in (64, tail)
        ]
        longest = [Pointer(x) for x in self.longest()] if LIMIT else [None, None]
        lengths = None if self.lengths is None else Pointer(np.asarray(self.lengths))
        launch(
            kernel,
            (-(-queries // (64 * tuned["CONSUMERS"])) * batch * heads,),
            *(None, None, None, Pointer(out, dtype=self.dtype), Pointer(lse) if with_lse else None),
            *longest,
            lengths,
            *boxes,
            *(float(self.scale), heads, queries, keys),
            seed=seed,
            HEAD_DIM=dim,
            LIMIT=LIMIT,
            SCALED=self.scaled,
            REGISTERS=0,
            COPY_REGISTERS=0,
            **tuned,
        )
        shape = (batch, queries, heads, dim)
        return out.reshape(shape).swapaxes(1, 2), lse.reshape(batch, heads, queries)

    def errors(self, out: np.ndarray, lse: np.ndarray) -> tuple[float, float]:
        """How much of what is allowed the largest errors are; NaN counts as infinite."""
        found = np.abs(out - self.out) / self.allowed, np.abs(lse - self.lse) / self.allowed_lse
        worst, worst_lse = (float(np.nan_to_num(x, nan=np.inf).max()) for x in found)
        return worst, worst_lse
