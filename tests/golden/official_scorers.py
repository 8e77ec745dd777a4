"""What make_evaluation_{geneval,dpg,compbench}.py share: they run functions of official repositories whose
files import what nobody can install any more.

Each takes the path of a checkout. What a file imports and a scorer does not need is replaced by empty
modules; the code of the functions is theirs, read from the checkout, and nothing of it is kept here.
"""

import ast
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

FOLDER = Path(__file__).parent / "evaluation"


def functions(source: Path, names: tuple[str, ...], **known: Any) -> dict[str, Any]:
    """The module-level functions of a file, with the globals that they use."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    space: dict[str, Any] = dict(known)
    exec(compile(ast.Module(body, []), str(source), "exec"), space)
    return space


def module(source: Path, *absent: str, **known: Any) -> dict[str, Any]:
    """A whole file, with empty modules in the place of those that are absent."""
    for name in absent:
        sys.modules[name] = MagicMock(spec=ModuleType, name=name)
    space: dict[str, Any] = {"__name__": "official", "__file__": str(source), **known}
    exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), space)
    return space


def write(name: str, values: dict[str, Any]) -> None:
    """One line for each item of a list: changes can be read."""
    lines = []
    for key, value in values.items():
        if isinstance(value, list):
            rows = ",\n".join(json.dumps(one) for one in value)
            lines.append(f"{json.dumps(key)}: [\n{rows}\n]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
