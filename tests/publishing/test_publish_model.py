"""The transformer of a published repository computes what ours does, with our kernels and without."""

from typing import Any

import pytest
import torch
from small_model import PARITY_TOLERANCE, build, inputs, mask_of, relative_error, sizes

from pixart.checkpoint.config import PUBLISHED_CLASS, PUBLISHED_NORM, config_from_diffusers
from pixart.checkpoint.names import from_diffusers, to_diffusers
from pixart.config import KVCompression
from pixart.publishing.folder import transformer_config
from pixart.publishing.repository import pixart_kv
from pixart.publishing.repository.pixart_kv import GUARD, PixArtKVTransformer2DModel

CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "conv": {"kv_compression": KVCompression([1], 2)},
    "conv without a norm": {"kv_compression": KVCompression([0, 1], 3, norm="none")},
    "average": {"kv_compression": KVCompression([0], 2, "average")},
    "average with a norm": {"kv_compression": KVCompression([0], 4, "average", "layer")},
    "uniform": {"kv_compression": KVCompression([0, 1], 2, "uniform")},
    "uniform_every": {"kv_compression": KVCompression([1], 3, "uniform_every", "layer")},
    "qk_norm": {"qk_norm": True, "kv_compression": KVCompression([0], 2)},
    "micro_condition": {"micro_condition": True, "kv_compression": KVCompression([1], 2)},
    "mlp_ratio": {"mlp_ratio": 2.5, "pred_sigma": False, "pe_interpolation": 0.25},
    "ratio 1": {"kv_compression": KVCompression([0, 1], 1)},
}
MASK = mask_of([[0, 1, 2, 3, 4], [1, 3, 4, 9]])


def published(model: Any) -> PixArtKVTransformer2DModel:
    values = transformer_config(model.config, has_null_caption=False)
    del values["_class_name"]
    own = PixArtKVTransformer2DModel(**values).eval()
    own.load_state_dict(to_diffusers(model.state_dict()), strict=True)
    return own


def predicted(own: Any, mask: Any, with_sizes: bool) -> torch.Tensor:
    latents, timesteps, caption = inputs()
    known = sizes() if with_sizes else {"image_size": None, "aspect_ratio": None}
    told = {"resolution": known["image_size"], "aspect_ratio": known["aspect_ratio"]}
    with torch.no_grad():
        return own(
            latents, caption, timesteps, told, encoder_attention_mask=mask, return_dict=False
        )[0]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_predicts_what_ours_does(
    name: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a grid of 5 x 7 tokens, which no ratio divides."""
    model = build(seed=len(name), **CONFIGS[name])
    own = published(model)
    if not kernels:
        monkeypatch.setattr(pixart_kv, "_kernels", None)
    is_told = model.config.micro_condition
    for mask in (MASK, None):
        with torch.no_grad():
            expected = model(*inputs(), mask, **(sizes() if is_told else {}))
        assert relative_error(predicted(own, mask, is_told), expected) < PARITY_TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_its_configuration_is_read_back(name: str) -> None:
    config = build(**CONFIGS[name]).config
    values = transformer_config(config, has_null_caption=False)
    tensors = from_diffusers(to_diffusers(build(**CONFIGS[name]).state_dict()))
    found = config_from_diffusers(values, tensors, model_max_length=config.model_max_length)
    if name == "ratio 1":
        assert found.kv_compression is None
    else:
        assert found == config


def test_what_guards_a_compressed_model_is_the_same_text_on_both_sides() -> None:
    assert GUARD == PUBLISHED_NORM and PixArtKVTransformer2DModel.__name__ == PUBLISHED_CLASS
    compressed = transformer_config(build(**CONFIGS["conv"]).config, has_null_caption=False)
    dense = transformer_config(build().config, has_null_caption=False)
    assert compressed["norm_type"] == GUARD and dense["norm_type"] == "ada_norm_single"


def test_a_model_without_a_caption_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="caption_channels must be a width, got None"):
        PixArtKVTransformer2DModel(caption_channels=None)


def test_processors_that_merge_nothing_are_refused() -> None:
    own = published(build(**CONFIGS["conv"]))
    own.set_default_attn_processor()
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn1\.processor must be"):
        predicted(own, MASK, False)
    with pytest.raises(ValueError, match="fuse_qkv_projections is not supported"):
        own.fuse_qkv_projections()


def test_masks_that_it_cannot_honour_are_refused() -> None:
    own = published(build())
    latents, timesteps, caption = inputs()
    nothing = MASK.clone()
    nothing[1] = 0
    for mask, said in ((MASK[:, None], "must be"), (nothing, "keep a token")):
        with pytest.raises(ValueError, match=said):
            own(latents, caption, timesteps, encoder_attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask must be None"):
        own(latents, caption, timesteps, attention_mask=torch.ones(2, 35))


def test_the_null_caption_lies_with_the_weights() -> None:
    config = build(**CONFIGS["conv"]).config
    values = transformer_config(config, has_null_caption=True)
    del values["_class_name"]
    own = PixArtKVTransformer2DModel(**values)
    assert own.state_dict()["null_caption"].shape == (12, 48)
    table = torch.randn(12, 48)
    assert from_diffusers({"null_caption": table}) == {"y_embedder.y_embedding": table}
