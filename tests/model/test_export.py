"""torch.export of the model: what an exported program computes is what the model does, at any size."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import KEPT, PARITY_TOLERANCE, build, inputs, mask_of, relative_error, sizes
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ExportedProgram

from pixart.config import KVCompression
from pixart.model.transformer import PixArt

ROWS, COLS = Dim("rows", max=512), Dim("cols", max=512)  # of tokens
BATCH, LENGTH = Dim("batch", max=64), Dim("length", max=512)
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "convolution": {"kv_compression": KVCompression((0,), 2, "conv")},
    "mean": {"kv_compression": KVCompression((0,), 3, "average")},
    "top left token": {"kv_compression": KVCompression((0,), 2, "uniform")},
    "every fourth token": {"kv_compression": KVCompression((0,), 4, "uniform_every")},
    "normed queries and sizes": {"qk_norm": True, "micro_condition": True},
}

QUICK = ("dense", "convolution")  # to trace


def _arguments(model: PixArt, *given: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """For a batch of a height and width of latents and a length of captions. Every second token is kept."""
    latents, timesteps, caption = inputs(*given)
    mask = torch.arange(caption.shape[1]).expand(given[0], -1) % 2 == 0
    extra = sizes(given[0]) if model.config.micro_condition else {}
    return (latents, timesteps, caption, mask), extra


def _export(model: PixArt) -> ExportedProgram:
    arguments, extra = _arguments(model, 2, 16, 16, 12)
    side = model.config.patch_size
    shapes: dict[str, Any] = {
        "latents": {0: BATCH, 2: side * ROWS, 3: side * COLS},
        "timesteps": {0: BATCH},
        "caption": {0: BATCH, 1: LENGTH},
        "caption_mask": {0: BATCH, 1: LENGTH},
        **{name: {0: BATCH} for name in extra},
    }
    return torch.export.export(model, arguments, extra, dynamic_shapes=shapes)


def _check(model: PixArt, program: Any, *given: int) -> None:
    arguments, extra = _arguments(model, *given)
    error = relative_error(program(*arguments, **extra), model(*arguments, **extra))
    assert error < PARITY_TOLERANCE, given


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
@torch.no_grad()
def test_a_program_for_all_sizes_computes_what_the_model_does(name: str) -> None:
    model = build(depth=1, **MODELS[name])
    program = _export(model).module()
    # The exported size; rows and columns that no ratio divides; more tokens than conditions ask for.
    for given in ((2, 16, 16, 12), (3, 10, 14, 7), (2, 70, 66, 3)):
        _check(model, program, *given)


@pytest.mark.parametrize("records", [False, True])
def test_a_program_for_one_size_computes_what_the_model_does(records: bool) -> None:
    model = build(depth=1, **MODELS["convolution"])
    latents, timesteps, caption = inputs(2, 10, 14)
    mask = mask_of(KEPT[:2])
    expected = model(latents, timesteps, caption, mask)
    with torch.set_grad_enabled(records):
        program = torch.export.export(model, (latents, timesteps, caption, mask)).module()
        found = program(latents, timesteps, caption, mask)
    assert relative_error(found, expected) < PARITY_TOLERANCE
    # The model kept nothing of what was traced.
    assert torch.equal(model(latents, timesteps, caption, mask), expected)


@torch.no_grad()
def test_what_is_computed_without_data_is_not_kept() -> None:
    model = build(depth=1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(*(mode.from_tensor(tensor) for tensor in inputs()))
    assert type(model(*inputs())) is Tensor


@pytest.mark.exhaustive  # a compiler takes minutes
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler on a CPU")
@torch.no_grad()
def test_a_compiled_package_computes_what_the_model_does(tmp_path: Path) -> None:
    """Of AOTInductor, in C++: none of our operators is left in it to be called in Python."""
    model, path = build(depth=1, **MODELS["convolution"]), str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(_export(model), package_path=path)
    with zipfile.ZipFile(path) as package:
        written = [package.read(name) for name in package.namelist() if name.endswith(".cpp")]
    assert written and not any(b"pixart::" in source for source in written)
    program = torch._inductor.aoti_load_package(path)
    for given in ((2, 16, 16, 12), (3, 10, 14, 7)):
        _check(model, program, *given)
