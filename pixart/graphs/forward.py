"""The forward of somebody else's model, replayed where its calls were met before."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pixart.device import check_cuda_graph
from pixart.graphs.recordings import Recordings


class GraphedForward:
    """Stands in the place of a module's forward, which it calls or replays.

    Tensors anywhere among the arguments are inputs; other arguments must be hashable or stay the same
    objects, and belong to the key. Calls that record gradients, are compiled or are recorded by somebody
    else's CUDA graph are plain ones. Hooks of the module itself run at each call, outside of the
    recording. ValueError for inputs on another device than CUDA, GraphError as Recordings has it.
    """

    def __init__(self, module: nn.Module, original: Callable[..., Any]) -> None:
        self.module, self.original = module, original
        self.recordings = Recordings()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[place] for place in places]
        others: list[Any] = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if tensors:
            check_cuda_graph(True, tensors[0].device)
        if not tensors or torch.cuda.is_current_stream_capturing():
            return self.original(*args, **kwargs)

        def step(moving: list[Tensor], _: list[Tensor]) -> Any:
            filled = list(others)
            for place, tensor in zip(places, moving, strict=True):
                filled[place] = tensor
            own_args, own_kwargs = pytree.tree_unflatten(filled, tree)
            return self.original(*own_args, **own_kwargs)

        key = (str(tree), *places, *map(_key_of, others))
        return self.recordings(
            self.module, step, tensors, key=key, outside=True, holds=lambda: others
        )


def wrap(module: nn.Module, holder: dict[str, Any], name: str) -> None:
    """Put a GraphedForward where the module's forward is kept: holder[name], if it is there at all."""
    holder[name] = GraphedForward(module, holder.get(name, module.forward))


def unwrap(module: nn.Module, holder: dict[str, Any], name: str) -> None:
    """Undo `wrap`. ValueError if somebody has put another forward there since."""
    found = holder.get(name)
    if not isinstance(found, GraphedForward):
        raise ValueError(f"forward must not have been replaced by somebody else, got {found}")
    found.recordings.clear()
    is_class_own = getattr(found.original, "__func__", None) is type(module).forward
    if is_class_own and holder is vars(module) and name == "forward":
        del holder[name]  # so that the class's own is found again
    else:
        holder[name] = found.original


def _key_of(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return (type(value), id(value))
    return (type(value), value)
