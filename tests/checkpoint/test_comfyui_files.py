"""Files for ComfyUI: it opens rightly what it can, and refuses the rest."""

import logging
from dataclasses import replace
from pathlib import Path

import comfyui_stub
import pytest
import torch
from tiny_checkpoints import CONV, SIGMA, assert_same, build

from pixart.checkpoint.comfyui import stock_obstacle
from pixart.checkpoint.load import empty_model, load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.checkpoint.save_control import save_control
from pixart.config import KVCompression, PixArtConfig
from pixart.convert import main
from pixart.model.control import ControlNet
from pixart.model.transformer import PixArt
from pixart.releases import RELEASES
from pixart.tensors import read_safetensors

XL = PixArtConfig(
    depth=1, pe_interpolation=2.0
)  # but for its depth, of which ComfyUI counts the blocks


def convert(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def zeros(config: PixArtConfig) -> PixArt:
    model = empty_model(config).to(torch.bfloat16).to_empty(device="cpu").eval()
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model


def test_comfyui_alone_opens_a_dense_model_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_transformer(zeros(XL), path, format="comfyui")
    tensors, _ = read_safetensors(path)
    assert tensors["pos_embed"].shape == (1, 64 * 64, 1152)
    found = comfyui_stub.detect_unet_config(list(tensors), dict(tensors))
    assert found is not None
    for name in ("input_size", "pe_interpolation", "depth", "model_max_length", "micro_condition"):
        assert found[name] == getattr(XL, name)
    model = comfyui_stub.load_diffusion_model(path)
    assert model.left.missing_keys == [] and model.left.unexpected_keys == ["pos_embed"]


def test_a_compressed_model_is_refused_and_a_line_says_who_opens_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_transformer(build(CONV), tmp_path / "m.safetensors")
    path = tmp_path / "c.safetensors"
    with caplog.at_level(logging.INFO, "pixart"):
        assert convert(tmp_path / "m.safetensors", path, "--to", "comfyui") == 0
    assert "drops the tensors of K/V compression; load the file with the node" in caplog.text
    assert all(name.startswith("pixart_kv.") for name in read_safetensors(path)[0])
    with pytest.raises(RuntimeError, match="Could not detect model type"):
        comfyui_stub.load_diffusion_model(path)
    assert_same(load_transformer(path), build(CONV))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"input_size": 64, "pe_interpolation": 1.0}, None),
        ({"micro_condition": True, "model_max_length": 120}, None),
        ({"kv_compression": KVCompression([0], 2)}, "K/V compression"),
        ({"kv_compression": KVCompression([0], 1)}, None),
        ({"input_size": 32, "pe_interpolation": 0.5}, "pe_interpolation to be 0 at 256 px"),
        ({"model_max_length": 120}, "for Σ, whose VAE is another"),
        ({"num_heads": 18}, "num_heads to be 16, and the model has 18"),
        ({"qk_norm": True}, "qk_norm"),
        ({"pred_sigma": False}, "pred_sigma"),
    ],
)
def test_what_comfyui_would_open_as_another_network(
    changes: dict[str, object], reason: str | None
) -> None:
    obstacle = stock_obstacle(replace(XL, **changes))  # type: ignore[arg-type]
    assert obstacle is None if reason is None else reason in str(obstacle)


def test_of_the_releases_comfyui_opens_those_of_512_px_and_more() -> None:
    opened = {name for name, release in RELEASES.items() if stock_obstacle(release.config) is None}
    sigma = {"sigma-512", "sigma-1024", "sigma-2k", "nitro-1024", "sigma-nitro"}
    assert opened == {*sigma, "alpha-1024", "lcm-1024"}


def test_a_file_is_replaced_by_its_own_format_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, path = tmp_path / "m.safetensors", tmp_path / "c.safetensors"
    save_transformer(build(CONV), source)
    for to, code in (("comfyui", 0), ("comfyui", 0), ("pixart", 2)):
        assert convert(source, path, "--to", to) == code
    assert "exists and is no pixart checkpoint" in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = replace(SIGMA, caption_embedding=False, caption_channels=72)
    save_transformer(build(plain), tmp_path / "plain.safetensors")
    save_transformer(build(), tmp_path / "m.safetensors")
    for source, name, reason in (
        ("m.safetensors", "c.pth", "must end in .safetensors"),
        ("plain.safetensors", "c.safetensors", "caption_embedding must be true for ComfyUI"),
    ):
        assert convert(tmp_path / source, tmp_path / name, "--to", "comfyui") == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
        assert not (tmp_path / name).exists()


def test_a_control_has_no_file_for_comfyui(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(ValueError, match="must be official, diffusers or pixart for a control"):
        save_control(ControlNet(SIGMA, 1), path, format="comfyui")
    assert not path.exists()
