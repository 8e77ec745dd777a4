"""Who may import whom: read from the syntax trees, lazy imports inside functions included."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted([*(ROOT / "pixart").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
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
        "pixart/sampler/loop.py",
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


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=_name)
def test_the_operators_stand_on_torch_and_triton_alone(path: Path) -> None:
    third_party = {"pixart", "numpy", "tqdm", "safetensors", "PIL", *LAZY_ONLY}
    assert not _roots(_anywhere(path)) & third_party


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("config", {"pixart.model", "pixart.checkpoint", "pixart.pipeline", "torch"}),
        ("diffusion", {"pixart.model", "pixart.checkpoint", "pixart.pipeline"}),
        ("sampler/loop", {"pixart.model", "pixart.checkpoint", "pixart.pipeline"}),
        ("resolution", {"pixart.model", "pixart.checkpoint", "pixart.pipeline"}),
        ("model/transformer", {"pixart.checkpoint", "pixart.pipeline", "pixart.training"}),
        ("checkpoint/load", {"pixart.pipeline", "pixart.training", "pixart.generate"}),
        ("pipeline/text_to_image", {"pixart.generate", "pixart.training"}),
    ],
)
def test_data_flow_one_way(module: str, forbidden: set[str]) -> None:
    assert not _anywhere(ROOT / "pixart" / f"{module}.py") & forbidden


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


def test_there_is_no_drawer_for_leftovers() -> None:
    assert not {path.stem for path in SOURCES} & {
        "utils",
        "util",
        "common",
        "base",
        "helpers",
        "misc",
    }
