"""The parts of a pipeline, each opened by a function of its own: see `Pipeline.from_pretrained`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from pixart.checkpoint.config import NO_PIPELINE
from pixart.checkpoint.control import OpenedControl, find_control, open_control
from pixart.checkpoint.load import (
    OpenedTransformer,
    empty_model,
    find_transformer,
    open_transformer,
)
from pixart.config import KVCompression, PixArtConfig
from pixart.device import check_kernels, choose_device
from pixart.few_step import FewStep
from pixart.files import CheckpointError
from pixart.lora.adapters import load_lora, merge_lora
from pixart.lora.files import find_adapter
from pixart.model.transformer import PixArt
from pixart.pipeline.captions import NullCaption
from pixart.pipeline.directory import (
    check_fit,
    choose_variants,
    open_directory,
    surroundings,
    text_dtype,
)
from pixart.quantize import Quantized, quantize_linear
from pixart.releases import release_named, release_of
from pixart.text.encoder import Quantization, TextEncoder, TextMemory
from pixart.vae.autoencoder import VAE
from pixart.weights import T5_WEIGHTS, find_weights, resolve, variants_of

Adapters = Sequence[tuple[str | Path, float]]


@dataclass(frozen=True)
class Source:
    """Where the parts of a pipeline are.

    transformer: a file or a folder, None for a model of the caller's. is_guest: whether it was named
    beside the directory, whose own it replaces. variants: of the weights, by folder. name: for
    people. few_step: what the transformer was distilled for by its name, which its files may not say.
    text_encoder: the file of a T5 that stands for the weights of the directory's.
    """

    directory: Path
    transformer: Path | None
    is_guest: bool
    variant: str | None
    variants: Mapping[str, str | None]
    name: str
    few_step: FewStep | None
    text_encoder: Path | None = None


def find_source(
    source: str | Path,
    transformer: str | Path | PixArt | None,
    variant: str | None,
    text_encoder: str | Path | None = None,
) -> Source:
    """Locate the directory, the transformer and the text encoder's file, on disk or on the hub.
    CheckpointError if one of them is not there.

    A release whose repository has a transformer alone is drawn in the pipeline that it belongs to.
    """
    name, release = str(source), release_named(str(source))
    if release is not None and release.pipeline is not None and transformer is None:
        transformer = release.place
    file = None if text_encoder is None else find_text_encoder(text_encoder)
    parts = {"with_transformer": transformer is None, "with_text_encoder": file is None}
    directory = open_directory(source, **parts)
    variants = choose_variants(directory, variant, **parts)
    if isinstance(transformer, str | Path):
        path = find_transformer(transformer)
        if release is None or transformer != release.place:
            name = f"{name} with {transformer}"
            release = release_named(str(transformer)) or release_of(path)
        few_step = release.few_step if release else None
        return Source(directory, path, True, variant, variants, name, few_step, file)
    if transformer is not None:
        return Source(directory, None, False, variant, variants, name, None, file)
    release = release or release_of(directory)
    few_step = release.few_step if release else None
    return Source(directory, directory, False, variant, variants, name, few_step, file)


def find_text_encoder(place: str | Path) -> Path:
    """The file of a T5, on disk or on the hub. CheckpointError for what is none."""
    path = resolve(place, allow_patterns=())
    if not path.is_file():
        raise CheckpointError(
            f"{place}: must be a file of T5's weights (.safetensors, .gguf), or id/file on the hub, got a "
            "folder; give a pipeline's folder with --model"
        )
    return path


def choose_numbers(
    device: str | torch.device | None, dtype: torch.dtype | None, sizes_only: bool = False
) -> tuple[torch.device, torch.dtype]:
    """Where to compute, and in which numbers: bf16 on a GPU, fp32 on a CPU. ValueError if it is not
    there, or cannot run the kernels. sizes_only: it need not be."""
    place = choose_device(device, may_lack=sizes_only)
    if not sizes_only:
        check_kernels(place)
    return place, dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)


def check_null_caption(null_caption: str | None) -> None:
    if null_caption not in (None, *get_args(NullCaption)):
        raise ValueError(f"null_caption must be own-mask or prompt-mask, got {null_caption!r}")


def open_denoiser(
    source: Source, transformer: str | Path | PixArt | None, dtype: torch.dtype, **options: Any
) -> OpenedTransformer:
    """The checkpoint that was found, or a model of the caller's. options: config, kv_compression, ema,
    lora and quantize of checkpoints."""
    if isinstance(transformer, PixArt):
        opened = _take_model(transformer, options)
    else:
        opened = _open_checkpoint(source, dtype=dtype, **options)
    check_fit(opened.config, source.transformer or Path("the model"), source.directory)
    return opened


def _take_model(model: PixArt, idle: Mapping[str, Any]) -> OpenedTransformer:
    """idle: what would do nothing beside a model."""
    if given := [name for name, value in idle.items() if value]:
        raise ValueError(
            f"{given[0]} must be left out beside a model, got {idle[given[0]]!r}; change the "
            "model itself"
        )
    return OpenedTransformer.of(model)


def _open_checkpoint(
    source: Source,
    *,
    config: PixArtConfig | None,
    kv_compression: KVCompression | None,
    dtype: torch.dtype,
    ema: bool,
    lora: Adapters,
    quantize: Quantized | None = None,
    sizes_only: bool = False,
) -> OpenedTransformer:
    """The transformer, its names and shapes checked; its weights, and those of the adapters that are
    to be merged, are read when it is loaded."""
    assert source.transformer is not None
    opened = open_transformer(
        source.transformer,
        config=config,
        kv_compression=kv_compression,
        dtype=dtype,
        ema=ema,
        variant=_transformer_variant(source),
        around=surroundings(source.directory) if source.is_guest else NO_PIPELINE,
        few_step=source.few_step,
        sizes_only=sizes_only,
    )
    if lora:
        # Refused now, not when T5 has run. An adapter may say how what it makes of the model is drawn.
        opened.config = load_lora(empty_model(opened.config), lora).config
        opened.changes.append(lambda model: merge_lora(load_lora(model, lora)))
    if quantize is not None:
        opened.changes.append(lambda model: quantize_linear(model, quantize))
    return opened


def open_controls(
    controls: Sequence[str | Path],
    opened: OpenedTransformer,
    dtype: torch.dtype,
    variant: str | None,
) -> list[OpenedControl]:
    """ControlNets for a transformer, their names and shapes checked; their weights are read when they are
    loaded. variant: of those that are folders and have it."""
    found = []
    for source in controls:
        path = find_control(source)
        wanted = variant if path.is_dir() and variant in variants_of(path) else None
        found.append(open_control(path, opened, dtype=dtype, variant=wanted))
    return found


def open_text_encoder(
    source: Source,
    config: PixArtConfig,
    wanted: torch.dtype | Quantization | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    cache_dir: str | Path | None,
    memory: TextMemory = "auto",
) -> TextEncoder:
    """wanted: None is bf16 for a large encoder, else `dtype`."""
    variant, file = source.variants.get("text_encoder"), source.text_encoder
    encoder_dtype, quantization = text_dtype(source.directory, wanted, dtype, variant, file)
    return TextEncoder.from_pretrained(
        source.directory,
        dtype=encoder_dtype,
        device=device,
        max_length=config.model_max_length,
        quantization=quantization,
        cache_dir=cache_dir,
        variant=variant,
        file=file,
        memory=memory,
    )


def open_vae(
    source: Source, dtype: torch.dtype, device: torch.device, sizes_only: bool = False
) -> VAE:
    variant = source.variants["vae"]
    return VAE.from_pretrained(
        source.directory, dtype=dtype, device=device, variant=variant, sizes_only=sizes_only
    )


def weight_files(
    source: Source, lora: Adapters, controls: Sequence[OpenedControl] = ()
) -> dict[str, list[Path]]:
    """The files that decide a picture, by part: "transformer", "text_encoder", "vae", "lora" and
    "control"."""
    variants, directory = source.variants, source.directory
    if source.text_encoder is not None:
        encoder = [source.text_encoder]
    else:
        folder = directory / "text_encoder"
        encoder, _ = find_weights(folder, variants["text_encoder"], stems=T5_WEIGHTS)
    vae, _ = find_weights(directory / "vae", variants["vae"])
    files = {"text_encoder": encoder, "vae": vae}
    if source.transformer is not None:
        files["transformer"] = _transformer_files(source)
    if lora:
        files["lora"] = [find_adapter(path) for path, _ in lora]
    if controls:
        files["control"] = [file for one in controls for file in one.files]
    return files


def _transformer_variant(source: Source) -> str | None:
    if source.is_guest and source.transformer is not None and source.transformer.is_dir():
        return source.variant
    return source.variants.get("transformer")


def _transformer_files(source: Source) -> list[Path]:
    path = source.transformer
    assert path is not None
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    return find_weights(folder, _transformer_variant(source))[0]
