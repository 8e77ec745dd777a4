"""One picture on several processes: each has some rows of its tokens, and attention sees them all.

Everything in a block but self-attention is about one token. There keys and values are merged first, then
goes over the wire what is less, layer by layer:

    gather     every process receives the keys and values of all others       2 (P - 1) M / P · C
    heads      it gives its tokens of other heads for all tokens of its own   (2 N + 2 M) (P - 1) / P² · C

(Ulysses, arXiv:2309.14509). So keys are gathered where (P - 1) M < N: with R = 2 on up to 4 processes, with
R = 3 on 9, with R = 4 on 16; dense layers exchange heads. Where P does not divide the heads, they gather too.
The longest key, which bounds the scores of a softmax, is looked for among the keys that attention is given:
nothing about it needs to be exchanged.

Axis letters: B batch, P processes, N image tokens, n those of this process, M and m merged ones, S what is
sent together (keys and values), C channels, H heads, D channels of one, h heads of this process.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from pixart.config import KVCompression, PixArtConfig
from pixart.cost import merged_keys

# PyTorch 2.13 renamed it, and warns of the older name.
_all_gather: Any = getattr(
    distributed, "all_gather_single", getattr(distributed, "all_gather_into_tensor", None)
)
Group = Any  # torch.distributed.ProcessGroup, which a build of PyTorch without it has not


def split_rows(rows: int, processes: int, multiple: int = 1) -> list[slice]:
    """The rows of each process: multiples of `multiple`, as even as can be, and the last ones whatever is
    left. ValueError where one would have none."""
    units = -(-rows // multiple)
    if units < processes:
        raise ValueError(
            f"a picture of {rows} rows of tokens, {multiple} of them together, can be shared among at "
            f"most {units} processes, got {processes}"
        )
    ends = [-(-units * part // processes) * multiple for part in range(processes + 1)]
    return [slice(start, min(end, rows)) for start, end in zip(ends, ends[1:], strict=False)]


def gathers(tokens: int, keys: int, heads: int, processes: int) -> bool:
    """Whether a layer gathers its keys and values; otherwise it exchanges heads."""
    return (processes - 1) * keys < tokens or heads % processes != 0


def layer_bytes(
    config: PixArtConfig, layer: int, grid: tuple[int, int], processes: int, itemsize: int
) -> tuple[float, float]:
    """Bytes that each of the processes receives in a layer's forward for one picture, on average: where it
    gathers keys and values, and where it exchanges heads."""
    compression, tokens = config.kv_compression, grid[0] * grid[1]
    keys = tokens
    if compression is not None and compression.applies_to(layer):
        keys = merged_keys(compression, grid)
    from_others = (processes - 1) / processes * config.hidden_size * itemsize
    return 2 * keys * from_others, 2 * (tokens + keys) / processes * from_others


def received_bytes(
    config: PixArtConfig, layer: int, grid: tuple[int, int], processes: int, itemsize: int
) -> float:
    """Those of `layer_bytes` the way that the layer takes."""
    gather, heads = layer_bytes(config, layer, grid, processes, itemsize)
    compression, tokens = config.kv_compression, grid[0] * grid[1]
    is_merged = compression is not None and compression.applies_to(layer)
    keys = merged_keys(compression, grid) if compression and is_merged else tokens
    return gather if gathers(tokens, keys, config.num_heads, processes) else heads


def rows_together(compressions: Iterable[KVCompression | None], ratios: Iterable[int] = ()) -> int:
    """How many rows of tokens must stay with one process, so that all that is merged lies in it. ratios: of
    further merging."""
    return math.lcm(*(one.ratio for one in compressions if one is not None), *ratios)


class TokenExchange:
    """The processes among which a picture's tokens are shared. group: of torch.distributed, None for all
    processes that there are."""

    def __init__(self, group: Group = None) -> None:
        self.group = group
        self.processes = distributed.get_world_size(group)
        self.rank = distributed.get_rank(group)

    def share(self, grid: tuple[int, int], multiple: int = 1) -> "Share":
        """A grid of tokens among them, see split_rows for `multiple` and for the ValueError."""
        parts = split_rows(grid[0], self.processes, multiple)
        return Share(self.group, self.rank, grid, tuple(parts))


@dataclass(frozen=True)
class Share:
    """A grid among processes. rows: those of each. All of them must make the same calls in one order; each
    function is differentiable, as of a loss that is the sum of those of all processes."""

    group: Group
    rank: int
    whole_grid: tuple[int, int]
    rows: tuple[slice, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of this process."""
        return self._grids[self.rank]

    def rows_of(self, image: Tensor, side: int) -> Tensor:
        """(B, C, h', w) of (B, C, h, w), for tokens of side × side."""
        rows = self.rows[self.rank]
        return image[:, :, rows.start * side : rows.stop * side]

    def own(self, tokens: Tensor) -> Tensor:
        """(..., n, C) of (..., N, C)."""
        rows, columns = self.rows[self.rank], self.whole_grid[1]
        return tokens[..., rows.start * columns : rows.stop * columns, :]

    def whole(self, tokens: Tensor) -> Tensor:
        """(B, N, C), the same for every process, of their (B, n, C)."""
        return self._gather(tokens, self._tokens)

    def attend(
        self,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
        compression: KVCompression | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        """attention(q, k, v) for the queries of this process, q (B, n, H, D), and the keys of all. k, v:
        (B, m, H, D), its own. Returns (B, n, H, D)."""
        tokens, keys = self._tokens, self._keys(compression)
        pair = torch.stack([k, v], 2)  # (B, m, S, H, D)
        if gathers(sum(tokens), sum(keys), q.shape[2], len(self.rows)):
            k, v = self._gather(pair, keys).unbind(2)
            return attention(q, k, v)
        q = self._to_heads(q.unsqueeze(2), tokens).squeeze(2)  # (B, N, h, D)
        k, v = self._to_heads(pair, keys).unbind(2)
        return self._to_tokens(attention(q, k, v), tokens)

    @property
    def _grids(self) -> list[tuple[int, int]]:
        return [(rows.stop - rows.start, self.whole_grid[1]) for rows in self.rows]

    @property
    def _tokens(self) -> list[int]:
        return [rows * columns for rows, columns in self._grids]

    def _keys(self, compression: KVCompression | None) -> list[int]:
        if compression is None:
            return self._tokens
        return [merged_keys(compression, grid) for grid in self._grids]

    def _gather(self, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """(B, sum of counts, ...) of the (B, count, ...) of each process."""
        return _Gather.apply(tokens.transpose(0, 1), counts, self.rank, self.group).transpose(0, 1)

    def _to_heads(self, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """(B, sum of counts, S, h, D) of the (B, count, S, H, D) of each process."""
        processes = len(counts)
        parts = tokens.unflatten(3, (processes, -1))  # (B, n, S, P, h, D)
        parts = parts.permute(3, 1, 0, 2, 4, 5).flatten(0, 1)  # (P·n, B, S, h, D)
        sent = [counts[self.rank]] * processes
        return _Swap.apply(parts, sent, counts, self.group).transpose(0, 1)

    def _to_tokens(self, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """(B, n, H, D) of the (B, N, h, D) of each process."""
        processes = len(counts)
        received = [counts[self.rank]] * processes
        parts = _Swap.apply(tokens.transpose(0, 1), counts, received, self.group)  # (P·n, B, h, D)
        return parts.unflatten(0, (processes, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)


class _Gather(torch.autograd.Function):
    """All rows of the first axis; backward each process receives the gradients of its own from all others
    and adds them up, in the order of the processes and in fp32."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: Sequence[int], rank: int, group: Group) -> Tensor:
        ctx.counts, ctx.rank, ctx.group = counts, rank, group
        return _gathered(own, counts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        [gradient] = gradients
        received = [ctx.counts[ctx.rank]] * len(ctx.counts)
        parts = _swapped(gradient, ctx.counts, received, ctx.group)
        parts = parts.unflatten(0, (len(ctx.counts), -1))
        dtype = torch.promote_types(parts.dtype, torch.float32)
        return parts.sum(0, dtype=dtype).to(parts.dtype), None, None, None


class _Swap(torch.autograd.Function):
    """Rows of the first axis: `sent` of them to each process, `received` from each."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Group
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _swapped(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        [gradient] = gradients
        return _swapped(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _gathered(own: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    # Of one size each, which every backend gathers: shares differ by a few rows.
    longest = max(counts)
    sent = own.new_zeros(longest, *own.shape[1:])
    sent[: len(own)] = own
    received = own.new_empty(len(counts), *sent.shape)
    _all_gather(received.flatten(0, 1), sent, group=group)
    if len({*counts}) == 1:
        return received.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)])


def _swapped(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    distributed.all_to_all_single(out, rows.contiguous(), [*received], [*sent], group=group)
    return out
