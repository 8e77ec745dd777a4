"""Numbers that the official implementation computed. See tests/golden/README.md."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pixart.config import PixArtConfig
from pixart.diffusion import add_noise, training_loss
from pixart.model import projection
from pixart.model.transformer import PixArt
from pixart.resolution import position_embedding

# Of the norm of what is compared, in fp32.
OUTPUT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
SKETCH_SIZE = 64  # entries that a reduced file keeps of a gradient, evenly spread


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return tensors, stored.metadata()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    return error.item()


def build(tensors: dict[str, Tensor], metadata: dict[str, str]) -> PixArt:
    model = PixArt(PixArtConfig.from_official(**json.loads(metadata["config"])))
    prefix = "state."
    state = {name[len(prefix) :]: t.float() for name, t in tensors.items() if name[:6] == prefix}
    model.load_official(state)
    return model.eval()


def conditions(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "image_size": tensors.get("in.img_hw"),
        "aspect_ratio": tensors.get("in.aspect_ratio"),
    }


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled queries"])
def test_outputs_equal_the_official_ones(
    golden_file: Path, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scaled:  # as on a GPU whose attention takes them
        monkeypatch.setattr(projection, "takes_scaled_queries", lambda x, head_dim: True)
    tensors, metadata = read(golden_file)
    model = build(tensors, metadata)
    inputs = tensors["in.latent"], tensors["in.timestep"], tensors["in.caption"]
    with torch.no_grad():
        masked = model(*inputs, tensors["in.caption_mask"], **conditions(tensors))
        unmasked = model(*inputs, None, **conditions(tensors))
    assert relative_error(masked, tensors["out.model"]) < OUTPUT_TOLERANCE
    assert relative_error(unmasked, tensors["out.model_no_mask"]) < OUTPUT_TOLERANCE


def test_gradients_equal_the_official_ones(golden_file: Path) -> None:
    tensors, metadata = read(golden_file)
    model = build(tensors, metadata)
    inputs = tensors["in.latent"], tensors["in.timestep"], tensors["in.caption"]
    output = model(*inputs, tensors["in.caption_mask"], **conditions(tensors))
    (output * tensors["in.grad_out_weight"]).mean().backward()
    wrong = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        error = gradient_error(parameter.grad, name, tensors)
        if not error < GRADIENT_TOLERANCE:
            wrong[name] = error
    assert not wrong


def gradient_error(gradient: Tensor, name: str, tensors: dict[str, Tensor]) -> float:
    if f"grad.{name}" in tensors:
        return relative_error(gradient, tensors[f"grad.{name}"])
    norm, expected = tensors[f"sketch.{name}"][0], tensors[f"sketch.{name}"][1:]
    entries = gradient.double().flatten()
    sample = entries[:: -(-entries.numel() // SKETCH_SIZE)]
    # Against the sample's share of the norm, so that a sample of small entries is not held to more.
    share = norm * (sample.numel() / entries.numel()) ** 0.5
    error = (sample - expected).norm() / torch.maximum(share, expected.norm())
    return max(error.item(), (entries.norm() / norm - 1).abs().item())


def test_the_training_loss_equals_the_official_one(golden_file: Path) -> None:
    tensors, metadata = read(golden_file)
    model = build(tensors, metadata)
    x0, noise, timesteps = (tensors[f"train.{name}"] for name in ("x0", "noise", "timestep"))

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        inputs = tensors["in.caption"], tensors["in.caption_mask"]
        return model(x_t, t, *inputs, **conditions(tensors))

    with torch.no_grad():
        terms = training_loss(denoise, x0, timesteps, noise)
    x_t = add_noise(x0, noise, timesteps)
    assert relative_error(x_t, tensors["train.x_t"]) < OUTPUT_TOLERANCE
    for name, values in terms._asdict().items():
        assert relative_error(values, tensors[f"train.{name}"]) < OUTPUT_TOLERANCE, name


@pytest.mark.parametrize("case", ["pe_256", "pe_512", "pe_1024", "pe_2048_ar"])
def test_position_tables_equal_the_official_ones(golden_folder: Path, case: str) -> None:
    tensors, _ = read(golden_folder / "pos_embed.safetensors")
    dim, rows, cols, pe_interpolation, base_size, stride = tensors[f"{case}.meta"].tolist()
    table = position_embedding(int(dim), (int(rows), int(cols)), int(base_size), pe_interpolation)
    assert relative_error(table[:: int(stride)], tensors[case]) < OUTPUT_TOLERANCE
