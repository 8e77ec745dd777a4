"""What a bench command found, in one file per command and machine.

    {"kind": "saving", "runs": [{"command", "date", "machine", "peaks", "rows": [...]}, ...]}

Each run of the command adds one entry. A row names its `case`; measured again, by a later run of the
command, it takes the place of the earlier one. So a machine can be measured size by size, and every
row still tells, by its run, the command, the commit and the date that made it.
"""

import argparse
import json
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import write
from bench.measure import machine
from bench.reporting.provenance import machine_name

Row = dict[str, Any]
Content = dict[str, Any]
PROCESSOR_TIMES = Path("/proc/stat")
IDLE = (3, 4)  # columns of its first line: idle, and waiting for a disk
TICKS = 100  # per second: what Linux reports in, whatever its own clock (proc(5), USER_HZ)


def parser(
    module: str, about: str, sizes: Sequence[str], more: Sequence[str]
) -> argparse.ArgumentParser:
    """The options that the commands share. sizes: those measured unless told; more: others allowed."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{module}", description=about)
    made.add_argument("--json", type=Path, help="file to keep the result in, beside earlier runs'")
    made.add_argument(
        "--sizes", nargs="+", default=sizes, choices=[*sizes, *more], help="all of the first ones"
    )
    made.add_argument("--rounds", type=int, default=5, help="how often to time each, at least (5)")
    made.add_argument("--seconds", type=float, default=10, help="go on timing for so long (10)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


class Run:
    """One run of a command: its rows, and what one must know to judge them.

    kind: the command's module name. tiny: peaks of small products, to try the command out.
    """

    def __init__(
        self, kind: str, arguments: Sequence[str], device: torch.device, *, tiny: bool = False
    ) -> None:
        self.kind = kind
        self.began = time.time()
        self.clocks = machine.ClockLog(device)
        self.values: dict[str, Any] = {
            "command": shlex.join(["python", "-m", f"bench.{kind}", *arguments]),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began)),
            "tiny": tiny,
            "load_before": _load(),
            "machine": machine.identity(device),
            "peaks": machine.peaks(device, tiny=tiny),
        }
        self.rows: list[Row] = []
        self._since = Moment()

    def add(self, rows: Mapping[str, Row]) -> None:
        """Rows by case that were measured in turn, since the last ones or the beginning. In each stands
        what other processes took of the CPUs meanwhile."""
        now = Moment()
        company = {
            "busy_elsewhere": now.elsewhere(self._since),
            "clocks": self.clocks.since(self._since.wall),
        }
        self._since = now
        self.rows += [plain({"case": case, **row, **company}) for case, row in rows.items()]

    def save(self, path: Path | None) -> Content:
        """What is known now: this run, beside those that the file holds. Raises ValueError for a file
        of another command or machine. Without a path nothing is kept."""
        seconds = round(time.time() - self.began, 1)
        run = {**self.values, "seconds": seconds, "rows": self.rows}
        content = {"kind": self.kind, "runs": [run]}
        if path is not None:
            earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            content = merge(earlier, content)
            write(path, content)
        return content


def merge(earlier: Content | None, new: Content) -> Content:
    """The file's next content: rows that were measured again are no longer in earlier runs."""
    if earlier is None:
        return new
    (run,) = new["runs"]
    if earlier["kind"] != new["kind"]:
        raise ValueError(f"--json must name a file of {new['kind']}, got one of {earlier['kind']}")
    cases = {row["case"] for row in run["rows"]}
    kept = []
    for other in earlier["runs"]:
        if machine_name(other["machine"]) != machine_name(run["machine"]):
            raise ValueError(
                f"--json must name a file of this machine, {machine_name(run['machine'])}, "
                f"got one of {machine_name(other['machine'])}"
            )
        rows = [row for row in other["rows"] if row["case"] not in cases]
        # A run that is going on saves more than once.
        if rows and (other["command"], other["date"]) != (run["command"], run["date"]):
            kept.append({**other, "rows": rows})
    return {"kind": new["kind"], "runs": [*kept, run]}


def plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become words."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Moment:
    """Seconds of CPU time up to now: of this process and its children, and of the whole machine."""

    def __init__(self) -> None:
        self.wall = time.time()
        self.own = sum(os.times()[:4])
        self.all = _busy_seconds()

    def elsewhere(self, before: "Moment") -> float | None:
        """The share of all cores that others took since `before`; None where nobody tells, and where
        it was too short a time ago for the system's ticks to tell."""
        wall = self.wall - before.wall
        if self.all is None or before.all is None or wall < 100 / TICKS:
            return None
        others = (self.all - before.all) - (self.own - before.own)
        return max(others, 0.0) / (wall * (os.cpu_count() or 1))


def _busy_seconds() -> float | None:
    """Stolen time counts: another virtual machine had the core."""
    if not PROCESSOR_TIMES.exists():
        return None
    columns = PROCESSOR_TIMES.read_text(encoding="ascii").splitlines()[0].split()[1:9]
    busy = sum(int(ticks) for index, ticks in enumerate(columns) if index not in IDLE)
    return busy / TICKS


def _load() -> float | None:
    """Processes that wanted a core, in the last minute's mean."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
