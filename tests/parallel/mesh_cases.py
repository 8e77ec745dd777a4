"""Run by test_mesh.py: pictures of the embedded model, drawn by 2, 3 and 4 processes together, against those
that one draws. Prints a line of JSON for each case."""

import json
import sys
from contextlib import suppress
from typing import Any

import torch
from forked import among
from PIL import Image

from pixart.distributed import rank, world_size
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.sampler import Cancelled
from pixart.sampler.mesh import Mesh

PROMPT = "a red circle left of a blue square"
CPU = torch.device("cpu")
MESHES = {2: [(1, 2), (2, 1)], 3: [(1, 3)], 4: [(2, 2)]}
PICTURE = Image.radial_gradient("L").resize((128, 128)).convert("RGB")
CASES: dict[str, dict[str, Any]] = {
    "guided": {},
    "wide, unguided": {"width": 192, "guidance": 1.0},
    "in two calls": {"batched": False, "height": 160},
    "perturbed": {"pag": 2.0, "guidance_interval": (0.0, 0.6)},
    "projected": {"apg": True, "guidance_rescale": 0.5, "scheduler": "euler-a"},
    "from a picture": {"image": "in", "strength": 0.6},
    "enlarged in windows": {"upscale": "192x192", "steps": 2, "tiles": 128},
}
SLOW = ("enlarged in windows", "from a picture")  # drawn by two and by four


def draw(pipe: Pipeline, steps: int = 3, **settings: Any) -> torch.Tensor:
    """The clean latents before the VAE."""
    seen: list[torch.Tensor] = []
    request = Request(PROMPT, seed=5, steps=steps, **settings)
    pipe.draw(request, pictures={"in": PICTURE}, callback=lambda step: seen.append(step.latents))
    return seen[-1]


def cancelled(pipe: Pipeline) -> dict[str, Any]:
    """The step at which each process stops when the last one is cancelled after its second."""
    steps: list[int] = []

    def cancel() -> bool:
        return rank() == world_size() - 1 and len(steps) == 2

    with suppress(Cancelled):
        pipe.draw(Request(PROMPT, steps=5), callback=lambda s: steps.append(s.step), cancel=cancel)
    stopped: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(stopped, steps)
    return {"stopped": stopped}


def run_cases() -> None:
    pipe = Pipeline.from_pretrained(device=CPU, cache_dir=None)
    for shape in MESHES[world_size()]:
        mesh = Mesh(*shape, CPU)
        found: dict[str, dict[str, Any]] = {}
        for name, settings in CASES.items():
            if name in SLOW and world_size() == 3:
                continue
            pipe.share(None)
            # Where its halves are evaluated apart, it is as if they were one after the other.
            apart = {"batched": False} if mesh.guidance > 1 else {}
            alone = draw(pipe, **{**settings, **apart})
            pipe.share(mesh)
            shared = draw(pipe, **settings)
            error = (shared - alone).abs().max() / alone.abs().max()
            found[name] = {"error": float(error)}
        found["cancelled"] = cancelled(pipe)
        if rank() == 0:
            for name, facts in found.items():
                print(json.dumps({"case": name, "mesh": shape, **facts}))


if __name__ == "__main__":
    for count in map(int, sys.argv[1:]):
        among(count, run_cases)
