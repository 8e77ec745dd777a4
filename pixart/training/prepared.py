"""What is wrong with prepared data for a stage that trains on it."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pixart.config import PixArtConfig
from pixart.dataset.batches import CaptionDataset, FeatureDataset
from pixart.dataset.features import holds_prompts
from pixart.training.batch import unread_data
from pixart.training.parallel import sharing_problems
from pixart.training.problems import attempt, problems_of
from pixart.training.run import Run
from pixart.training.stage import TDM, ResolvedStage, Stage


def prepared_problems(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the fields about prepared features, whatever trains on them."""
    yield from unread_data(stage, "scenes", "sizes", "crop", "nameless", "short")
    weights = [weight for _, weight in stage.data.captions]
    if min(weights, default=0) < 0 or not sum(weights) > 0:
        yield f"data.captions must be names and weights, got {stage.data.captions}"
    if not stage.data.source:
        yield (
            f"stage {stage.name} must have data, got none; give --data.source FOLDER, made by "
            f"`python -m pixart.data {_maker(stage)}`"
        )


def source_problems(stage: ResolvedStage, run: Run, config: PixArtConfig | None) -> Iterator[str]:
    """Yield why a stage cannot train on the folders that it names. config: of its model, where known."""
    if not stage.data.source:
        return  # a complaint of `check`
    given = {name: getattr(stage.data, name) for name in ("source", "prior")}
    # Of none Path makes the folder that the command is called in.
    alone = [name for name, place in given.items() if place and holds_prompts(Path(place))]
    for name in alone:
        yield (
            f"data.{name} must hold pictures where trains is {stage.trains}, {getattr(stage.data, name)} holds "
            "prompts only, of which tdm alone learns; `pixart data prepare` encodes pictures"
        )
    if alone:
        return
    found: list[FeatureDataset | None] = []
    for name in ("source", "prior"):
        folder = getattr(stage.data, name)
        if folder and not Path(folder).is_dir():
            way_out = f"`python -m pixart.data {_maker(stage)}` makes one"
            yield f"data.{name} must be a folder of prepared data, {folder} is none; {way_out}"
        data, lines = (
            attempt(partial(run.dataset, folder, stage.resolution)) if folder else (None, [])
        )
        yield from lines if Path(folder).is_dir() else ()
        found.append(data)
    data, prior = found
    if data is not None:
        yield from data_problems(stage, data, prior, config)


def _maker(stage: Stage) -> str:
    """The command that makes what a stage learns from."""
    return "prompts" if stage.trains == TDM else "prepare"


def data_problems(
    stage: ResolvedStage,
    data: FeatureDataset,
    prior: FeatureDataset | None,
    config: PixArtConfig | None,
) -> Iterator[str]:
    """Why a stage cannot train on such data. config: of the model that is to, where it is known."""
    yield from _scale_problems(data, stage)
    sizes = sorted(set(data.buckets) - {(stage.resolution, stage.resolution)})
    if sizes and not stage.aspect:
        yield (
            f"aspect must be true for data in buckets, got {sizes[0][0]}×{sizes[0][1]}; give "
            "--aspect, or prepare the data with --square"
        )
    yield from problems_of(lambda: data.check_captions(dict(stage.data.captions)))
    yield from _fit_problems(data, config)
    if config is not None:
        yield from sharing_problems(stage, config, data.buckets)
    if prior is None:
        return
    yield from _scale_problems(prior, stage)
    yield from _fit_problems(prior, config)
    if lacking := sorted(set(data.buckets) - set(prior.buckets)):
        height, width = lacking[0]
        yield (
            f"data.prior must have a picture in every bucket of the data, got none of "
            f"{height}×{width}; prepare both with --square"
        )


def caption_problems(
    stage: ResolvedStage, data: CaptionDataset, config: PixArtConfig | None
) -> Iterator[str]:
    """Why a stage cannot train on captions alone. config: of the model that is to, where it is known."""
    yield from problems_of(lambda: data.check_captions(dict(stage.data.captions)))
    one, lines = attempt(lambda: data.caption(0, random.Random(0)))
    yield from lines
    if one is not None and config is not None:
        yield from _width_problems("caption channels", one.shape[1], config.caption_channels)


def _scale_problems(data: FeatureDataset, stage: ResolvedStage) -> Iterator[str]:
    stored = data.scaling_factor
    if stored is not None and abs(stored - stage.vae_scale) > 1e-6:
        yield (
            f"vae_scale must be that of the VAE that made the data, {stored}, got {stage.vae_scale}"
        )


def _fit_problems(data: FeatureDataset, config: PixArtConfig | None) -> Iterator[str]:
    if config is None:
        return
    one, lines = attempt(lambda: data.batch([0], random.Random(0)))
    yield from lines
    if one is None:
        return
    pairs = (
        ("latent channels", one.mean.shape[1], config.in_channels),
        ("caption channels", one.features.shape[2], config.caption_channels),
    )
    for name, given, expected in pairs:
        yield from _width_problems(name, given, expected)


def _width_problems(name: str, given: int, expected: int) -> Iterator[str]:
    if given != expected:
        yield f"data must have {expected} {name} for this model, got {given}"
