"""Run by test_strips.py: pictures that 2, 3 and 4 processes decode and encode together, against one. Prints a
line of JSON for each case."""

import json
import sys
from itertools import product
from typing import Any

import torch
from forked import ROOT, among

from pixart.distributed import rank, world_size
from pixart.vae.autoencoder import VAE
from pixart.vae.strips import Strips

SIZES = {"even": (24, 16), "uneven": (19, 11), "small": (7, 8)}  # of latents


def decoded(vae: VAE, size: tuple[int, int], tile: int | bool, strips: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, vae.latent_channels, *size, generator=generator)
    seen: list[tuple[int, int]] = []
    whole = vae.decode(latents, tile=False)
    shared = vae.decode(latents, tile=tile, strips=strips, progress=lambda *done: seen.append(done))
    is_counted = [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    return {"error": float((shared - whole).abs().max()), "counted": is_counted, "tiles": len(seen)}


def encoded(vae: VAE, size: tuple[int, int], tile: int | bool, strips: Any) -> dict[str, Any]:
    """Of two pictures at once, as far apart as the mean and deviation that are farthest."""
    generator = torch.Generator().manual_seed(2)
    sides = [side * vae.downsample for side in size]
    images = torch.rand(2, 3, *sides, generator=generator) * 2 - 1
    images[:, :, : sides[0] // 3] *= 0.2  # strips of unlike statistics
    whole = torch.cat(vae.posterior(images, tile=False))
    shared = torch.cat(vae.posterior(images, tile=tile, strips=strips))
    of_all = [torch.empty_like(shared) for _ in range(world_size())]
    torch.distributed.all_gather(of_all, shared)
    same = all(one.equal(shared) for one in of_all)
    latents = vae.encode(images, sample=False, tile=tile, strips=strips)
    scaled = (shared[:2] - vae.shift_factor) * vae.scaling_factor
    return {
        "error": float((shared - whole).abs().max()),
        "same": same and latents.equal(scaled),
    }


class Unaware(Strips):
    """Each with the statistics of its own strip."""

    def _statistics(self, *own: Any) -> list[Any]:
        return [own]


class Edged(Strips):
    """Each with nothing of its neighbours' rows."""

    def _band(self, own: torch.Tensor, edges: Any) -> Any:
        band = super()._band(own, edges)
        band.x[:, :, : band.start - band.first] = 0
        return band


def run_cases() -> None:
    vae = VAE.from_pretrained(ROOT / "pixart" / "assets" / "shapes")
    strips = Strips()
    cases = [("whole", name, tile, strips) for name in SIZES for tile in (64, False)]
    cases += [("unaware", "even", 64, Unaware()), ("edged", "even", 64, Edged())]
    for (kind, name, tile, how), work in product(cases, (decoded, encoded)):
        found = work(vae, SIZES[name], tile, how)
        if rank() == 0:
            facts = {"kind": kind, "size": name, "tile": tile, "processes": world_size()}
            print(json.dumps({**facts, "work": work.__name__, **found}))


if __name__ == "__main__":
    for count in map(int, sys.argv[1:]):
        among(count, run_cases)
