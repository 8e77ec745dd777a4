"""Linear layers one after the other: the heads of ImageReward and of LAION's aesthetic predictors, whose
activations are commented out in the published code."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from pixart.files import AGAIN, CheckpointError, listed
from pixart.weights import fit


def head_of(state: Mapping[str, Tensor], path: Path, prefix: str = "layers.") -> nn.Sequential:
    """The layers of a state dict, in the order of their numbers; "" as the prefix for a single layer that
    has none. Sizes are read from the weights. path: for messages. CheckpointError for others."""
    names = [
        name.removeprefix(prefix).rpartition(".")[0] for name in state if name.endswith("weight")
    ]
    if not names or not all(name.isdigit() or not (prefix or name) for name in names):
        raise CheckpointError(
            f"{path}: must hold linear layers {prefix}NUMBER.weight and .bias, got "
            f"{listed(state)}; {AGAIN}"
        )
    layers = nn.Sequential()
    tensors: dict[str, Tensor] = {}
    for place, name in enumerate(sorted(names, key=lambda name: int(name or 0))):
        key = f"{prefix}{name}." if name else prefix
        weight = state[f"{key}weight"]
        layers.append(nn.Linear(weight.shape[1], weight.shape[0]))
        tensors |= {
            f"{place}.{k}": state[f"{key}{k}"] for k in ("weight", "bias") if f"{key}{k}" in state
        }
    fit(layers, tensors, path)
    return layers.eval().requires_grad_(False)
