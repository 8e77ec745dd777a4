"""`pixart_kernels` as a repository of Hugging Face's `kernels`: its layout, and that it loads and computes."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

import hub_repository

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("hub") / "repository"
    hub_repository.write(output)
    return output


def test_every_backend_has_the_same_code_and_its_own_metadata(repository: Path) -> None:
    contents = []
    for backend in ("cpu", "cuda", "rocm"):
        folder = repository / "build" / f"torch-{backend}"
        held = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        described = json.loads(held.pop("metadata.json"))
        assert described["name"] == "pixart-kernels" and described["backend"] == {"type": backend}
        assert described["id"].isidentifier() and backend in described["id"]
        contents.append(held)
    assert contents[0] == contents[1] == contents[2]
    source = ROOT / "kernels" / "pixart_kernels"
    kept = [
        path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert set(contents[0]) == {path.relative_to(source).as_posix() for path in kept}
    assert not any(b"from pixart_kernels" in data for data in contents[0].values())
    assert (repository / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_namespace_follows_from_the_content(repository: Path, tmp_path: Path) -> None:
    namespace, content = hub_repository.files()
    assert f'\nNAMESPACE = "{namespace}"\n'.encode() in content["dispatch/registration.py"]
    assert f"torch.ops.{namespace}`" in (repository / "README.md").read_text(encoding="utf-8")
    assert hub_repository.write(repository) == namespace  # in the place of the first
    assert hub_repository.files(_changed_source(tmp_path))[0] != namespace


def _changed_source(folder: Path) -> Path:
    """The package with another version, which computes the same."""
    copy = folder / "pixart_kernels"
    shutil.copytree(hub_repository.SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    start = copy / "__init__.py"
    start.write_text(start.read_text(encoding="utf-8") + "\n# Another.\n", encoding="utf-8")
    return copy


@pytest.mark.parametrize("line", ["import pixart_kernels.dispatch", "import pixart_kernels as ops"])
def test_an_import_that_cannot_be_made_relative_is_refused(line: str, tmp_path: Path) -> None:
    source = _changed_source(tmp_path)
    (source / "attention" / "more.py").write_text(f'"""More."""\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="attention/more.py must import the package as .* line 3"):
        hub_repository.files(source)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept", encoding="utf-8")
    script = ROOT / "kernels" / "hub_repository.py"
    command = [sys.executable, str(script), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --output must be new or an earlier output, got")
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "kept"


# What follows runs in processes of its own: operators cannot be taken back from PyTorch.
CHECK = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("error")  # PyTorch warns where an operator takes the place of another
import torch
from kernels import get_local_kernel

def check(ops):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, 2, 72, requires_grad=True) for _ in range(3))
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / 72**0.5
    expected = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())
    out = ops.flash_attention(q, k, v)
    assert (out - expected).abs().max() < 1e-5
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), grad)
    theirs = torch.autograd.grad(expected, (q, k, v), grad.double())
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(ours, theirs))
    x, row = torch.randn(2, 6, 72), torch.randn(2, 72)
    image = x.double().reshape(2, 2, 3, 72)
    means = torch.stack([image[:, :, :2].mean((1, 2)), image[:, :, 2].mean(1)], 1)
    merged, _ = ops.compress_kv(
        x, x, torch.full((72, 1, 2, 2), 0.25), torch.zeros(72), None, None, grid=(2, 3), ratio=2
    )
    assert (merged - means).abs().max() < 1e-5
    assert (ops.gate_add(x, x, row) - (x + row[:, None] * x)).abs().max() < 1e-5
    assert ops.modulate(x, row, row).shape == x.shape
"""
HIDDEN = """
for name in ("pixart", "pixart_kernels"):
    sys.modules[name] = None  # importing it raises
check(get_local_kernel(Path(sys.argv[1]), backend="cpu"))
"""
BESIDE = """
import pixart_kernels
paths = [path for path in sys.argv[1:] if "/" in path]
copies = [pixart_kernels, *(get_local_kernel(Path(path), backend="cpu") for path in paths)]
assert len({id(ops.flash_attention) for ops in copies}) == 3
for ops in copies * 2:
    check(ops)
for namespace in ("pixart", *(name for name in sys.argv[1:] if "/" not in name)):
    assert hasattr(getattr(torch.ops, namespace), "flash_attention"), namespace
"""


def _run(script: str, *arguments: str, **environment: str) -> None:
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("needs Hugging Face's kernels; .ci/with-hf-kernels runs it with them")
    given = {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "", **environment}
    path = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **given, "PYTHONPATH": path}
    command = [sys.executable, "-c", CHECK + script, *arguments]
    # Not from the root, whose folder `kernels` has the name of the package.
    done = subprocess.run(command, env=env, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_loads_where_the_package_is_not_installed(repository: Path) -> None:
    interpret = "1" if util.find_spec("triton") else ""  # the Triton files and their imports, too
    _run(HIDDEN, str(repository), TRITON_INTERPRET=interpret)


def test_it_lives_beside_the_package_and_another_version(repository: Path, tmp_path: Path) -> None:
    one, other = hub_repository.write(repository), tmp_path / "other"
    another = hub_repository.write(other, _changed_source(tmp_path))
    _run(BESIDE, str(repository), one, str(other), another)
