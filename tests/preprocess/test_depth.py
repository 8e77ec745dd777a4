"""Depth maps: the network's numbers from 0 to 255, near bright, of tiny random networks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_preprocessors import build_depth

from pixart.files import CheckpointError
from pixart.preprocess import open_preprocessor
from pixart.preprocess.depth import draw_depth, open_depth


@pytest.fixture(scope="module", params=["relative", "metric"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_depth(tmp_path_factory.mktemp("depth"), request.param)


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_depth_is_the_networks_from_far_to_near(folder: Path) -> None:
    image = picture()
    estimate = open_depth(folder)
    depth = estimate(image)["predicted_depth"].double()
    if "metric" in (folder / "config.json").read_text():
        depth = -depth
    spread = depth.max() - depth.min()
    expected = ((depth - depth.min()) / spread * 255).numpy()
    drawn = open_preprocessor("depth", {"depth": folder})(image)
    pixels = np.asarray(drawn)
    assert drawn.mode == "RGB" and drawn.size == image.size
    assert (pixels == pixels[..., :1]).all() and pixels.min() == 0 and pixels.max() == 255
    assert np.abs(pixels[..., 0] - expected).max() < 0.51  # of rounding to 8 bits


class Estimate:
    """Gives one map; in the form of older transformers, at the network's size."""

    def __init__(self, depth: torch.Tensor) -> None:
        self.depth = depth
        self.model = type("Model", (), {"name_or_path": "some/model", "config": self})
        self.model_type = "dpt"

    def __call__(self, image: Any) -> dict[str, torch.Tensor]:
        return {"predicted_depth": self.depth}


def test_a_map_of_another_size_is_scaled_and_a_flat_one_is_black() -> None:
    ramp = torch.linspace(1, 2, 40).expand(1, 30, 40)
    pixels = np.asarray(draw_depth(Estimate(ramp), picture()))[..., 0]
    assert pixels.shape == (60, 80)
    assert pixels[:, 0].max() == 0 and pixels[:, -1].min() == 255
    assert not np.asarray(draw_depth(Estimate(torch.ones(1, 60, 80)), picture())).any()
    with pytest.raises(CheckpointError, match="some/model: gives a depth that is not finite"):
        draw_depth(Estimate(torch.full((1, 60, 80), torch.nan)), picture())


def test_a_network_that_lacks_weights_or_is_not_there_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors.pop("head.conv1.weight")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing head.conv1.weight"):
        open_preprocessor("depth", {"depth": damaged})
    with pytest.raises(CheckpointError, match=r"no such file.*preprocessor-weights depth=PATH"):
        open_preprocessor("depth", {"depth": tmp_path / "absent"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as refused:
        open_preprocessor("depth")
    assert "Depth-Anything-V2-Small-hf: is no local path" in str(refused.value)
    assert "download it and give its path (--preprocessor-weights depth=PATH)" in str(refused.value)
