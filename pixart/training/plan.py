"""What a stage will cost, before it is begun: `--dry-run`. Estimates, and called so."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pixart.config import PixArtConfig
from pixart.device import measure_peak
from pixart.resolution import aspect_ratios
from pixart.training.stage import DRAWN, Stage

EFFICIENCY = 0.4  # of the device's matrix products, that a training step reaches as a whole
_STATES = {"came": 4, "adamw": 8, "muon": 6, "adamw-8bit": 2}  # bytes per weight
_BLOCK = 28  # tensors of (N, C) that a block keeps for its backward pass, MLP and qkv counted out


@dataclass(frozen=True)
class Cost:
    """Of one process. tokens: of an image. images: of a step. memory: bytes. seconds: of a step."""

    height: int
    width: int
    tokens: int
    images: int
    memory: int
    seconds: float


def forward_flops(config: PixArtConfig, tokens: int) -> float:
    """One image through the transformer: linear layers, attention and 300 caption tokens."""
    width = config.hidden_size
    flops = 0.0
    compression = config.kv_compression
    for layer in range(config.depth):
        merged = compression is not None and compression.applies_to(layer)
        keys = -(-tokens // compression.ratio**2) if merged and compression else tokens
        linear = 4 * width**2 + 2 * width**2 + 2 * width * config.mlp_hidden_size
        text = 2 * width**2 * config.model_max_length
        attention = 2 * tokens * (keys + config.model_max_length) * width
        flops += 2 * (tokens * linear + text + attention)
    return flops


def plan(
    stage: Stage,
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
        passes = 4 if stage.checkpoint_blocks else 3
        passes -= bool(stage.lora.rank)  # frozen weights have no gradient
        flops = passes * forward_flops(config, tokens) * seen / world
        memory = memory_of(stage, config, weights, trained, tokens * local, world)
        yield Cost(height, width, tokens, images, memory, flops / (EFFICIENCY * peak))


def memory_of(
    stage: Stage, config: PixArtConfig, weights: int, trained: int, tokens: int, world: int
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
    recomputed = -(-config.depth // every) if every else 0
    kept = config.depth - recomputed
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
