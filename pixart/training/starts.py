"""Where a stage's transformer comes from, and what is changed about it before it trains."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pixart.checkpoint.config import Surroundings
from pixart.checkpoint.dit import open_dit
from pixart.checkpoint.load import (
    OpenedTransformer,
    empty_model,
    load_transformer,
    open_transformer,
)
from pixart.config import EMBEDDED, PixArtConfig
from pixart.lora.adapters import add_lora
from pixart.model.transformer import PixArt
from pixart.pipeline.directory import open_directory
from pixart.pipeline.text_to_image import Pipeline
from pixart.training.stage import DIT, PREVIOUS, RANDOM, Stage
from pixart.training.transitions import (
    add_kv_compression,
    add_micro_condition,
    interpolate_positions,
    lengthen_captions,
)
from pixart.weights import resolve

CALIBRATION_BATCHES = 4
_LATENT = 8  # pixels a latent is wide, for every VAE of the family


def transformer_config(stage: Stage) -> PixArtConfig:
    """The transformer of a stage that starts from random weights."""
    size = stage.size
    return PixArtConfig(
        input_size=stage.resolution // _LATENT,
        hidden_size=size.hidden_size,
        depth=size.depth,
        num_heads=size.num_heads,
        caption_channels=size.caption_channels,
        model_max_length=stage.max_length,
        pe_interpolation=stage.position_scale,
        pred_sigma=size.pred_sigma,
        class_dropout_prob=stage.data.caption_dropout,
        micro_condition=stage.micro_condition,
        qk_norm=size.qk_norm,
        kv_compression=stage.compression,
    )


def planned_config(stage: Stage, stages: Sequence[Stage]) -> PixArtConfig:
    """What a stage's transformer will be, also before what it starts from is there: then a published
    start is taken to be XL/2 of the stage's resolution."""
    before = stages[: [one.name for one in stages].index(stage.name)]
    if stage.start == PREVIOUS and before and before[-1].trains == "transformer":
        config = planned_config(before[-1], stages)
    else:
        config = _known_config(stage) or transformer_config(stage)
    model = empty_model(config)
    if stage.start != RANDOM:
        adapt(model, stage)
    return replace(model.config, kv_compression=stage.compression or config.kv_compression)


def _known_config(stage: Stage) -> PixArtConfig | None:
    """Of a start that lies on this machine."""
    if stage.start == EMBEDDED:
        return _opened(open_directory(EMBEDDED, True), stage).config
    is_here = stage.start not in (PREVIOUS, RANDOM) and Path(stage.start).exists()
    return _opened(Path(stage.start), stage).config if is_here else None


def start_transformer(stage: Stage, previous: Path | None) -> PixArt:
    """The model that a stage begins with, in fp32, before its compression is added. previous: the
    last stage's checkpoint."""
    if stage.start == RANDOM:
        return PixArt(transformer_config(stage))
    return adapt(_open(stage, previous), stage)


def adapt(model: PixArt, stage: Stage) -> PixArt:
    """Give a model the stage's resolution, caption length and micro-conditioning, in place."""
    if stage.resolution != model.config.input_size * _LATENT or stage.pe_interpolation is not None:
        interpolate_positions(model, stage.resolution, stage.pe_interpolation)
    if stage.max_length < model.config.model_max_length:
        raise ValueError(
            f"max_length must be at least that of the start, {model.config.model_max_length}, got "
            f"{stage.max_length}; shorter captions fit as they are"
        )
    lengthen_captions(model, stage.max_length)
    if stage.micro_condition:
        if stage.lora.rank and not model.config.micro_condition:
            raise ValueError(
                "micro_condition must be known to the start with lora, whose adapters alone are "
                f"trained, got {stage.start}"
            )
        add_micro_condition(model)
    return model


def _open(stage: Stage, previous: Path | None) -> PixArt:
    if stage.start == PREVIOUS:
        assert previous is not None
        return load_transformer(previous / "model.safetensors", dtype=torch.float32)
    if stage.start.startswith(DIT):
        path = stage.start.removeprefix(DIT)
        width = stage.size.caption_channels
        return open_dit(path, caption_channels=width, max_length=stage.max_length)
    is_embedded = stage.start == EMBEDDED
    source = open_directory(EMBEDDED, True) if is_embedded else resolve(stage.start)
    return _opened(source, stage).load()


def _opened(source: Path, stage: Stage) -> OpenedTransformer:
    """A checkpoint that does not say how long its captions are has the stage's."""
    around = Surroundings(stage.max_length)
    return open_transformer(source, dtype=torch.float32, around=around)


def set_null_caption(model: PixArt, pipe: Pipeline) -> None:
    """Give PixArt-Σ the null caption that it trains with, T5 of the empty text, padded, also in the
    place of one from α, whose own comes with its checkpoint."""
    if pipe.family == "alpha" and getattr(model, "null_caption_stored", False):
        return
    features = pipe.text_encoder.encode([""], keep_padding=True).features[0]
    lengthen_captions(model, max(len(features), model.config.model_max_length), features)


def check_null_caption(model: PixArt) -> None:
    """Refuse to train on dropped captions when nobody knows what stands in their place."""
    if not getattr(model, "null_caption_stored", False):
        raise ValueError(
            "data.caption_dropout must be 0 for a checkpoint without its null caption; give "
            "--pipeline, whose T5 makes it, or --data.caption-dropout 0"
        )


def add_adapters(stage: Stage, model: PixArt) -> None:
    """What stage.lora asks for: adapters alone train from then on."""
    if stage.lora.rank:
        add_lora(model, stage.lora.rank, stage.lora.alpha, stage.lora.targets)


class Compressible(Protocol):
    """A task with a transformer, and batches to measure it with."""

    transformer: PixArt

    def noised_batches(self, count: int) -> Iterator[tuple[Tensor, ...]]: ...


def add_compression(stage: Stage, task: Compressible) -> None:
    """What stage.kv_compress adds to a model that does not have it."""
    compression = stage.compression
    if compression is None or stage.start == RANDOM:
        return
    batches = task.noised_batches(CALIBRATION_BATCHES) if stage.kv_start == "calibrated" else ()
    add_kv_compression(task.transformer, compression, start=stage.kv_start, batches=batches)
