"""The launch script, with stand-ins for Slurm's commands and for python."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "pixart" / "training" / "launch.sh"
PIXART = ["-m", "--", "pixart.train", "sigma", "--start", "x y"]
STAND_INS = {
    "python": 'printf "%s\\n" python "$@"',
    "srun": 'echo srun "$1"; shift; exec "$@"',
    "scontrol": '[[ $* == "show hostnames a[1-2]" ]] && printf "a1\\na2\\n"',
}


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def launch(commands: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env = {**kept, "PATH": f"{commands}:{os.environ['PATH']}", **variables}
    command = ["bash", str(SCRIPT), *(words or ("sigma", "--start", "x y"))]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=20)


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_machine_meets_itself(commands: Path) -> None:
    printed = lines(launch(commands))
    expected = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "gpu"]
    assert printed == expected + PIXART
    assert lines(launch(commands, PROCESSES="2"))[5] == "2"


def test_under_slurm_all_machines_meet_at_the_first_on_the_jobs_own_port(commands: Path) -> None:
    job = {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "41234"}
    printed = lines(launch(commands, **job))
    assert printed[0] == "srun --kill-on-bad-exit=1"
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "a1:21234"]
    assert printed[4:12] == [*meeting, "--rdzv-id", "pixart-41234"]
    assert printed[-6:] == PIXART


def test_many_machines_without_a_head_are_refused(commands: Path) -> None:
    done = launch(commands, NODES="2")
    assert done.returncode != 0 and "HOST:PORT of the first machine" in done.stderr
    assert "h:1" in lines(launch(commands, NODES="2", HEAD="h:1"))


def test_pictures_are_drawn_by_the_same_script(commands: Path) -> None:
    printed = lines(launch(commands, "generate", "a circle", "--size", "1k", PROCESSES="2"))
    assert printed[-7:] == ["2", "-m", "--", "pixart.generate", "a circle", "--size", "1k"]
    # Only as the first word: a recipe may be called so elsewhere.
    assert lines(launch(commands, "sigma", "generate"))[-3:] == [
        "pixart.train",
        "sigma",
        "generate",
    ]
