"""The one form of results, and the one writer of it.

    {"schema": 2, "kind": "gpu", "runs": [run, ...]}

kind: the command that measured: "gpu", "suite" (pytest bench), "saving", "cpu", "growth", "host",
"parallel", "resources", "studies.editing" or "studies.few_steps".
Each run of the command on a machine adds one run to the file:

    command, date, seconds      what was typed, when (UTC), how long it took
    complete                    whether it came to its end, whatever failed on the way
    dry_run                     whether at tiny shapes, whose times mean nothing
    machine                     device, processor, cores, threads, python, libraries; gpu, driver, ...
                                (resources compiles for machines that are not there: None)
    source                      commit, modified, source_sha256 (kernels, pixart, bench), kernels_sha256
    load_before                 processes that wanted a core, in the last minute's mean
    peaks                       of the machine, by name: per_second
    rows                        see below
    unfinished                  cases that came to no end: case, variant, event ("failure", "crash" or
                                "skipped") and reason

A row is about one variant of one case. All rows have

    id                          part/case/variant; a later run that measures it again takes its place
    part                        "correctness", "configurations", "operators", "steps", "saving", ...
    what                        in words; rows of the same what, shape and dtype are comparable
    variant                     whose: "ours", "ours compressed", "diffusers", "sdpa flash", ...
    shape                       size ("1k"), batch, tokens and what else there is
    dtype                       "bfloat16"
    status                      "measured", or the reason why not

and, as far as they are known,

    seconds                     median, p20, p80 (quantiles), count (of samples) and method ("graph",
                                "events", "events with host" or "wall") of one call
    flops, bytes                of one call, at least (pixart.cost)
    share_of_matmul, share_of_copy      of the peaks that were measured in the same process
    held_bytes, peak_bytes      of memory before a call (weights, states), and beyond that at its peak
    errors, errors_from         relative errors by result, and whose results they are errors from, or
                                "not compared"
    agrees                      whether they are small enough; None where nothing was compared
    errors_beside               the relative error from another variant's result, by its name
    clocks, busy_elsewhere      meanwhile: of the GPU; the share of the CPUs that others took

and what is particular to its part (`saving`, `floors`, `kernels`, `config`, `images_per_second`, ...).
Infinities and NaN are words: JSON has none.
"""

import calendar
import math
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import machine
from pixart.files import parse_json, read_json, write_json

SCHEMA = 2
DATE = "%Y-%m-%dT%H:%M:%SZ"
KINDS = (
    "gpu", "suite", "saving", "cpu", "growth", "host", "parallel", "resources", "studies.editing",
    "studies.few_steps",
)  # fmt: skip
Row = dict[str, Any]
Content = dict[str, Any]


def started(
    kind: str, arguments: Sequence[str], device: torch.device | None, *, dry_run: bool = False
) -> Content:
    """What is known of a run before it measures anything. device: None where nothing runs."""
    return {
        "command": command(kind, arguments),
        "date": time.strftime(DATE, time.gmtime()),
        "seconds": 0.0,
        "complete": False,
        "dry_run": dry_run,
        "machine": None if device is None else machine.identity(device),
        "source": machine.revision(),
        "load_before": machine.load(),
        "peaks": None,
        "rows": [],
        "unfinished": [],
    }


def command(kind: str, arguments: Sequence[str]) -> str:
    program = ["pytest"] if kind == "suite" else ["python", "-m", f"bench.{kind}"]
    return shlex.join([*program, *arguments])


def read(path: Path) -> Content:
    """A file of results. Raises ValueError for anything else."""
    content = read_json(path)
    if content.get("schema") != SCHEMA or content.get("kind") not in KINDS:
        raise ValueError(
            f"{path.name} must be results of schema {SCHEMA} by one of {', '.join(KINDS)}, "
            f"got schema {content.get('schema')} of {content.get('kind')}"
        )
    return content


def rows_of_kind(results: Iterable[tuple[str, Content]], kind: str) -> list[Row]:
    """The rows of all runs of a kind, of results by name."""
    return [
        row
        for _, result in results
        if result["kind"] == kind
        for run in result["runs"]
        for row in run["rows"]
    ]


def read_all(folder: Path) -> list[tuple[str, Content]]:
    """The results of a folder by name. Raises ValueError for what no measurement made, and for dry runs."""
    found = []
    for path in sorted(folder.glob("*.json")):
        result = read(path)
        if any(run["dry_run"] for run in result["runs"]):
            raise ValueError(f"{path.name} must be measured at real shapes, got a dry run")
        found.append((path.stem, result))
    return found


def save(path: Path | None, kind: str, run: Content, *, beside: bool = True) -> Content:
    """The run, beside those that the file holds already, written whole or not at all; without a path
    nothing is kept. Raises ValueError for a file of another command or machine."""
    began = calendar.timegm(time.strptime(run["date"], DATE))
    run["seconds"] = round(time.time() - began, 1)
    earlier = read(path) if beside and path is not None and path.exists() else None
    content = merged(earlier, kind, plain(run))
    if path is not None:
        write_json(path, content, indent=1)
    return content


def merged(
    earlier: Content | None, kind: str, run: Content, *, one_machine: bool = True
) -> Content:
    """The file's next content: rows that were measured again are no longer in earlier runs. one_machine:
    refuses a run of another, whose times would not compare; what has no times may come from several."""
    kept = []
    if earlier is not None and earlier["kind"] != kind:
        raise ValueError(f"--json must name a file of {kind}, got one of {earlier['kind']}")
    again = {row["id"] for row in run["rows"]}
    for other in earlier["runs"] if earlier else ():
        here, there = (machine.name(one["machine"]) for one in (run, other))
        if one_machine and here != there:
            raise ValueError(f"--json must name a file of this machine, {here}, got one of {there}")
        rows = [row for row in other["rows"] if row["id"] not in again]
        # A run that is going on saves more than once.
        if rows and (other["command"], other["date"]) != (run["command"], run["date"]):
            kept.append({**other, "rows": rows})
    return {"schema": SCHEMA, "kind": kind, "runs": [*kept, run]}


def plain(value: Any) -> Any:
    """As JSON keeps it."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if key != "samples"}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_events(path: Path) -> list[dict[str, Any]]:
    """Of a worker that may have died in the middle of a line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [
        parse_json(line, str(path)) for line in lines if line.startswith("{") and line.endswith("}")
    ]
