"""BENCHMARKS.md: what is faster than whom by how much, what is slower, and what was not measured."""

import re
from collections.abc import Iterable, Iterator, Sequence

from bench.measure.results import Row
from bench.reporting import (
    comparisons,
    editing,
    exchange,
    few_steps,
    host,
    ladder,
    pages,
    parallel,
    plots,
    scaling,
)
from bench.reporting.comparisons import Comparison
from bench.reporting.ladder import GPU
from bench.reporting.plots import Named
from bench.reporting.targets import CASE, MODELS, TARGETS, Target
from bench.reporting.text import (
    MISSING,
    TEMPLATES,
    commit,
    fill,
    is_provisional,
    machine_name,
    remarks,
    table,
)

SUMMARY = ("what", "at the largest image", "worst of all", "slower in", "machine", "date")
DEVICES = {"cuda": "a GPU", "cpu": "a CPU"}


def render(results: Sequence[Named]) -> str:
    """The whole file."""
    pictures = [f"![{plot.title}](bench/plots/{plot.file})" for plot in plots.drawable(results)]
    parts = {
        "SUMMARY": table(SUMMARY, _summary(results)),
        "TARGETS": _targets(results),
        "LADDER": ladder.overview(results),
        "HOST": host.overview(results),
        "EDITING": editing.overview(results),
        "FEW_STEPS": few_steps.overview(results),
        "EXCHANGE": exchange.overview(),
        "PARALLEL": parallel.overview(results),
        "PLOTS": "\n\n".join(pictures),
        "GROWTH": "\n".join(_growth(results)),
        "PAGES": table(("page", "command", "date", "commit", "remarks"), _pages(results)),
    }
    return fill(TEMPLATES / "overview.md", parts)


def _summary(results: Sequence[Named]) -> Iterator[list[str]]:
    """A line for each thing that was compared on one machine, losses first."""
    topics: dict[tuple[str, str, str], list[Comparison]] = {}
    for name, result in results:
        for found in comparisons.of_result(result):
            topics.setdefault((name, machine_name(found.run["machine"]), found.topic), []).append(
                found
            )
    ordered = sorted(
        topics.items(), key=lambda item: _worst(item[1]).ratio if _lost(item[1]) else 1
    )
    for (name, where, topic), own in ordered:
        worst, typical = _worst(own), max(own, key=lambda one: (one.tokens, -one.ratio))
        count = f"**{_lost(own)} of {len(own)}**" if _lost(own) else f"0 of {len(own)}"
        figures = [_ratio(typical), "the same" if worst == typical else _ratio(worst), count]
        dates = sorted({_date(one.run) for one in own})
        yield [f"[{topic}](bench/results/{name}.md)", *figures, where, "; ".join(dates)]
    machines = [run["machine"] for _, result in results for run in result["runs"] if run["machine"]]
    for device, name in DEVICES.items():
        if device not in {machine["device"] for machine in machines}:
            yield [f"everything on {name}", MISSING, "", "", name, ""]


def _worst(own: Sequence[Comparison]) -> Comparison:
    return min(own, key=lambda one: one.ratio)


def _lost(own: Sequence[Comparison]) -> int:
    return sum(one.is_loss for one in own)


def _ratio(one: Comparison) -> str:
    where = f" at {one.image}" if one.image else ""
    return f"{one.ratio:.2f} ({one.low:.2f} to {one.high:.2f}), {one.against}{where}"


def _date(run: Row) -> str:
    return run["date"][:10] + ", provisional" * is_provisional(run)


def _growth(results: Sequence[Named]) -> Iterator[str]:
    for name, result in results:
        for (variant, dtype), rows in scaling.curves(result).items():
            yield f"- One block, [{variant}, {dtype}](bench/results/{name}.md): {scaling.fits(rows)}."


def _targets(results: Sequence[Named]) -> str:
    runs = {
        kind: [run for _, result in results if result["kind"] == kind for run in result["runs"]]
        for kind in ("gpu", "resources")
    }
    measured = [run for run in runs["gpu"] if GPU in machine_name(run["machine"])]
    columns = ["what, at 4K", f"to be reached on one {GPU}"]
    columns += [f"measured {_date(run)}, {commit(run['source'])}" for run in measured] or [
        "measured"
    ]
    columns += [f"predicted cycles, Triton {run['triton']}" for run in runs["resources"]]
    lines = []
    for target in TARGETS:
        reached = [_reached(target, run) or MISSING for run in measured] or [MISSING]
        predicted = [_predicted(target, run) for run in runs["resources"]]
        lines.append([target.name, target.goal, *reached, *predicted])
    return table(columns, lines)


def _reached(target: Target, run: Row) -> str:
    """Ours at 4K, and how many times as long the others take."""
    found = []
    for rows in comparisons.grouped(run["rows"]):
        times = comparisons.timed(rows)
        topic, image = comparisons.topic(rows[0]), comparisons.image(rows[0])
        if image == "4k" and re.fullmatch(target.topics, topic) and comparisons.OURS in times:
            ours = times.pop(comparisons.OURS)
            _, _, rate, share, *_ = pages.figures(ours)
            ratios = (f"{name} {pages.ratio(row, ours)}" for name, row in times.items())
            found.append(f"{topic}: {', '.join([f'{rate}, {share} of peak', *ratios])}")
    return "; ".join(found)


def _predicted(target: Target, run: Row) -> str:
    """Cycles of the pipes of one kernel, and the rate of all kernels that it takes."""
    ways = (way for way in run.get("targets", ()) if target.way and way["name"] == target.way)
    rates = [
        f"{way[law]['tflops']} TFLOP/s by {law}, {way[order]['tflops'][1]} to "
        f"{way[order]['tflops'][0]} {order}"
        for way in ways
        for law, order in [MODELS]
    ]
    return "; ".join(filter(None, [_cycles(target, run["rows"]), *rates]))


def _cycles(target: Target, rows: Iterable[Row]) -> str:
    for row in rows:
        matches = row["what"].strip("_").removesuffix("_kernel").endswith(target.kernel)
        is_case = "4k" in row["floor_bytes"].get(CASE, ()) and row["architecture"] == "sm_90"
        if target.kernel and matches and is_case and row["default"] and row.get("cycles"):
            return " / ".join(str(count) for count in row["cycles"].values())
    return ""


def _pages(results: Sequence[Named]) -> Iterator[list[str]]:
    """A line for each page, with all the runs that made it."""
    for name, result in results:
        runs = result["runs"]
        lists = (
            [f"`{run['command']}`" for run in runs],
            [run["date"][:10] for run in runs],
            [commit(run["source"]) for run in runs],
        )
        doubts = "; ".join(dict.fromkeys(filter(None, map(remarks, runs))))
        yield [f"[{name}](bench/results/{name}.md)", *map("<br>".join, lists), doubts]
