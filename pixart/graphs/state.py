"""What a recording of a model depends on: where its tensors lie, and what else its modules hold."""

from collections.abc import Hashable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pixart.graphs.capture import GraphError

# What every module has. `training` is not among them: dropout depends on it.
_COMMON = frozenset(vars(nn.Module())) - {"training"}
_NUMBERS = frozenset((type(None), bool, int, float, str))
_TENSORS = frozenset((Tensor, nn.Parameter))
_DEPTH = 4  # of containers in attributes that are looked into


class State:
    """What a recording of a model depends on, as far as Python can tell.

    key: address, dtype and size of every parameter and buffer, the type of every module, and the
    attributes of modules that are not torch.nn's own: numbers, texts and containers of them by value,
    anything else by identity. So a layer or an adapter that is swapped, a weight that is moved,
    quantised or loaded with assign=True, a LoRA of another strength and model.train() make another key;
    an optimizer's step does not, since a replay reads the weights where they lie. held: the objects that
    the key names by identity; while somebody holds them, no others can pass for them.

    Made anew for each call, in about the time of list(model.parameters()). Raises GraphError where a
    module has forward hooks, which a replay would not call. outside: the model's own hooks are none of
    those, since its forward alone is recorded.
    """

    def __init__(self, model: nn.Module, *, outside: bool = False) -> None:
        self.held: list[object] = []
        self._found: list[Hashable] = []
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            raise _hook_error("every module")
        found, modules, tensors = self._found, [model], []
        # Written for speed: some 400 modules and 600 tensors are met at each step of a picture.
        for module in modules:  # which grows
            own = module.__dict__
            is_hooked = own["_forward_hooks"] or own["_forward_pre_hooks"]
            if is_hooked and not (outside and module is model):
                raise _hook_error(_name_of(module, model))
            kind: Any = type(module)
            found.append(kind)
            found.append(own["training"])
            tensors += [each for each in own["_parameters"].values() if each is not None]
            if own["_buffers"]:
                tensors += [each for each in own["_buffers"].values() if each is not None]
            if own["_modules"]:
                modules += [child for child in own["_modules"].values() if child is not None]
            if _is_plain(kind):
                found.append(len(own))
                forward = own.get("forward")  # in the instance's own place
                if forward is not None:
                    found.append(id(forward))
                    self.held.append(forward)
                continue
            for name, value in own.items():
                if name not in _COMMON:
                    if type(value) in _NUMBERS:
                        found.append(value)
                    else:
                        self._add(value, _DEPTH)
        if _TENSORS.issuperset(set(map(type, tensors))):
            found += [tensor.data_ptr() for tensor in tensors]
            found += [tensor.dtype for tensor in tensors]
            found += [(tensor.shape, tensor.stride()) for tensor in tensors]
        else:
            for tensor in tensors:
                self._add_tensor(tensor)
        self.key: Hashable = tuple(found)

    def _add_tensor(self, tensor: Tensor) -> None:
        if type(tensor) in _TENSORS:
            self._found += (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        else:
            self._add_subclass(tensor)

    def _add_subclass(self, tensor: Tensor) -> None:
        """What a quantised or sharded tensor is made of."""
        self._found.append(type(tensor))
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is None:
            self._found += (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            self._add(vars(tensor), _DEPTH)
            return
        names, context = flatten()
        for name in names:
            self._add_tensor(getattr(tensor, name))
        self._add(context, _DEPTH)

    def _add(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _NUMBERS:
            self._found.append(value)
        elif isinstance(value, Tensor):
            self._add_tensor(value)
        elif depth and isinstance(value, (list, tuple)):
            self._found.append(len(value))
            for each in value:
                self._add(each, depth - 1)
        elif depth and isinstance(value, dict):
            self._found.append(len(value))
            for name, each in value.items():
                self._add(name, depth - 1)
                self._add(each, depth - 1)
        else:
            self.held.append(value)
            self._found.append(id(value))


@cache
def _is_plain(kind: type) -> bool:
    """Whether a module is one of torch.nn: what it holds beside tensors was fixed when it was made."""
    return kind.__module__.startswith("torch.nn.modules.")


def _name_of(module: nn.Module, model: nn.Module) -> str:
    names = [name for name, each in model.named_modules() if each is module]
    return names[0] or "the model"


def _hook_error(owner: str) -> GraphError:
    return GraphError(f"{owner} has a forward hook, which a replay would not call")
