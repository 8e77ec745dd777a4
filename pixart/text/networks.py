"""The networks that read prompts, from a pipeline's `text_encoder/`: T5, and the text half of a CLIP.

T5 is computed here (`stream`, `t5`), from that folder or from a file that stands for its weights. What
bitsandbytes has quantised, and CLIPs, are transformers' (`OfTransformers`).

OpenCLIP-H has 24 layers, of which Stable Diffusion 2 uses the output of the 23rd, the penultimate one,
followed by the final LayerNorm. diffusers' repository of it holds 23 layers, whose last output is just that;
of a full OpenCLIP-H in the layout of transformers the 24th layer is left out here, so that both give the
same features. Of every other CLIP the last layer is used, as Stable Diffusion 1 does.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pixart.files import CheckpointError, listed, read_json
from pixart.libraries import importing, silenced
from pixart.tensors import check_size
from pixart.text.stored import EMBEDDING, Weights, read_weights
from pixart.text.stream import Footprint, Ids, T5Network, choose_memory
from pixart.text.t5 import BIAS, DEFAULTS, T5Shape, check_epsilon
from pixart.weights import T5_WEIGHTS, check_finite, check_loaded, errors_naming, find_weights

Kind = Literal["t5", "clip"]

OPENCLIP_H = {"hidden_size": 1024, "num_hidden_layers": 24}  # the text half; 23 are used
_CLIP_TYPES = ("clip", "clip_text_model")
_CLIP_CLASSES = ("CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection")
# What transformers takes for a size that a config.json leaves out.
_CLIP_DEFAULTS = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77,
}  # fmt: skip


def kind_of(folder: Path) -> Kind:
    """What a text_encoder folder holds, by its config.json; T5 where that does not say."""
    config = _config(folder)
    classes = config.get("architectures")
    names = classes if isinstance(classes, list) else []
    is_clip = config.get("model_type") in _CLIP_TYPES or any(n in _CLIP_CLASSES for n in names)
    return "clip" if is_clip else "t5"


def features_width(folder: Path) -> Any:
    """The width of the features, None where config.json does not say it."""
    return (
        _clip_config(folder)["hidden_size"]
        if kind_of(folder) == "clip"
        else _config(folder).get("d_model")
    )


def longest_caption(folder: Path) -> int | None:
    """The tokens that a CLIP has positions for, 77 of all published ones; None of T5, which has no limit."""
    if kind_of(folder) == "t5":
        return None
    most = _clip_config(folder)["max_position_embeddings"]
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise CheckpointError(
            f"{folder / 'config.json'}: max_position_embeddings must be a positive integer, got {most!r}"
        )
    return most


def layers_used(config: Mapping[str, Any]) -> int:
    """Of a CLIP with these sizes: all but the last of OpenCLIP-H, all of others."""
    layers: int = config["num_hidden_layers"]
    is_full = all(config[name] == value for name, value in OPENCLIP_H.items())
    return layers - 1 if is_full else layers


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def _clip_config(folder: Path) -> dict[str, Any]:
    """The sizes of the text half, which a whole CLIP keeps in a part of its config.json."""
    config = _config(folder)
    inner = config.get("text_config")
    return _CLIP_DEFAULTS | (inner if isinstance(inner, dict) else config)


class Network(Protocol):
    """An encoder: prompts in, features (L, C) of each out. has_passes: whether prompts had better go through
    together."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def has_passes(self) -> bool: ...
    def __call__(self, prompts: Sequence[Ids]) -> list[Tensor]: ...


class OfTransformers:
    """One of transformers' models, in eval mode, which gives `last_hidden_state`."""

    has_passes = False

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.vocabulary = model, model.config.vocab_size
        self._dtype, self._device = dtype, device

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Ids]) -> list[Tensor]:
        return [self._encoded(*prompt) for prompt in prompts]

    def _encoded(self, ids: Sequence[int], padding: int) -> Tensor:
        mask = [1] * (len(ids) - padding) + [0] * padding
        output = self.model(
            input_ids=torch.tensor([ids], device=self._device),
            attention_mask=torch.tensor([mask], device=self._device),
        )
        return output.last_hidden_state[0].to(self._dtype)


@dataclass(frozen=True)
class OpenedT5:
    """A T5 whose names and shapes are checked, and whose weights are mapped from the disk. where: its folder
    or file, for messages."""

    weights: Weights
    shape: T5Shape
    where: Path

    def footprint(self, dtype: torch.dtype, device: torch.device) -> Footprint:
        return Footprint.of(self.weights, self.shape, dtype, device)

    def load(self, dtype: torch.dtype, device: torch.device, memory: str) -> T5Network:
        """memory: "auto" asks what is free. ValueError where what cannot be mapped was to be streamed."""
        chosen = choose_memory(memory, self.weights, self.footprint(dtype, device), device)
        return T5Network(self.weights, self.shape, dtype, device, chosen, str(self.where))


def open_t5(folder: Path, variant: str | None, file: Path | None = None) -> OpenedT5:
    """The T5 of a folder; file: what stands for the folder's weights. CheckpointError for what is not there,
    or has another shape than config.json says."""
    if file is None:
        files, _ = find_weights(folder, variant, T5_WEIGHTS)
        _check_t5_size(folder, files)
        shape, weights = read_shape(folder), read_weights(files)
        check_complete(folder, _differences(weights, shape), None)
        return OpenedT5(weights, shape, folder)
    shape, weights = read_shape(folder), read_weights([file])
    check_encoder(file, weights)
    if problem := _misfit(file, weights, shape):
        raise CheckpointError(
            f"{file}: {problem}; the pipeline's {folder / 'config.json'} asks for a T5 of width {shape.width} "
            f"and {shape.layers} blocks"
        )
    return OpenedT5(weights, shape, file)


def read_shape(folder: Path) -> T5Shape:
    """CheckpointError for a config.json that is missing or has what no T5 has."""
    file = folder / "config.json"
    config = read_json(file)
    try:
        return T5Shape.of(config)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def check_encoder(file: Path, weights: Weights, may_hold_decoder: bool = False) -> None:
    """CheckpointError unless a file holds the encoder of a T5 and nothing beside it."""
    if EMBEDDING not in weights.tensors or BIAS not in weights.tensors:
        has = listed([*weights.others, *weights.tensors]) or "no tensors"
        raise CheckpointError(f"{file}: must hold the encoder of T5, got {has}")
    others = weights.others
    decoder = re.compile(r"(?:decoder|dec)\..*|lm_head\..*|output\.weight")
    if may_hold_decoder:
        others = [name for name in others if not decoder.fullmatch(name)]
    elif any(decoder.fullmatch(name) for name in others):
        raise CheckpointError(
            f"{file}: must hold the encoder of T5 alone, got a decoder too; write the encoder to a file of its "
            "own with python -m pixart.convert --text-encoder"
        )
    if others:
        raise CheckpointError(
            f"{file}: must hold the encoder of T5 and nothing else, got {listed(others)}"
        )


def _differences(weights: Weights, shape: T5Shape) -> dict[str, list[Any]]:
    """As transformers' loading_info has them."""
    wanted, found = shape.tensors, weights.tensors
    wrong = [(name, found[name].shape, size) for name, size in wanted.items()
             if name in found and found[name].shape != size]  # fmt: skip
    return {
        "missing_keys": [name for name in wanted if name not in found],
        "mismatched_keys": wrong,
        "unexpected_keys": [*(name for name in found if name not in wanted), *weights.others],
    }


def _misfit(file: Path, weights: Weights, shape: T5Shape) -> str | None:
    """How a file's T5 differs from the one that is asked for."""
    found = _differences(weights, shape)
    try:
        own = T5Shape.seen_in({name: one.shape for name, one in weights.tensors.items()})
    except ValueError as error:
        return str(error)
    if (own.width, own.layers) != (shape.width, shape.layers):
        return f"holds a T5 of width {own.width} and {own.layers} blocks"
    for kind in ("missing", "mismatched", "unexpected"):
        names = [entry if isinstance(entry, str) else entry[0] for entry in found[f"{kind}_keys"]]
        if names:
            words = {
                "missing": "lacks",
                "mismatched": "has in other sizes",
                "unexpected": "has beside",
            }
            return f"{words[kind]} {listed(sorted(names))}"
    return None


def is_packed(folder: Path) -> bool:
    """Whether a folder's weights were stored quantised, which only transformers opens."""
    return "quantization_config" in _config(folder)


def load_network(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None,
    variant: str | None,
    file: Path | None = None,
    memory: str = "auto",
) -> Network:
    """The encoder. file: what stands for a T5's weights. memory: "resident", "stream", or "auto", which asks
    what is free. CheckpointError for what is not there, has another shape, or is not finite."""
    is_ours = file is not None or not is_packed(folder)
    if kind_of(folder) == "clip" or quantization or not is_ours:
        model = _load_with_transformers(folder, dtype, device, quantization, variant)
        return OfTransformers(model, dtype, device)
    return open_t5(folder, variant, file).load(dtype, device, memory)


def _load_with_transformers(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None,
    variant: str | None,
) -> Any:
    files, variant = find_weights(folder, variant, T5_WEIGHTS)
    is_clip = kind_of(folder) == "clip"
    (_check_clip_size if is_clip else _check_t5_size)(folder, files)
    kind, changes = _clip_class(folder) if is_clip else (_t5_class(), {})
    options: dict[str, Any] = {
        "torch_dtype": dtype,  # transformers 4.45 knows no `dtype`
        "variant": variant,
        "use_safetensors": files[0].suffix == ".safetensors",
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # check_complete refuses them, and the rest with them
    }
    if quantization:
        options |= _bitsandbytes_options(quantization, dtype, device)
    with errors_naming(folder), silenced():
        model, info = kind.from_pretrained(folder, **options, **changes)
    (_check_clip_complete if is_clip else check_complete)(folder, info, quantization)
    check_finite(dict(model.named_parameters()), str(folder))
    # bitsandbytes has placed its weights; most versions of transformers refuse to move them.
    return model.eval() if quantization else model.eval().to(device)


def _t5_class() -> Any:
    with importing():
        from transformers.models.t5.modeling_t5 import T5EncoderModel

    return T5EncoderModel


def _clip_class(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The class, and the configuration with the layers that are used."""
    with importing():
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel

    with errors_naming(folder), silenced():
        config: Any = CLIPTextConfig.from_pretrained(folder)
    config.num_hidden_layers = layers_used(_clip_config(folder))
    return CLIPTextModel, {"config": config}


def _check_t5_size(folder: Path, files: list[Path]) -> None:
    config = {**DEFAULTS, **read_json(folder / "config.json")}
    held = _check_sizes(folder, config, DEFAULTS, "layer_norm_epsilon", files)
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    layer = 4 * width * inner + 2 * width * config["d_ff"]
    least = config["vocab_size"] * width + config["num_layers"] * layer
    _check_held(folder, config, least, held)


def _check_clip_size(folder: Path, files: list[Path]) -> None:
    config = _clip_config(folder)
    held = _check_sizes(folder, config, _CLIP_DEFAULTS, "layer_norm_eps", files)
    width = config["hidden_size"]
    if width % config["num_attention_heads"]:
        raise CheckpointError(
            f"{folder / 'config.json'}: hidden_size must be divisible by num_attention_heads "
            f"{config['num_attention_heads']}, got {width}"
        )
    layer = 4 * width * width + 2 * width * config["intermediate_size"]
    vectors = config["vocab_size"] + config["max_position_embeddings"]
    _check_held(folder, config, vectors * width + config["num_hidden_layers"] * layer, held)


def _check_sizes(
    folder: Path, config: dict[str, Any], names: Mapping[str, int], epsilon: str, files: list[Path]
) -> int:
    """How many numbers the files hold. CheckpointError for sizes that are none."""
    try:
        check_epsilon(epsilon, config.get(epsilon, 1e-6))
        return check_size(config, names, files)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def _check_held(folder: Path, config: dict[str, Any], least: int, held: int) -> None:
    """Raise CheckpointError for a configuration of more weights than the files hold, before the memory
    for them is taken."""
    # What is stored quantised packs several numbers into one.
    if least > 2 * held and "quantization_config" not in config:
        raise CheckpointError(
            f"{folder / 'config.json'}: must describe the {held:,} weights there are, got sizes of "
            f"more than {least:,}"
        )


def check_complete(folder: Path, info: dict[str, Any], quantization: str | None) -> None:
    """transformers fills what is missing with random numbers, and says so in passing."""
    # The embedding of tokens is the same tensor as `shared`; a whole T5 has a decoder besides, and
    # bitsandbytes stores states of its own beside quantised weights.
    pardoned = {
        "missing": re.compile(r"encoder\.embed_tokens\.weight"),
        "mismatched": re.compile(r"(?!)"),
        "unexpected": re.compile(
            r".*" if quantization else r"encoder\.embed_tokens\.weight|decoder\..*|lm_head\..*"
        ),
    }
    check_loaded(folder, info, pardoned)


def _check_clip_complete(folder: Path, info: dict[str, Any], quantization: str | None) -> None:
    # Files of before 2023 hold the numbers of the positions; a whole CLIP has another half, and the layers
    # that are not used are no part of the model.
    config = _clip_config(folder)
    unused = range(layers_used(config), config["num_hidden_layers"])
    layers = "".join(rf"|(?:text_model\.)?encoder\.layers\.{layer}\..*" for layer in unused)
    more = r"(?:.*\.)?position_ids|vision_model\..*|(?:visual|text)_projection\.weight|logit_scale"
    pardoned = {
        "missing": re.compile(r"(?:.*\.)?position_ids"),
        "mismatched": re.compile(r"(?!)"),
        "unexpected": re.compile(r".*" if quantization else more + layers),
    }
    check_loaded(folder, info, pardoned)


def _bitsandbytes_options(
    quantization: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    with importing():
        from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}
