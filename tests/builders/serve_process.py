"""`pixart serve` as a process of its own, with the embedded model, and what is left of it."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SECONDS = 240.0  # for a start or an end, on a machine that has other work


@dataclass
class Served:
    """errors: lines of standard error so far, all of them once it has ended."""

    process: "subprocess.Popen[str]"
    folder: Path
    url: str = ""
    errors: list[str] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def end(self, number: int) -> int:
        """Send a signal, and wait; returns the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(SECONDS)
        for thread in self.threads:
            thread.join(SECONDS)
        return code

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rpartition(":")[2])

    def leftovers(self) -> list[str]:
        """What lies in its folder for temporary files."""
        return sorted(path.name for path in self.folder.glob("pixart-serve-*"))


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[Served]:
    """One that listens, on a free port unless the options name one. folder: for temporary files."""
    port = () if "--port" in options else ("--port", "0")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "TMPDIR": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "pixart.serve", *port, *options],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    one = Served(process, folder)
    try:
        one.threads.append(threading.Thread(target=_read_errors, args=(one,), daemon=True))
        one.threads[0].start()
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        timer.cancel()
        assert line, f"it ended: {one.errors}"
        one.url = line.split()[0]
        yield one
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _read_errors(one: Served) -> None:
    assert one.process.stderr is not None
    with one.process.stderr as stream:
        one.errors.extend(line.rstrip("\n") for line in stream)
