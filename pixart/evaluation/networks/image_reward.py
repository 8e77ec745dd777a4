"""ImageReward's network (arXiv:2304.05977; github.com/THUDM/ImageReward): BLIP's picture encoder, its
text encoder that attends to the picture, and five linear layers on the first token.

The parts are transformers', the names of weights are mapped from ImageReward.pt.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixart.evaluation.networks.clip import open_tokenizer
from pixart.evaluation.networks.head import head_of
from pixart.evaluation.networks.weighing import read_state
from pixart.files import AGAIN, CheckpointError
from pixart.libraries import importing, silenced
from pixart.weights import check_finite, check_loaded, errors_naming

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of rewards, which come out as standard scores
TOKENS = 35
HEAD = 64  # channels of an attention head, in both encoders
_PICTURES, _TEXTS, _MLP = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", f"{_TEXTS}embeddings.position_ids")
_ONCE = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_LAYER = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "mlp.": "mlp.",
}


def parts_of(state: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """ImageReward's state dict as "pictures", "texts" (names of transformers' BlipVisionModel and
    BlipTextModel) and "mlp". path: for messages. CheckpointError for a name that has no place."""
    parts: dict[str, dict[str, Tensor]] = {"pictures": {}, "texts": {}, "mlp": {}}
    for name, tensor in state.items():
        if name.startswith(_PICTURES):
            parts["pictures"][_of_pictures(name.removeprefix(_PICTURES), path)] = tensor.float()
        elif name.startswith(_UNUSED):
            continue
        elif name.startswith(_TEXTS):
            parts["texts"][name.removeprefix(_TEXTS)] = tensor.float()
        elif name.startswith(_MLP):
            parts["mlp"][name] = tensor
        else:
            raise CheckpointError(f"{path}: must hold ImageReward, got {name} beside; {AGAIN}")
    if not all(parts.values()):
        raise CheckpointError(f"{path}: must hold ImageReward, parts of it are missing; {AGAIN}")
    return parts


def _of_pictures(name: str, path: Path) -> str:
    if name in _ONCE:
        return _ONCE[name]
    if name.startswith("blocks."):
        number, _, rest = name.removeprefix("blocks.").partition(".")
        for theirs, ours in _LAYER.items():
            if rest.startswith(theirs):
                return f"encoder.layers.{number}.{ours}{rest.removeprefix(theirs)}"
    raise CheckpointError(f"{path}: must hold ImageReward, got {_PICTURES}{name} beside; {AGAIN}")


class Reward:
    """The network and its tokenizer. path: ImageReward.pt. tokenizer_folder: BERT's, uncased."""

    def __init__(self, path: Path, tokenizer_folder: Path, device: torch.device) -> None:
        parts = parts_of(read_state(path), path)
        for part in ("pictures", "texts"):
            check_finite(parts[part], str(path))
        self._tokenizer = open_tokenizer(tokenizer_folder)
        self._pictures = _pictures(parts["pictures"], path).to(device)
        self._texts = _texts(parts["texts"], path).to(device)
        self._mlp = head_of(parts["mlp"], path, _MLP).to(device)
        self._device = device

    def tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, the two at its ends included; beyond TOKENS it is cut."""
        return [len(self._tokenizer(text).input_ids) for text in texts]

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """(n,) fp64 rewards of (n, 3, side, side) pictures and their texts."""
        words = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        seen = self._pictures(pixel_values=torch.from_numpy(pixels).to(self._device))
        read = self._texts(
            input_ids=words.input_ids.to(self._device),
            attention_mask=words.attention_mask.to(self._device),
            encoder_hidden_states=seen.last_hidden_state,
        )
        rewards = self._mlp(read.last_hidden_state[:, 0].float())[:, 0]
        return (rewards.cpu().double().numpy() - MEAN) / STD


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    place = prefix.count(".")
    return len({name.split(".")[place] for name in state if name.startswith(prefix)})


def _pictures(state: Mapping[str, Tensor], path: Path) -> Any:
    with importing():
        from transformers import BlipVisionConfig, BlipVisionModel

    with errors_naming(path), silenced():
        patches = state["embeddings.patch_embedding.weight"]
        places = state["embeddings.position_embedding"].shape[1] - 1
        config = BlipVisionConfig(
            hidden_size=patches.shape[0],
            intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_layers(state, "encoder.layers."),
            num_attention_heads=max(1, patches.shape[0] // HEAD),
            image_size=patches.shape[-1] * round(places**0.5),
            patch_size=patches.shape[-1],
            hidden_act="gelu",
            layer_norm_eps=1e-6,  # timm's, which is not transformers' for BLIP
        )
        loaded: Any = BlipVisionModel.from_pretrained(
            None, config=config, state_dict=dict(state), output_loading_info=True
        )
    return _whole(loaded, path)


def _texts(state: Mapping[str, Tensor], path: Path) -> Any:
    with importing():
        from transformers import BlipTextConfig
        from transformers.models.blip.modeling_blip_text import BlipTextModel

    with errors_naming(path), silenced():
        words = state["embeddings.word_embeddings.weight"]
        config = BlipTextConfig(
            vocab_size=words.shape[0],
            hidden_size=words.shape[1],
            encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
            intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_layers(state, "encoder.layer."),
            num_attention_heads=max(1, words.shape[1] // HEAD),
            max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            is_decoder=True,  # with layers that attend to the picture; the text itself is seen both ways
        )
        loaded: Any = BlipTextModel.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            output_loading_info=True,
            add_pooling_layer=False,
        )
    return _whole(loaded, path)


def _whole(loaded: Any, path: Path) -> Any:
    model, info = loaded
    check_loaded(path, info)
    return model.eval().requires_grad_(False)
