"""Time and memory of a forward pass on this machine, each measured in a process of its own.

The peak of a process's memory never goes down: what a process measured before would hide in it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pixart.device import free_memory, processor_name, usable_cores
from pixart.files import parse_json
from pixart.scalability.rows import ROWS

WORKER = "pixart.scalability.one_pass"
ITEMSIZE = {"fp32": 4, "bf16": 2}
CPU_PARAMETERS = 1_000_000_000  # at most: beyond it a pass on a CPU takes minutes
ROOM = 1.25  # of the weights: what a pass needs at the least, activations included


@dataclass(frozen=True)
class Machine:
    """What a number was measured on. threads: that PyTorch computes with on the CPU."""

    device: str
    name: str
    cores: int
    threads: int
    torch: str

    def __str__(self) -> str:
        own = f", {self.cores} cores, {self.threads} threads" if self.device == "cpu" else ""
        return f"{self.name}{own}, PyTorch {self.torch}"


@dataclass(frozen=True)
class Pass:
    """One forward pass: its median in milliseconds, of how many, and the bytes held at the peak, weights
    included (None where the system does not tell). left_out: why it was not measured."""

    row: str
    dtype: str
    batch: int
    milliseconds: float | None = None
    repeats: int = 0
    peak_bytes: int | None = None
    left_out: str = ""


def machine(device: torch.device) -> Machine:
    """This one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    threads = torch.get_num_threads()
    return Machine(device.type, name, usable_cores(), threads, torch.__version__)


def measure(
    row: str, parameters: int, device: torch.device, size: int, dtype: str, batch: int
) -> Pass:
    """A row of the table at a size in pixels. parameters: how many it has."""
    reason = _left_out(parameters, device, dtype)
    if reason:
        return Pass(row, dtype, batch, left_out=reason)
    answer = ask(
        WORKER, {"row": row, "device": str(device), "size": size, "dtype": dtype, "batch": batch}
    )
    return Pass(row, dtype, batch, **answer)


def _left_out(parameters: int, device: torch.device, dtype: str) -> str:
    if device.type == "cpu" and parameters > CPU_PARAMETERS:
        return f"{parameters / 1e9:.2f} billion parameters, more than 1 billion on a CPU"
    needed, free = ROOM * parameters * ITEMSIZE[dtype], free_memory(device)
    if needed > free:
        return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return ""


def ask(worker: str, question: dict[str, Any]) -> dict[str, Any]:
    """What a module run in a process of its own answers, as JSON. A process that is killed, as the system does
    where memory runs out, answers {"left_out": why}; RuntimeError for any other that fails."""
    # sys.path as it is here, wherever the package was found; a session of its own, as Ctrl-C is ours to answer.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", worker],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env=environment,
        start_new_session=True,
    )
    if done.returncode < 0:
        return {"left_out": f"its process was killed by signal {-done.returncode}: out of memory?"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"{worker} failed with exit code {done.returncode}: {said[-1]}")
    answer: dict[str, Any] = parse_json(done.stdout, worker)
    return answer


def passes_text(passes: Sequence[Pass], macs: dict[str, float], where: Machine) -> list[str]:
    """Lines for a terminal. macs: 1e9 of a pass of one picture, by row."""
    lines = [
        f"Measured on {where}: random weights, the median of several passes after a warm-up. Peak memory "
        "holds the weights.",
        "",
        f"{'':<{_WIDTH}}  dtype  batch   GMACs         ms  GFLOP/s  peak GiB",
    ]
    for one in passes:
        start = f"{one.row:<{_WIDTH}}  {one.dtype:<5}  {one.batch:>5}"
        total = one.batch * macs[one.row]
        if one.milliseconds is None:
            lines.append(f"{start}  {total:>6.0f}  left out: {one.left_out}")
            continue
        speed = 2 * total / one.milliseconds * 1e3
        peak = "not told" if one.peak_bytes is None else f"{one.peak_bytes / 2**30:.2f}"
        lines.append(
            f"{start}  {total:>6.0f}  {one.milliseconds:>9,.1f}  {speed:>7,.0f}  {peak:>8}"
        )
    return lines


def passes_json(passes: Sequence[Pass], where: Machine) -> dict[str, Any]:
    """For --json."""
    return {"machine": asdict(where), "passes": [asdict(one) for one in passes]}


_WIDTH = max(map(len, ROWS))
