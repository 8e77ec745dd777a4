"""The VAE on several processes: each has a strip of the picture's rows, and all know the statistics of the
whole. As in tiles, what comes out is what one process gives, but for rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from pixart.model.exchange import split_rows
from pixart.vae.tiling import HALO, Band, Stage, run_band


class Strips:
    """The processes that share a picture, all of which make the same calls. group: None for all that there
    are."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.processes = distributed.get_world_size(group)
        self.rank = distributed.get_rank(group)

    def split(self, rows: int, multiple: int = 1) -> list[slice] | None:
        """Rows of each, multiples of `multiple`; None where one would have too few for its neighbours, which
        need HALO of them at a `multiple`-th of the size."""
        if rows < self.processes * multiple:
            return None
        parts = split_rows(rows, self.processes, multiple)
        least = min(part.stop - part.start for part in parts)
        return parts if least >= HALO * multiple else None

    def run(
        self,
        stages: Sequence[Stage],
        x: Tensor,
        parts: Sequence[slice],
        tile: int,
        advance: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """The stages on x (1, C, H, W), which all have whole, about `tile` pixels of a side at a time; all
        are given all rows of the result, and the same. parts: of `split`, whose `multiple` must be by what the
        stages make the picture smaller."""
        edges = [part.start for part in parts] + [parts[-1].stop]
        own = x[:, :, parts[self.rank]]
        for stage in stages:
            band = self._band(own, edges)
            own = run_band(stage, band, tile, self._statistics, advance)
            grown, before = own.shape[2], edges[self.rank + 1] - edges[self.rank]
            edges = [edge * grown // before for edge in edges]
        return self._whole(own, edges)

    def _band(self, own: Tensor, edges: Sequence[int]) -> Band:
        """The own rows, with HALO of the neighbours' on both sides."""
        ends = torch.cat([own[:, :, :HALO], own[:, :, -HALO:]], 2).contiguous()
        of_all = [torch.empty_like(ends) for _ in range(self.processes)]
        distributed.all_gather(of_all, ends, group=self._group)
        rows = [own]
        if self.rank > 0:
            rows.insert(0, of_all[self.rank - 1][:, :, HALO:])
        if self.rank + 1 < self.processes:
            rows.append(of_all[self.rank + 1][:, :, :HALO])
        start, stop = edges[self.rank], edges[self.rank + 1]
        return Band(torch.cat(rows, 2), max(start - HALO, 0), start, stop, edges[-1])

    def _statistics(
        self, pixels: int, mean: Tensor, variance: Tensor
    ) -> list[tuple[int, Tensor, Tensor]]:
        """Those of each process. In fp64, as fp32 does not count so far."""
        own = torch.cat([mean.new_tensor([pixels], dtype=torch.float64), mean, variance])
        of_all = [torch.empty_like(own) for _ in range(self.processes)]
        distributed.all_gather(of_all, own, group=self._group)
        found = []
        for one in of_all:
            means, variances = one[1:].to(mean.dtype).chunk(2)
            found.append((int(one[0]), means, variances))
        return found

    def _whole(self, own: Tensor, edges: Sequence[int]) -> Tensor:
        counts = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
        sent = own.new_zeros(*own.shape[:2], max(counts), own.shape[3])
        sent[:, :, : own.shape[2]] = own
        of_all = [torch.empty_like(sent) for _ in counts]
        distributed.all_gather(of_all, sent, group=self._group)
        parts = [part[:, :, :count] for part, count in zip(of_all, counts, strict=True)]
        return torch.cat(parts, 2)
