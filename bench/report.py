"""`python -m bench.report`: BENCHMARKS.md and bench/plots/ from bench/results/*.json, and nothing else.

No figure is typed: --check, and a test, make the text again and compare; a picture carries the hash
of what it shows. What has no result is called not measured.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.measure import machine
from bench.reporting import plots, provenance, sections, targets
from bench.reporting.format import MISSING, table
from bench.reporting.targets import TARGETS

ROOT = Path(__file__).parent.parent
RESULTS, OUTPUT = ROOT / "bench" / "results", ROOT / "BENCHMARKS.md"
PLOTS = ROOT / "bench" / "plots"

Result = dict[str, Any]
Named = tuple[str, Result]  # the name of a file and what it holds
# A section for each command that measures, in this order, and how to call it.
COMMANDS: dict[str, tuple[Callable[[Result], str], str]] = {
    "saving": (sections.saving, "python -m bench.saving"),
    "cpu": (sections.cpu, "python -m bench.cpu"),
    "growth": (sections.growth, "python -m bench.growth"),
    "gpu": (sections.operators, "python -m bench.gpu --out DIR"),
    "suite": (sections.suite, "pytest bench --benchmark-only --benchmark-json FILE"),
}
ONLY = {"cpu": "cpu", "gpu": "cuda"}  # commands that measure one kind of device


def read_results(folder: Path) -> list[Named]:
    """The results by file name; those of other tools in the form of ours. Raises ValueError for
    what no measurement made."""
    found = []
    for path in sorted(folder.glob("*.json")):
        result = normal(path.name, json.loads(path.read_text(encoding="utf-8")))
        found.append((path.name, result))
    return found


def normal(name: str, result: Result) -> Result:
    """A result as {"kind", "runs"}, but for what bench.resources compiled, which ran nowhere."""
    if "benchmarks" in result:
        result = {"kind": "suite", "runs": [_suite_run(result)]}
    elif "parts" in result:
        peaks = result["peaks"][0] if result["peaks"] else None
        tiny = result["dry_run"]
        result = {"kind": "gpu", "runs": [{**result, "peaks": peaks, "tiny": tiny}]}
    if result.get("kind") not in (*COMMANDS, "resources"):
        raise ValueError(f"{name} must be a result of a bench command, got {result.get('kind')}")
    if result["kind"] == "resources":
        return result
    if any(run["tiny"] for run in result["runs"]):
        raise ValueError(f"{name} must be measured at real shapes, got a dry run at tiny ones")
    judged = [
        {**run, "rows": [provenance.judged(row) for row in run["rows"]]} for run in result["runs"]
    ]
    return {**result, "runs": judged}


def _suite_run(result: Result) -> Result:
    """pytest-benchmark's JSON, and what was not measured beside it; its quartiles take the place of
    the 20 % and 80 % quantiles."""
    rows = []
    for benchmark in result["benchmarks"]:
        stats = benchmark["stats"]
        times = {"median": stats["median"], "p20": stats["q1"], "p80": stats["q3"]}
        names = {"bench": benchmark["name"].split("[")[0], "group": benchmark["group"]}
        row = {**names, "status": "measured", **benchmark["extra_info"]}
        rows.append(row | times)
    return {
        "command": result.get("command", "pytest bench (options not recorded)"),
        "date": result["datetime"],
        "machine": result["machine_info"] | result["commit_info"],
        "peaks": result["peaks"],
        "tiny": False,
        "rows": rows + result.get("unmeasured", []),
    }


def render(results: Sequence[Named]) -> str:
    """BENCHMARKS.md."""
    compiled = [(name, result) for name, result in results if result["kind"] == "resources"]
    measured = [(name, result) for name, result in results if result["kind"] != "resources"]
    parts = [
        "# Benchmarks\n\n"
        "Written by `python -m bench.report` from `bench/results/`; nothing is typed. A section is "
        "about one machine; below each table stand the runs that made it: command, date, commit, "
        "load. Sizes are those of square images: 1k is 1024 × 1024 px and 4,096 tokens; XL/2 is the "
        "published model of 28 blocks and 0.6 B parameters. A share of peak is one of the largest "
        "rate that any of some twenty matrix products reached in the same process, in bf16 or, for "
        "fp32, in fp32; where a rate is of bytes, that any of as many copies did. Times are by the "
        "wall clock; on a GPU by events, which leave the host's launches out unless it says “with "
        "host”, or by a graph of many calls.",
        *(f"![{plot.title}](bench/plots/{plot.file})" for plot in plots.drawable(measured)),
    ]
    machines: dict[tuple[str, str], list[Named]] = {}
    for name, result in measured:
        where = result["runs"][-1]["machine"]
        machines.setdefault((where["device"], provenance.machine_name(where)), []).append(
            (name, result)
        )
    for device, title in (("cuda", "a GPU"), ("cpu", "a CPU")):
        own = {name: files for (kind, name), files in machines.items() if kind == device}
        if not own:
            parts.append(f"## On {title}\n\n{_nothing(device)}")
        for name, files in own.items():
            parts += [f"## On {title}: {name}", *_machine(device, files)]
    runs = [
        (name, run)
        for name, result in measured
        for run in result["runs"]
        if result["kind"] == "gpu" and targets.GPU in provenance.machine_name(run["machine"])
    ]
    parts.append(_targets([result for _, result in compiled], runs))
    parts += [_resources(name, result) for name, result in compiled]
    return "\n\n".join(parts) + "\n"


def _nothing(device: str) -> str:
    if device == "cpu":
        return "Not measured."
    return (
        "Not measured: no GPU was available so far. `python -m bench.gpu --out DIR` measures the "
        "operators and steps in one run; the other commands below run on a GPU as well."
    )


def _machine(device: str, files: Sequence[Named]) -> Iterable[str]:
    made: dict[str, list[str]] = {}  # runs by what they ran on: libraries change
    for name, file in files:
        for index, run in enumerate(file["runs"], start=1):
            identity = provenance.identity(run["machine"])
            made.setdefault(identity, []).append(f"run {index} of `{name}`")
    yield "\n".join(
        f"- {identity}" + (f" ({', '.join(runs)})" if len(made) > 1 else "")
        for identity, runs in sorted(made.items())
    )
    for kind, (section, command) in COMMANDS.items():
        own = [(name, result) for name, result in files if result["kind"] == kind]
        for name, result in own:
            yield f"{section(result)}\n\nKept in `bench/results/{name}`."
        if not own and ONLY.get(kind, device) == device:
            yield f"`{command}`: not measured on this machine."


def _targets(compiled: Sequence[Result], runs: Sequence[Named]) -> str:
    """What is to be reached on one GPU, what runs of bench.gpu on it reached, and the cycles that the
    compiled code will need."""
    columns = ["what", f"to be reached on one {targets.GPU}"]
    columns += [
        f"measured, `{name}`: {run['date']}, {provenance.commit(run['machine'])}"
        for name, run in runs
    ] or ["measured"]
    columns += [f"cycles, Triton {result['triton']}" for result in compiled]
    lines = [
        "## What a GPU is to reach",
        "",
        "Cycles are those that a tile of 64 queries × 128 keys takes at least on each pipe of an "
        "sm_90 SM, counted in the compiled code of the default configuration: tensor cores / "
        "exponentials / FMA / ALU / issue slots. The largest is the bound.",
        "",
    ]
    cells = []
    for target in TARGETS:
        measured = [targets.measured(target, run["rows"]) for _, run in runs] or [MISSING]
        cycles = [_cycles(result, target) for result in compiled]
        cells.append([target.name, target.goal, *measured, *cycles])
    return "\n".join([*lines, table(columns, cells)])


def _cycles(result: Result, target: targets.Target) -> str:
    for row in result["rows"]:
        matches = row["kernel"].strip("_").removesuffix("_kernel").endswith(target.kernel)
        is_case = "4k" in row["floor_bytes"].get(target.case, ()) and row["architecture"] == "sm_90"
        if target.kernel and matches and is_case and row["default"] and row.get("cycles"):
            return " / ".join(str(count) for count in row["cycles"].values())
    return ""


def _resources(name: str, result: Result) -> str:
    is_current = result["kernels_sha256"] == machine.source_hash(("kernels",))
    warning = "" if is_current else "\n\n**The kernels have changed since.**"
    head = (
        f"## Compiled code, Triton {result['triton']}\n\n"
        f"`{result['command']}` wrote `bench/results/{name}`; {result['date']}; "
        f"{provenance.commit(result)}. It needs no GPU. Counts are of the inner loop.{warning}\n\n"
        "| GPU | kernel | configuration | registers | spilled bytes | shared KiB | warps per SM "
        "| useful / issued | waits | defects |\n" + "|---" * 10 + "|"
    )
    return "\n".join([head, *_rows(result["rows"])])


def _rows(rows: Iterable[Result]) -> Iterable[str]:
    for row in rows:
        if not row["default"]:
            continue
        name = f"| {row['architecture']} | {row['kernel'].strip('_')} | {row['config']} "
        defects = "; ".join(row["defects"])
        if row["error"]:
            yield f"{name}| | | | | | | {defects} |"
            continue
        useful = "" if row["useful_share"] is None else f"{row['useful_share']:.3f}"
        yield (
            f"{name}| {row['registers']} | {row['spill_bytes']} | {row['shared_bytes'] / 1024:.0f} "
            f"| {row['resident_warps']} | {useful} | {row['waits']} | {defects} |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether all is current")
    options = parser.parse_args(arguments)
    results = read_results(RESULTS)
    text = render(results)
    measured = [(name, result) for name, result in results if result["kind"] != "resources"]
    if not options.check:
        OUTPUT.write_text(text, encoding="utf-8")
        plots.draw(measured, PLOTS)
        return 0
    stale = plots.stale(measured, PLOTS)
    if OUTPUT.read_text(encoding="utf-8") != text:
        stale.append(OUTPUT.name)
    for name in stale:
        print(f"{name} is not what bench/results says; run python -m bench.report")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
