"""Checkpoints: every direction bit-exact, and configurations recognised from the tensors."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    CONV,
    FORMATS,
    SIGMA,
    assert_same,
    build,
    edit_json,
    official,
    save_official,
)

from pixart.checkpoint import names
from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.positions import solve_interpolation
from pixart.checkpoint.save import save_transformer
from pixart.config import KVCompression, PixArtConfig
from pixart.files import CheckpointError
from pixart.resolution import position_embedding
from pixart.weights import resolve

CONFIGS = {
    "sigma": SIGMA,
    "alpha with sizes": replace(SIGMA, micro_condition=True, pe_interpolation=1.0),
    "conv": CONV,
    "conv 4, qk_norm": replace(SIGMA, kv_compression=KVCompression([1], 4), qk_norm=True),
    "conv without norm": replace(SIGMA, kv_compression=KVCompression([1], 3, norm="none")),
    "noise only": replace(SIGMA, pred_sigma=False),
    "narrow mlp": replace(SIGMA, mlp_ratio=2.5),
}
UNSEEN = {  # nothing in the tensors shows these: the configuration must travel along
    "average": replace(SIGMA, kv_compression=KVCompression([0, 1], 2, "average")),
    "uniform with norm": replace(SIGMA, kv_compression=KVCompression([1], 2, "uniform", "layer")),
    "heads of 24": replace(SIGMA, num_heads=3),
    "dropout": replace(SIGMA, class_dropout_prob=0.25),
}


@pytest.mark.parametrize("config", (CONFIGS | UNSEEN).values(), ids=CONFIGS | UNSEEN)
def test_every_direction_is_bit_exact(tmp_path: Path, config: PixArtConfig) -> None:
    model = build(config)
    save_transformer(model, tmp_path / "start.safetensors")
    source = tmp_path / "start.safetensors"
    # The six directions, and each format once from itself.
    tour = ["official", "diffusers", "pixart", "diffusers", "official", "pixart"]
    own = ["pixart", "official", "official", "diffusers", "diffusers"] if config is CONV else []
    for step, format in enumerate([*tour, *own]):
        destination = tmp_path / f"{step}-{FORMATS[format]}"
        save_transformer(load_transformer(source), destination, format=format)
        source = destination
        assert_same(load_transformer(source), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_the_stored_dtype_stays_unless_another_is_asked_for(
    tmp_path: Path, format: str, dtype: torch.dtype
) -> None:
    model = build(CONV, dtype)
    model.final_layer.float()  # mixed, as diffusers leaves some modules
    save_transformer(model, tmp_path / FORMATS[format])
    assert_same(load_transformer(tmp_path / FORMATS[format]), model)
    cast = load_transformer(tmp_path / FORMATS[format], dtype=torch.float64)
    assert {tensor.dtype for tensor in cast.state_dict().values()} == {torch.float64}


def test_an_official_file_has_the_official_tensors_and_position_table(tmp_path: Path) -> None:
    config = replace(CONV, pe_interpolation=0.5)
    save_transformer(build(config, torch.float16), tmp_path / "m.pth")
    state = torch.load(tmp_path / "m.pth", weights_only=True)["state_dict"]
    assert state["blocks.2.attn.sr.weight"].shape == (72, 1, 2, 2)
    assert state["y_embedder.y_embedding"].shape == (7, 24)
    # The published formula, written out once more: column first, sines before cosines.
    coordinate = np.arange(4, dtype=np.float32) / (4 / 4) / 0.5
    angle = np.outer(coordinate, 10000.0 ** -(np.arange(18) / 18.0))
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    table = [np.concatenate([axis[x], axis[y]]) for y in range(4) for x in range(4)]
    expected = torch.from_numpy(np.array(table, dtype=np.float32)).half()
    assert torch.equal(state["pos_embed"], expected[None])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("key", ["state_dict", None])
def test_the_tensors_of_an_official_file_tell_the_configuration(
    tmp_path: Path, config: PixArtConfig, key: str | None
) -> None:
    # The name lies: the published 2K model is called "kvcompress" and is dense.
    path = save_official(tmp_path / "kvcompress.pth", official(config), key)
    model = load_transformer(path)
    assert_same(model, build(config))
    assert not model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 2.0, 4.0, 5.625, 8.0, 0.7])
def test_pe_interpolation_is_solved_from_the_table(scale: float, dtype: torch.dtype) -> None:
    for side in (4, 16, 64):
        table = position_embedding(144, (side, side), side, scale)
        # A sine that rounds the other way in every second number, as another library's may.
        table[:, ::2] = torch.nextafter(table[:, ::2], torch.zeros(()))
        assert solve_interpolation(table.to(dtype), side) == pytest.approx(scale, rel=1e-6)
    assert solve_interpolation(torch.randn(16, 72).to(dtype), 4) is None


def test_what_an_official_file_lacks_is_assumed_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pixart")
    state = official(positions=False)
    del state["y_embedder.y_embedding"]
    config = load_transformer(save_official(tmp_path / "m.pth", state)).config
    assert (config.input_size, config.pe_interpolation, config.model_max_length) == (128, 2.0, 300)
    for note in ("1024 px", "300 tokens", "1 heads of 72", "must come from the text encoder"):
        assert note in caplog.text
    state |= {"pos_embed": torch.randn(1, 16, 72), "y_embedder.y_embedding": torch.zeros(120, 24)}
    config = load_transformer(save_official(tmp_path / "m.pth", state)).config
    assert (config.input_size, config.pe_interpolation, config.model_max_length) == (8, 0.125, 120)
    assert "no table of sines and cosines" in caplog.text


def test_a_width_that_does_not_tell_its_heads_needs_a_configuration(tmp_path: Path) -> None:
    config = replace(SIGMA, hidden_size=96, num_heads=2)
    path = save_official(tmp_path / "m.pth", official(config))
    with pytest.raises(
        CheckpointError, match=r"m\.pth: does not tell its number of heads.*config="
    ):
        load_transformer(path)
    assert_same(load_transformer(path, config=config), build(config))


def test_the_averaged_weights_are_taken_only_when_asked_for(tmp_path: Path) -> None:
    average = {name: tensor + 1 for name, tensor in official().items()}
    both = {"state_dict": official(), "state_dict_ema": average}
    torch.save(both, tmp_path / "both.pth")
    torch.save({"state_dict_ema": average}, tmp_path / "ema.pth")
    save_official(tmp_path / "plain.pth", official())
    name = "t_block.1.weight"
    plain = load_transformer(tmp_path / "both.pth").state_dict()[name]
    assert torch.equal(plain, official()[name])
    taken = load_transformer(tmp_path / "both.pth", ema=True, config=SIGMA).state_dict()[name]
    assert torch.equal(taken, average[name])
    with pytest.raises(CheckpointError, match="only averaged weights.*ask for them with ema"):
        load_transformer(tmp_path / "ema.pth")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_transformer(tmp_path / "plain.pth", ema=True)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module."])
@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_safetensors_that_others_wrote_are_recognised(
    tmp_path: Path, prefix: str, naming: str
) -> None:
    state = official(CONV)
    if naming == "diffusers":
        state = {**names.to_diffusers(state), "pos_embed": state["pos_embed"]}
    save_file({prefix + k: v.contiguous() for k, v in state.items()}, tmp_path / "m.safetensors")
    model = load_transformer(tmp_path / "m.safetensors")
    assert model.config.kv_compression == CONV.kv_compression
    assert model.null_caption_stored == (naming == "official")
    for name, parameter in build(CONV).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


@pytest.mark.parametrize("format", FORMATS)
def test_a_null_caption_that_was_never_stored_is_not_made_up(tmp_path: Path, format: str) -> None:
    state = official()
    del state["y_embedder.y_embedding"]
    source = save_official(tmp_path / "source.pth", state)
    model = load_transformer(source)
    assert not model.null_caption_stored
    assert_same(load_transformer(source), model)  # random, but the same every time
    assert model.y_embedder.y_embedding.std() == pytest.approx(24**-0.5, rel=0.1)
    save_transformer(model, tmp_path / FORMATS[format])
    assert not load_transformer(tmp_path / FORMATS[format]).null_caption_stored
    model.null_caption_stored = True
    save_transformer(model, tmp_path / FORMATS[format])
    assert load_transformer(tmp_path / FORMATS[format]).null_caption_stored
    assert_same(load_transformer(tmp_path / FORMATS[format]), model)


def test_opening_maps_the_file_and_neither_initialises_nor_writes(tmp_path: Path) -> None:
    for name in ("m.pth", "m.safetensors"):
        save_transformer(build(), tmp_path / name)
        before, random = (tmp_path / name).read_bytes(), torch.get_rng_state()
        model = load_transformer(tmp_path / name)
        assert torch.equal(torch.get_rng_state(), random)
        with torch.no_grad():
            model.t_block[1].weight.add_(1)
        assert (tmp_path / name).read_bytes() == before


# Compression


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_a_dense_checkpoint_opens_compressed_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, norm: str
) -> None:
    caplog.set_level(logging.INFO, "pixart")
    path = save_official(tmp_path / "m.pth", official())
    assert load_transformer(path).config.kv_compression is None
    asked = KVCompression([0, 1, 2], 4, norm=norm)
    model = load_transformer(path, kv_compression=asked, dtype=torch.float64)
    assert model.config == replace(SIGMA, kv_compression=asked)
    attention = model.blocks[1].attn
    assert torch.equal(attention.sr.weight, torch.full((72, 1, 4, 4), 1 / 16).double())
    assert not attention.sr.bias.any()
    assert "blocks.{0-2}.attn.sr.weight = 0.0625, blocks.{0-2}.attn.sr.bias = 0" in caplog.text
    assert ("attn.norm.weight = 1, blocks.{0-2}.attn.norm.bias = 0" in caplog.text) == (
        norm == "layer"
    )
    if norm == "layer":
        assert torch.equal(attention.norm.weight, torch.ones(72).double())
        assert not attention.norm.bias.any()
    for name, tensor in build().double().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("format", FORMATS)
def test_a_compressed_checkpoint_opens_as_what_it_is_or_not_at_all(
    tmp_path: Path, format: str
) -> None:
    path = tmp_path / FORMATS[format]
    save_transformer(build(CONV), path)
    assert_same(load_transformer(path, kv_compression=CONV.kv_compression), build(CONV))
    with pytest.raises(CheckpointError, match=r"is compressed as 0,2:2:conv .*got 0,2:4:conv"):
        load_transformer(path, kv_compression=KVCompression([0, 2], 4))
    with pytest.raises(CheckpointError, match="unexpected"):
        load_transformer(path, config=SIGMA)


def test_a_norm_without_convolution_needs_the_sampling_to_be_named(tmp_path: Path) -> None:
    config = UNSEEN["uniform with norm"]
    path = save_official(tmp_path / "m.pth", official(config))
    with pytest.raises(
        CheckpointError, match=r"missing blocks\.1\.attn\.sr\.weight.*kv_compression="
    ):
        load_transformer(path)
    assert_same(load_transformer(path, kv_compression=config.kv_compression), build(config))


@pytest.mark.parametrize("name", ["sr.weight", "sr.bias", "norm.weight", "norm.bias"])
@pytest.mark.parametrize("carries_config", [False, True])
def test_an_incomplete_compression_is_an_error_that_names_the_tensor(
    tmp_path: Path, name: str, carries_config: bool
) -> None:
    state = official(CONV)
    del state[f"blocks.2.attn.{name}"]
    extra = {"pixart": CONV.to_dict()} if carries_config else {}
    torch.save({"state_dict": state, **extra}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=rf"m\.pth: missing blocks\.2\.attn\.{name}$"):
        load_transformer(tmp_path / "m.pth")


# Missing, unexpected, misshapen


@pytest.mark.parametrize(
    "name", sorted(n for n in official(CONFIGS["alpha with sizes"]) if ".1." not in n)
)
def test_every_missing_tensor_but_the_two_buffers_is_named(tmp_path: Path, name: str) -> None:
    state = official(CONFIGS["alpha with sizes"])
    del state[name]
    path = save_official(tmp_path / "m.pth", state)
    if name in ("pos_embed", "y_embedder.y_embedding"):
        load_transformer(path)
        return
    with pytest.raises(CheckpointError, match=rf"m\.pth: missing {name}$"):
        load_transformer(path)


def test_errors_about_diffusers_tensors_use_their_names(tmp_path: Path) -> None:
    save_transformer(build(), tmp_path / "m")
    weights = tmp_path / "m" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["transformer_blocks.1.attn1.to_k.weight"], tensors["proj_out.bias"]
    tensors["transformer_blocks.0.attn1.sr.bias"] = torch.zeros(72)
    tensors["adaln_single.linear.bias"] = torch.zeros(3)
    tensors["lora"] = torch.zeros(3)
    edit_json(tmp_path / "m" / "config.json", kv_compression=None)
    save_file(tensors, weights)
    with pytest.raises(CheckpointError) as caught:
        load_transformer(tmp_path / "m", config=SIGMA)
    message = str(caught.value)
    assert "missing transformer_blocks.1.attn1.to_k.weight, proj_out.bias;" in message
    assert "unexpected lora, transformer_blocks.0.attn1.sr.bias;" in message
    assert message.endswith("adaln_single.linear.bias must be (432,), got (3,)")


def test_every_tensor_that_does_not_fit_is_named_however_many_there_are(tmp_path: Path) -> None:
    state = official() | {f"extra.{i}": torch.zeros(1) for i in range(50)}
    with pytest.raises(CheckpointError, match=r"unexpected extra\.0, .*extra\.10, .*extra\.49$"):
        load_transformer(save_official(tmp_path / "m.pth", state))


# Hub ids


def test_local_paths_win_over_hub_ids_and_typing_errors_stay_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("PixArt-alpha/model").mkdir(parents=True)
    assert resolve("PixArt-alpha/model") == Path("PixArt-alpha/model")
    for name in ("nowhere", "PixArt-alpha/other", "out/model.pth", "/a/b", "../x"):
        with pytest.raises(CheckpointError, match=f"^{name}: no such file or directory$"):
            resolve(name)


def test_a_hub_id_is_downloaded_or_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path)
    )
    assert resolve("org/model", allow_patterns=("transformer/*",)) == tmp_path
    assert asked == [(("org/model",), {"allow_patterns": ["transformer/*"]})]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a: "/cache/" + "/".join(a))
    assert resolve("org/model/x.pth") == Path("/cache/org/model/x.pth")

    def offline(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("Cannot find the snapshot.\nAsk for help.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError) as caught:
        resolve("org/model")
    assert str(caught.value) == (
        "org/model: is no local path, and the hub did not give it (Cannot find the snapshot.); "
        "check the name and the network, or download it and give its path"
    )
