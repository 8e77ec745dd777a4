"""What is installed, what importing costs, and the folder that must never become a package."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("torch", "transformers", "diffusers", "PIL", "tyro", "numpy")


def _loaded(code: str) -> set[str]:
    """The names out of HEAVY that a fresh interpreter has loaded after running the code."""
    report = f"import sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return set(eval(result.stdout.splitlines()[-1]))


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert (ROOT / "kernels" / "pixart_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_pixart_loads_nothing_heavy() -> None:
    assert _loaded("import pixart") == set()


def test_help_answers_without_torch() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['generate', '--help']\n"
        "try: runpy.run_module('pixart.generate', run_name='__main__')\n"
        "except SystemExit as exit: assert not exit.code"
    )
    assert not _loaded(code) & {"torch", "transformers", "diffusers", "PIL"}


def test_drawing_imports_neither_diffusers_nor_transformers(tmp_path: Path) -> None:
    """They take longer to import than a small picture to draw."""
    arguments = ["generate", "a red circle", "--steps", "1", "--no-cache"]  # T5 reads it too
    arguments += ["--output", str(tmp_path / "a.png")]
    code = (
        "import runpy, sys\n"
        f"sys.argv = {arguments!r}\n"
        "try: runpy.run_module('pixart.generate', run_name='__main__')\n"
        "except SystemExit as exit: assert not exit.code"
    )
    assert _loaded(code) & {"torch", "transformers", "diffusers"} == {"torch"}
    assert (tmp_path / "a.png").is_file()


def test_the_public_names_are_there() -> None:
    import pixart

    for name in pixart.__all__:
        assert getattr(pixart, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = pixart.Pipelin  # type: ignore[attr-defined]


def test_hugging_face_imports_from_the_repository_root() -> None:
    code = (
        "from transformers import T5EncoderModel\n"
        "from diffusers import AutoencoderKL, PixArtSigmaPipeline"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("top", [ROOT / "pixart", ROOT / "kernels" / "pixart_kernels"])
def test_every_folder_with_modules_is_packaged(top: Path) -> None:
    """setup.py packages what setuptools finds: the folders with an `__init__.py`."""
    sources = {path.parent for path in top.rglob("*.py")}
    packages = {path.relative_to(top.parent).as_posix().replace("/", ".") for path in sources}
    assert packages == set(find_packages(str(top.parent), include=[f"{top.name}*"]))


def test_the_wheel_holds_the_packages_the_model_and_nothing_else(
    request: pytest.FixtureRequest,
) -> None:
    wheel = request.config.getoption("--wheel")
    if wheel is None:
        pytest.skip("needs --wheel FILE; `make package` builds one and gives it")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"pixart", "pixart_kernels"}
    for file in ("pixart/py.typed", "pixart_kernels/py.typed", "pixart/pipeline/text_to_image.py"):
        assert file in names
    nodes = ROOT / "pixart" / "comfyui"  # what a user links into ComfyUI, guide and workflow too
    assert {p.relative_to(ROOT).as_posix() for p in nodes.glob("*.*")} <= set(names)
    assets = ROOT / "pixart" / "assets"
    files = {p.relative_to(ROOT).as_posix() for p in assets.rglob("*") if p.is_file()}
    # Logs of training and pictures of the guide stay in the repository.
    kept = {name for name in files if "/log/" in name or name.startswith("pixart/assets/pictures/")}
    assert kept and {name for name in names if name.startswith("pixart/assets/")} == files - kept
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "pixart").rglob("*.py")}
    assert modules <= set(names)


def test_what_a_package_index_shows_links_to_nothing_in_the_repository() -> None:
    shown = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "--long-description"],
        capture_output=True, text=True, encoding="utf-8", cwd=ROOT, check=True,
    ).stdout  # fmt: skip
    targets = re.findall(r"\]\(([^)]*)\)", shown)
    assert targets and all(target.startswith("https://") for target in targets)
    assert "its model card says" in " ".join(shown.split()), "the words of a link stay"
