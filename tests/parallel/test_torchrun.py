"""Drawing under torchrun itself: what ends one process ends all of them, and is said once."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from forked import ROOT

FOR_EVER = ["a red circle", "--steps", "400", "--size", "768", "--no-cache", "--output", "out.png"]
PATIENCE = 300  # seconds, where the machine has much else to do


class Job:
    """A job of torchrun in a process group of its own, and what it has said so far."""

    def __init__(self, folder: Path, processes: int, *words: str) -> None:
        path = ":".join(map(str, (ROOT, ROOT / "kernels")))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", "--", "pixart.generate", *words]
        self.said = ""
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def wait_for(self, words: str) -> None:
        end = time.monotonic() + PATIENCE
        while words not in self.said:
            assert self.process.poll() is None and time.monotonic() < end, self.said
            time.sleep(0.1)

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        for child in _children(self.process.pid):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={number}".encode() in environment:
                return child
        raise AssertionError(f"no rank {number}: {self.said}")

    def end(self) -> int:
        """Its exit code, once it is over and has nothing left that runs."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        with pytest.raises(ProcessLookupError):
            os.killpg(self.process.pid, 0)
        return code

    @property
    def lines(self) -> list[str]:
        """Those of ours that tell how it ended."""
        return [line for line in self.said.splitlines() if line.startswith("pixart.generate: ")]


def _children(parent: int) -> list[int]:
    return [*map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())]


@contextmanager
def started(folder: Path, processes: int, *words: str) -> Iterator[Job]:
    job = Job(folder, processes, *words)
    try:
        yield job
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait(PATIENCE)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.exhaustive
@linux
@pytest.mark.parametrize(
    ("whom", "layout"),
    [("all", "guidance"), ("the first", "guidance"), ("the first", "pictures")],
)
def test_ctrl_c_cancels_all(tmp_path: Path, whom: str, layout: str) -> None:
    with started(tmp_path, 2, *FOR_EVER, "--num-images", "2", "--parallel", layout) as job:
        job.wait_for("denoise ")
        if whom == "all":
            os.killpg(job.process.pid, signal.SIGINT)
        else:
            os.kill(job.rank(0), signal.SIGINT)
        assert job.end() != 0
    assert job.lines == ["pixart.generate: cancelled; finished pictures are kept"], job.said
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
@linux
def test_a_process_that_is_killed_ends_all(tmp_path: Path) -> None:
    with started(tmp_path, 2, *FOR_EVER, "--parallel", "sequence") as job:
        job.wait_for("denoise ")
        os.kill(job.rank(1), signal.SIGKILL)
        assert job.end() != 0
    assert "exitcode  : -9" in job.said and "Traceback" not in "".join(job.lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("processes", "layout", "reason"),
    [
        (3, "guidance+sequence", "beside tokens for 4, 6, 8 ..., not 3"),
        (4, "sequence", "4 processes for the tokens are more than the 3 heads of attention"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(
    tmp_path: Path, processes: int, layout: str, reason: str
) -> None:
    with started(tmp_path, processes, *FOR_EVER, "--parallel", layout) as job:
        assert job.end() == 1  # torchrun's own
    [line] = job.lines
    assert reason in line and "exitcode  : 2" in job.said
    assert not list(tmp_path.iterdir())
