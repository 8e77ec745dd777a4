"""Weights into networks: every tensor has its place, and none is left over."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixart.files import AGAIN, CheckpointError, fingerprint_files, listed, read_json
from pixart.libraries import silenced
from pixart.tensors import check_stored, container, read_safetensors, read_torch
from pixart.weights import (
    T5_WEIGHTS,
    check_finite,
    check_loaded,
    errors_naming,
    find_weights,
)

MAX_WIDTH = 65_536  # of an embedding


def fit(
    network: nn.Module, tensors: Mapping[str, Tensor], path: Path, unused: str = "(?!)"
) -> None:
    """Load a state dict in place, as fp32. path: the file, for messages. unused: a pattern of names that
    the file may hold beside. CheckpointError unless all others fit; NotFiniteError for NaN."""
    own = network.state_dict()
    # A counter of training steps, which old files do not have.
    own_names = {name for name in own if not name.endswith("num_batches_tracked")}
    names = {
        name
        for name in tensors
        if not name.endswith("num_batches_tracked") and not re.fullmatch(unused, name)
    }
    problems = []
    if missing := sorted(own_names - names):
        problems.append(f"misses {listed(missing)}")
    if left := sorted(names - own_names):
        problems.append(f"has {listed(left)} beside")
    wrong = [
        f"{name} {tuple(tensors[name].shape)} in the place of {tuple(own[name].shape)}"
        for name in sorted(names & own_names)
        if tensors[name].shape != own[name].shape
    ]
    if wrong:
        problems.append(f"has {listed(wrong)}")
    if problems:
        raise CheckpointError(
            f"{path}: must hold the weights of this network, but {'; '.join(problems)}; {AGAIN}"
        )
    taken = {name: tensors[name].float() for name in sorted(names)}
    check_finite(taken, str(path))
    network.load_state_dict(taken, strict=False)


def weights_digest(version: str, files: Sequence[Path]) -> str:
    """16 hexadecimal digits that tell weights, and the versions of our code around them, apart. The same
    for a file wherever it lies."""
    named = {f"{version} {place}": path for place, path in enumerate(files)}
    return fingerprint_files(named)[:16]


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a file of tensors, also where a trainer put it under "state_dict" beside other
    things. Nothing in the file may run. CheckpointError for anything else."""
    kind = container(path)
    held = read_safetensors(path)[0] if kind == "safetensors" else read_torch(path, kind)
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    if not isinstance(held, dict):
        raise CheckpointError(f"{path}: holds a {type(held).__name__}, not a state dict")
    check_stored(path, held)
    return held


def width_in(config: Path, name: str) -> int:
    """The number of features that a model's config.json states under `name`. CheckpointError for a file
    without a sensible one."""
    width = read_json(config).get(name)
    if type(width) is not int or not 1 <= width <= MAX_WIDTH:
        raise CheckpointError(
            f"{config}: {name} must be from 1 to {MAX_WIDTH:,}, got {width!r}; {AGAIN}"
        )
    return width


def open_pretrained(
    kind: Any, folder: Path, dtype: torch.dtype = torch.float32, *, may_hold_more: bool = False
) -> Any:
    """A model of transformers from its folder, for use alone. kind: its class, or one that chooses it.
    may_hold_more: published files keep what older versions of the class had. CheckpointError for weights
    that do not fit, are missing, or are not finite."""
    files, variant = find_weights(folder, None, T5_WEIGHTS)
    options: dict[str, Any] = {
        "torch_dtype": dtype,  # transformers 4 knows no `dtype` in all of its versions
        "variant": variant,
        "use_safetensors": files[0].suffix == ".safetensors",
        "output_loading_info": True,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    with errors_naming(folder), silenced():
        model, info = kind.from_pretrained(folder, **options)
    check_loaded(folder, {**info, "unexpected_keys": ()} if may_hold_more else info)
    check_finite(dict(model.named_parameters()), str(folder))
    return model.eval().requires_grad_(False)
