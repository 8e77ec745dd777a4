"""Where a stage's transformer comes from, and what is changed about it before it trains."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pixart.checkpoint.config import Surroundings
from pixart.checkpoint.control import empty_control
from pixart.checkpoint.dit import open_dit
from pixart.checkpoint.load import empty_model, open_transformer
from pixart.checkpoint.load import find_transformer as find_checkpoint
from pixart.config import EMBEDDED, MAX_LENGTH, PixArtConfig
from pixart.lora.adapters import add_lora
from pixart.model.control import COPIES, ControlNet
from pixart.model.transformer import PixArt
from pixart.pipeline.directory import (
    caption_length_of,
    check_fit,
    choose_variants,
    open_directory,
    read_scheduler,
)
from pixart.pipeline.text_to_image import Pipeline
from pixart.training.batch import LATENT
from pixart.training.problems import attempt, problems_of
from pixart.training.stage import DIT, DRAWN, RANDOM, ResolvedStage, Stage
from pixart.training.transitions import (
    add_kv_compression,
    add_micro_condition,
    check_start,
    interpolate_positions,
    lengthen_captions,
)
from pixart.weights import find_weights, is_on_hub, may_download

CALIBRATION_BATCHES = 4
DEPTH = 28  # of the published models, 13 of whose blocks the published controls copy


@dataclass(frozen=True)
class Start:
    """A trained transformer to start from: what it is, and how to read its weights, in fp32."""

    config: PixArtConfig
    null_caption_stored: bool
    load: Callable[[], PixArt]


def open_start(stage: Stage, previous: Path | None) -> Start:
    """What a stage that does not start from random weights starts from. previous: the last stage's
    state. A checkpoint that does not say how long its captions are has the stage's, or else those of
    the pipeline's family. Raises ValueError for what cannot be opened."""
    if stage.start.startswith(DIT):
        model = open_dit(
            stage.start.removeprefix(DIT),
            caption_channels=stage.size.caption_channels,
            max_length=stage.max_length or MAX_LENGTH["sigma"],
        )
        return Start(model.config, False, lambda: model)
    if previous is not None:
        drawn = previous / "pipeline" / "transformer"
        source = drawn if drawn.exists() else previous / "model.safetensors"
    else:
        source = find_transformer(stage.start)
    around = Surroundings(stage.max_length or _family_length(stage))
    opened = open_transformer(source, dtype=torch.float32, around=around)
    return Start(opened.config, opened.null_caption_stored, opened.load)


def find_transformer(source: str) -> Path:
    """`checkpoint.load.find_transformer`, which knows the embedded model too."""
    return open_directory(EMBEDDED, True) if source == EMBEDDED else find_checkpoint(source)


def _family_length(stage: Stage) -> int | None:
    """The caption tokens of the pipeline's CLIP, or of the family that it is of; None where it is not here
    yet."""
    if not stage.pipeline or not pipeline_is_here(stage):
        return None
    return caption_length_of(open_directory(stage.pipeline, with_transformer=False))


def start_is_here(stage: Stage) -> bool:
    """Whether the start may be opened: it is not, where something of it would have to be downloaded
    within `without_downloads`. What can be wrong with a path is for opening it to say."""
    if stage.data.source == DRAWN:  # all parts of a pipeline are trained
        return _opens_here(stage.start, lambda: _check_parts(stage.start, True))
    return _opens_here(stage.start, lambda: _check_weights(find_transformer(stage.start)))


def pipeline_is_here(stage: Stage) -> bool:
    """The same of the pipeline, the transformer aside."""
    return _opens_here(stage.pipeline, lambda: _check_parts(stage.pipeline, False))


def _opens_here(source: str, look: Callable[[], object]) -> bool:
    return may_download() or not is_on_hub(source) or not list(problems_of(look))


def _check_parts(source: str, with_transformer: bool) -> None:
    """Raise CheckpointError unless all weights of a pipeline are there: the cache may have some."""
    choose_variants(open_directory(source, with_transformer), None, with_transformer)


def _check_weights(place: Path) -> None:
    if place.is_dir():
        inside = place / "transformer"
        find_weights(inside if inside.is_dir() else place, None)


def transformer_config(stage: ResolvedStage) -> PixArtConfig:
    """The transformer of a stage that starts from random weights."""
    size = stage.size
    return PixArtConfig(
        input_size=stage.resolution // LATENT,
        hidden_size=size.hidden_size,
        depth=size.depth,
        num_heads=size.num_heads,
        caption_channels=size.caption_channels,
        caption_embedding=size.caption_embedding,
        model_max_length=stage.max_length,
        pe_interpolation=stage.position_scale,
        pred_sigma=size.pred_sigma,
        class_dropout_prob=stage.data.caption_dropout,
        micro_condition=stage.micro_condition,
        qk_norm=size.qk_norm,
        kv_compression=stage.compression,
    )


def control_blocks(stage: Stage, base: PixArtConfig) -> int:
    """How many blocks a control copies, where it goes on from no other. Raises ValueError where the base has
    not as many beside."""
    published = max(1, round(base.depth * COPIES / DEPTH))
    blocks = published if stage.control.blocks is None else stage.control.blocks
    if blocks >= base.depth:
        raise ValueError(f"control.blocks must be below the base's {base.depth}, got {blocks}")
    return blocks


def weightless_model(stage: ResolvedStage, start: PixArtConfig | None) -> PixArt:
    """The model that a stage will train, its adapters aside, without memory for its weights: all that
    changes a start is tried on it. start: None for random weights. Raises ValueError for what cannot
    be changed."""
    if start is None:
        return empty_model(transformer_config(stage))
    model = adapt(empty_model(start), stage)
    if stage.compression is not None:
        check_start(stage.kv_start, stage.compression)
        add_kv_compression(model, stage.compression)
    return model


def adapt(model: PixArt, stage: ResolvedStage) -> PixArt:
    """Give a model the stage's resolution, caption length and micro-conditioning, in place. All of whose weights
    train on the loss of diffusion, is distilled no more: it says no `few_step` then. Beside adapters and
    controls a base stays what it was."""
    if model.config.few_step is not None and stage.trains_transformer and not stage.lora.rank:
        model.config = replace(model.config, few_step=None)
    if stage.resolution != model.config.input_size * LATENT or stage.pe_interpolation is not None:
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


def check_prediction(stage: ResolvedStage, source: str, scheduler: Mapping[str, Any]) -> None:
    """Refuse to train on another target than a scheduler_config.json names. source: whose it is."""
    predicts = scheduler.get("prediction_type", "epsilon")
    if predicts != stage.prediction:
        raise ValueError(f"prediction must be that of {source}, {predicts}, got {stage.prediction}")


def pipeline_problems(stage: ResolvedStage, config: PixArtConfig | None) -> Iterator[str]:
    """Why stage.pipeline cannot read and draw for a stage. config: of its model, where it is known."""
    folder, lines = attempt(lambda: open_directory(stage.pipeline, with_transformer=False))
    yield from lines
    if folder is None:
        return
    scheduler, lines = attempt(lambda: read_scheduler(folder))
    yield from lines
    if scheduler is not None:
        yield from problems_of(lambda: check_prediction(stage, stage.pipeline, scheduler))
    if config is not None:
        yield from problems_of(lambda: check_fit(config, Path("the model"), folder))


def set_null_caption(model: PixArt, pipe: Pipeline) -> None:
    """Give PixArt-Σ the null caption that it trains with, T5 of the empty text, padded, also in the
    place of one from α, whose own comes with its checkpoint."""
    if pipe.family == "alpha" and getattr(model, "null_caption_stored", False):
        return
    features = pipe.text_encoder.encode([""], keep_padding=True).features[0]
    lengthen_captions(model, max(len(features), model.config.model_max_length), features)


def check_null_caption(stage: Stage, stored: bool) -> None:
    """Refuse to train on dropped captions when nobody knows what stands in their place. stored: whether
    the start holds it."""
    if not (stage.pipeline or stage.start == RANDOM or stored) and stage.data.caption_dropout:
        raise ValueError(
            "data.caption_dropout must be 0 for a checkpoint without its null caption; give "
            "--pipeline, whose T5 makes it, or --data.caption-dropout 0"
        )


def weightless_control(stage: Stage, base: PixArt) -> ControlNet:
    """The control that a stage will train, its adapters included, without memory for its weights; as many
    blocks as it has where it goes on from no other."""
    network = empty_control(base.config, control_blocks(stage, base.config))
    return add_control_adapters(stage, network)


def add_control_adapters(stage: Stage, network: ControlNet) -> ControlNet:
    """What stage.lora asks for: adapters, and the projections, which start at zero, train from then on."""
    if stage.lora.rank:
        add_lora(network, stage.lora.rank, stage.lora.alpha, stage.lora.targets)
        for block in network.control_blocks:
            for projection in (block.before_proj, block.after_proj):
                if projection is not None:
                    projection.requires_grad_(True)
    return network


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
