"""Load a kernel's modules onto stand-ins, and run its programs."""

import ast
import importlib
import importlib.util
import inspect
import random
import sys
import types
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gluon_simulator import stand_ins
from gluon_simulator.machine import Machine
from gluon_simulator.values import Tensor


class Kernel:
    """A @gluon.jit function, by the name of its module and its own.

    sources: texts in place of the files of modules, by their names: mistakes that are to be found.
    """

    def __init__(self, module: str, name: str, sources: Mapping[str, str] | None = None) -> None:
        self.module = module
        self.name = name
        self.sources = dict(sources or {})
        # In an order in which each finds what it imports.
        self.modules = [one for one in _gluon_modules(module) if one != module] + [module]

    def text(self, module: str) -> str:
        return self.sources.get(module) or source(module)

    def with_mistake(self, old: str, new: str) -> "Kernel":
        """The same, with a passage replaced that is there once in all its modules."""
        places = [module for module in self.modules if old in self.text(module)]
        assert len(places) == 1 and self.text(places[0]).count(old) == 1, (places, old)
        changed = self.text(places[0]).replace(old, new)
        return Kernel(self.module, self.name, {**self.sources, places[0]: changed})

    def load(
        self, machine: Machine, program: tuple[int, ...], grid: tuple[int, ...]
    ) -> Callable[..., None]:
        """The function as that program of the grid has it."""
        stubs = stand_ins.modules(machine, program, grid)
        names = [*stubs, *self.modules]
        before = {name: sys.modules.get(name) for name in names}
        sys.modules.update(stubs)
        try:
            for name in self.modules:
                module = types.ModuleType(name)
                sys.modules[name] = module
                exec(_code(name, self.text(name)), vars(module))
                _unwrap_constants(module)
            return getattr(module, self.name)
        finally:
            for name, old in before.items():
                if old is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = old


def _unwrap_constants(module: types.ModuleType) -> None:
    """tl.constexpr that it got from a module which is not on stand-ins."""
    for name, value in vars(module).items():
        if type(value).__name__ == "constexpr":
            setattr(module, name, value.value)


@cache
def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin, module
    return Path(spec.origin)


@cache
def source(module: str) -> str:
    return _path(module).read_text(encoding="utf-8")


@cache
def _code(module: str, text: str) -> types.CodeType:
    return compile(text, str(_path(module)), "exec")


@cache
def _gluon_modules(module: str) -> tuple[str, ...]:
    """Those of the same package that it imports, and those import, which import Gluon; itself last."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.ImportFrom) and node.module:
            name = node.module
            if name.split(".")[0] != module.split(".")[0]:
                continue
            if stand_ins.GLUON in source(name):
                found += _gluon_modules(name)
            else:
                importlib.import_module(
                    name
                )  # while it still finds the modules that stand-ins hide
    return tuple(dict.fromkeys([*found, module]))


def launch(
    kernel: Kernel,
    grid: tuple[int, ...],
    *arguments: Any,
    seed: int = 0,
    together: bool = False,
    resident: int | None = None,
    **constants: Any,
) -> None:
    """Run all programs of a grid, in an order drawn from the seed.

    arguments: Pointer, Descriptor, None and numbers, in the kernel's order; constants: its constexprs.
    together: programs wait for each other, so that all run at the same time, or `resident` of them
    in the order in which they start; else one after the other. Raises Fault.
    """
    programs = list(np.ndindex(*grid))
    order = random.Random(seed)
    order.shuffle(programs)
    machine = Machine(seed, resident)
    for i, program in enumerate(programs):
        if not together:
            machine = Machine(order.randrange(2**32))
        machine.start(i)
        function = kernel.load(machine, program, grid)
        _check_constants(function, constants)
        function(*(_number(x) for x in arguments), **constants)
        if not together:
            machine.run()
    if together:
        machine.run()


def _number(x: Any) -> Any:
    if isinstance(x, bool) or not isinstance(x, int | float | np.number):
        return x
    return Tensor(np.int64(x) if isinstance(x, int | np.integer) else np.float32(x))


def _check_constants(function: Callable[..., None], constants: Mapping[str, Any]) -> None:
    """A number in place of a constexpr, or the other way round, would compile to something else."""
    parameters = inspect.signature(function).parameters.values()
    expected = {p.name for p in parameters if p.annotation is not inspect.Parameter.empty}
    assert expected == set(constants), sorted(expected ^ set(constants))
