"""Who may import whom: read from the syntax trees, lazy imports inside functions included."""

import ast
import os
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted(
    [*(ROOT / "pixart").rglob("*.py"), *(ROOT / "kernels" / "pixart_kernels").rglob("*.py")]
)
# What is copied into a published repository, where it stands alone.
REMOTE = {"pixart/publishing/repository/pipeline.py", "pixart/publishing/repository/pixart_kv.py"}
LAZY_ONLY = {"transformers", "diffusers", "huggingface_hub", "sentencepiece", "tokenizers", "peft"}
DOORS = {
    "transformers": {
        "pixart/libraries.py",
        "pixart/text/networks.py",
        "pixart/dataset/captioning.py",
        "pixart/preprocess/depth.py",
        "pixart/preprocess/pose.py",
        "pixart/evaluation/judges/blip.py",
        "pixart/evaluation/judges/chat.py",
        "pixart/evaluation/detecting/detectors.py",
        "pixart/evaluation/networks/clip.py",
        "pixart/evaluation/networks/dinov2.py",
        "pixart/evaluation/networks/hps.py",
        "pixart/evaluation/networks/image_reward.py",
        "pixart/training/tasks/shapes.py",
        "pixart/training/tasks/shapes_clip.py",
        "pixart/scalability/parts.py",
    },
    "diffusers": {
        "pixart/libraries.py",
        "pixart/vae/autoencoder.py",
        "pixart/vae/preview.py",
        "pixart/vae/tiling.py",
        "pixart/sampler/schedulers.py",
        "pixart/patch.py",
        "pixart/training/tasks/autoencoder.py",
        "pixart/pipeline/export.py",
        "pixart/scalability/unets.py",
        "pixart/scalability/parts.py",
        "pixart/scalability/study/denoisers.py",
    },
    "peft": {"pixart/lora/adapters.py"},
}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


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
    body = [node for node in _tree(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return _imports(ast.Module(body, []))


@cache
def _anywhere(path: Path) -> set[str]:
    return _imports(_tree(path))


def _roots(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_module_imports_the_name_of_hugging_faces_kernels_or_our_tests(path: Path) -> None:
    assert not _roots(_anywhere(path)) & {"kernels", "tests", "bench"}


AT_HOME = [path for path in SOURCES if _name(path) not in REMOTE]


@pytest.mark.parametrize("path", AT_HOME, ids=_name)
def test_hugging_face_is_imported_inside_functions_and_only_behind_its_doors(path: Path) -> None:
    assert not _roots(_at_load(path)) & LAZY_ONLY
    for library, doors in DOORS.items():
        assert library not in _roots(_anywhere(path)) or _name(path) in doors


@pytest.mark.parametrize("path", AT_HOME, ids=_name)
def test_imports_behind_the_doors_say_when_torchvision_breaks_them(path: Path) -> None:
    """Each stands in a `with importing()`; see pixart.libraries."""
    inside = [
        node
        for parent in ast.walk(_tree(path))
        if isinstance(parent, ast.With)
        and "importing()" in [ast.unparse(item.context_expr) for item in parent.items]
        for node in parent.body
    ]
    found = sum(bool(_roots(_imports(node)) & DOORS.keys()) for node in inside)
    every = [
        node
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom) and _roots(_imports(node)) & DOORS.keys()
    ]
    assert found == len(every)


@pytest.mark.parametrize("name", sorted(REMOTE))
def test_published_code_stands_alone(name: str) -> None:
    """pixart_kernels, which it can do without, it imports by name: diffusers looks at its import lines."""
    allowed = {*sys.stdlib_module_names, "torch", "diffusers", "transformers"}
    assert _roots(_anywhere(ROOT / name)) <= allowed


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


@cache
def _of_the_house(path: Path) -> set[str]:
    """The modules of ours that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(_tree(path)):
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
    "few_step",
    "resolution",
    "diffusion",
    "releases",
    "cost",
    "device",
    "distributed",
    "files",
    "lazy",
    "locks",
    "command",
    "addresses",
    "endpoint",
    "libraries",
    "pictures",
    "plain_yaml",
    "plans",
    "progress",
    "process",
    "quantize",
    "shapes",
    "similarity",
    "tensors",
    "variants",
    "workers",
    "graphs",
    "cluster",
    "storage",
]
FLOORS = [
    GROUND,
    ["model", "weights"],
    ["checkpoint", "text", "vae", "preprocess"],
    ["sampler", "lora"],
    ["pipeline"],
    ["generation", "dataset", "training", "evaluation"],
    ["scalability", "publishing", "serving", "calibration"],
    [
        "generate",
        "calibrate",
        "convert",
        "data",
        "train",
        "evaluate",
        "preference",
        "scaling",
        "publish",
        "serve",
        "patch",
        "comfyui",
        "__main__",
    ],
]
FLOOR_MATES = {
    ("training", "dataset"),
    ("training", "evaluation"),
    *((a, b) for a in GROUND for b in GROUND),
}
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
    ["compiled"],
    ["reporting"],
    ["studies", "command"],
    [
        "compare",
        "cpu",
        "gpu",
        "growth",
        "host",
        "ladder",
        "parallel",
        "quality",
        "report",
        "resources",
        "saving",
        "tune",
    ],
    [
        "bench_guidance",
        "bench_host",
        "bench_kernels",
        "bench_model",
        "bench_pipeline",
        "bench_training",
        "conftest",
    ],
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
    assert callers == {"model", "patch", "comfyui"}


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


def _opens_with_pillow(tree: ast.AST) -> bool:
    """Whether it calls PIL.Image.open, by whatever name."""
    nodes = list(ast.walk(tree))
    names = {"Image", "PIL.Image"}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "PIL":
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
            if any(alias.name == "open" for alias in node.names):
                return True
        elif isinstance(node, ast.Import):
            names |= {alias.asname for alias in node.names if alias.asname and "PIL" in alias.name}
    return any(
        isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node.value) in names
        for node in nodes
    )


@pytest.mark.parametrize("path", HOUSE, ids=_name)
def test_pictures_are_opened_in_one_place(path: Path) -> None:
    """There Pillow gets the formats that it may try: for some it starts other programs."""
    opens = _opens_with_pillow(_tree(path))
    assert opens == (_name(path) == "pixart/pictures.py")


def test_no_two_files_of_tests_have_the_same_name() -> None:
    """pytest imports them by their names alone, and collects none of a run that meets one twice."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_there_is_no_drawer_for_leftovers() -> None:
    assert not {path.stem for path in SOURCES} & {
        "utils",
        "util",
        "common",
        "base",
        "helpers",
        "misc",
    }
