"""Processes that draw one picture together: the halves of guidance side by side, and the tokens of each
half shared. All of them hold the same latents and walk the same steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor, distributed

from pixart.distributed import world_size
from pixart.model.exchange import TokenExchange
from pixart.vae.strips import Strips


class Mesh:
    """All processes that there are, guidance × tokens of them.

    guidance: 2 evaluates both halves of guidance at once, 1 does not. tokens: among how many the tokens
    of a picture are shared. device: of this process. ValueError for a product that is not their number.
    """

    def __init__(self, guidance: int, tokens: int, device: torch.device) -> None:
        if guidance not in (1, 2) or guidance * tokens != world_size():
            raise ValueError(
                f"a mesh must be of 1 or 2 by as many as make {world_size()} processes, "
                f"got {guidance} by {tokens}"
            )
        # Its import takes a second, which one process need not wait.
        from torch.distributed.device_mesh import init_device_mesh

        self.guidance, self.tokens, self._device = guidance, tokens, device
        mesh = init_device_mesh(
            device.type, (guidance, tokens), mesh_dim_names=("guidance", "tokens")
        )
        self.exchange = TokenExchange(mesh.get_group("tokens")) if tokens > 1 else None
        self.strips = Strips()
        self._half = mesh.get_local_rank("guidance")
        self._halves = mesh.get_group("guidance")

    def both(self, evaluate: Callable[[bool, Tensor, Tensor], Tensor], *batch: Tensor) -> Tensor:
        """(2B, ...): evaluate(is_second, *its half of the batch) of both halves, one of them here."""
        own = evaluate(self._half == 1, *(values.chunk(2)[self._half] for values in batch))
        parts = [torch.empty_like(own) for _ in range(2)]
        distributed.all_gather(parts, own.contiguous(), group=self._halves)
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        return self._largest(float(flag)) > 0

    def least(self, number: int) -> int:
        """The smallest that a process has."""
        return -int(self._largest(-float(number)))

    def _largest(self, value: float) -> float:
        largest = torch.tensor(value, dtype=torch.float64, device=self._device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return float(largest)
