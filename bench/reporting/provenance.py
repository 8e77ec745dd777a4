"""Who made a figure: the machine, and the command, commit, date and load of each run on it."""

from collections.abc import Sequence
from typing import Any

from bench.reporting.format import MISSING, SPREAD, percent

Content = dict[str, Any]
Row = dict[str, Any]
BUSY = 0.1  # share of the CPUs that other processes may take before a figure is provisional


def judged(row: Row) -> Row:
    """Without its time if it computes something else than the others: it is no win then."""
    if row.get("agrees") is not False:
        return row
    kept = {key: value for key, value in row.items() if key not in SPREAD}
    return kept | {"status": "computes something else"}


def runs(content: Content) -> str:
    """Which command, commit, date and load made the figures."""
    lines = []
    for index, run in enumerate(content["runs"], start=1):
        parts = [f"`{run['command']}`", run["date"], commit(run["machine"])]
        parts += [_methods(run["rows"]), _company(run["rows"])]
        parts += [_peaks(run["peaks"]), _clocks(run["rows"])]
        lines.append(f"{index}. " + "; ".join(part for part in parts if part))
    return "\n".join(["Runs:\n", *lines])


def commit(machine: Row) -> str:
    """The commit that was measured, or the hash of its sources where it was edited or has none."""
    name = f"commit `{(machine['commit'] or 'unknown')[:12]}`"
    if machine["modified"] or not machine["commit"]:
        return f"{name} with changes, sources `{machine['source_sha256'][:12]}`"
    return name


def _methods(rows: Sequence[Row]) -> str:
    timed = [row.get("dense", row) for row in rows]  # of a saving, two times
    found = sorted({one["method"] for one in timed if "method" in one})
    return f"timed by {', '.join(found)}" if found else ""


def _company(rows: Sequence[Row]) -> str:
    busy = [row["busy_elsewhere"] for row in rows if row.get("busy_elsewhere") is not None]
    if not busy:
        return ""
    said = f"other processes took up to {percent(max(busy), 0)} of the CPUs"
    return f"{said}: **provisional**" if max(busy) > BUSY else said


def _peaks(peaks: Row | None) -> str:
    if peaks is None:
        return f"peaks {MISSING}"
    said = [
        f"{peaks[name]['per_second'] / 1e12:.3g} TFLOP/s ({dtype} product)"
        for name, dtype in (("matmul", "bf16"), ("matmul_fp32", "fp32"))
        if name in peaks  # older files have none of fp32
    ]
    return f"peaks {', '.join(said)}, {peaks['copy']['per_second'] / 1e9:.3g} GB/s (copy)"


def _clocks(rows: Sequence[Row]) -> str:
    read = [row["clocks"]["sm_mhz"] for row in rows if (row.get("clocks") or {}).get("sm_mhz")]
    return f"SM clock {min(read):.0f} to {max(read):.0f} MHz" if read else ""


def machine_name(machine: Row) -> str:
    """Its GPU, or its CPU with what was used of it."""
    if machine.get("gpu"):
        return machine["gpu"]
    return f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"


def identity(machine: Row) -> str:
    """The machine, in a line."""
    libraries = ", ".join(f"{name} {v}" for name, v in machine["libraries"].items() if v)
    parts = [f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"]
    if machine.get("gpu"):
        parts.insert(0, f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}")
    return "; ".join([*parts, f"Python {machine['python']}", libraries])
