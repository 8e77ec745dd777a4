"""What other programs make of a transformer's tensors: fp8, prefixes of wrappers, dicts of trainers."""

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_model import dit
from safetensors.torch import save_file
from tiny_checkpoints import CONV, assert_same, build, official, save_official
from torch import Tensor

from pixart.checkpoint.dit import open_dit
from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.names import to_diffusers
from pixart.checkpoint.save import save_transformer
from pixart.files import CheckpointError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def test_parameters_are_read_as_their_numbers(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    state = {name: torch.nn.Parameter(tensor) for name, tensor in official().items()}
    assert_same(load_transformer(save_official(tmp_path / "m.pth", state)), build())
    assert not recwarn.list


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items()}


@pytest.mark.parametrize("kind", FP8, ids=str)
@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_fp8_opens_as_exact_numbers_of_16_bits_or_as_asked(
    tmp_path: Path, kind: torch.dtype, naming: str
) -> None:
    narrow = {name: tensor.to(kind) for name, tensor in official().items()}
    stored = to_diffusers(narrow) if naming == "diffusers" else narrow
    save_file(contiguous(stored), tmp_path / "m.safetensors")
    torch.save({"state_dict": stored}, tmp_path / "m.pth")
    for name in ("m.safetensors", "m.pth"):
        for dtype in (None, torch.float32, torch.float16):
            model = load_transformer(tmp_path / name, dtype=dtype)
            assert model.dtype == (dtype or torch.bfloat16)
            own = model.state_dict()["blocks.1.attn.qkv.weight"]
            assert torch.equal(own.double(), narrow["blocks.1.attn.qkv.weight"].double())


def test_fp8_beside_other_numbers_is_opened_as_those(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pixart")
    state = {
        name: tensor.to(FP8[0]) if ".mlp.fc" in name else tensor.half()
        for name, tensor in official().items()
    }
    model = load_transformer(save_official(tmp_path / "m.pth", state))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}
    assert "12 tensors of fp8, which were opened as float16" in caplog.text
    save_transformer(model, tmp_path / "again.pth")
    assert_same(load_transformer(tmp_path / "again.pth"), model)


PREFIXES = (
    "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.module.",
    "transformer.", "model.diffusion_model.", "module.model.transformer._orig_mod.",
    "_fsdp_wrapped_module._orig_mod.", "transformer.transformer.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_wrappers_are_taken_off_in_any_nesting(tmp_path: Path, prefix: str, naming: str) -> None:
    stored = to_diffusers(official()) if naming == "diffusers" else official()
    path = save_official(tmp_path / "m.pth", {prefix + name: t for name, t in stored.items()})
    state = load_transformer(path).state_dict()
    assert all(torch.equal(state[name], t) for name, t in build().state_dict().items()
               if naming == "official" or not name.startswith("y_embedder.y_emb"))  # fmt: skip


def test_wrappers_of_single_layers_are_taken_off(tmp_path: Path) -> None:
    state = {
        name.replace("blocks.", "blocks._orig_mod.").replace(".attn.", "._checkpoint_wrapped_module.attn."): t
        for name, t in official(CONV).items()
    }  # fmt: skip
    assert_same(load_transformer(save_official(tmp_path / "m.pth", state)), build(CONV))


def average() -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in official(positions=False).items()}


TRAINERS: dict[str, dict[str, Any]] = {
    "DiT": {"model": official(), "ema": average(), "opt": {}, "args": argparse.Namespace(lr=1)},
    "DeepSpeed": {"module": official(), "optimizer": None, "ds_version": "0.15", "global_steps": 3},
    "Lightning": {"state_dict": {f"model.{n}": t for n, t in official().items()}, "epoch": 3},
    "nested": {"state_dict": {"module": {"model": official()}}},
    "official": {"state_dict": official(), "state_dict_ema": average()},
    "accelerate": {"model_state_dict": official(), "ema_state_dict": average(), "step": 1},
}


@pytest.mark.parametrize("payload", TRAINERS.values(), ids=TRAINERS)
def test_what_trainers_save_is_opened(tmp_path: Path, payload: dict[str, Any]) -> None:
    torch.save(payload, tmp_path / "m.pt")
    assert_same(load_transformer(tmp_path / "m.pt"), build())
    if any("ema" in key for key in payload):
        model = load_transformer(tmp_path / "m.pt", ema=True, config=build().config)
        assert torch.equal(model.t_block[1].bias, official()["t_block.1.bias"] + 1)
    else:
        with pytest.raises(CheckpointError, match="has no averaged weights"):
            load_transformer(tmp_path / "m.pt", ema=True)


def test_what_holds_more_than_a_transformer_is_not_replaced_by_one(tmp_path: Path) -> None:
    torch.save(TRAINERS["DeepSpeed"], tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="exists and is no official checkpoint"):
        save_transformer(build(), tmp_path / "m.pt")


def test_a_single_file_with_other_models_gives_its_transformer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pixart")
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in official().items()}
    state |= {"first_stage_model.decoder.conv_in.weight": torch.zeros(4), "vae.x": torch.zeros(1)}
    save_file(contiguous(state), tmp_path / "all.safetensors")
    assert_same(load_transformer(tmp_path / "all.safetensors"), build())
    assert "holds 2 tensors of other models (first_stage_model, vae)" in caplog.text


REFUSED = {
    "scaled fp8": (
        official() | {"scaled_fp8": torch.zeros(0), "blocks.0.mlp.fc1.scale_weight": torch.ones(())},
        r"scales of their own \(scaled_fp8, blocks.0.mlp.fc1.scale_weight\)",
    ),
    "two": (
        {f"{p}.{name}": t for p in ("module", "model") for name, t in official().items()},
        "holds 2 transformers, under module., model.; give one",
    ),
    "twice": (
        official() | {f"_orig_mod.{name}": t for name, t in official().items()},
        "holds a tensor twice, with and without a wrapper",
    ),
    "emptied by ZeRO": (
        {name: tensor.new_empty(0) for name, tensor in official().items()},
        "x_embedder.proj.weight must have 4 dimensions",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("state", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_told_is_refused_by_name(
    tmp_path: Path, state: dict[str, Tensor], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_transformer(save_official(tmp_path / "m.pth", state))
    assert str(caught.value).startswith(str(tmp_path / "m.pth"))


def test_a_dit_is_opened_out_of_its_trainers_dict_a_wrapper_and_fp8(tmp_path: Path) -> None:
    plain = dit()
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in plain.items()}
    older = {name: tensor + 1 for name, tensor in plain.items()}
    options = argparse.Namespace(lr=1e-4)
    torch.save({"model": older, "ema": wrapped, "opt": {}, "args": options}, tmp_path / "dit.pt")
    torch.save(plain, tmp_path / "plain.pt")
    small: dict[str, Any] = {"caption_channels": 8, "max_length": 4}
    torch.manual_seed(0)
    expected = open_dit(tmp_path / "plain.pt", **small)
    torch.manual_seed(0)
    assert_same(open_dit(tmp_path / "dit.pt", **small), expected)
    narrow = {name: tensor.to(FP8[0]) for name, tensor in plain.items()}
    save_file(contiguous(narrow), tmp_path / "dit.safetensors")
    opened = open_dit(tmp_path / "dit.safetensors", **small).state_dict()["x_embedder.proj.weight"]
    assert torch.equal(opened.double(), narrow["x_embedder.proj.weight"].double())


DAMAGED = {
    "blocks.999.attn.proj.bias": (torch.zeros(1), "missing blocks.3, .* says 1000 blocks"),
    "x_embedder.proj.weight": (torch.zeros(30000, 4, 2, 2), "got .*of another shape"),
    "blocks.0.mlp.fc1.weight": (torch.zeros(()), "mlp.fc1.weight must have 2 dimensions"),
    "pos_embed": (torch.zeros(1, 63, 144), "must be a table of a square grid, got 63 tokens"),
    "final_layer.linear.bias": (torch.full((32,), torch.nan), "NaN or infinity in final_layer.lin"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_dit_is_refused_before_memory_is_taken(tmp_path: Path, name: str) -> None:
    value, reason = DAMAGED[name]
    torch.save(dit() | {name: value}, tmp_path / "dit.pt")
    with pytest.raises(CheckpointError, match=f"dit.pt: .*{reason}"):
        open_dit(tmp_path / "dit.pt", caption_channels=8, max_length=4)
