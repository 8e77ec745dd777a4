"""What the study trains, axis by axis, and how much of each run is measured.

After arXiv 2404.02883, in the embedded world: sizes, width against depth, data, captions, their quality,
and a UNet beside the transformers. Everything is laid out in steps, so that no result depends on how busy
the machine is.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

VERSION = 1  # of what a run computes: results of another one are not taken up
BATCH = 16
PASSES = 3  # a training step is so many forward passes
TERA = 1e12

Captions = Literal["raw", "mixed", "synthetic", "top"]
Quality = Literal["clean", "wrong", "filtered"]


@dataclass(frozen=True)
class Run:
    """One denoiser, trained once.

    captions: "raw" names a thing ("a red star") and nothing else; "synthetic" is one of five descriptions
    at random; "mixed" either of these with equal chance; "top" the description of the five that states
    most. quality: "wrong" gives 30 % of the scenes the captions of another one; "filtered" leaves those
    scenes out. scenes: 0 for all of the pool. compute: TFLOP, which decide the steps.
    """

    name: str
    denoiser: Literal["transformer", "unet"] = "transformer"
    width: int = 144
    depth: int = 4
    captions: Captions = "synthetic"
    quality: Quality = "clean"
    scenes: int = 0
    seed: int = 0
    compute: float = 8.0


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured. share: of each run's compute. levels: TFLOP, before `share`, at
    which sizes are compared, pictures drawn, and the loss of the averaged weights measured.

    first, ratio: the loss is measured after `first` steps, `ratio` times as many, and so on. shared: one
    of these that every run reaches. scenes: (scene, timestep, noise) that the loss is measured on.
    captions: that pictures are drawn for at the last two levels, and of sizes at all of them. shown:
    pictures of a grid's row.
    """

    pool: int = 16_384
    share: float = 1.0
    levels: tuple[float, ...] = (0.75, 2.0, 4.0, 8.0)
    first: int = 20
    ratio: float = 1.5
    shared: int = 228
    scenes: int = 256
    captions: int = 48
    shown: int = 3


BASE = "144x4"
SIZES = (
    Run("72x2", width=72, depth=2, compute=4.0),
    Run("72x6", width=72, depth=6),
    Run(BASE),
    Run("144x6", depth=6),
    Run("216x4", width=216, depth=4),
    Run("216x6", width=216, depth=6),
)
SHAPES = (
    Run("72x10", width=72, depth=10, compute=6.0),
    Run("144x2", depth=2, compute=6.0),
    Run("216x2", width=216, depth=2),
    Run("216x3", width=216, depth=3),
)
DATA = tuple(Run(f"{count} scenes", scenes=count) for count in (32, 128, 512, 2048))
CAPTIONS = (
    Run("raw captions", captions="raw"),
    Run("raw and synthetic", captions="mixed"),
    Run("top caption", captions="top"),
)
QUALITY = (Run("wrong captions", quality="wrong"), Run("filtered", quality="filtered"))
AGAIN = (
    *(Run(f"{BASE}, seed {seed}", seed=seed) for seed in (1, 2, 3)),
    Run("72x2, seed 1", width=72, depth=2, compute=4.0, seed=1),
)
UNETS = (
    Run("UNet", denoiser="unet", width=32, depth=2),
    Run("UNet, seed 1", denoiser="unet", width=32, depth=2, seed=1),
)
RUNS = (*SIZES, *SHAPES, *DATA, *CAPTIONS, *QUALITY, *AGAIN, *UNETS)
SHOWN = {run.name for run in (*SIZES, UNETS[0])}  # whose pictures stand in the grid
# Runs that differ in nothing but the seed, which their names tell.
REPEATS = tuple(
    tuple(run.name for run in RUNS if run.name.split(",")[0] == name)
    for name in (BASE, "72x2", "UNet")
)

FULL = Scale()
TINY = Scale(
    pool=64, share=0.002, levels=(0.75, 4.0, 8.0), first=1, ratio=2.0, shared=2, scenes=8, captions=2,
    shown=1,
)  # fmt: skip
TINY_RUNS = tuple(
    run for run in RUNS if run.name in ("72x2", BASE, f"{BASE}, seed 1", "32 scenes", "UNet")
)


def settings(run: Run, scale: Scale) -> dict[str, Any]:
    """All that a run depends on, as JSON."""
    return {"version": VERSION, "batch": BATCH, **asdict(run), "scale": asdict(scale)}


def identity(run: Run, scale: Scale) -> str:
    """A digest of all that a run depends on."""
    told = json.dumps(settings(run, scale), sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def level_steps(run: Run, scale: Scale, step_flops: int) -> dict[float, int]:
    """The step at which a run reaches each level that it reaches, at least one."""
    steps = {
        level: max(1, round(level * scale.share * TERA / step_flops))
        for level in scale.levels
        if level < run.compute
    }
    return steps | {run.compute: max(1, round(run.compute * scale.share * TERA / step_flops))}


def scored_steps(run: Run, scale: Scale, step_flops: int) -> list[int]:
    """Steps after which pictures are checked: of sizes at every level, for a law needs a decade of compute."""
    steps = list(level_steps(run, scale, step_flops).values())
    return steps if run in SIZES else steps[-2:]


def mark_steps(run: Run, scale: Scale, step_flops: int) -> list[int]:
    """Steps after which the loss is measured: log-spaced, and those of the levels."""
    levels = level_steps(run, scale, step_flops)
    last, step = levels[run.compute], float(scale.first)
    found = set(levels.values())
    while round(step) < last:
        found.add(round(step))
        step *= scale.ratio
    return sorted(one for one in found if one >= min(scale.first, last))
