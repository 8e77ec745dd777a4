"""Files of a VAE whose numbers would hang, fill the memory or draw black pictures."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import published
import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart.files import CheckpointError
from pixart.vae.autoencoder import VAE
from pixart.weights import NotFiniteError

WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sigma")
    return published.build_sigma(path, with_transformer=False, vae_channels=(8, 16))


def changed(pipeline: Path, path: Path, **changes: object) -> Path:
    shutil.copytree(pipeline / "vae", path / "vae")
    file = path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


NUMBERS = {
    "scaling_factor": (0, -0.13, 1e-320, math.nan, math.inf, 10**400, True, "1", None),
    "shift_factor": (math.nan, -math.inf, 10**400, True, "0"),
    "latent_channels": (10**9, 0, 10**70, "4"),
    "layers_per_block": (10**9, -1, 2.5),
    "norm_num_groups": (-1, 0, math.nan),
    "block_out_channels": ([10**9, 8], [8] * 99, [], 8, ["8"], [4096, 8192]),
    "down_block_types": (None, "DownEncoderBlock2D", [], ["DownEncoderBlock2D"] * 9),
    "up_block_types": (None, 3, []),
    "act_fn": (None, 1, ["silu"]),
}
CASES = [(name, value) for name, values in NUMBERS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda v: str(v)[:24])
def test_a_number_that_cannot_be_is_named(
    pipeline: Path, tmp_path: Path, name: str, value: object
) -> None:
    path = changed(pipeline, tmp_path, **{name: value})
    began = time.process_time()
    with pytest.raises(CheckpointError, match=name) as caught:
        VAE.from_pretrained(path)
    assert time.process_time() - began < 2
    message = str(caught.value)
    assert message.startswith(str(path / "vae")) and message.isprintable() and "got" in message


def test_a_shift_is_taken_and_its_absence_is_none(pipeline: Path, tmp_path: Path) -> None:
    assert (
        VAE.from_pretrained(changed(pipeline, tmp_path / "a", shift_factor=-1)).shift_factor == -1
    )
    assert (
        VAE.from_pretrained(changed(pipeline, tmp_path / "b", shift_factor=None)).shift_factor == 0
    )


def test_weights_that_are_not_finite_are_named(pipeline: Path, tmp_path: Path) -> None:
    path = changed(pipeline, tmp_path)
    tensors = load_file(path / WEIGHTS)
    tensors["decoder.conv_in.bias"][0] = math.inf
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(NotFiniteError, match="vae: must be finite, .* decoder.conv_in.bias;"):
            VAE.from_pretrained(path, dtype=dtype)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:999])


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [_cut, _pipe])
def test_a_damaged_file_is_named_at_once(
    pipeline: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    path = changed(pipeline, tmp_path)
    damage(path / WEIGHTS)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        VAE.from_pretrained(path)
