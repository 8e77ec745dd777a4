"""The examples run as they are, and say what they found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "kernels" / "examples"
LAST_LINES = {
    "own_block.py": "gradient of x differs by",
    "accelerate_diffusers.py": "restored: the picture of before, bit for bit",
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(LAST_LINES)


@pytest.mark.parametrize("name", LAST_LINES)
def test_an_example_runs_without_a_gpu(name: str) -> None:
    # They compare with plain PyTorch and with the pipeline of before by themselves, and fail.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": ""}
    paths = [str(EXAMPLES.parents[1]), str(EXAMPLES.parent)]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(LAST_LINES[name])
    if name == "accelerate_diffusers.py":
        assert "merged 2×2, untrained: differs by 0.0e+00" not in done.stdout
        assert "accelerate() changes nothing: the kernels need a GPU" in done.stderr
