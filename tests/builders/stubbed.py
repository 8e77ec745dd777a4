"""Programs in processes of their own, where a stub of the CUDA driver stands for a GPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.compiled import stub_driver
from pixart.files import parse_json

ROOT = Path(__file__).parent.parent.parent
BEFORE = """
import json
from pathlib import Path
from bench.compiled import stub_driver
stub_driver.activate({architecture!r}, {log!r} and Path({log!r}))
import torch
from pixart_kernels import *
torch.set_num_threads(1)
"""


def run(
    program: str, architecture: str = "sm_90", log: Path | None = None, **environment: str
) -> Any:
    """What the program printed last, as JSON; stderr if it failed, as the text of an AssertionError.

    It has torch, the operators, json and stub_driver. log: holds a line for each launch and map."""
    done = start(program, architecture, log, **environment)
    assert done.returncode == 0, done.stderr
    return parse_json(done.stdout.splitlines()[-1], "the program's last line")


def start(
    program: str, architecture: str = "sm_90", log: Path | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    before = BEFORE.format(architecture=architecture, log=str(log) if log else "")
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", before + program]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def has_compiler() -> bool:
    try:
        stub_driver.build()
    except RuntimeError:
        return False
    return True
