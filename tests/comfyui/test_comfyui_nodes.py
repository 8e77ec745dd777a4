"""The node pack against stubs of ComfyUI: what it loads computes what our own model computes."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfyui_stub
import pytest
import torch
from documents import ROOT
from tiny_checkpoints import FORMATS, SIGMA, build
from torch import Tensor

from pixart.checkpoint.save import save_transformer
from pixart.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from pixart.comfyui.nodes import PixArtKVLoader, PixArtPatchAttention
from pixart.config import KVCompression, PixArtConfig
from pixart.files import CheckpointError
from pixart.model.transformer import PixArt

ALPHA = replace(SIGMA, micro_condition=True, model_max_length=120)
COMPRESSED = replace(SIGMA, kv_compression=KVCompression([0, 2], 2))
MODELS = {
    "dense": SIGMA,
    "alpha": ALPHA,
    "qk_norm": replace(SIGMA, qk_norm=True),
    "no variance": replace(SIGMA, pred_sigma=False),
    **{
        f"{sampling} {norm}": replace(
            SIGMA, kv_compression=KVCompression([0, 2], ratio, sampling, norm)
        )
        for sampling, norm, ratio in (
            ("conv", "layer", 3), ("conv", "none", 2), ("average", "none", 3),
            ("average", "layer", 2), ("uniform", "none", 3), ("uniform_every", "none", 2),
        )
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's models/diffusion_models."""
    comfyui_stub.install(monkeypatch, tmp_path)
    return tmp_path


def inputs(config: PixArtConfig, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, config.in_channels, height, width, generator=generator)
    caption = torch.randn(2, 5, config.caption_channels, generator=generator)
    return latents, torch.tensor([981.0, 3.0]), caption


def expected(model: PixArt, latents: Tensor, timesteps: Tensor, caption: Tensor) -> Tensor:
    sizes: Any = {}
    height, width = latents.shape[2:]
    if model.config.micro_condition:
        sizes["image_size"] = torch.tensor([[height * 8.0, width * 8.0]])
        sizes["aspect_ratio"] = torch.tensor([[height / width]])
    with torch.inference_mode():
        return model(latents, timesteps, caption, **sizes)[:, : model.config.in_channels]


def drawn(patcher: Any, latents: Tensor, timesteps: Tensor, caption: Tensor) -> Tensor:
    with torch.inference_mode():
        return patcher.model.diffusion_model(latents, timesteps, context=caption)


def load(folder: Path, model: PixArt, name: str = "m.safetensors", kv_compress: str = "") -> Any:
    save_transformer(model, folder / name)
    (patcher,) = PixArtKVLoader().load(name, kv_compress)
    return patcher


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_loaded_model_computes_what_ours_does(folder: Path, config: PixArtConfig) -> None:
    """At the native size, at another shape, and where the ratio does not divide the token grid."""
    model = build(config)
    patcher = load(folder, model)
    for size in ((8, 8), (12, 20), (10, 14)):
        given = inputs(config, *size)
        torch.testing.assert_close(
            drawn(patcher, *given), expected(model, *given), rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("format", [*FORMATS, "comfyui"])
def test_files_of_every_format_load(folder: Path, format: str) -> None:
    model = build(COMPRESSED)
    name = FORMATS.get(format, "c.safetensors")
    save_transformer(model, folder / name, format=format)
    (patcher,) = PixArtKVLoader().load(name)
    given = inputs(COMPRESSED, 8, 12)
    torch.testing.assert_close(drawn(patcher, *given), expected(model, *given), rtol=0, atol=2e-5)


def test_a_dense_model_opens_compressed(folder: Path) -> None:
    model = build(SIGMA)
    patcher = load(folder, model, kv_compress=" 0,2:2:average ")
    compressed = build(replace(SIGMA, kv_compression=KVCompression([0, 2], 2, "average")))
    compressed.load_state_dict(model.state_dict())
    given = inputs(SIGMA, 8, 12)
    torch.testing.assert_close(
        drawn(patcher, *given), expected(compressed, *given), rtol=0, atol=2e-5
    )


def test_weights_in_another_precision_are_cast_by_comfyui(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merging too goes through ComfyUI's layers, which cast: fp16 weights, fp32 tokens."""
    monkeypatch.setattr(comfyui_stub.chosen, "dtype", torch.float16)
    patcher = load(folder, build(COMPRESSED))
    attention = patcher.model.diffusion_model.blocks[0].attn
    assert attention.sr.weight.dtype == torch.float16
    given = inputs(COMPRESSED, 8, 8)
    rounded = build(COMPRESSED)
    for name, parameter in rounded.named_parameters():
        if "table" not in name:  # no layer of ComfyUI: it stays as it is in the file
            parameter.data = parameter.data.half().float()
    torch.testing.assert_close(drawn(patcher, *given), expected(rounded, *given), rtol=0, atol=2e-5)


def test_the_vae_follows_the_length_of_the_captions(folder: Path) -> None:
    """α is drawn with SD's VAE and Σ with SDXL's; ComfyUI alone takes α-512 for Σ."""
    without_sizes = replace(SIGMA, model_max_length=120)
    for config, latents in ((SIGMA, "SDXL"), (ALPHA, "SD15"), (without_sizes, "SD15")):
        assert load(folder, build(config)).model.latent_format == latents


def test_the_kernel_replaces_attention_and_can_be_taken_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixart.comfyui import attention

    calls: list[tuple[int, ...]] = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((q.shape[1], k.shape[1]))
        return kernel(q, k, v)

    kernel = attention.flash_attention
    monkeypatch.setattr(attention, "flash_attention", counted)
    monkeypatch.setattr(attention, "_obstacle", lambda device: None)
    model = build(COMPRESSED)
    loaded = load(folder, model)
    (patched,) = PixArtPatchAttention().patch(loaded)
    assert patched is not loaded and not loaded.object_patches
    given = inputs(COMPRESSED, 8, 12)
    patched.patch_model()
    torch.testing.assert_close(drawn(patched, *given), expected(model, *given), rtol=0, atol=2e-5)
    assert calls == [(24, 6), (24, 5), (24, 24), (24, 5), (24, 6), (24, 5)]
    patched.unpatch_model()
    drawn(loaded, *given)
    assert len(calls) == 6


def test_without_a_gpu_nothing_is_patched_and_a_warning_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pixart.comfyui import attention

    monkeypatch.setattr(attention, "INTERPRETED", False)
    loaded = load(folder, build(SIGMA))
    with caplog.at_level(logging.WARNING, "pixart"):
        assert PixArtPatchAttention().patch(loaded) == (loaded,)
    assert "changes nothing: the kernel needs a GPU" in caplog.text


def test_bad_input_is_one_line(folder: Path) -> None:
    (folder / "notes.safetensors").write_text("no weights")
    plain = replace(SIGMA, caption_embedding=False, caption_channels=72)
    save_transformer(build(plain), folder / "plain.safetensors")
    for name, reason in (
        ("notes.safetensors", "notes.safetensors: "),
        ("plain.safetensors", "plain.safetensors: caption_embedding must be true for ComfyUI"),
    ):
        with pytest.raises(CheckpointError) as error:
            PixArtKVLoader().load(name)
        assert reason in str(error.value) and "\n" not in str(error.value)
    patcher = load(folder, build(SIGMA))
    with pytest.raises(ValueError, match="multiples of 16 px, got 72x64"):
        drawn(patcher, *inputs(SIGMA, 8, 9))
    patcher.model.diffusion_model = torch.nn.Identity()
    with pytest.raises(ValueError, match="model must be a PixArt, got Identity"):
        PixArtPatchAttention().patch(patcher)
    assert PixArtKVLoader.VALIDATE_INPUTS("14-27:2") is True
    assert "must be LAYERS:RATIO" in str(PixArtKVLoader.VALIDATE_INPUTS("x"))


def test_a_compressed_model_of_another_loader_is_not_patched(folder: Path) -> None:
    patcher = load(folder, build(SIGMA))
    patcher.model.diffusion_model.blocks[1].attn.sr_ratio = 2
    with pytest.raises(ValueError, match="must come from PixArtKVLoader, .* in block 1"):
        PixArtPatchAttention().patch(patcher)


def test_the_nodes_are_as_comfyui_wants_them(folder: Path) -> None:
    (folder / "a.safetensors").touch()
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in NODE_CLASS_MAPPINGS.values():
        assert callable(getattr(node(), node.FUNCTION)) and node.RETURN_TYPES == ("MODEL",)
    assert PixArtKVLoader.INPUT_TYPES()["required"]["checkpoint"] == (["a.safetensors"],)


def test_the_example_workflow_holds_together(folder: Path) -> None:
    """Links lead to nodes that are there; our nodes are given what they ask for, by its name."""
    workflow = json.loads((ROOT / "pixart/comfyui/workflow_api.json").read_text())
    ours = {n["class_type"] for n in workflow.values()} & NODE_CLASS_MAPPINGS.keys()
    assert ours == NODE_CLASS_MAPPINGS.keys()
    for node in workflow.values():
        links = [v for v in node["inputs"].values() if isinstance(v, list)]
        assert all(source in workflow and isinstance(output, int) for source, output in links)
        if node["class_type"] in ours:
            asked = NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
            known = asked["required"].keys() | asked.get("optional", {}).keys()
            assert asked["required"].keys() <= node["inputs"].keys() <= known
