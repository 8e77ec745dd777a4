"""`.ci/environment`, with a stand-in for Python: what it makes, and what it makes again."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / ".ci" / "environment"
# Says yes to everything; `-m venv` makes .venv with another of itself.
PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$(dirname "$0")/calls"
case "$*" in
  *torch.cuda*) exit 1 ;;
  "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
esac
"""


def run(folder: Path) -> str:
    """Run the script; returns how Python was called."""
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "VENV": ".venv"}  # CI has one of its own
    subprocess.run([folder / ".ci" / "environment"], env=environment, check=True)
    return (folder / "calls").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci")
    return tmp_path


@pytest.mark.skipif(os.name == "nt", reason="bash")
def test_an_environment_that_was_interrupted_is_made_anew_and_a_whole_one_is_kept(
    folder: Path,
) -> None:
    half = folder / ".venv" / "bin"
    half.mkdir(parents=True)
    (half / "python").write_text('#!/usr/bin/env bash\n[ "$2" != pip ]\n')
    (half / "python").chmod(0o755)
    (half / "left").touch()
    assert run(folder).count("-m venv") == 1
    assert not (half / "left").exists()
    assert run(folder).count("-m venv") == 1, "the second time it is whole"
