"""The operators' own distribution: what its wheel holds, and that it needs nothing of pixart."""

import os
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import pixart
import pixart_kernels

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "kernels"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # A copy, since setuptools leaves build/ and *.egg-info beside what it builds.
    source = tmp_path_factory.mktemp("kernels")
    listed = [KERNELS / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    for path in [*listed, *_files_of_the_package()]:
        copy = source / path.relative_to(KERNELS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(file)


def _files_of_the_package() -> list[Path]:
    package = KERNELS / "pixart_kernels"
    return [*package.rglob("*.py"), package / "py.typed"]


def _metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_the_wheel_holds_the_operators_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {path.relative_to(KERNELS).as_posix() for path in _files_of_the_package()}
    licences = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
    assert [wheel.read(name) for name in licences] == [(ROOT / "LICENSE").read_bytes()]


def test_it_says_what_it_needs_and_reads_like_the_readme(wheel: zipfile.ZipFile) -> None:
    metadata = _metadata(wheel)
    assert metadata["Name"] == "pixart-kernels"
    needs = {requirement.replace('"', "'") for requirement in metadata.get_all("Requires-Dist")}
    assert needs == {"torch>=2.10", "triton>=3.6; platform_system == 'Linux'"}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8").replace('"', "'")
    assert all(requirement in setup for requirement in needs)
    readme = metadata.get_payload(decode=True).decode("utf-8")
    assert readme.strip() == (KERNELS / "README.md").read_text(encoding="utf-8").strip()


def test_both_distributions_have_one_version(wheel: zipfile.ZipFile) -> None:
    assert _metadata(wheel)["Version"] == pixart_kernels.__version__ == pixart.__version__


def test_the_wheel_of_pixart_holds_the_same_operators(
    wheel: zipfile.ZipFile, request: pytest.FixtureRequest
) -> None:
    """Both may be installed in one environment: whichever comes second writes the same bytes."""
    main = request.config.getoption("--wheel")
    if main is None:
        pytest.skip("needs --wheel FILE; `make package` builds one and gives it")
    whole = zipfile.ZipFile(main)
    ours = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    inside = [name for name in whole.namelist() if name.startswith("pixart_kernels/")]
    assert {name: whole.read(name) for name in inside} == ours


ALONE = """
import sys
for name in ("pixart", "numpy", "safetensors", "transformers", "diffusers", "huggingface_hub", "PIL"):
    sys.modules[name] = None  # importing it raises
import torch, pixart_kernels as ops
assert ops.__file__.startswith(sys.argv[1]), ops.__file__
q = torch.randn(1, 6, 2, 72, requires_grad=True)
x, row = torch.randn(1, 6, 8, requires_grad=True), torch.randn(1, 8)
weight, bias = torch.randn(8, 1, 2, 2), torch.randn(8)
outs = [ops.flash_attention(q, q, q), ops.modulate(x, row, row), ops.gate_add(x, x, row)]
outs += ops.gate_add_modulate(x, x, row, row, row)
outs += ops.compress_kv(x, x, weight, bias, bias, bias, grid=(2, 3), ratio=2)
sum(out.sum() for out in outs).backward()
assert q.grad.isfinite().all() and x.grad.isfinite().all()
try:
    import triton
except ModuleNotFoundError:
    sys.exit()
import pixart_kernels.attention.backward_launcher, pixart_kernels.attention.forward_launcher
import pixart_kernels.compression.kernels, pixart_kernels.modulation.kernels
"""


def test_it_works_where_there_is_only_torch_and_triton(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": ""}
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
