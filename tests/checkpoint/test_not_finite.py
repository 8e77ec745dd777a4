"""Weights that are not finite are refused by name, wherever they come from."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published import build_sigma
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FORMATS, assert_same, build, official, save_official
from torch import Tensor

from pixart import generate
from pixart.checkpoint.load import load_transformer, open_transformer
from pixart.checkpoint.save import save_transformer
from pixart.command import FAILURE, exit_code
from pixart.files import CheckpointError
from pixart.weights import NotFiniteError, check_finite

FLOATS = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_number_that_is_not_finite_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    sound = torch.tensor([[largest, -largest, 0.0] * 5] * 3, dtype=torch.float64).to(dtype)
    check_finite({"a": sound, "none": sound[:0], "ids": torch.arange(3)}, "x")
    for value in (math.nan, math.inf, -math.inf):
        if dtype == torch.float8_e4m3fn and math.isinf(value):  # has no infinity: becomes NaN
            continue
        broken = sound.float().clone()
        broken[1, 7] = value
        broken = broken.t().to(dtype)
        with pytest.raises(CheckpointError, match=r"^x: must be finite, .* in b, c;") as caught:
            check_finite({"a": sound, "b": broken, "c": broken[:, 1]}, "x")
        assert exit_code(caught.value) == FAILURE


def test_only_the_first_few_are_named() -> None:
    broken = torch.tensor(math.nan)
    with pytest.raises(CheckpointError, match=r"in t0, t1, .*, t9 and 20 more;"):
        check_finite({f"t{i}": broken for i in range(30)}, "x")


FILES = {
    "official": lambda state, folder: save_official(folder / "m.pth", state),
    "legacy": lambda state, folder: (
        torch.save(state, folder / "m.pt", _use_new_zipfile_serialization=False),
        folder / "m.pt",
    )[1],
    "safetensors": lambda state, folder: (
        save_file(state, folder / "m.safetensors"),
        folder / "m.safetensors",
    )[1],
    "fp8": lambda state, folder: save_official(
        folder / "m.pth", {name: tensor.to(torch.float8_e5m2) for name, tensor in state.items()}
    ),
}


@pytest.mark.parametrize("save", FILES.values(), ids=FILES)
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_checkpoint_with_numbers_that_are_not_finite_does_not_open(
    tmp_path: Path,
    save: Callable[[dict[str, Tensor], Path], Path],
    dtype: torch.dtype | None,
) -> None:
    state = official()
    state["blocks.0.mlp.fc1.bias"][0] = math.nan
    state["blocks.2.attn.qkv.weight"][3, 1] = -math.inf
    path = save(state, tmp_path)
    reason = r": must be finite, got .* in blocks.0.mlp.fc1.bias, blocks.2.attn.qkv.weight; take"
    with pytest.raises(NotFiniteError, match=reason) as caught:
        open_transformer(path, dtype=dtype)
    assert str(caught.value).startswith(str(path))


def test_a_sharded_folder_names_the_tensors_as_it_does(tmp_path: Path) -> None:
    save_transformer(build(), tmp_path / "m", max_shard_size=200_000)
    shards = sorted((tmp_path / "m").glob("diffusion*-of-*.safetensors"))
    assert len(shards) > 1
    found = {name: shard for shard in shards for name in load_file(shard)}
    name = "transformer_blocks.1.attn1.to_k.bias"
    tensors = load_file(found[name])
    tensors[name][5] = math.nan
    save_file(tensors, found[name], {"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"in transformer_blocks.1.attn1.to_q.bias \+ .*to_k"):
        load_transformer(tmp_path / "m")


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_that_is_not_finite_is_not_saved(tmp_path: Path, format: str) -> None:
    path = tmp_path / FORMATS[format]
    save_transformer(build(), path)
    broken = build(dtype=torch.bfloat16)
    broken.t_block[1].bias.data[7] = math.inf
    with pytest.raises(NotFiniteError, match=r"model to be saved as .* in t_block.1.bias"):
        save_transformer(broken, path)
    assert_same(load_transformer(path), build())


def test_drawing_with_such_weights_is_a_failure_and_writes_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_transformer(
        load_transformer(build_sigma(tmp_path / "p", sample_size=32)), tmp_path / "m.pth"
    )
    payload = torch.load(tmp_path / "m.pth")
    payload["state_dict"]["blocks.0.mlp.fc1.bias"][0] = math.nan
    torch.save(payload, tmp_path / "m.pth")
    arguments = ["a cat", "--model", str(tmp_path / "p"), "--transformer", str(tmp_path / "m.pth")]
    arguments += ["--size", "64", "--steps", "2", "--output", str(tmp_path / "x.png")]
    capsys.readouterr()  # of building
    assert generate.main(arguments) == FAILURE
    error = capsys.readouterr().err
    assert "m.pth: must be finite, got NaN or infinity in blocks.0.mlp.fc1.bias;" in error
    assert error.count("\n") == 1 and not (tmp_path / "x.png").exists()
