"""Who may import whom: read from the syntax trees, lazy imports inside functions included."""

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted(
    [*(ROOT / "pixart").rglob("*.py"), *(ROOT / "kernels" / "pixart_kernels").rglob("*.py")]
)
LAZY_ONLY = {"transformers", "diffusers", "huggingface_hub", "sentencepiece", "tokenizers", "peft"}
DOORS = {
    "transformers": {
        "pixart/text/encoder.py",
        "pixart/dataset/captioning.py",
        "pixart/training/tasks/shapes.py",
    },
    "diffusers": {
        "pixart/vae/autoencoder.py",
        "pixart/vae/tiling.py",
        "pixart/sampler/schedulers.py",
        "pixart/patch.py",
        "pixart/training/tasks/autoencoder.py",
        "pixart/pipeline/export.py",
    },
    "peft": {"pixart/lora/adapters.py"},
}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(node: ast.AST) -> set[str]:
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and child.module:
            found.add(child.module)
    return found


def _at_load(path: Path) -> set[str]:
    """What loading the module imports: its top level, but for `if TYPE_CHECKING`."""
    body = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    return _imports(ast.Module(body, []))


def _anywhere(path: Path) -> set[str]:
    return _imports(ast.parse(path.read_text(encoding="utf-8")))


def _roots(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_module_imports_the_name_of_hugging_faces_kernels_or_our_tests(path: Path) -> None:
    assert not _roots(_anywhere(path)) & {"kernels", "tests", "bench"}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_hugging_face_is_imported_inside_functions_and_only_behind_its_doors(path: Path) -> None:
    assert not _roots(_at_load(path)) & LAZY_ONLY
    for library, doors in DOORS.items():
        assert library not in _roots(_anywhere(path)) or _name(path) in doors


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels" / "pixart_kernels").rglob("*.py")), ids=_name
)
def test_the_operators_stand_on_torch_and_triton_alone(path: Path) -> None:
    assert _roots(_anywhere(path)) <= {
        *sys.stdlib_module_names,
        "torch",
        "triton",
        "pixart_kernels",
    }


def _module(path: Path) -> str:
    name = _name(path).removeprefix("kernels/").removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


HOUSE = [
    path
    for top in ("pixart", "kernels/pixart_kernels", "bench")
    for path in (ROOT / top).rglob("*.py")
]
MODULES = {_module(path): path for path in HOUSE}


def _of_the_house(path: Path) -> set[str]:
    """The modules of ours that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found & MODULES.keys() - {_module(path)}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: _of_the_house(path) for name, path in MODULES.items()}
    graph["pixart"] = set()  # it names its public classes for type checkers only
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other in a circle: {' -> '.join(error.args[1])}")


# Rooms by floor, from the ground up: a room imports what is below it, and what FLOOR_MATES allows.
GROUND = [
    "config",
    "resolution",
    "diffusion",
    "releases",
    "cost",
    "device",
    "distributed",
    "files",
    "command",
    "pictures",
    "progress",
    "process",
    "shapes",
    "tensors",
]
FLOORS = [
    GROUND,
    ["model", "weights"],
    ["checkpoint", "text", "vae"],
    ["sampler", "lora"],
    ["pipeline"],
    ["generation", "dataset", "training", "evaluation"],
    ["generate", "convert", "data", "train", "evaluate", "patch", "__main__"],
]
FLOOR_MATES = {("training", "dataset"), *((a, b) for a in GROUND for b in GROUND)}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", sorted((ROOT / "pixart").rglob("*.py")), ids=_name)
def test_data_flow_one_way(path: Path) -> None:
    room = _room(_module(path))
    if not room:  # pixart itself
        return
    for module in _of_the_house(path):
        other = _room(module)
        if module.split(".")[0] != "pixart" or other in ("", room):
            continue
        below = FLOOR_OF[other] < FLOOR_OF[room]
        assert below or (room, other) in FLOOR_MATES, f"{room} must not import {module}"


# The same for bench/: commands and pytest's files stand on top, and nothing imports those.
BENCH_FLOORS = [
    ["measure"],
    ["workloads", "suite"],
    ["compiled", "reporting"],
    ["studies", "command"],
    ["compare", "cpu", "gpu", "growth", "report", "resources", "saving"],
    ["bench_kernels", "bench_model", "bench_pipeline", "bench_training", "conftest"],
]
BENCH_FLOOR_OF = {part: floor for floor, parts in enumerate(BENCH_FLOORS) for part in parts}


@pytest.mark.parametrize("path", sorted((ROOT / "bench").rglob("*.py")), ids=_name)
def test_benches_stand_on_what_they_measure_with(path: Path) -> None:
    part = _room(_module(path))
    if not part:  # bench itself
        return
    for module in _of_the_house(path):
        other = _room(module)
        if module.split(".")[0] == "bench" and other not in ("", part):
            below = BENCH_FLOOR_OF[other] < BENCH_FLOOR_OF[part]
            assert below, f"bench.{part} must not import {module}"


def test_only_the_model_and_what_changes_it_call_the_operators() -> None:
    callers = {
        _room(name)
        for name, path in MODULES.items()
        if name.startswith("pixart.") and "pixart_kernels" in _roots(_anywhere(path))
    }
    assert callers == {"model", "patch"}


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, pixart, pixart_kernels
from pixart.model import PixArt
q = torch.randn(1, 5, 2, 72, requires_grad=True)
pixart_kernels.flash_attention(q, q, q).sum().backward()
x = torch.randn(1, 4, 8, requires_grad=True)
row = torch.randn(1, 8)
sum(t.sum() for t in pixart_kernels.gate_add_modulate(x, x, row, row, row)).backward()
weight, bias = torch.randn(8, 1, 2, 2), torch.randn(8)
pixart_kernels.compress_kv(x, x, weight, bias, bias, bias, grid=(2, 2), ratio=2)[0].sum().backward()
"""


def test_models_and_operators_work_where_there_is_no_triton() -> None:
    """As on macOS: a launcher imports its kernels when it is called."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_INTERPRET": ""}
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=env, check=True, timeout=120)


@pytest.mark.parametrize("path", sorted((ROOT / "pixart").rglob("*.py")), ids=_name)
def test_the_model_leaves_triton_to_the_operators(path: Path) -> None:
    assert "triton" not in _roots(_anywhere(path))


def _opens_with_pillow(node: ast.AST) -> bool:
    """Image.open(...) by any name that Pillow's module goes by here, and what opens a file as it does."""
    if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
        return any(alias.name == "open" for alias in node.names)
    called = node.func if isinstance(node, ast.Call) else None
    return (
        isinstance(called, ast.Attribute)
        and called.attr == "open"
        and isinstance(called.value, ast.Name | ast.Attribute)
        and "Image" in ast.unparse(called.value)
    )


@pytest.mark.parametrize("path", HOUSE, ids=_name)
def test_pictures_are_opened_in_one_place(path: Path) -> None:
    """There Pillow gets the formats that it may try: for some it starts other programs."""
    if _name(path) != "pixart/pictures.py":
        assert not any(map(_opens_with_pillow, ast.walk(ast.parse(path.read_text()))))


def test_there_is_no_drawer_for_leftovers() -> None:
    assert not {path.stem for path in SOURCES} & {
        "utils",
        "util",
        "common",
        "base",
        "helpers",
        "misc",
    }
