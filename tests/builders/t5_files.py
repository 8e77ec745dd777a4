"""Small T5s, and their weights in the formats that people have."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SIZES = {
    "vocab_size": 320, "d_model": 256, "d_kv": 64, "d_ff": 256, "num_layers": 4, "num_heads": 4,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6,
}  # fmt: skip
TO_GGUF = {
    "layer.0.SelfAttention.q": "attn_q", "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v", "layer.0.SelfAttention.o": "attn_o",
    "layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.1.DenseReluDense.wi_0": "ffn_gate", "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
}  # fmt: skip


def random_t5(seed: int = 0, **sizes: Any) -> dict[str, Tensor]:
    """Weights of an encoder in fp32, under transformers' names."""
    from pixart.text.t5 import T5Shape

    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in T5Shape.of(SIZES | sizes).tensors.items():
        numbers = torch.randn(shape, generator=generator)
        found[name] = 1 + 0.1 * numbers if len(shape) == 1 else numbers * shape[-1] ** -0.5
    return found


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a file packs it: matrices of the blocks, but no position bias."""
    return tensor.ndim == 2 and "layer." in name and "bias" not in name


def save_folder(folder: Path, weights: dict[str, Tensor], shards: int = 1, **sizes: Any) -> Path:
    """A text_encoder folder of safetensors."""
    folder.mkdir(parents=True)
    config = {"model_type": "t5", "architectures": ["T5EncoderModel"], **SIZES, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    names, where = sorted(weights), {}
    for place in range(shards):
        file = f"model-{place + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[place::shards]}
        where |= dict.fromkeys(part, file)
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_fp8(path: Path, weights: dict[str, Tensor]) -> Path:
    """A plain cast of everything, as t5xxl_fp8_e4m3fn.safetensors is."""
    save_file({name: one.to(torch.float8_e4m3fn) for name, one in weights.items()}, path)
    return path


def scaled(weights: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    """Matrices in fp8 with a scale beside each, the rest in bf16."""
    found = {}
    for name, one in weights.items():
        if is_matrix(name, one):
            scale = one.abs().max() / 448
            found[name] = (one / scale).to(torch.float8_e4m3fn)
            found[name.removesuffix(".weight") + ending] = scale
        else:
            found[name] = one.bfloat16()
    return found


def save_scaled(path: Path, weights: dict[str, Tensor]) -> Path:
    """ComfyUI's first layout."""
    marks = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    tokenizer = {"spiece_model": torch.zeros(8, dtype=torch.uint8)}
    save_file({**scaled(weights, ".scale_weight"), **marks, **tokenizer}, path)
    return path


def save_with_metadata(
    path: Path, weights: dict[str, Tensor], format: str = "float8_e4m3fn"
) -> Path:
    """ComfyUI's layout of December 2025."""
    tensors = scaled(weights, ".weight_scale")
    ending = ".weight_scale"
    layers = {name.removesuffix(ending): {"format": format} for name in tensors if ending in name}
    said = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(tensors, path, {"_quantization_metadata": said})
    return path


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem == "shared":
        return "token_embd.weight"
    if stem == "encoder.final_layer_norm":
        return "enc.output_norm.weight"
    _, _, block, rest = stem.split(".", 3)
    return f"enc.blk.{block}.{TO_GGUF[rest]}.weight"


def save_gguf(
    path: Path, packed: dict[str, tuple[Any, Any]], architecture: str = "t5encoder"
) -> Path:
    """By the package `gguf`. packed: bytes (numpy) and ggml type of each tensor, by transformers' names."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), architecture)
    writer.add_array("tokenizer.ggml.tokens", ["<pad>", "</s>", "a"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0])
    writer.add_uint32(f"{architecture}.block_count", SIZES["num_layers"])  # type: ignore[arg-type]
    for name, (content, kind) in packed.items():
        writer.add_tensor(gguf_name(name), content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
