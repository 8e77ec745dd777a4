"""The folder of a repository: a pipeline in diffusers' layout, with the remote code that runs it."""

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pixart.checkpoint.config import (
    PUBLISHED_CLASS,
    PUBLISHED_NORM,
    config_to_diffusers,
    is_compressed,
)
from pixart.checkpoint.names import (
    NOT_IN_DIFFUSERS,
    NULL_CAPTION,
    PUBLISHED_NULL_CAPTION,
    to_diffusers,
)
from pixart.checkpoint.write import write_config, write_directory
from pixart.config import PixArtConfig
from pixart.files import read_json
from pixart.pipeline.defaults import Sampling
from pixart.pipeline.directory import INDEX
from pixart.pipeline.export import add_parts
from pixart.sampler.schedulers import default_guidance, default_steps
from pixart.weights import check_finite

if TYPE_CHECKING:
    from pixart.pipeline.text_to_image import Pipeline

PIPELINE_CLASS = "PixArtKVPipeline"
PIPELINE_FILE, TRANSFORMER_FILE = "pipeline.py", "pixart_kv.py"
_CODE = {PIPELINE_FILE: PIPELINE_FILE, TRANSFORMER_FILE: f"transformer/{TRANSFORMER_FILE}"}
# What the class of the remote code takes; the rest of diffusers' settings is the same for every PixArt.
_SETTINGS = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers",
    "cross_attention_dim", "sample_size", "patch_size", "norm_type", "interpolation_scale",
    "use_additional_conditions", "caption_channels", "mlp_ratio", "qk_norm", "kv_compression",
)  # fmt: skip


def check_publishable(pipe: "Pipeline") -> None:
    """ValueError for a pipeline that the remote code cannot draw as ours does."""
    config = pipe.opened.config
    if not config.caption_embedding:
        raise ValueError(
            "caption_embedding must be true to be published, got false: the remote code builds on diffusers' "
            "transformer, which has no such model; share it as a file of pixart convert"
        )
    if pipe.text_encoder.is_clip:
        raise ValueError(
            "the text encoder must be a T5 to be published, got a CLIP, whose prompts the remote code does "
            "not read; share the model as a file of pixart convert"
        )


def needs_remote_code(config: PixArtConfig) -> bool:
    """Whether diffusers' own transformer would run it wrong."""
    return is_compressed(config) or config.qk_norm


def write_repository(
    folder: Path, pipe: "Pipeline", source: Path, dtype: str | None, shard_size: str
) -> None:
    """Write what diffusers opens to a new folder. source: the pipeline's directory, whose tokenizer, text
    encoder, VAE and scheduler are linked where the disk has links. dtype: "fp32", "bf16" or "fp16" of the
    transformer, None for that of the file."""
    check_publishable(pipe)
    folder.mkdir(parents=True)
    _write_transformer(folder / "transformer", pipe, dtype, shard_size)
    add_parts(folder, source, pipe.opened.config)
    write_config(folder / INDEX, _index(pipe, read_json(folder / INDEX)))
    for name, place in _CODE.items():
        text = resources.files("pixart.publishing.repository").joinpath(name).read_bytes()
        (folder / place).write_bytes(text)


def _write_transformer(folder: Path, pipe: "Pipeline", dtype: str | None, shard_size: str) -> None:
    opened, config = pipe.opened, pipe.opened.config
    tensors = {name: tensor.detach() for name, tensor in opened.tensors().items()}
    if dtype is not None:
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        tensors = {name: tensor.to(kind) for name, tensor in tensors.items()}
    check_finite(tensors, "the model to be published")
    has_table = opened.null_caption_stored and pipe.captions.mask == "prompt-mask"
    written = to_diffusers(tensors)
    if has_table:
        written[PUBLISHED_NULL_CAPTION] = tensors[NULL_CAPTION]
    values = transformer_config(config, has_table)
    extra = {key: getattr(config, key) for key in NOT_IN_DIFFUSERS}
    # With the null caption in one place alone.
    write_directory(folder, values, written, {}, extra, shard_size)


def transformer_config(config: PixArtConfig, has_null_caption: bool) -> dict[str, Any]:
    """The transformer/config.json."""
    values = config_to_diffusers(config)
    kept = {name: values[name] for name in _SETTINGS if name in values}
    if not is_compressed(config):
        kept.pop("kv_compression", None)
    if needs_remote_code(config):
        kept["norm_type"] = PUBLISHED_NORM
    return {
        "_class_name": PUBLISHED_CLASS,
        **kept,
        "model_max_length": config.model_max_length,
        "has_null_caption": has_null_caption,
    }


def _index(pipe: "Pipeline", parts: dict[str, Any]) -> dict[str, Any]:
    solver, own, few_step = pipe.solver(None), pipe.sampling, pipe.few_step
    if few_step is not None:
        own = Sampling(len(few_step.timesteps), few_step.guidance)
    steps = default_steps(solver) if own.steps is None else own.steps
    guidance = default_guidance(solver) if own.guidance is None else own.guidance
    start, end = own.guidance_interval or (0.0, 1.0)
    return {
        **parts,
        "_class_name": [PIPELINE_FILE.removesuffix(".py"), PIPELINE_CLASS],
        "transformer": [TRANSFORMER_FILE.removesuffix(".py"), PUBLISHED_CLASS],
        "family": pipe.family,
        "steps": steps,
        "guidance": guidance,
        "guidance_start": start,
        "guidance_end": end,
    }


def is_published(folder: Path) -> bool:
    """Whether a folder is a repository that was published from here."""
    index = folder / INDEX
    named = read_json(index).get("_class_name") if index.is_file() else None
    return isinstance(named, list) and named[-1:] == [PIPELINE_CLASS]


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Every file by its name in the repository, and its bytes."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in files]
