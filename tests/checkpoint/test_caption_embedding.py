"""A transformer that attends to text features as they are: its weights, its files, what refuses it."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_checkpoints import SIGMA, assert_same, build, edit_json, official, save_official

from pixart.checkpoint.config import Surroundings, config_to_diffusers
from pixart.checkpoint.control import open_control
from pixart.checkpoint.load import load_transformer, open_transformer
from pixart.checkpoint.save import save_transformer
from pixart.checkpoint.save_control import save_control
from pixart.config import PixArtConfig
from pixart.convert import main as convert
from pixart.cost import caption_flops
from pixart.files import CheckpointError
from pixart.lora import add_lora, merge_lora
from pixart.model import PixArt

BARE = replace(SIGMA, caption_channels=72, caption_embedding=False)
WIDE = replace(SIGMA, caption_channels=72)


def run(model: PixArt, caption: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(len(caption), 4, 8, 8, generator=generator)
    mask = torch.arange(caption.shape[1]) < torch.tensor([[7], [3]])
    with torch.no_grad():
        return model(latents, torch.tensor([13.5, 900.0]), caption, mask)


def features(width: int = 72) -> torch.Tensor:
    return torch.randn(2, 7, width, generator=torch.Generator().manual_seed(4))


def test_the_blocks_attend_to_what_the_embedding_would_have_made() -> None:
    embedded, bare = build(WIDE), build(BARE)
    state = {
        n: t for n, t in embedded.state_dict().items() if not n.startswith("y_embedder.y_proj")
    }
    bare.load_state_dict(state)
    with torch.no_grad():
        projected = embedded.y_embedder.y_proj(features())
    assert torch.equal(run(bare, projected), run(embedded, features()))
    assert not torch.equal(run(bare, features()), run(embedded, features()))


def test_it_has_no_weights_of_a_caption_embedding_and_keeps_its_null_caption() -> None:
    names = set(build(WIDE).state_dict()) - set(build(BARE).state_dict())
    layers = (f"y_embedder.y_proj.{layer}" for layer in ("fc1", "fc2"))
    assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert build(BARE).state_dict()["y_embedder.y_embedding"].shape == (7, 72)
    assert caption_flops(WIDE, 5) - caption_flops(BARE, 5) == 2 * 5 * 72 * (72 + 72)


def test_a_dropped_caption_becomes_the_null_caption_as_it_is() -> None:
    model = PixArt(replace(BARE, class_dropout_prob=1.0)).train()
    null = model.y_embedder.y_embedding
    tokens, lengths = model.y_embedder(features(), None)
    assert torch.equal(tokens, null.expand(2, -1, -1)) and lengths is None


def test_an_encoded_caption_is_the_caption() -> None:
    model, mask = build(BARE), torch.arange(7) < torch.tensor([[7], [3]])
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        encoded = model.encode_caption(features(), mask)
        once = model(latents, torch.tensor([5.0]), encoded)
        assert torch.allclose(
            once, model(latents, torch.tensor([5.0]), features(), mask), atol=1e-6
        )


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"caption_channels": 24}, "caption_channels must be hidden_size 72 without caption_emb"),
        ({"caption_embedding": None}, "caption_embedding must be true or false, got None"),
    ],
)
def test_another_width_of_features_is_refused(changes: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        replace(BARE, **changes)


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
@pytest.mark.parametrize("stored", [True, False])
def test_files_that_can_hold_it_open_as_they_were(tmp_path: Path, name: str, stored: bool) -> None:
    model = build(BARE)
    model.null_caption_stored = stored  # type: ignore[assignment]
    save_transformer(model, tmp_path / name)
    opened = load_transformer(tmp_path / name)
    if stored:
        assert_same(opened, model)
    assert opened.config == BARE and opened.null_caption_stored == stored
    assert opened.y_embedder.y_embedding.shape == (7, 72)


def test_files_of_before_mean_a_caption_embedding() -> None:
    values = SIGMA.to_dict()
    del values["caption_embedding"]
    assert PixArtConfig.from_dict(values) == SIGMA


def test_the_official_format_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "m.safetensors", tmp_path / "m.pth"
    save_transformer(build(BARE), source)
    assert convert([str(source), str(target)]) == 2
    reason = "caption_embedding must be true for the official model, which always embeds captions"
    assert reason in capsys.readouterr().err and not target.exists()
    control = build(BARE).new_control(1)
    with pytest.raises(ValueError, match=reason):
        save_control(control, target, base=build(BARE))
    with pytest.raises(ValueError, match=reason):
        save_control(control, target, config=BARE)
    assert not target.exists()


def test_diffusers_runs_it_without_its_caption_projection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = build(BARE)
    assert convert_to_diffusers(ours, tmp_path) == 0
    logging.getLogger("diffusers").addHandler(caplog.handler)
    theirs, report = PixArtTransformer2DModel.from_pretrained(
        tmp_path / "d", output_loading_info=True, low_cpu_mem_usage=False
    )
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert theirs.caption_projection is None and not any(report.values()), report
    assert "not expected" not in caplog.text and "not used" not in caplog.text
    caption, latents = features(), torch.randn(2, 4, 8, 8)
    mask = (torch.arange(7) < torch.tensor([[7], [3]])).long()
    with torch.no_grad():
        other = theirs(
            latents,
            encoder_hidden_states=caption,
            timestep=torch.tensor([13.5, 900.0]),
            encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        mine = ours(latents, torch.tensor([13.5, 900.0]), caption, mask)
    assert 0.1 < other.abs().max() < 10 and float((mine - other).abs().max()) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    opened = load_transformer(tmp_path / "theirs")
    assert not opened.config.caption_embedding and opened.config.caption_channels == 72


def convert_to_diffusers(model: PixArt, folder: Path) -> int:
    save_transformer(model, folder / "m.safetensors")
    return convert([str(folder / "m.safetensors"), str(folder / "d"), "--to", "diffusers"])


def test_a_width_that_is_left_out_of_config_json_is_no_choice(tmp_path: Path) -> None:
    assert config_to_diffusers(BARE)["caption_channels"] is None
    save_transformer(build(BARE), tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", caption_channels=...)
    with pytest.raises(CheckpointError, match="config.json has no caption_channels"):
        load_transformer(tmp_path / "m")


def test_a_state_dict_tells_it_by_its_null_caption(tmp_path: Path) -> None:
    path = save_official(tmp_path / "m.pth", official(BARE))
    config = load_transformer(path).config
    assert config == BARE


def test_lost_weights_of_a_caption_embedding_are_missed(tmp_path: Path) -> None:
    state = {n: t for n, t in official(SIGMA).items() if "y_proj" not in n}  # null caption of 24
    path = save_official(tmp_path / "m.pth", state)
    with pytest.raises(CheckpointError, match="missing y_embedder.y_proj.fc1.weight"):
        load_transformer(path)
    state = {n: t for n, t in official(BARE).items() if "y_embedding" not in n}
    path = save_official(tmp_path / "n.pth", state)
    with pytest.raises(CheckpointError, match="missing y_embedder.y_proj.fc1.weight"):
        load_transformer(path)
    around = Surroundings(model_max_length=7, config=BARE)
    assert open_transformer(path, around=around).config == BARE


def test_one_of_its_weights_is_unexpected(tmp_path: Path) -> None:
    save_transformer(build(BARE), tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    tensors["y_embedder.y_proj.fc1.bias"] = torch.zeros(72)
    metadata = {"format": "pixart", "config": json.dumps(BARE.to_dict())}
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    with pytest.raises(CheckpointError, match="unexpected y_embedder.y_proj.fc1.bias"):
        load_transformer(tmp_path / "m.safetensors")


def test_adapters_go_on_its_blocks_and_find_no_caption_embedding() -> None:
    model = build(BARE)
    before = run(model, features())
    assert torch.allclose(run(merge_lora(add_lora(model, 2)), features()), before, atol=1e-5)
    with pytest.raises(ValueError, match=r"y_proj\.fc1"):
        add_lora(build(BARE), 2, targets=["y_proj.fc1"])


def test_a_control_is_of_a_base_that_embeds_captions_or_not(tmp_path: Path) -> None:
    save_control(build(WIDE).new_control(1), tmp_path / "c.safetensors", config=WIDE)
    for name, config in (("wide", WIDE), ("bare", BARE)):
        save_transformer(build(config), tmp_path / f"{name}.safetensors")
    open_control(tmp_path / "c.safetensors", open_transformer(tmp_path / "wide.safetensors"))
    with pytest.raises(CheckpointError, match="caption_embedding True, and .* False: they do not"):
        open_control(tmp_path / "c.safetensors", open_transformer(tmp_path / "bare.safetensors"))
