"""From training state to a pipeline in the published layout that generate opens."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pixart.checkpoint.save import save_transformer
from pixart.checkpoint.write import write_config
from pixart.config import PixArtConfig
from pixart.few_step import FewStep
from pixart.files import read_json
from pixart.libraries import importing, silenced
from pixart.model.transformer import PixArt
from pixart.pipeline.defaults import Sampling
from pixart.pipeline.directory import INDEX, PARTS, SAMPLING, choose_family, family_of
from pixart.releases import release_of
from pixart.sampler.schedulers import make_scheduler, of_diffusers
from pixart.text.networks import kind_of
from pixart.weights import check_finite

_CLASSES = {"sigma": "PixArtSigmaPipeline", "alpha": "PixArtAlphaPipeline"}
MODEL_INDEX = {
    "_class_name": "PixArtSigmaPipeline",
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
CLIP_CLASSES = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
SPECIAL_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@silenced()
def export_pipeline(
    directory: Path,
    *,
    transformer: PixArt,
    text_encoder: nn.Module,
    vae: nn.Module,
    spiece: Path,
    prediction_type: str,
    sampling: Sampling | None = None,
) -> None:
    """Write model_index.json, sampling.json if there is anything to say, and the five folders, weights
    in fp16."""
    with importing():
        import diffusers
        from diffusers import DPMSolverMultistepScheduler

    directory.mkdir(parents=True, exist_ok=True)
    save_transformer(
        transformer.to(torch.float16), directory / "transformer", format="diffusers", overwrite=True
    )
    for name, part in (("text_encoder", text_encoder), ("vae", vae)):
        # fp16 ends at 65504.
        check_finite(part.to(torch.float16).state_dict(), f"the {name} to be saved in fp16")
        part.save_pretrained(directory / name)  # type: ignore[operator]
    _forget_origin(directory / "vae" / "config.json")
    scheduler: Any = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type=prediction_type
    )
    scheduler.save_pretrained(directory / "scheduler")
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "spiece.model").write_bytes(spiece.read_bytes())
    write_config(tokenizer / "special_tokens_map.json", SPECIAL_TOKENS)
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "legacy": False, **SPECIAL_TOKENS}
    write_config(tokenizer / "tokenizer_config.json", settings)
    index = {"_diffusers_version": diffusers.__version__, **MODEL_INDEX}
    write_config(directory / INDEX, index)
    if sampling is not None:
        write_config(directory / SAMPLING, sampling.to_dict())


def add_parts(directory: Path, source: Path, config: PixArtConfig) -> None:
    """Make a whole pipeline of a directory that has a transformer, of this config, by the other parts of
    another pipeline. They take no space: files are linked, and copied only where the disk has no links. Of
    a distilled model the scheduler is the one that it was distilled for; one that is not takes none that was
    made for another's few steps."""
    index = read_json(source / INDEX) if (source / INDEX).is_file() else _index_of(source)
    was_few_step = _few_step_of(source, index)
    writes_scheduler = config.few_step is not None or was_few_step
    parts = [part for part in PARTS if not writes_scheduler or part != "scheduler"]
    for part in parts:
        for file in sorted((source / part).rglob("*")):
            if file.is_file():
                _link(file, directory / part / file.relative_to(source / part))
    # Of a pipeline of another kind, what belongs to that alone.
    index = {name: value for name, value in index.items() if name[0] == "_" or name in PARTS}
    family = family_of(source)
    trained = choose_family(config, family, True)
    # A published one names a class of its own, in a file that stays there.
    if trained != family or isinstance(index.get("_class_name"), list):
        index["_class_name"] = _CLASSES[trained]
    index["transformer"] = MODEL_INDEX["transformer"]
    if config.few_step is not None:
        index |= _write_few_step(directory, config.few_step, source)
    elif was_few_step:
        index["scheduler"] = _write_scheduler(directory, "dpm-solver++", source)
    write_config(directory / INDEX, index)
    if (source / SAMPLING).is_file():
        write_config(directory / SAMPLING, read_json(source / SAMPLING))


def _write_few_step(directory: Path, few_step: FewStep, source: Path) -> dict[str, Any]:
    """Write the scheduler of a distilled model, and return what model_index.json says of both. diffusers' own
    pipelines are told the timesteps (or for lcm their number) and guidance_scale by who calls them."""
    # What dmd makes of a prediction is a step of DDIM to the end.
    name = "ddim" if few_step.scheduler == "dmd" else few_step.scheduler
    return {
        "scheduler": _write_scheduler(directory, name, source),
        "few_step": few_step.to_dict(),
    }


def _write_scheduler(directory: Path, name: str, source: Path) -> list[str]:
    """Write a scheduler for the training that the source's says; returns its place in model_index.json."""
    facts = read_json(source / "scheduler" / "scheduler_config.json")
    scheduler = make_scheduler(name, facts)
    kind = of_diffusers(type(scheduler).__name__)
    kind.from_config(scheduler.config).save_pretrained(directory / "scheduler")
    return ["diffusers", kind.__name__]


def _few_step_of(source: Path, index: Mapping[str, Any]) -> bool:
    """Whether a pipeline's own transformer was distilled, by what it says or by its name."""
    release = release_of(source)
    return "few_step" in index or (release is not None and release.few_step is not None)


def _index_of(source: Path) -> dict[str, Any]:
    """The classes of a pipeline's parts, which does not name them itself."""
    is_clip = kind_of(source / "text_encoder") == "clip"
    return MODEL_INDEX | (CLIP_CLASSES if is_clip else {})


def _link(file: Path, place: Path) -> None:
    """A hard link, which outlives the file's own name; a symbolic one to another disk; else a copy."""
    place.parent.mkdir(parents=True, exist_ok=True)
    real = file.resolve()  # the hub's cache has links to it
    for make in (os.link, os.symlink):
        try:
            make(real, place)
            return
        except OSError:
            continue
    shutil.copyfile(real, place)


def _forget_origin(config: Path) -> None:
    """diffusers writes down from which folder a model was read: that of whoever trained it."""
    values = read_json(config)
    values.pop("_name_or_path", None)
    write_config(config, values)
