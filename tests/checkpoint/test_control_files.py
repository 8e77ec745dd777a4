"""ControlNet files: every layout in both directions, what fits which base, and hostile files."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CONV, FORMATS, SIGMA, build, edit_json
from torch import Tensor

from pixart.checkpoint.control import (
    control_to_diffusers,
    find_control,
    open_control,
    open_control_alone,
)
from pixart.checkpoint.load import OpenedTransformer, load_transformer
from pixart.checkpoint.save_control import save_control
from pixart.config import KVCompression, PixArtConfig
from pixart.convert import main
from pixart.files import CheckpointError
from pixart.model.control import ControlNet
from pixart.model.transformer import PixArt


def control(base: PixArt, copies: int = 2) -> ControlNet:
    network = base.new_control(copies).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


def opened(base: PixArt) -> OpenedTransformer:
    return OpenedTransformer.of(base)


def assert_same(network: ControlNet, expected: ControlNet) -> None:
    state = network.state_dict()
    assert list(state) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def published(base: PixArt, network: ControlNet) -> dict[str, Tensor]:
    """As the official code saves it, without anything of ours."""
    own = {f"base_model.{name}": tensor for name, tensor in base.state_dict().items()}
    return own | network.state_dict()


@pytest.mark.parametrize("config", [SIGMA, CONV, replace(SIGMA, qk_norm=True)])
@pytest.mark.parametrize("format", FORMATS)
def test_every_layout_is_read_as_it_was_written(
    tmp_path: Path, format: str, config: PixArtConfig
) -> None:
    base = build(config)
    network, path = control(base), tmp_path / FORMATS[format]
    for known in (None, config):
        save_control(network, path, config=known)  # over the first
        assert_same(open_control(path, opened(base)).load(), network)
        alone, contents = open_control_alone(path)
        assert_same(alone.load(), network)
        assert contents.config == known and contents.format == format
    narrow = open_control(path, opened(base), dtype=torch.bfloat16).load()
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}


def test_an_official_file_holds_its_base_and_both_are_opened(tmp_path: Path, caplog: Any) -> None:
    base = build()
    network, path = control(base), tmp_path / "m.pth"
    save_control(network, path, base=base)
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert set(stored) == set(published(base, network)) | {"base_model.pos_embed"}
    with caplog.at_level(logging.INFO, "pixart"):
        model = load_transformer(path)
    assert model.config == base.config and "holds a ControlNet of 36 tensors too" in caplog.text
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert_same(open_control(path, opened(base)).load(), network)


@pytest.mark.parametrize("wrapper", ["", "module.", "model."])
@pytest.mark.parametrize("has_base", [True, False])
def test_a_published_file_is_opened_in_any_wrapper(
    tmp_path: Path, wrapper: str, has_base: bool
) -> None:
    base = build()
    network = control(base)
    state = published(base, network) if has_base else network.state_dict()
    state = {wrapper + name: tensor for name, tensor in state.items()}
    for number, payload in enumerate(({"state_dict": state, "epoch": 1}, state)):
        torch.save(payload, tmp_path / f"{number}.pth")
        assert_same(open_control(tmp_path / f"{number}.pth", opened(base)).load(), network)
    save_file(state, tmp_path / "m.safetensors")
    assert_same(open_control(tmp_path / "m.safetensors", opened(base)).load(), network)


def test_diffusers_names_are_those_of_its_research_code() -> None:
    names = set(control_to_diffusers(control(build()).state_dict()))
    inside = [
        *(f"attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj", "ff.net.2",
    ]  # fmt: skip
    expected = set()
    for block in ("controlnet_blocks.0", "controlnet_blocks.1"):
        expected.add(f"{block}.transformer_block.scale_shift_table")
        layers = [f"transformer_block.{name}" for name in inside] + ["after_proj"]
        layers += ["before_proj"] if block.endswith("0") else []
        expected |= {f"{block}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert names == expected


def test_a_folder_of_diffusers_alone_is_opened(tmp_path: Path) -> None:
    """What save_pretrained writes: no sidecar, and other keys in config.json; and the whole model's."""
    base = build()
    network, folder = control(base), tmp_path / "m"
    save_control(network, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    edit_json(folder / "config.json", _diffusers_version="0.32.0")
    assert json.loads((folder / "config.json").read_text())["num_layers"] == 2
    assert_same(open_control(folder, opened(base)).load(), network)
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    whole = {f"controlnet.{name}": tensor for name, tensor in state.items()}
    save_file(whole, tmp_path / "whole.safetensors")
    assert_same(open_control(tmp_path / "whole.safetensors", opened(base)).load(), network)


@pytest.mark.parametrize("sampling", ["conv", "average"])
def test_a_dense_control_of_a_compressed_base_compresses_as_it_does(
    tmp_path: Path, sampling: str, caplog: Any
) -> None:
    compressed = build(replace(SIGMA, kv_compression=KVCompression([0, 2], 2, sampling)))
    save_control(control(build()), tmp_path / "m.safetensors")
    with caplog.at_level(logging.INFO, "pixart"):
        network = open_control(tmp_path / "m.safetensors", opened(compressed)).load()
    assert "was dense; its blocks 0 compress as the transformer's do" in caplog.text
    attention: Any = network.controlnet[0].copied_block.attn  # type: ignore[union-attr]
    assert attention.compression is not None
    if sampling == "conv":
        own: Any = compressed.blocks[0].attn  # type: ignore[union-attr]
        assert torch.equal(attention.sr.weight, own.sr.weight)
        assert torch.equal(attention.norm.bias, own.norm.bias)


def test_a_base_of_another_kind_is_refused_in_one_line_that_names_both(tmp_path: Path) -> None:
    base = build()
    with_base, alone = tmp_path / "both.pth", tmp_path / "alone.safetensors"
    save_control(control(base), with_base, base=base)
    save_control(control(base), alone)
    wide = build(replace(SIGMA, hidden_size=144, num_heads=2))
    for path, other, words in (
        (alone, wide, "is a control of width 72, and the transformer a model has width 144"),
        (with_base, wide, "is a control of width 72, and the transformer a model has width 144"),
        (with_base, build(replace(SIGMA, depth=4)), "depth 3, and a model has depth 4"),
        (
            alone,
            build(replace(SIGMA, depth=2)),
            "2 copied blocks, and the transformer a model has 2",
        ),
        (with_base, build(replace(SIGMA, num_heads=2)), "num_heads 1, and a model has num_heads 2"),
        (
            with_base,
            build(replace(SIGMA, model_max_length=9)),
            "model_max_length 7, and a model has",
        ),
        (with_base, build(replace(SIGMA, micro_condition=True)), "are of two families"),
        (
            alone,
            build(replace(SIGMA, qk_norm=True)),
            "missing controlnet.0.copied_block.attn.q_norm",
        ),
    ):
        with pytest.raises(CheckpointError, match=words) as raised:
            open_control(path, opened(other))
        assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_a_control_that_compresses_needs_a_base_that_does(tmp_path: Path) -> None:
    save_control(control(build(CONV)), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="compresses keys and values, and the transformer"):
        open_control(tmp_path / "m.safetensors", opened(build()))


def test_another_base_than_its_own_is_never_silent(tmp_path: Path, caplog: Any) -> None:
    base, path = build(), tmp_path / "m.pth"
    network = control(base)
    save_control(network, path, base=base)
    open_control(path, opened(build(dtype=torch.bfloat16)))
    assert not caplog.records, "rounding is no difference"
    tuned, other = build(), build()
    for parameter in tuned.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) * parameter.abs().mean()
    for parameter in other.parameters():
        parameter.data.copy_(torch.randn_like(parameter) / 10)
    assert_same(open_control(path, opened(tuned)).load(), network)
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "differ from those of a model by" in record.message
    with pytest.raises(CheckpointError, match="trained with another transformer than a model"):
        open_control(path, opened(other))
    # The way out that the message names.
    alone, _ = open_control_alone(path)
    save_control(alone.load(), tmp_path / "alone.safetensors")
    assert_same(open_control(tmp_path / "alone.safetensors", opened(other)).load(), network)


def test_a_control_of_ours_warns_of_another_family(tmp_path: Path, caplog: Any) -> None:
    save_control(control(build()), tmp_path / "m.safetensors", config=SIGMA)
    open_control(tmp_path / "m.safetensors", opened(build(replace(SIGMA, model_max_length=9))))
    [record] = caplog.records
    assert "model_max_length 7, and a model has model_max_length 9" in record.message


def test_the_repository_of_several_asks_for_one() -> None:
    with pytest.raises(CheckpointError, match="name one, controlnet-512 or controlnet-1024"):
        find_control("PixArt-alpha/PixArt-ControlNet")


Edit = Callable[[dict[str, Any]], object]
AFTER = "controlnet.1.after_proj.weight"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda s: s.pop(AFTER), f"missing {AFTER}"),
        (lambda s: s.update({AFTER: s[AFTER][:7].clone()}), f"{AFTER} must be"),
        (lambda s: s.update({"controlnet.0.after_proj.weight": torch.zeros(7)}), "must have 2 dim"),
        (lambda s: s.update({AFTER: s[AFTER] * float("nan")}), "must be finite, got NaN"),
        (lambda s: s.update({"controlnet.999.after_proj.weight": torch.zeros(1)}), "missing controlnet.2"),
        (lambda s: s.update({"controlnet.9999999.after_proj.weight": torch.zeros(1)}), "unexpected"),
        (lambda s: s.update({"other.weight": torch.zeros(1)}), "unexpected other.weight"),
        (lambda s: s.update({"controlnet.1.before_proj.weight": torch.zeros(1)}), "unexpected"),
        (lambda s: s.update({f"model.{AFTER}": s[AFTER].clone()}), "holds 2 ControlNets"),
        (lambda s: s.update({AFTER: s[AFTER].long()}), "must be float64"),
        (lambda s: s.clear(), "holds no ControlNet"),
        (lambda s: s.update({AFTER: torch.zeros(1).expand(10**6, 10**6)}), "its numbers in the file"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, edit: Edit, reason: str) -> None:
    base = build()
    state: dict[str, Any] = dict(control(base).state_dict())
    edit(state)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=reason) as raised:
        open_control(tmp_path / "m.pth", opened(base))
    assert str(raised.value).startswith(str(tmp_path)) and "\n" not in str(raised.value)
    with pytest.raises(CheckpointError):
        open_control_alone(tmp_path / "m.pth")


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("harm",))


@pytest.mark.parametrize("kind", ["code", "transformer", "config", "class", "fp16"])
def test_what_is_no_control_is_refused(tmp_path: Path, kind: str, capsys: Any) -> None:
    base, path = build(), tmp_path / "m.pth"
    dtype = None
    if kind == "code":
        torch.save({"controlnet.0.after_proj.weight": _Harm()}, path)
        reason = "contains code"
    elif kind == "transformer":
        torch.save(base.state_dict(), path)
        reason = "holds no ControlNet but a transformer alone"
    elif kind == "config":
        metadata = {"format": "pixart-control", "config": "[1]"}
        path = tmp_path / "m.safetensors"
        save_file(control(base).state_dict(), path, metadata)
        reason = "configuration must be a mapping"
    elif kind == "class":
        path = tmp_path / "m"
        save_control(control(base), path)
        edit_json(path / "config.json", _class_name="FluxControlNetModel")
        reason = "config.json is of a FluxControlNetModel"
    else:
        network = control(base)
        network.controlnet[0].after_proj.bias.data += 70_000  # type: ignore[union-attr]
        save_control(network, path)
        reason, dtype = "after_proj.bias must fit into float16", torch.float16
    with pytest.raises(CheckpointError, match=reason) as raised:
        open_control(path, opened(base), dtype=dtype).load()
    assert "\n" not in str(raised.value) and "harm" not in capsys.readouterr().out


def test_a_control_is_no_transformer(tmp_path: Path) -> None:
    save_control(control(build()), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="holds a ControlNet .* and no transformer"):
        load_transformer(tmp_path / "m.safetensors")


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    network = control(build())
    (tmp_path / "m.pth").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is no official checkpoint"):
        save_control(network, tmp_path / "m.pth")
    assert (tmp_path / "m.pth").read_text() == "mine"
    with pytest.raises(ValueError, match="base is for official files"):
        save_control(network, tmp_path / "m.safetensors", base=build())


def test_the_converter_writes_every_layout_of_a_control(tmp_path: Path, capsys: Any) -> None:
    base = build()
    network = control(base)
    save_control(network, tmp_path / "both.pth", base=base)
    places = [tmp_path / name for name in ("a", "b.safetensors", "c.pth", "d.pth")]
    steps = [
        (tmp_path / "both.pth", places[0]), (places[0], places[1]), (places[1], places[2]),
        (places[0], places[3], "--base", tmp_path / "both.pth"),
    ]  # fmt: skip
    for step in steps:
        assert main([*map(str, step), "--control"]) == 0
    for place in places:
        assert_same(open_control(place, opened(base)).load(), network)
    stored = torch.load(places[3], weights_only=True)["state_dict"]
    assert set(stored) == set(torch.load(tmp_path / "both.pth", weights_only=True)["state_dict"])
    capsys.readouterr()
    for arguments, reason in (
        (["b.safetensors", "x.pth"], "holds a ControlNet"),
        (["b.safetensors", "x.pth", "--control", "--ema"], "--ema must be left out with --control"),
        (["b.safetensors", "x.pth", "--base", "both.pth"], "--base must be given with --control"),
        (["b.safetensors", "x", "--control", "--base", "both.pth"], "with --to official"),
    ):
        given = [str(tmp_path / one) if one[0] != "-" else one for one in arguments]
        assert main(given) == 2
        out, err = capsys.readouterr()
        assert reason in err and out == "" and err.count("\n") == 1
