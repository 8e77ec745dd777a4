"""Whether what a stage would save is finite: weights, averages and optimizer states, cut or whole."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pixart.distributed import any_process, local
from pixart.weights import NotFiniteError, check_finite


def not_finite(tensors: Mapping[str, Mapping[str, Any]], device: torch.device) -> str | None:
    """What is wrong with groups of named tensors, of which this process has its parts: the first names,
    or that they are another's. None where all are finite; the same for all processes, which call it."""
    found = None
    for group, members in tensors.items():
        parts = {name: part for key, value in members.items() for name, part in _parts(key, value)}
        try:
            check_finite(parts, group)
        except NotFiniteError as error:
            rule = str(error).partition(": ")[2].partition(";")[0]
            found = f"{'weights' if group == 'model' else group} {rule}"
            break
    if not any_process(found is not None, device):
        return None
    return found or "weights of another process must be finite"


def _parts(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of one: this process's part, the codes and scales of an 8-bit state."""
    if not isinstance(value, Tensor):
        return
    value = local(value)
    if not hasattr(value, "__tensor_flatten__"):
        yield name, value
        return
    for inner in value.__tensor_flatten__()[0]:
        yield from ((f"{name} ({inner})", part) for _, part in _parts(inner, getattr(value, inner)))
