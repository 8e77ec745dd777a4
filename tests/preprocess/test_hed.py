"""HED: its formula against a direct evaluation in NumPy, and files of weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_preprocessors import hed_tensors

from pixart.files import CheckpointError
from pixart.preprocess import open_preprocessor, preprocess
from pixart.preprocess.hed import HED, open_hed
from pixart.weights import NotFiniteError


def picture(height: int = 21, width: int = 34) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(C, h, w) with zeros around, by the definition of a 3x3 product."""
    _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    total = np.zeros((len(weight), height, width))
    for row in range(3):
        for column in range(3):
            part = padded[:, row : row + height, column : column + width]
            total += np.tensordot(weight[:, :, row, column], part, 1)
    return total + bias[:, None, None]


def stretched(line: np.ndarray, size: int) -> np.ndarray:
    """The last axis at another size: between the middles of pixels linearly, beyond the last ones level."""
    places = (np.arange(size) + 0.5) * line.shape[-1] / size - 0.5
    places = places.clip(0, line.shape[-1] - 1)
    below = np.floor(places).astype(int)
    above = np.minimum(below + 1, line.shape[-1] - 1)
    share = places - below
    return line[..., below] * (1 - share) + line[..., above] * share


def directly(tensors: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """The edges (H, W) of pixels (H, W, 3) in fp64."""
    x = pixels.astype(np.float64).transpose(2, 0, 1) - tensors["norm"][0]
    height, width = pixels.shape[:2]
    blocks = sorted({name.split(".")[0] for name in tensors if name != "norm"})
    total = np.zeros((height, width))
    for number, block in enumerate(blocks):
        if number:
            rows, columns = x.shape[1] // 2, x.shape[2] // 2
            x = x[:, : rows * 2, : columns * 2].reshape(-1, rows, 2, columns, 2).max((2, 4))
        place = 0
        while f"{block}.convs.{place}.weight" in tensors:
            names = (f"{block}.convs.{place}.{kind}" for kind in ("weight", "bias"))
            x = np.maximum(convolved(x, *(tensors[name] for name in names)), 0)
            place += 1
        side = np.tensordot(tensors[f"{block}.projection.weight"][0, :, 0, 0], x, 1)
        side += tensors[f"{block}.projection.bias"]
        total += stretched(stretched(side, width).T, height).T
    return 1 / (1 + np.exp(-total / len(blocks)))


def test_the_network_is_the_formula() -> None:
    """To rounding: in fp64 both, on a small one of three stages, with sides that 2 does not divide."""
    torch.manual_seed(0)
    network = HED(((4, 2), (6, 2), (8, 3))).double()
    network.norm.data.uniform_(100, 130)
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    pixels = np.asarray(picture())
    with torch.no_grad():
        edges = network(torch.tensor(pixels).permute(2, 0, 1)[None].double())[0, 0].numpy()
    expected = directly(tensors, pixels)
    assert expected.std() > 0.01
    assert np.abs(edges - expected).max() < 1e-12


def test_a_file_in_the_published_layout_is_opened_and_drawn(tmp_path: Path) -> None:
    tensors = hed_tensors()
    assert sum(t.numel() for t in tensors.values()) == 14_716_168  # VGG-16's, 5 sides, 3 colours
    path = tmp_path / "ControlNetHED.pth"
    torch.save(tensors, path)
    image = picture()
    drawn = np.asarray(preprocess("hed", image, weights={"hed": path}))
    assert drawn.shape == (21, 34, 3) and (drawn == drawn[..., :1]).all()
    assert drawn.std() > 1
    doubled = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    expected = directly(doubled, np.asarray(image)) * 255
    assert np.abs(drawn[..., 0] - expected).max() < 0.51  # of rounding to 8 bits
    save_file(tensors, tmp_path / "hed.safetensors")
    again = open_preprocessor("hed", {"hed": tmp_path / "hed.safetensors"})
    assert (np.asarray(again(image)) == drawn).all() and again.identity.startswith("hed ")


def test_other_files_are_refused(tmp_path: Path) -> None:
    tensors = hed_tensors()
    path = tmp_path / "hed.safetensors"
    save_file({**tensors, "norm": torch.full((1, 3, 1, 1), torch.nan)}, path)
    with pytest.raises(NotFiniteError, match="NaN or infinity in norm"):
        open_hed(path)
    save_file({**tensors, "norm": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"norm \(3,\) in the place of \(1, 3, 1, 1\)"):
        open_hed(path)
    del tensors["block5.projection.bias"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"misses block5.projection.bias"):
        open_hed(path)
    path.write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="is a web page"):
        open_hed(path)


def test_a_picture_smaller_than_the_last_stage_sees_is_refused(tmp_path: Path) -> None:
    save_file(hed_tensors(), tmp_path / "hed.safetensors")
    places = {"hed": tmp_path / "hed.safetensors"}
    assert preprocess("hed", picture(16, 16), weights=places).size == (16, 16)
    with pytest.raises(ValueError, match="16 pixels a side for preprocessor hed, got 34x15"):
        preprocess("hed", picture(15), weights=places)
