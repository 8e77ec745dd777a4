"""A pipeline that reads prompts with a CLIP, in the layout of stabilityai/stable-diffusion-2, and a small
transformer that takes its features as they are."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from published import build_sigma
from tiny_checkpoints import build as build_transformer
from tiny_clip import START, write_tokenizer

from pixart.checkpoint.save import save_transformer
from pixart.config import PixArtConfig

WIDTH = 72
MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "a n", "an d</w>"]
BARE = PixArtConfig(
    input_size=8, hidden_size=WIDTH, depth=2, num_heads=1, caption_channels=WIDTH,
    model_max_length=77, pe_interpolation=0.5, caption_embedding=False,
)  # fmt: skip


def write_clip_tokenizer(folder: Path, padding: str = "!") -> int:
    """With a few merges, and the padding that Stable Diffusion 2 has. Returns the id of the end."""
    write_tokenizer(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    *plain, start, end = vocabulary
    tokens = [*plain, *(merge.replace(" ", "") for merge in MERGES), start, end]
    numbers = {token: k for k, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbers), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    special = json.loads((folder / "special_tokens_map.json").read_text()) | {"pad_token": padding}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return numbers[end]


def text_config(end: int, **changes: Any) -> dict[str, Any]:
    """OpenCLIP-H's of that repository, small."""
    return {
        "vocab_size": end + 1, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 77,
        "hidden_act": "gelu", "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": 1,
    } | changes  # fmt: skip


def write_text_model(folder: Path, end: int, seed: int = 0, **changes: Any) -> Any:
    """The text half alone, as in that repository; returns it."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    model = CLIPTextModel(CLIPTextConfig(**text_config(end, **changes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    return model


def build_clip_pipeline(
    path: Path, *, with_transformer: bool = True, seed: int = 0, config: PixArtConfig = BARE
) -> Path:
    build_sigma(path, with_transformer=False, vae_channels=(8, 8, 8, 8), seed=seed)
    shutil.rmtree(path / "tokenizer")
    end = write_clip_tokenizer(path / "tokenizer")
    write_text_model(path / "text_encoder", end, seed)
    index = json.loads((path / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (path / "model_index.json").write_text(json.dumps(index))
    if with_transformer:
        save_transformer(build_transformer(config), path / "transformer", format="diffusers")
    return path


__all__ = ["BARE", "START", "WIDTH", "build_clip_pipeline", "write_clip_tokenizer"]
