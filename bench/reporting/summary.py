"""The results of bench.gpu as text: a line for each operator and size, ours beside the best peer."""

from collections.abc import Iterable
from typing import Any

from bench.reporting.provenance import judged

Row = dict[str, Any]


def render(result: dict[str, Any]) -> str:
    machine = result["machine"]
    if not machine:
        return "nothing was measured"
    result = {**result, "rows": [judged(row) for row in result["rows"]]}
    name = machine.get("gpu") or f"{machine['device']} (a dry run: these times mean nothing)"
    versions = ", ".join(f"{k} {v}" for k, v in machine["libraries"].items() if v)
    lines = [f"{name}, {versions}, commit {machine['commit'] or machine['source_sha256'][:12]}"]
    lines += _peaks(result["peaks"])
    lines += _correctness(_of(result, "correctness"))
    lines += _compared("operators", _of(result, "operators"))
    lines += _compared("steps", _of(result, "steps"))
    lines += _tuning(_of(result, "tuning"))
    lines += _problems(result)
    return "\n".join(lines)


def what(row: Row) -> str:
    """What was timed; rows of the same and of one resolution are comparable. Batch and dtype are told
    where they are not 1 and bf16, and checkpoints where the variant does not."""
    names, shape = ("step", "operator", "kind", "direction"), row.get("shape") or {}
    words = [row[name] for name in names if row.get(name)] or [row["group"]]
    words += [f"R = {shape['ratio']}"] if "ratio" in shape else []
    words += [f"batch {shape['batch']}"] if shape.get("batch", 1) != 1 else []
    if row.get("checkpointing") and "checkpointed" not in row["variant"]:
        words.append("checkpointed")
    dtype = row.get("dtype", "bfloat16").removeprefix("torch.")
    return " ".join([*words, dtype] if dtype != "bfloat16" else words)


def _of(result: dict[str, Any], part: str) -> list[Row]:
    return [row for row in result["rows"] if row["part"] == part]


def _peaks(peaks: list[Row]) -> list[str]:
    return [
        f"peaks: copy {peak['copy']['per_second'] / 1e12:.2f} TB/s, "
        f"bf16 product {peak['matmul']['per_second'] / 1e12:.0f} TFLOP/s"
        for peak in peaks[:1]
    ]


def _correctness(rows: list[Row]) -> list[str]:
    measured = [row for row in rows if row["status"] == "measured"]
    wrong = [row for row in measured if not row["passed"]]
    moving = [row for row in measured if not row["repeatable"]]
    if not rows:
        return []
    lines = [
        f"correctness: {len(measured) - len(wrong)} of {len(rows)} within twice eager's error, "
        f"{len(moving)} not repeatable"
    ]
    for row in [*wrong, *(row for row in moving if row not in wrong)][:12]:
        errors = ", ".join(
            f"{name} {_short(error)} (eager {_short(row['errors_eager'][name])})"
            for name, error in row["errors"].items()
        )
        lines.append(f"  {'WRONG' if row in wrong else 'moves'} {row['case']}: {errors}")
    return lines


def _compared(title: str, rows: list[Row]) -> list[str]:
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "measured" and "median" in row:
            groups.setdefault(f"{what(row)} {row['resolution']}", {})[row["variant"]] = row
    lines = (
        [f"{title}: ms, rate, share of peak | best peer, times as long as ours"] if groups else []
    )
    for label, variants in sorted(groups.items()):
        mine = {name: row for name, row in variants.items() if name.startswith("ours")}
        others = {name: row for name, row in variants.items() if name not in mine}
        text = ", ".join(_speed(name, row) for name, row in mine.items())
        if others and "ours" in mine:
            best = min(others, key=lambda name: others[name]["median"])
            ratio = others[best]["median"] / mine["ours"]["median"]
            text += f" | {best} {1e3 * others[best]['median']:.4g}, {ratio:.2f}x"
        lines.append(f"  {label:40} {text}")
    return lines


def _speed(name: str, row: Row) -> str:
    text = f"{name.removeprefix('ours').strip()} {1e3 * row['median']:.4g} ms".strip()
    if "flops_per_second" in row:
        return f"{text} {row['flops_per_second'] / 1e12:.0f} TF/s {row['share_of_matmul']:.0%}"
    return f"{text} {row['bytes_per_second'] / 1e9:.0f} GB/s {row['share_of_copy']:.0%}"


def _tuning(rows: list[Row]) -> list[str]:
    swept: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["status"] == "measured" and "median" in row:
            swept.setdefault((row["kernel"], row["case"]), []).append(row)
    lines = []
    for (kernel, case), candidates in swept.items():
        best = min(candidates, key=lambda row: row["median"])
        chosen = [row["median"] for row in candidates if row["chosen"]]
        if not chosen or chosen[0] > 1.02 * best["median"]:
            loss = f"{chosen[0] / best['median'] - 1:.0%} slower" if chosen else "not runnable"
            case = case.removeprefix("tuning/")
            lines.append(f"  {kernel} {case}: {best['config']} (the chosen one is {loss})")
    count = f"tuning: {len(swept) - len(lines)} of {len(swept)} choices within 2 % of the fastest"
    return [count, *lines] if swept else []


def _problems(result: dict[str, Any]) -> list[str]:
    lines = []
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["status"] != "measured":
            who = row.get("variant") or row["part"]
            reasons.setdefault(f"{who}: {row['status'][:160]}", []).append(row["case"])
    for reason, cases in reasons.items():
        lines.append(f"not measured ({len(cases)} cases, first {cases[0]}): {reason}")
    return lines + unfinished(result)


def unfinished(result: dict[str, Any]) -> list[str]:
    """The cases that came to no end."""
    lines = []
    for failure in result["failures"]:
        last = failure["error"].strip().splitlines()[-1]
        lines.append(f"FAILED {failure['case'] or failure['part']}: {last[:200]}")
    for crash in result["crashes"]:
        lines.append(f"CRASHED {crash['case']} {crash['variant']}: {crash['reason']}")
    return lines + _count_skipped(result["skipped"])


def _count_skipped(skipped: Iterable[Row]) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for row in skipped:
        key = (row["part"], row["reason"])
        counts[key] = counts.get(key, 0) + 1
    return [f"{part}: {count} cases not run, {why}" for (part, why), count in counts.items()]


def _short(error: Any) -> str:
    return error if isinstance(error, str) else f"{error:.1e}"
