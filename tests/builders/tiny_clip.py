"""A CLIP of a few thousand weights, as its folder would come from the hub, and a tokenizer of single bytes."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from seeded_weights import weights_of

START, END = "<|startoftext|>", "<|endoftext|>"
TEXTS = ["a red star", "a blue circle on white", "a red star above a blue circle"]


def byte_letters() -> list[str]:
    """GPT-2's printable letters of the 256 bytes."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


def write_tokenizer(folder: Path) -> int:
    """A tokenizer without merges: a token for each byte, and for each that ends a word. Returns the id of
    the end, the highest."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = byte_letters()
    tokens = [*letters, *(f"{one}</w>" for one in letters), START, END]
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    files: dict[str, Any] = {
        "vocab.json": {token: k for k, token in enumerate(tokens)},
        "special_tokens_map.json": special,
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", **special},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return len(tokens) - 1


def write_processor(folder: Path, side: int = 32) -> None:
    values = {
        "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "CLIPImageProcessor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")


def write_clip(
    folder: Path, *, end: int | None = None, limit: int = 77, width: int = 32, seed: int = 0
) -> Any:
    """The whole folder; returns the model. end: text_config.eos_token_id, None for the right one."""
    from transformers import CLIPConfig, CLIPModel

    highest = write_tokenizer(folder)
    write_processor(folder)
    tower = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    config = CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={
            **tower,
            "vocab_size": highest + 1,
            "max_position_embeddings": limit,
            "bos_token_id": highest - 1,
            "eos_token_id": highest if end is None else end,
            "pad_token_id": highest,
        },
        projection_dim=24,
        architectures=["CLIPModel"],
    )
    model = CLIPModel(config).eval()
    state = weights_of(model, gain=1.0, seed=seed)
    model.load_state_dict(state, strict=False)
    config.save_pretrained(folder)
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return model
