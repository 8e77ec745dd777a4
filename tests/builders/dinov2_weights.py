"""Weights of a small DINOv2: in the names of the published code, and as a folder of transformers."""

import json
from pathlib import Path

from safetensors.torch import save_file
from seeded_weights import weights
from torch import Tensor

WIDTH, DEPTH, HEADS, PATCH, SIDE = 48, 2, 3, 14, 280  # SIDE: pixels that it was trained on, not 224


def published(seed: int = 0) -> dict[str, Tensor]:
    """A state dict of facebookresearch/dinov2's DinoVisionTransformer."""
    places = (SIDE // PATCH) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, places, WIDTH), "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
    }  # fmt: skip
    for k in range(DEPTH):
        at = f"blocks.{k}."
        for norm in ("norm1", "norm2"):
            shapes |= {f"{at}{norm}.weight": (WIDTH,), f"{at}{norm}.bias": (WIDTH,)}
        for name, out, into in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
        ):
            shapes |= {f"{at}{name}.weight": (out, into), f"{at}{name}.bias": (out,)}
        shapes |= {f"{at}ls1.gamma": (WIDTH,), f"{at}ls2.gamma": (WIDTH,)}
    state = weights(shapes, gain=1.0, seed=seed)
    # Such that both branches of a layer are seen in the result.
    return {k: v + 1 if k.endswith("gamma") else v for k, v in state.items()}


_ONCE = {
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias",
}  # fmt: skip
_LAYER = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def write_folder(folder: Path, seed: int = 0) -> None:
    """As facebook/dinov2-large is: the names of transformers 4."""
    found = {}
    for name, tensor in published(seed).items():
        if name in _ONCE:
            found[_ONCE[name]] = tensor
            continue
        _, number, rest = name.split(".", 2)
        at = f"encoder.layer.{number}."
        if rest.startswith("attn.qkv."):
            for one, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"{at}attention.attention.{one}.{rest.removeprefix('attn.qkv.')}"] = part
            continue
        for theirs, ours in _LAYER.items():
            rest = rest.replace(theirs, ours)
        found[at + rest] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in found.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = {
        "model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "mlp_ratio": 4,
        "hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": SIDE, "patch_size": PATCH,
        "num_channels": 3, "qkv_bias": True, "layerscale_value": 1.0, "use_swiglu_ffn": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
