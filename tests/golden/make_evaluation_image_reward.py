"""ImageReward's own network with a small configuration and random weights:
tests/golden/evaluation/image_reward.json. See reference_environment.py; the source is unpacked beside:

    THUDM/ImageReward at c1392c6
    python tests/golden/make_evaluation_image_reward.py FOLDER_OF_SOURCES

Its imports name places that timm and transformers have since moved or dropped: they are set here.
"""

import importlib
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from reference_environment import let_torchvision_import, versions, write
from seeded_weights import pictures, weights_of
from tiny_reward import TEXTS, write_bert_tokenizer

let_torchvision_import()

SOURCES = Path(sys.argv[1])
SIZES = [(300, 200), (96, 160), (64, 64)]
MED = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256,
    "vocab_size": 64, "max_position_embeddings": 40, "type_vocab_size": 2, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "pad_token_id": 0, "add_cross_attention": True, "encoder_width": 128,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "is_decoder": False,
    "chunk_size_feed_forward": 0, "position_embedding_type": "absolute", "fusion_layer": 6,
}  # fmt: skip


def package(name: str, folder: Path) -> None:
    """A package without what its __init__ would import."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]  # type: ignore[attr-defined]
    sys.modules[name] = module


def stand_in(name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    sys.modules[name] = module


def moved_imports() -> None:
    import timm.layers
    import transformers.file_utils
    import transformers.modeling_utils
    from transformers import pytorch_utils

    for name in (
        "apply_chunking_to_forward",
        "find_pruneable_heads_and_indices",
        "prune_linear_layer",
    ):
        if not hasattr(transformers.modeling_utils, name):
            setattr(transformers.modeling_utils, name, getattr(pytorch_utils, name, None))
    stand_in("timm.models.registry", register_model=lambda f: f)
    stand_in(
        "timm.models.layers", trunc_normal_=timm.layers.trunc_normal_, DropPath=timm.layers.DropPath
    )
    stand_in("timm.models.helpers", named_apply=None, adapt_input_conv=None)
    stand_in("timm.models.hub", download_cached_file=None)
    stand_in("fairscale")
    stand_in("fairscale.nn")
    stand_in("fairscale.nn.checkpoint")
    stand_in("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=lambda m: m)
    vision = importlib.import_module("timm.models.vision_transformer")
    vision._cfg = getattr(vision, "_cfg", None)
    vision.PatchEmbed = getattr(vision, "PatchEmbed", timm.layers.PatchEmbed)


def main() -> None:
    moved_imports()
    folder = SOURCES / "ImageReward" / "ImageReward"
    package("ImageReward", folder)
    package("ImageReward.models", folder / "models")
    package("ImageReward.models.BLIP", folder / "models" / "BLIP")
    med = importlib.import_module("ImageReward.models.BLIP.med")
    vit = importlib.import_module("ImageReward.models.BLIP.vit")
    reference = importlib.import_module("ImageReward.ImageReward")
    from transformers import AutoTokenizer, BertConfig

    network = reference.ImageReward.__new__(reference.ImageReward)
    torch.nn.Module.__init__(network)
    blip = torch.nn.Module()
    blip.visual_encoder = vit.VisionTransformer(
        img_size=224, patch_size=32, embed_dim=128, depth=2, num_heads=2
    )
    blip.text_encoder = med.BertModel(config=BertConfig(**MED), add_pooling_layer=False)
    network.blip, network.mlp = blip, reference.MLP(128)
    network.mean, network.std, network.device = 0.16717362830052426, 1.0333394966054072, "cpu"
    network.eval()
    network.load_state_dict(weights_of(network, gain=6.0), strict=False)
    prepare = reference._transform(224)
    images = pictures(SIZES)
    with tempfile.TemporaryDirectory() as place:
        write_bert_tokenizer(Path(place))
        tokenizer = AutoTokenizer.from_pretrained(place)
    words = tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    pixels = torch.stack([prepare(image) for image in images])
    with torch.inference_mode():
        rewards = network.score_gard(words.input_ids, words.attention_mask, pixels)[:, 0]
    write(
        "image_reward",
        {
            "made_by": {
                "network": "THUDM/ImageReward c1392c6, ImageReward.score_gard on its own ViT, BertModel "
                "and MLP, small, fp32, CPU",
                "transform": "the same, _transform(224)",
                "packages": versions("torchvision", "timm", "transformers"),
            },
            "weights": "tests/builders/seeded_weights.py, weights_of, gain 6, seed 0",
            "sizes": SIZES,
            "texts": TEXTS,
            "ids": words.input_ids.tolist(),
            "shapes": {
                name: list(t.shape)
                for name, t in network.state_dict().items()
                if not name.endswith("position_ids")
            },
            "pixels": [one[:, ::17, ::19].double().tolist() for one in pixels],
            "rewards": rewards.double().tolist(),
        },
    )


if __name__ == "__main__":
    main()
