"""Checkpoints against diffusers: its directories open here, ours open there, with the same outputs."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file
from tiny_checkpoints import CONV, SIGMA, assert_same, build, edit_json

from pixart.checkpoint.config import config_from_diffusers, config_to_diffusers
from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.config import KVCompression, PixArtConfig
from pixart.files import CheckpointError

TOLERANCE = 1e-5  # of outputs whose largest value is about 1
# Two heads, and latents of 128: there diffusers turns size conditions on by default.
TWO_HEADS = replace(SIGMA, hidden_size=144, num_heads=2, input_size=128)
FAMILIES = {"sigma": TWO_HEADS, "alpha": replace(TWO_HEADS, micro_condition=True)}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference on a latent that is not square, with fractional timesteps and masks."""
    config, generator = ours.config, torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, 8, 12, generator=generator)
    caption = torch.randn(2, 7, config.caption_channels, generator=generator)
    mask = (torch.arange(7) < torch.tensor([[7], [3]])).long()
    timesteps = torch.tensor([13.5, 900.0])
    sizes, ratios = torch.tensor([[64.0, 96.0], [512.0, 640.0]]), torch.tensor([[0.67], [0.8]])
    if not config.micro_condition:
        sizes = ratios = None
    with torch.no_grad():
        mine = ours(latents, timesteps, caption, mask, sizes, ratios)
        other = theirs(
            latents,
            encoder_hidden_states=caption,
            timestep=timesteps,
            encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": sizes, "aspect_ratio": ratios},
        ).sample
    assert 0.1 < other.abs().max() < 10
    return float((mine - other).abs().max())


def diffusers_model(config: PixArtConfig) -> PixArtTransformer2DModel:
    torch.manual_seed(3)
    values = config_to_diffusers(config)
    model = PixArtTransformer2DModel.from_config(values).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("shards", [None, "500KB"])
def test_diffusers_opens_our_directory_with_the_same_outputs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: PixArtConfig, shards: str | None
) -> None:
    ours = build(config)
    save_transformer(ours, tmp_path / "m", max_shard_size=shards)
    files = list(tmp_path.glob("m/diffusion_pytorch_model*"))
    assert len(files) == 1 if shards is None else max(f.stat().st_size for f in files) < 600_000
    logging.getLogger("diffusers").addHandler(caplog.handler)
    theirs, report = PixArtTransformer2DModel.from_pretrained(
        tmp_path / "m", output_loading_info=True, low_cpu_mem_usage=False
    )
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not any(report.values()), report
    assert "not expected" not in caplog.text and "not used" not in caplog.text
    assert theirs.use_additional_conditions == config.micro_condition
    assert difference(ours, theirs) < TOLERANCE
    assert_same(load_transformer(tmp_path / "m"), ours)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    "how",
    [{}, {"max_shard_size": "500KB"}, {"safe_serialization": False}, {"variant": "fp16"}],
    ids=["safetensors", "shards", "bin", "variant"],
)
def test_a_directory_that_diffusers_saved_opens_with_the_same_outputs(
    tmp_path: Path, config: PixArtConfig, how: dict[str, Any]
) -> None:
    theirs = diffusers_model(config)
    theirs.save_pretrained(tmp_path / "m", **how)
    ours = load_transformer(tmp_path / "m")
    # Caption length is not in there: 300 tokens, or 120 for a model with size conditions.
    length = 120 if config.micro_condition else 300
    assert ours.config == replace(config, model_max_length=length)
    assert not ours.null_caption_stored
    assert difference(ours, theirs) < TOLERANCE


def test_published_configs_open_although_they_leave_things_out(tmp_path: Path) -> None:
    diffusers_model(TWO_HEADS).save_pretrained(tmp_path / "transformer")
    config = tmp_path / "transformer" / "config.json"
    # Σ's first configs have no use_additional_conditions, α's no interpolation_scale, and both an
    # older class; trainers leave their averaging in there.
    edit_json(config, _class_name="Transformer2DModel", interpolation_scale=..., decay=0.9999)
    edit_json(config, use_additional_conditions=..., only_cross_attention=False)
    for pipeline, length in (("PixArtAlphaPipeline", 120), ("PixArtSigmaPipeline", 300)):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        for path in (tmp_path, tmp_path / "transformer"):
            expected = replace(TWO_HEADS, pe_interpolation=2, model_max_length=length)
            assert load_transformer(path).config == expected


def test_compression_in_a_directory_is_told_by_its_tensors_and_by_its_config(
    tmp_path: Path,
) -> None:
    model = build(replace(CONV, qk_norm=True))
    save_transformer(model, tmp_path / "m")
    names = load_file(tmp_path / "m" / WEIGHTS).keys()
    for name in ("sr.weight", "sr.bias", "norm.weight", "norm.bias", "q_norm.bias", "k_norm.bias"):
        assert f"transformer_blocks.2.attn1.{name}" in names
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    compression = {"layers": [0, 2], "ratio": 2, "sampling": "conv", "norm": "layer"}
    assert config["kv_compression"] == compression and config["qk_norm"] is True
    edit_json(tmp_path / "m" / "config.json", kv_compression=..., qk_norm=...)
    assert_same(load_transformer(tmp_path / "m"), model)
    edit_json(tmp_path / "m" / "config.json", kv_compression=compression | {"layers": [0, 1, 2]})
    with pytest.raises(CheckpointError, match=r"missing transformer_blocks\.1\.attn1\.sr\.weight"):
        load_transformer(tmp_path / "m")


def test_a_dense_directory_has_no_key_that_diffusers_does_not_know() -> None:
    known = set(PixArtTransformer2DModel._get_init_keys(PixArtTransformer2DModel))
    for config in FAMILIES.values():
        assert set(config_to_diffusers(config)) - known == {"_class_name"}
        back = config_from_diffusers(config_to_diffusers(config), {}, model_max_length=7)
        assert back == config


def test_a_variant_is_taken_when_named_or_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pixart")
    path = tmp_path / "m"
    models = {
        dtype: build(SIGMA, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    for dtype, name in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        save_transformer(models[dtype], path, overwrite=True)
        (path / WEIGHTS).rename(tmp_path / f"diffusion_pytorch_model.{name}.safetensors")
    save_transformer(models[torch.float32], path, overwrite=True)
    for variant in tmp_path.glob("*.safetensors"):
        variant.rename(path / variant.name)
    assert load_transformer(path).dtype == torch.float32
    named = load_transformer(path, variant="bf16")
    for parameter, expected in zip(
        named.parameters(), models[torch.bfloat16].parameters(), strict=True
    ):
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, expected)
    with pytest.raises(CheckpointError, match="has no variant 'int8'; choose .*: bf16, fp16"):
        load_transformer(path, variant="int8")
    (path / WEIGHTS).unlink()
    with pytest.raises(
        CheckpointError, match="no weights without a variant; choose .*: bf16, fp16"
    ):
        load_transformer(path)
    (path / "diffusion_pytorch_model.bf16.safetensors").unlink()
    assert load_transformer(path).dtype == torch.float16
    assert "has only the variant 'fp16', which was taken" in caplog.text


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    save_transformer(build(), tmp_path / "m", max_shard_size=100_000)
    index = tmp_path / "m" / f"{WEIGHTS}.index.json"
    shard = sorted(set(json.loads(index.read_text())["weight_map"].values()))[1]
    (tmp_path / "m" / shard).unlink()
    with pytest.raises(CheckpointError, match=f"m: lacks the shard {shard}"):
        load_transformer(tmp_path / "m")
    edit_json(index, weight_map={"proj_out.bias": "../../secret.safetensors"})
    with pytest.raises(CheckpointError, match=r"index.json: must name files beside it, got '\.\./"):
        load_transformer(tmp_path / "m")
    edit_json(index, weight_map=[])
    with pytest.raises(CheckpointError, match=r"index.json: must have a weight_map"):
        load_transformer(tmp_path / "m")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"interpolation_scale": "2"}, "pe_interpolation must be a positive number, got '2'"),
        ({"sample_size": None}, "config.json: sample_size must be a positive integer, got None"),
        ({"num_attention_heads": "1"}, "num_attention_heads must be a positive integer, got '1'"),
        ({"out_channels": "8"}, "out_channels must be a positive integer, got '8'"),
        ({"use_additional_conditions": "no"}, "micro_condition must be true or false, got 'no'"),
        ({"num_layers": ...}, "config.json has no num_layers"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(
    tmp_path: Path, changes: dict[str, Any], rule: str
) -> None:
    save_transformer(build(), tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", **changes)
    with pytest.raises(CheckpointError, match=rule):
        load_transformer(tmp_path / "m")


def test_a_directory_for_compression_without_tensors_keeps_it(tmp_path: Path) -> None:
    config = replace(SIGMA, kv_compression=KVCompression([1], 2, "uniform_every"))
    save_transformer(build(config), tmp_path / "m")
    assert load_transformer(tmp_path / "m").config == config
