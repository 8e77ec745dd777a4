"""How a report says things: figures with their spread, tables, machines, and which run made what."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.measure import machine
from bench.measure.results import Content, Row

TEMPLATES = Path(__file__).with_name("templates")  # what is prose in the files that are made
MISSING = "not measured"
BUSY = 0.1  # share of the CPUs that other processes may take before a figure is provisional


def spread(timing: Row) -> str:
    """A median with its 20 % and 80 % quantiles, in one unit."""
    scale, unit = _unit(timing["median"])
    median, low, high = (f"{scale * timing[key]:.4g}" for key in ("median", "p20", "p80"))
    return f"{median} {unit} ({low} to {high})"


def duration(seconds: float) -> str:
    scale, unit = _unit(seconds)
    return f"{scale * seconds:.3g} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    return (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")


def memory(held: int | None) -> str:
    if held is None:
        return MISSING
    return f"{held / 2**30:.2f} GiB" if held >= 2**30 else f"{held / 2**20:.0f} MiB"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (columns, *lines)]
    head, *rest = ("| " + " | ".join(line) + " |" for line in cells)
    return "\n".join([head, "|---" * len(columns) + "|", *rest])


def fill(template: Path, parts: Mapping[str, object]) -> str:
    """The text of a file, with parts in the places of their names between @; empty ones leave no gap."""
    text = template.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"@{name}@", str(part))
    return re.sub(r"\n{3,}", "\n\n", text)


def machine_name(identity: Row | None) -> str:
    """Without trade marks and threads, for a narrow column."""
    plain = re.sub(r"\(\w+\)|\b(Processor|CPU)\b|@[^,]*|, \d+ threads", "", machine.name(identity))
    return " ".join(plain.replace(" ,", ",").split())


def commit(source: Row) -> str:
    """The commit that was measured, or the hash of its sources where it was edited or has none."""
    name = f"`{(source['commit'] or 'unknown')[:12]}`"
    if source["modified"] or not source["commit"]:
        return f"{name} with changes, sources `{source['source_sha256'][:12]}`"
    return name


def remarks(run: Row) -> str:
    """What makes the figures of a run doubtful, or of other code than today's; empty if nothing."""
    words = ["a dry run: these times mean nothing"] if run["dry_run"] else []
    if is_provisional(run):
        words.append(f"**provisional**: others took up to {percent(busiest(run), 0)} of the CPUs")
    if not run["complete"]:
        words.append("did not come to its end")
    if run["source"]["kernels_sha256"] != machine.source_hash(("kernels",)):
        words.append("the kernels have changed since")
    return "; ".join(words)


def busiest(run: Row) -> float:
    """The largest share of the CPUs that other processes took, 0 where no row knows it."""
    return max((row.get("busy_elsewhere") or 0 for row in run["rows"]), default=0)


def is_provisional(run: Row) -> bool:
    return busiest(run) > BUSY


def runs(content: Content) -> str:
    """Which machine, command, date and commit made the figures of each run, and remarks on it."""
    lines, machines = [], dict[str, list[str]]()
    for number, run in enumerate(content["runs"], start=1):
        parts = [
            f"`{run['command']}`",
            run["date"],
            f"commit {commit(run['source'])}",
            remarks(run),
        ]
        parts += [_peaks(run["peaks"]), _clocks(run["rows"])]
        lines.append(f"{number}. " + "; ".join(part for part in parts if part))
        if run["machine"]:
            machines.setdefault(_machine(run["machine"]), []).append(str(number))
    where = [f"- run {', '.join(made)}: {details}" for details, made in machines.items()]
    return "\n".join(["Runs:\n", *lines, *([""] if where else []), *where])


def _machine(identity: Row) -> str:
    """With its libraries, which change."""
    libraries = ", ".join(f"{name} {v}" for name, v in identity["libraries"].items() if v)
    gpu = f", driver {identity['driver']}, CUDA {identity['cuda']}" if "gpu" in identity else ""
    return f"{machine.name(identity)}{gpu}; Python {identity['python']}, {libraries}"


def _peaks(peaks: Row | None) -> str:
    if peaks is None:
        return ""
    rates = [
        f"{peaks[name]['per_second'] / 1e12:.3g} TFLOP/s ({dtype} product)"
        for name, dtype in (("matmul", "bf16"), ("matmul_fp32", "fp32"))
        if name in peaks  # older files have none of fp32
    ]
    return f"peaks {', '.join(rates)}, {peaks['copy']['per_second'] / 1e9:.3g} GB/s (copy)"


def _clocks(rows: Sequence[Row]) -> str:
    read = [row["clocks"]["sm_mhz"] for row in rows if (row.get("clocks") or {}).get("sm_mhz")]
    return f"SM clock {min(read):.0f} to {max(read):.0f} MHz" if read else ""
