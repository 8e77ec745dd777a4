"""The files of a pipeline directory: where they are, and what is wrong with those that are not."""

import logging
from pathlib import Path
from typing import Any, cast

import torch

from pixart.checkpoint.config import Surroundings, config_from_diffusers
from pixart.checkpoint.load import TRANSFORMER_FILES
from pixart.checkpoint.names import CONFIG
from pixart.config import EMBEDDED, MAX_LENGTH, Family, PixArtConfig
from pixart.files import CheckpointError, read_json
from pixart.pipeline.defaults import Sampling
from pixart.releases import release_named
from pixart.sampler.loop import check_sampling
from pixart.sampler.schedulers import default_steps, make_scheduler
from pixart.text.encoder import Quantization
from pixart.text.networks import features_width, longest_caption
from pixart.text.stored import read_weights
from pixart.weights import T5_WEIGHTS, WEIGHTS, errors_naming, find_weights, resolve, variants_of

SAMPLING = "sampling.json"  # steps and guidance of a pipeline's own, beside model_index.json
INDEX = "model_index.json"
PARTS = ("tokenizer", "text_encoder", "vae", "scheduler")
_FILES = ("*.safetensors", "*.bin", "*.model")
# merges.txt is half of a CLIP's tokenizer.
_PIPELINE_FILES = (
    "*.json",
    "*/*.json",
    "tokenizer/*.txt",
    *(f"{part}/{kind}" for part in PARTS if part != "text_encoder" for kind in _FILES),
)
_TEXT_ENCODER_FILES = tuple(f"text_encoder/{kind}" for kind in _FILES)
_SMALL_TEXT_ENCODER = 2**31  # bytes on disk; below it T5 runs in the dtype of the rest
_STEMS = {"text_encoder": T5_WEIGHTS, "vae": (WEIGHTS,), "transformer": (WEIGHTS,)}

logger = logging.getLogger("pixart")


def open_directory(
    source: str | Path, with_transformer: bool, with_text_encoder: bool = True
) -> Path:
    """A pipeline on disk, of the hub or of a release. CheckpointError if parts of it are missing.

    with_text_encoder: without it the text encoder's weights need not be there, only its config.json.
    Where another transformer takes the place of its own, a release whose repository has a transformer
    alone stands for the pipeline that it belongs to.
    """
    if str(source) == EMBEDDED:  # a directory of that name is ./shapes
        return Path(__file__).parent.parent / "assets" / EMBEDDED
    release = release_named(str(source))
    if release is not None and release.pipeline is not None and not with_transformer:
        source = release.pipeline
    wanted = (*_PIPELINE_FILES, *TRANSFORMER_FILES) if with_transformer else _PIPELINE_FILES
    wanted = (*wanted, *_TEXT_ENCODER_FILES) if with_text_encoder else wanted
    directory = resolve(source, allow_patterns=wanted)
    needed = [*PARTS, *["transformer"] * with_transformer]
    if missing := [name for name in needed if not (directory / name).is_dir()]:
        way_out = "give the directory of a whole pipeline"
        if missing == ["transformer"]:
            way_out = "name a transformer checkpoint with --transformer"
        raise CheckpointError(f"{directory}: has no {', '.join(missing)} folder; {way_out}")
    return directory


def family_of(directory: Path) -> Family | None:
    """Σ or α by the class that model_index.json names, or as a published one says, None if it tells
    neither."""
    index = directory / INDEX
    if not index.is_file():
        return None
    values = read_json(index)
    name = f"{values.get('_class_name')} {values.get('family')}".lower()
    return next((cast(Family, family) for family in MAX_LENGTH if family in name), None)


def caption_length_of(directory: Path) -> int | None:
    """The caption tokens of a pipeline: those that its CLIP has positions for, or else of its family; None
    if it names neither."""
    family = family_of(directory)
    length = longest_caption(directory / "text_encoder")
    return length or (None if family is None else MAX_LENGTH[family])


def surroundings(directory: Path) -> Surroundings:
    """What the pipeline tells about another transformer that takes the place of its own."""
    length = caption_length_of(directory)
    file = directory / "transformer" / CONFIG
    if not file.is_file():
        return Surroundings(length)
    try:
        own = config_from_diffusers(
            read_json(file), {}, model_max_length=length or MAX_LENGTH["sigma"]
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return Surroundings(length, own)


def choose_family(config: PixArtConfig, pipeline: Family | None, is_guest: bool) -> Family:
    """The pipeline's, unless another checkpoint in it (a guest) shows that it is of the other."""
    if is_guest or pipeline is None:
        if config.micro_condition or config.model_max_length == MAX_LENGTH["alpha"]:
            return "alpha"
        if config.model_max_length == MAX_LENGTH["sigma"]:
            return "sigma"
    return pipeline or "sigma"


def choose_variants(
    directory: Path, variant: str | None, with_transformer: bool, with_text_encoder: bool = True
) -> dict[str, str | None]:
    """The variant of each folder: the one asked for where there is one, else what is there."""
    folders = ["text_encoder"] * with_text_encoder + ["vae"] + ["transformer"] * with_transformer
    chosen: dict[str, str | None] = {}
    for name in folders:
        folder, stems = directory / name, _STEMS[name]
        has = variant in variants_of(folder, stems)
        _, chosen[name] = find_weights(folder, variant if has else None, stems)
        if chosen[name] != variant and variant is not None:
            logger.info("%s: has no variant %r, its other weights are taken", folder, variant)
    if variant is not None and variant not in chosen.values():
        has_any = {
            found for name in folders for found in variants_of(directory / name, _STEMS[name])
        }
        raise CheckpointError(
            f"{directory}: has no variant {variant!r}; its variants: "
            f"{', '.join(sorted(has_any)) or 'none'}"
        )
    return chosen


def check_fit(config: PixArtConfig, path: Path, directory: Path) -> None:
    """Refuse a transformer that was made for another pipeline, before anything is run."""
    encoder = directory / "text_encoder"
    read_json(encoder / "config.json")  # missing or damaged, it says nothing to compare with
    channels = read_json(directory / "vae" / "config.json").get("latent_channels")
    pairs = (
        ("text_encoder", features_width(encoder), "caption_channels"),
        ("vae", channels, "in_channels"),
    )
    for folder, given, ours in pairs:
        expected = getattr(config, ours)
        if given is not None and given != expected:
            raise CheckpointError(
                f"{path}: is made for {expected} {ours.replace('_', ' ')}, but {directory / folder} "
                f"has {given}; give the pipeline that it belongs to with --model"
            )
    most = longest_caption(encoder)
    if most is not None and config.model_max_length > most:
        raise CheckpointError(
            f"{path}: is made for captions of {config.model_max_length} tokens, but the CLIP in {encoder} "
            f"has positions for {most}; give the pipeline that it belongs to with --model"
        )


def text_dtype(
    directory: Path,
    wanted: torch.dtype | Quantization | None,
    dtype: torch.dtype,
    variant: str | None = None,
    file: Path | None = None,
) -> tuple[torch.dtype, Quantization | None]:
    """What is asked for; or bf16 for a large encoder, else `dtype`. file: of the encoder's weights."""
    if isinstance(wanted, str):
        return torch.bfloat16, wanted
    if wanted is not None:
        return wanted, None
    if file is not None:  # packed, it has fewer bytes than what it is computed with
        size = 2 * read_weights([file]).numbers
    else:
        files, _ = find_weights(directory / "text_encoder", variant, T5_WEIGHTS)
        size = sum(one.stat().st_size for one in files)
    return (torch.bfloat16 if size >= _SMALL_TEXT_ENCODER else dtype), None


def read_sampling(directory: Path) -> Sampling:
    """What sampling.json says, if there is one. CheckpointError for what cannot be drawn with."""
    file = directory / SAMPLING
    if not file.is_file():
        return Sampling()
    values = read_json(file)
    try:
        return Sampling.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def read_scheduler(directory: Path) -> dict[str, Any]:
    """scheduler_config.json, if a scheduler can be made of it and makes its timesteps."""
    file = directory / "scheduler" / "scheduler_config.json"
    values = read_json(file)
    with errors_naming(file):
        scheduler = make_scheduler(None, values)
        steps = min(default_steps(scheduler), scheduler.config.num_train_timesteps)
        check_sampling(scheduler, steps, None, (0.0, 1.0))
    return values
