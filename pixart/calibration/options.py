"""What the command line of `pixart.calibrate` takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Options:
    """Find out how much less work a model can do per picture, and write that as a plan for generate --fast."""

    model: str | None = None
    """A pipeline directory, a hub id, a release (sigma-1024, alpha-512 ...), or the embedded model "shapes",
    which is the default."""
    transformer: str | None = None
    """A transformer to use in the pipeline: official .pth, .safetensors or diffusers directory."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """PATH[:WEIGHT] of a LoRA. The plan is of the model with it. Give it again for further ones."""
    kv_compress: str | None = None
    """Open a dense transformer compressed: LAYERS:RATIO[:SAMPLING], such as 14-27:2."""
    variant: str | None = None
    """Of the weights: fp16, for diffusion_pytorch_model.fp16.safetensors and its like."""
    prompts: Path | None = None
    """A file of prompts, .txt or .jsonl, such as will be drawn: a different one for each picture, --scenes,
    --verify and --images together. Default, for the embedded model alone: captions of its world."""
    budget: float = 0.05
    """What the KV schedule may change: relative error of the latents, beside those of the same steps and
    guidance without it."""
    output: Path = Path("plan.json")
    """The plan."""
    overwrite: bool = False
    """Take the place of a plan that is there."""
    steps: int | None = None
    """Of the plan. Default: the pipeline's own, or 20."""
    guidance: float | None = None
    """Of the plan. Default: the pipeline's own, or 4.5."""
    guidance_interval: tuple[float, float] | None = None
    """Of the plan: the part of the trajectory that is guided. Default: the pipeline's own, or 0 1."""
    scheduler: str | None = None
    """Of the plan. Default: the pipeline's own."""
    reuse_blocks: str | None = None
    """Of the plan: FIRST:STEPS, as generate takes it. What it changes is no part of the budget, as little as what
    other steps change, and measured beside it."""
    size: str | None = None
    """Of the pictures, WIDTHxHEIGHT or one number for a square. Default: the model's own."""
    ratios: tuple[int, ...] = (2, 3, 4)
    """What may be merged: R of R x R tokens."""
    bands: int = 5
    """Into how many ranges timesteps are divided."""
    scenes: int = 4
    """Pictures that single blocks are probed on."""
    verify: int = 8
    """Other pictures, on which the schedule is verified."""
    images: int = 24
    """Again others, for the table."""
    seed: int = 0
    """Of the first picture."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of transformer and VAE. Default bf16 on CUDA, fp32 on a CPU."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    threads: int | None = None
    """Of the CPU. Default: as many as PyTorch takes."""
    quiet: bool = False
    """Nothing on standard error but what went wrong."""
