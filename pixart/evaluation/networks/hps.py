"""HPSv2's CLIP (arXiv:2306.09341; github.com/tgxs002/HPSv2): open_clip's ViT-H-14 in the form that
transformers has, and pictures letterboxed as HPSv2's own code does.

The reference turns a picture into a tensor first and resizes that, whose bicubic filter torchvision ran
without antialias up to 0.16 and with it since 0.17 (January 2024): the same package gives two scores.
With it is the default here, `--option hps-antialias=no` is the other.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pixart.evaluation.metric import Context, Extractor
from pixart.evaluation.needs import Need, find_file, need_snapshot, open_file, open_snapshot
from pixart.evaluation.networks.clip import Clip, open_tokenizer
from pixart.evaluation.networks.preparing import CLIP_MEAN, CLIP_STD, letterboxed
from pixart.evaluation.networks.weighing import read_state, weights_digest
from pixart.files import AGAIN, CheckpointError
from pixart.libraries import importing, silenced
from pixart.weights import check_finite, check_loaded, errors_naming

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

_REHOSTED = "as safetensors also in huggingface.co/DiffSynth-Studio/ImageMetrics"
WEIGHTS = {
    "hpsv2.0": Need("HPS_v2_compressed.pt", f"huggingface.co/xswu/HPSv2, {_REHOSTED}", repository="xswu/HPSv2"),
    "hpsv2.1": Need(
        "HPS_v2.1_compressed.pt", f"huggingface.co/xswu/HPSv2, {_REHOSTED}", repository="xswu/HPSv2"
    ),
}  # fmt: skip
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # of the network that HPSv2 began with
PICTURE_HEAD, TEXT_HEAD = 80, 64  # channels of a head, which weights do not tell
_VERSION = "1"  # of preparing pictures and texts: another one, other features
_LAYER = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_ONCE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
# Read from the other side: x @ projection.
_TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}


def to_transformers(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """open_clip's state dict of a CLIP of two transformers, in the names of transformers' CLIPModel. path:
    for messages. CheckpointError for a name that neither has."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tower = next((t for t in _TOWERS if name.startswith(t)), None)
        if name in _ONCE:
            found[_ONCE[name]] = tensor
        elif name in _TURNED:
            found[_TURNED[name]] = tensor.T.contiguous()
        elif tower is not None:
            number, _, rest = name.removeprefix(tower).partition(".")
            found |= _of_layer(f"{_TOWERS[tower]}{number}.", rest, tensor, path)
        elif name != "attn_mask":  # of old versions: the causal mask
            raise CheckpointError(f"{path}: must hold open_clip's CLIP, got {name} beside; {AGAIN}")
    return found


def _of_layer(prefix: str, rest: str, tensor: Tensor, path: Path) -> dict[str, Tensor]:
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        return {
            f"{prefix}self_attn.{one}_proj.{kind}": part
            for one, part in zip("qkv", tensor.chunk(3), strict=True)
        }
    for theirs, ours in _LAYER.items():
        if rest.startswith(theirs):
            return {f"{prefix}{ours}{rest.removeprefix(theirs)}": tensor}
    raise CheckpointError(f"{path}: must hold open_clip's CLIP, got {rest} in a layer; {AGAIN}")


def config_of(state: Mapping[str, Tensor], end: int) -> Any:
    """The CLIPConfig of a mapped state dict: sizes are read from it. end: the tokenizer's id of the end."""
    with importing():
        from transformers import CLIPConfig

    patches = state["vision_model.embeddings.patch_embedding.weight"]
    places = state["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    words = state["text_model.embeddings.token_embedding.weight"]
    towers: dict[str, dict[str, Any]] = {}
    for tower, head in (("vision", PICTURE_HEAD), ("text", TEXT_HEAD)):
        layers = f"{tower}_model.encoder.layers."
        width = state[f"{tower}_model.encoder.layers.0.layer_norm1.weight"].shape[0]
        towers[tower] = {
            "hidden_size": width,
            "intermediate_size": state[f"{layers}0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": len({n.split(".")[3] for n in state if n.startswith(layers)}),
            "num_attention_heads": max(1, width // head),
            "hidden_act": "gelu",
        }
    side = patches.shape[-1]
    towers["vision"] |= {"patch_size": side, "image_size": side * round(places**0.5)}
    towers["text"] |= {
        "vocab_size": words.shape[0],
        "max_position_embeddings": state["text_model.embeddings.position_embedding.weight"].shape[
            0
        ],
        "eos_token_id": end,
        "bos_token_id": max(0, end - 1),
        "pad_token_id": end,
    }
    width = state["visual_projection.weight"].shape[0]
    return CLIPConfig(
        vision_config=towers["vision"], text_config=towers["text"], projection_dim=width
    )


@lru_cache(maxsize=1)
def open_hps(path: Path, tokenizer_folder: Path, device: torch.device) -> Clip:
    """The network of an HPSv2 file, one in memory at a time. CheckpointError for another file."""
    with importing():
        from transformers import CLIPModel

    tokenizer = open_tokenizer(tokenizer_folder)
    state = {name: t.float() for name, t in to_transformers(read_state(path), path).items()}
    check_finite(state, str(path))
    with errors_naming(path), silenced():
        config = config_of(state, tokenizer("").input_ids[-1])
        loaded: Any = CLIPModel.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
    model, info = loaded
    check_loaded(path, info)
    return Clip(model.eval().requires_grad_(False), tokenizer, device, str(path))


class HpsImages(Extractor):
    """Features of pictures, letterboxed. name: "hpsv2.0-pictures" or "hpsv2.1-pictures"."""

    def __init__(self, name: str, context: Context) -> None:
        version = name.removesuffix("-pictures")
        if version not in WEIGHTS:
            raise ValueError(f"name must be one of {', '.join(WEIGHTS)}, got {version!r}")
        antialias = context.options.get("hps-antialias", "yes")
        if antialias not in ("yes", "no"):
            raise ValueError(f"option hps-antialias must be yes or no, got {antialias!r}")
        self.name, self.antialias, self._context = name, antialias == "yes", context
        self.weights = WEIGHTS[version]

    def needs(self) -> Sequence[Need]:
        missing = [] if find_file(self.weights, self._context) else [self.weights]
        return [*missing, *need_snapshot(TOKENIZER, self._context, ["tokenizer_config.json"])]

    @property
    def width(self) -> int:  # type: ignore[override]
        return int(read_state(self._path())["visual.proj"].shape[1])

    @property
    def digest(self) -> str:
        return weights_digest(f"{_VERSION} {self.antialias}", [self._path()])

    def prepare(self, image: "Image", entry: "Entry") -> Any:
        # The pictures are RGB: there is no mask for the reference's mask-aware normalisation to keep.
        pixels = letterboxed(image, self.side, self.antialias)
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        return (pixels - mean) / std

    side = 224

    def __call__(self, prepared: Sequence[Any]) -> np.ndarray:
        return self.opened().pictures(prepared)

    def opened(self) -> Clip:
        """The network, for texts too."""
        folder = open_snapshot(self.name, TOKENIZER, self._context, ["tokenizer_config.json"])
        return open_hps(self._path(), folder, self._context.device)

    def release(self) -> None:
        open_hps.cache_clear()

    def _path(self) -> Path:
        return open_file(self.name, self.weights, self._context)
