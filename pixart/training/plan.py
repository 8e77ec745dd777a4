"""What a stage will cost, before it is begun: `--dry-run`. Estimates, and called so."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pixart.config import PixArtConfig
from pixart.cost import forward_flops
from pixart.device import measure_peak
from pixart.distributed import world_size
from pixart.model.exchange import received_bytes
from pixart.resolution import aspect_ratios
from pixart.training.parallel import groups
from pixart.training.problems import attempt
from pixart.training.run import Run
from pixart.training.stage import (
    CONTROLNET,
    DISTILLED,
    DRAWN,
    LCM,
    TDM,
    ResolvedStage,
    Stage,
)
from pixart.training.starts import add_adapters, control_blocks, weightless_control

EFFICIENCY = 0.4  # of the device's matrix products, that a training step reaches as a whole
_STATES = {"came": 4, "adamw": 8, "muon": 6, "adamw-8bit": 2}  # bytes per weight
_BLOCK = 28  # tensors of (N, C) that a block keeps for its backward pass, MLP and qkv counted out


@dataclass(frozen=True)
class Cost:
    """What a bucket costs one process. tokens: an image has so many. images: a step has so many. memory:
    bytes. seconds: a step takes so long. exchanged: bytes of shared tokens that are received in a step."""

    height: int
    width: int
    tokens: int
    images: int
    memory: int
    seconds: float
    exchanged: float


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


def distilling_plan(stage: ResolvedStage, run: Run) -> str:
    """What distilling a transformer will cost, in words and a table of its buckets."""
    model = run.planned(stage)
    one = sum(p.numel() for p in model.parameters())
    add_adapters(stage, model)
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    learners = 2 if stage.trains == TDM else 1
    # Beside adapters all have one base, where processes do not cut it.
    bases = 1 if stage.lora.rank and stage.parallel == "ddp" else 1 + learners
    weights = bases * one + (learners * learns if stage.lora.rank else 0)
    others = "a fake and a teacher" if stage.trains == TDM else "a teacher"
    adapters = f", {learners * learns / 1e6:.1f} M of adapters" if stage.lora.rank else ""
    beside = f" of a student, {others}{adapters}"
    return _plan(stage, run, model.config, weights, learners * learns, beside)


def _plan(
    stage: ResolvedStage, run: Run, config: PixArtConfig, weights: int, trained: int, beside: str
) -> str:
    """weights: all that are there, trained: those that are learned; beside: said of them."""
    mesh = _mesh(stage)
    costs = list(bucket_costs(stage, config, weights, trained, run.device, world_size()))
    hours = stage.steps * max(cost.seconds for cost in costs) / 3600
    return (
        f"{stage.name}: {weights / 1e6:.1f} M parameters{beside}, {stage.steps} steps, "
        f"about {hours:.1f} h on {world_size()} × {run.device.type} (estimate: "
        f"{EFFICIENCY:.0%} of this machine's matrix products)\n{mesh}{_mix(stage, run)}"
        f"{table(costs)}"
    )


def _mesh(stage: Stage) -> str:
    """A line on who shares tokens with whom; none where nobody does. ValueError where the processes
    cannot."""
    if stage.sequence == 1:
        return ""
    parts = "forward and backward" + (", and of blocks again" if stage.checkpoint_blocks else "")
    return (
        f"mesh: {groups(stage)} × {stage.sequence} processes (groups with pictures of their own × those that "
        f"share the tokens of each); exchanged: GiB of tokens that a process receives in a step, computed "
        f"({parts}), whose time is in no estimate\n"
    )


def _mix(stage: ResolvedStage, run: Run) -> str:
    """A line on how often each caption of the data is drawn; none where data are drawn, are not here or
    are complained of."""
    if stage.data.source in ("", DRAWN):
        return ""
    weights = dict(stage.data.captions)
    mix, _ = attempt(lambda: run.captions(stage).caption_mix(weights))
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
        among = world // stage.sequence
        shares = among * stage.batch.accumulate
        images = stage.drawn_images(height, shares) if drawn else stage.batch.of(tokens, among)
        seen = images * (2 if stage.data.prior else 1)  # as many of the class as of the subject
        local = seen // among // stage.batch.accumulate
        grid = (height // side, width // side)
        flops = _passes(stage, config) * forward_flops(config, grid) * seen / world
        own_tokens = -(-tokens * local // stage.sequence)
        kept = own_tokens * (2 if stage.trains == TDM else 1)  # of the student and the fake at once
        memory = memory_of(stage, config, weights, trained, kept, world)
        exchanged = exchanged_bytes(stage, config, grid) * seen / among
        yield Cost(height, width, tokens, images, memory, flops / (EFFICIENCY * peak), exchanged)


def _passes(stage: ResolvedStage, config: PixArtConfig) -> float:
    """The work of a step, in forward passes of the base: one forward, one for gradients of inputs, one for
    those of weights that are learned, one of what is computed again."""
    again = bool(stage.checkpoint_blocks)
    learned = not stage.lora.rank  # frozen weights have no gradient
    if stage.trains in DISTILLED:
        taught = 1 if stage.distil.guidance == 1 else 2
        if stage.trains == LCM:
            return taught + 1 + 2 + learned + again
        walked = sum((len(walk) - 1) / 2 for walk in stage.distil.walks) / len(stage.distil.walks)
        return taught + walked + 2 * (2 + learned + again)
    if stage.trains != CONTROLNET:
        return 2 + learned + again
    return 2 + again + (2 + learned + again) * control_blocks(stage, config) / config.depth


def exchanged_bytes(stage: Stage, config: PixArtConfig, grid: tuple[int, int]) -> float:
    """Bytes that each process receives on average from those it shares a picture's tokens with, for a grid of
    them, forward, backward and where blocks are computed again. What FSDP exchanges comes beside."""
    processes, itemsize = stage.sequence, _itemsize(stage)
    if processes == 1:
        return 0.0
    copies = control_blocks(stage, config) if stage.trains == CONTROLNET else 0
    # The base's first block sees nothing of a control, and needs no gradient.
    walks = [(layer, not copies or layer > 0) for layer in range(config.depth)]
    walks += [(layer, True) for layer in range(copies)]
    total = 0.0
    for layer, learns in walks:
        is_again = stage.checkpoint_blocks > 0 and layer % stage.checkpoint_blocks == 0
        once = received_bytes(config, layer, grid, processes, itemsize)
        total += once * (1 + learns * (1 + is_again))
    patch = config.patch_size**2 * config.out_channels
    prediction = grid[0] * grid[1] * patch * itemsize * (processes - 1) / processes
    return total + 2 * prediction  # there and back


def memory_of(
    stage: ResolvedStage, config: PixArtConfig, weights: int, trained: int, tokens: int, world: int
) -> int:
    """Bytes of weights, gradients, states and kept activations for so many tokens at once."""
    shards = 1 if stage.parallel == "ddp" else world
    learning = trained * (4 + _STATES[stage.optimizer.name] + (4 if stage.ema else 0))
    fixed = (4 * weights + learning) // shards
    bytes_each = _itemsize(stage)
    if bytes_each == 2:
        fixed += 2 * weights  # the lowered copies that autocast keeps for the backward pass
    per_block = tokens * config.hidden_size * bytes_each
    every = stage.checkpoint_blocks
    copies = control_blocks(stage, config) if stage.trains == CONTROLNET else 0
    recomputed = sum(-(-blocks // every) for blocks in (config.depth, copies)) if every else 0
    kept = config.depth + copies - recomputed
    return int(fixed + per_block * (2 * recomputed + _BLOCK * (kept + bool(recomputed))))


def _itemsize(stage: Stage) -> int:
    return 4 if stage.precision == "fp32" else 2


def table(costs: list[Cost]) -> str:
    """The costs as lines of a table."""
    head = f"{'bucket':>11} {'tokens':>7} {'images/step':>11} {'GiB':>7} {'s/step':>8}"
    rows = [
        f"{c.height:>5}×{c.width:<5} {c.tokens:>7} {c.images:>11} {c.memory / 2**30:>7.1f} "
        f"{c.seconds:>8.2f}"
        for c in costs
    ]
    if any(c.exchanged for c in costs):
        head += f" {'exchanged':>10}"
        rows = [f"{row} {c.exchanged / 2**30:>10.3g}" for row, c in zip(rows, costs, strict=True)]
    return "\n".join([head, *rows])
