"""How long the first call of every operator takes in a fresh process: with nothing compiled, and with all
of it in Triton's cache.

    python -m bench.workloads.launches DEVICE SIZE [TABLE]      seconds of the first and the second call, as JSON
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.workloads.launches")

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.measure import compilation, table, timing
from bench.measure.case import Case, Context
from bench.measure.machine import ROOT
from bench.measure.results import Row
from bench.workloads import comparisons
from bench.workloads.operators import OPERATORS, Workload
from pixart.files import parse_json

LIMIT = 120  # seconds of a process


def case(size: str, configured: Path | None = None) -> Case:
    """configured: a table of configurations to launch by, if it is there by then."""
    return Case(f"first launches/{size}", partial(_run_both, size, configured))


def _run_both(size: str, configured: Path | None, context: Context) -> None:
    if context.device.type == "cpu":
        context.row(
            "ours", "not measured: no kernel of ours runs here", **_what("any operator", size)
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        for state in ("nothing compiled", "compiled before"):
            context.announce(state, compilation.SECONDS)
            for name, seconds in _run(size, context.device, Path(folder), configured).items():
                context.row(f"{name}, {state}", **_what(name, size), first_calls=seconds)


def _what(name: str, size: str) -> Row:
    return {
        "what": f"first call of {name}",
        "shape": {"size": size, "batch": 1},
        "dtype": "bfloat16",
    }


def _run(
    size: str, device: torch.device, folder: Path, configured: Path | None
) -> dict[str, list[float]]:
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), *inherited]))
    given = [str(configured)] if configured is not None and configured.exists() else []
    done = subprocess.run(
        [sys.executable, "-m", "bench.workloads.launches", str(device), size, *given],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    if done.returncode:
        raise RuntimeError(
            f"the process that launches ended with {done.returncode}: {done.stderr[-1000:]}"
        )
    found: dict[str, list[float]] = parse_json(done.stdout.splitlines()[-1], "what it printed")
    return found


def first_and_second(device: torch.device, size: str) -> dict[str, list[float]]:
    """By operator and direction, the seconds that its first call takes, and its second."""
    found = {}
    for operator in OPERATORS.values():
        if not operator.kinds:  # a variant of another
            continue
        work = Workload(operator, size, operator.kinds[0])
        inputs = work.inputs(device)
        for backward in (False, True) if operator.has_backward else (False,):
            call = comparisons.call_of(work.variants()["ours"], inputs, backward)
            name = f"{operator.name} {comparisons.DIRECTIONS[backward]}"
            found[name] = [_seconds(call, device) for _ in range(2)]
    return found


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    timing.synchronize(device)
    began = time.perf_counter()
    call()
    timing.synchronize(device)
    return time.perf_counter() - began


def main() -> int:
    if len(sys.argv) > 3:
        table.adopt(Path(sys.argv[3]))
    print(json.dumps(first_and_second(torch.device(sys.argv[1]), sys.argv[2])))
    return 0
