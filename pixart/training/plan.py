"""What a stage will cost, before it is begun: `--dry-run`. Estimates, and called so."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pixart.config import PixArtConfig
from pixart.cost import forward_flops
from pixart.device import measure_peak
from pixart.distributed import world_size
from pixart.resolution import aspect_ratios
from pixart.training.problems import attempt
from pixart.training.run import Run
from pixart.training.stage import CONTROLNET, DRAWN, ResolvedStage
from pixart.training.starts import add_adapters, control_blocks, weightless_control

EFFICIENCY = 0.4  # of the device's matrix products, that a training step reaches as a whole
_STATES = {"came": 4, "adamw": 8, "muon": 6, "adamw-8bit": 2}  # bytes per weight
_BLOCK = 28  # tensors of (N, C) that a block keeps for its backward pass, MLP and qkv counted out


@dataclass(frozen=True)
class Cost:
    """What a bucket costs one process. tokens: an image has so many. images: a step has so many. memory:
    bytes. seconds: a step takes so long."""

    height: int
    width: int
    tokens: int
    images: int
    memory: int
    seconds: float


def transformer_plan(stage: ResolvedStage, run: Run) -> str:
    """What training a transformer will cost, in words and a table of its buckets."""
    model = run.planned(stage)
    weights = sum(p.numel() for p in model.parameters())
    add_adapters(stage, model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters = f" and {trained / 1e6:.1f} M of adapters" if stage.lora.rank else ""
    return _plan(stage, run, model.config, weights, trained, adapters)


def control_plan(stage: ResolvedStage, run: Run) -> str:
    """What training a control will cost, in words and a table of its buckets."""
    base = run.planned(stage)
    network = weightless_control(stage, base)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    parts = [sum(p.numel() for p in one.parameters()) for one in (base, network)]
    how = f", {trained / 1e6:.1f} M of which train" if stage.lora.rank else ""
    control = f" of the base and {parts[1] / 1e6:.1f} M of the control{how}"
    return _plan(stage, run, base.config, sum(parts), trained, control)


def _plan(
    stage: ResolvedStage, run: Run, config: PixArtConfig, weights: int, trained: int, beside: str
) -> str:
    """weights: all that are there, trained: those that are learned; beside: said of them."""
    costs = list(bucket_costs(stage, config, weights, trained, run.device, world_size()))
    hours = stage.steps * max(cost.seconds for cost in costs) / 3600
    return (
        f"{stage.name}: {weights / 1e6:.1f} M parameters{beside}, {stage.steps} steps, "
        f"about {hours:.1f} h on {world_size()} × {run.device.type} (estimate: "
        f"{EFFICIENCY:.0%} of this machine's matrix products)\n{_mix(stage, run)}{table(costs)}"
    )


def _mix(stage: ResolvedStage, run: Run) -> str:
    """A line on how often each caption of the data is drawn; none where data are drawn, are not here or
    are complained of."""
    if stage.data.source in ("", DRAWN):
        return ""
    weights = dict(stage.data.captions)
    mix, _ = attempt(lambda: run.dataset(stage.data.source, stage.resolution).caption_mix(weights))
    return f"captions: {mix}\n" if mix else ""


def weights_plan(stage: ResolvedStage, build: Callable[[], nn.Module]) -> str:
    """How many weights a part has whose costs are not counted."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in build().parameters())
    what = stage.trains.replace("_", " ")
    return f"{stage.name}: {weights / 1e6:.1f} M parameters of the {what}, {stage.steps} steps"


def bucket_costs(
    stage: ResolvedStage,
    config: PixArtConfig,
    weights: int,
    trained: int,
    device: torch.device,
    world: int,
) -> Iterator[Cost]:
    """The cost of every bucket of a stage whose model has so many weights, largest first. trained: how
    many are learned: all, or those of adapters beside them."""
    peak = measure_peak(device, torch.float32 if stage.precision == "fp32" else torch.bfloat16)
    side = 8 * config.patch_size
    drawn = stage.data.source == DRAWN
    buckets = {(size, size) for size in stage.data.sizes or (stage.resolution,)}
    if stage.aspect:
        buckets = set(aspect_ratios(stage.resolution).values())
    for height, width in sorted(buckets, key=lambda b: (-b[0] * b[1], b)):
        tokens = (height // side) * (width // side)
        shares = world * stage.batch.accumulate
        images = stage.drawn_images(height, shares) if drawn else stage.batch.of(tokens, world)
        seen = images * (2 if stage.data.prior else 1)  # as many of the class as of the subject
        local = seen // world // stage.batch.accumulate
        grid = (height // side, width // side)
        flops = _passes(stage, config) * forward_flops(config, grid) * seen / world
        memory = memory_of(stage, config, weights, trained, tokens * local, world)
        yield Cost(height, width, tokens, images, memory, flops / (EFFICIENCY * peak))


def _passes(stage: ResolvedStage, config: PixArtConfig) -> float:
    """The work of a step, in forward passes of the base: one forward, one for gradients of inputs, one for
    those of weights that are learned, one of what is computed again."""
    again = bool(stage.checkpoint_blocks)
    learned = not stage.lora.rank  # frozen weights have no gradient
    if stage.trains != CONTROLNET:
        return 2 + learned + again
    return 2 + again + (2 + learned + again) * control_blocks(stage, config) / config.depth


def memory_of(
    stage: ResolvedStage, config: PixArtConfig, weights: int, trained: int, tokens: int, world: int
) -> int:
    """Bytes of weights, gradients, states and kept activations for so many tokens at once."""
    shards = world if stage.parallel == "fsdp" else 1
    learning = trained * (4 + _STATES[stage.optimizer.name] + (4 if stage.ema else 0))
    fixed = (4 * weights + learning) // shards
    bytes_each = 4 if stage.precision == "fp32" else 2
    if bytes_each == 2:
        fixed += 2 * weights  # the lowered copies that autocast keeps for the backward pass
    per_block = tokens * config.hidden_size * bytes_each
    every = stage.checkpoint_blocks
    copies = control_blocks(stage, config) if stage.trains == CONTROLNET else 0
    recomputed = sum(-(-blocks // every) for blocks in (config.depth, copies)) if every else 0
    kept = config.depth + copies - recomputed
    return int(fixed + per_block * (2 * recomputed + _BLOCK * (kept + bool(recomputed))))


def table(costs: list[Cost]) -> str:
    """The costs as lines of a table."""
    head = f"{'bucket':>11} {'tokens':>7} {'images/step':>11} {'GiB':>7} {'s/step':>8}"
    rows = [
        f"{c.height:>5}×{c.width:<5} {c.tokens:>7} {c.images:>11} {c.memory / 2**30:>7.1f} "
        f"{c.seconds:>8.2f}"
        for c in costs
    ]
    return "\n".join([head, *rows])
