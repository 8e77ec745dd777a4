"""A torchvision that was built for another torch is named, where transformers and diffusers name others."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pixart.command import FAILURE, exit_code
from pixart.libraries import BrokenLibraryError, importing

ROOT = Path(__file__).parent.parent.parent
BROKEN = 'raise RuntimeError("operator torchvision::nms\\n does not exist")\n'


def torchvision(folder: Path, content: str) -> Path:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(content)
    information = folder / "torchvision-0.20.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n"
    )
    return folder


@pytest.mark.parametrize(
    "content", [BROKEN, "import nothing_of_this_name", "1 / 0", "raise SystemExit(3)", None, ""]
)
def test_torchvision_is_named_only_where_it_is_why_an_import_fails(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("torchvision"):
        pytest.skip("a torchvision is installed, and may be imported already")
    if content is not None:
        monkeypatch.syspath_prepend(torchvision(tmp_path, content))
    fault = ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'.")
    with pytest.raises(ImportError) as caught, importing():
        raise fault
    sys.modules.pop("torchvision", None)
    if not content:
        assert caught.value is fault
        return
    assert isinstance(caught.value, BrokenLibraryError) and exit_code(caught.value) == FAILURE
    message = str(caught.value)
    assert "Bloom" not in message and "\n" not in message
    assert "got torchvision 0.20.0 and torch 2." in message and "uninstall torchvision" in message


def test_a_torchvision_of_which_a_part_is_broken_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("torchvision"):
        pytest.skip("a torchvision is installed, and may be imported already")
    monkeypatch.syspath_prepend(torchvision(tmp_path, ""))
    with (
        pytest.raises(BrokenLibraryError, match="No module named 'torchvision.transforms'"),
        importing(),
    ):
        try:
            importlib.import_module("torchvision.transforms")
        except ImportError as error:
            raise RuntimeError("Could not import module 'BloomPreTrainedModel'.") from error
    sys.modules.pop("torchvision", None)


def drawn(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(torchvision(tmp_path, BROKEN))}
    command = ["-m", "pixart.generate", "a red circle", "--steps", "2", "--no-cache", *options]
    target = ["--output", str(tmp_path / "out"), "--device", "cpu", "--quiet"]
    return subprocess.run(
        [sys.executable, *command, *target],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_embedded_model_draws_beside_a_broken_torchvision(tmp_path: Path) -> None:
    done = drawn(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_drawing_beside_a_broken_torchvision_ends_in_one_line(tmp_path: Path) -> None:
    done = drawn(tmp_path, "--lora", str(tmp_path))  # which peft opens
    assert done.returncode == FAILURE, done.stderr
    (line,) = done.stderr.splitlines()
    assert "torchvision must fit torch" in line and "nms does not exist; install" in line
