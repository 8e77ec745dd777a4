"""Run by test_mesh.py: pictures of the embedded model, drawn by 2, 3 and 4 processes together, against those
that one draws. Prints a line of JSON for each case."""

import json
import sys
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from forked import ROOT, among
from PIL import Image, ImageDraw

from pixart.distributed import rank, world_size
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.sampler import Cancelled
from pixart.sampler.mesh import Mesh

PROMPT = "a red circle left of a blue square"
CPU = torch.device("cpu")
MESHES = {2: [(1, 2), (2, 1)], 3: [(1, 3)], 4: [(2, 2)]}
CONTROL = ROOT / "pixart" / "assets" / "shapes-control" / "control.safetensors"


def outline() -> Image.Image:
    picture = Image.new("RGB", (128, 128))
    ImageDraw.Draw(picture).ellipse((20, 40, 70, 90), outline="white", width=2)
    return picture


PICTURES = {
    "in": Image.radial_gradient("L").resize((128, 128)).convert("RGB"),
    "mask": Image.linear_gradient("L").resize((128, 128)).point(lambda level: 255 * (level > 99)),
    "outline": outline(),
}
STEERED = {"control_image": ("outline",), "tile": 64}
CASES: dict[str, dict[str, Any]] = {
    "guided": {},
    "merged for a while": {"kv_schedule": "0-2:2@1000-500"},
    "wide, unguided": {"width": 192, "guidance": 1.0},
    "in two calls": {"batched": False, "height": 160},
    "perturbed": {"pag": 2.0, "guidance_interval": (0.0, 0.6)},
    "projected": {"apg": True, "guidance_rescale": 0.5, "scheduler": "euler-a"},
    "from a picture": {"image": "in", "strength": 0.6},
    "masked": {"image": "in", "mask": "mask", "mask_blur": 4, "tile": 64},
    "with a border": {"image": "in", "outpaint": "0,16,24,0", "strength": 0.8},
    "steered": STEERED,
    "steered for a while": {**STEERED, "control_interval": ((0.0, 0.5),), "apg": True, "pag": 2.0},
    "enlarged in windows": {**STEERED, "upscale": "192x192", "steps": 2, "tiles": 128},
    "a picture enlarged": {"image": "in", "upscale": "1.5x", "tiles": 128, "steps": 2},
}
SLOW = ("enlarged in windows", "from a picture")  # drawn by two and by four


def draw(pipe: Pipeline, steps: int = 3, **settings: Any) -> tuple[list[torch.Tensor], np.ndarray]:
    """What a callback sees at every step, and the levels of the picture."""
    seen: list[torch.Tensor] = []
    request = Request(PROMPT, seed=5, steps=steps, **settings)
    drawn = pipe.draw(
        request,
        pictures=PICTURES,
        callback=lambda step: seen.extend((step.latents, step.predicted)),
    )
    return seen, np.asarray(drawn.image).astype(int)


def compared(pipe: Pipeline, mesh: Mesh, settings: dict[str, Any]) -> dict[str, Any]:
    pipe.share(None)
    # Where its halves are evaluated apart, it is as if they were one after the other.
    apart = {"batched": False} if mesh.guidance > 1 else {}
    alone, levels = draw(pipe, **{**settings, **apart})
    if rank() == 0:  # one has forgotten what it encoded: all must encode it again
        pipe.controls.move(CPU)
    pipe.share(mesh)
    shared, levels_shared = draw(pipe, **settings)
    pictures: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(pictures, levels_shared.tobytes())
    pairs = zip(shared, alone, strict=True)
    return {
        "error": float(max((one - other).abs().max() / other.abs().max() for one, other in pairs)),
        "levels": int(abs(levels_shared - levels).max()),
        "pictures": len({*pictures}),
    }


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
    pipe = Pipeline.from_pretrained(device=CPU, cache_dir=None, control=[CONTROL])
    for shape in MESHES[world_size()]:
        mesh = Mesh(*shape, CPU)
        found: dict[str, dict[str, Any]] = {}
        for name, settings in CASES.items():
            if name in SLOW and world_size() == 3:
                continue
            found[name] = compared(pipe, mesh, settings)
        found["cancelled"] = cancelled(pipe)
        if rank() == 0:
            for name, facts in found.items():
                print(json.dumps({"case": name, "mesh": shape, **facts}))


if __name__ == "__main__":
    for count in map(int, sys.argv[1:]):
        among(count, run_cases)
