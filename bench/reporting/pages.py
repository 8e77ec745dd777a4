"""A result as a page of Markdown: every row that it has, and the runs that made them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from bench.measure.results import Content, Row
from bench.reporting import comparisons, editing, few_steps, host, parallel, scaling, targets
from bench.reporting.text import (
    MISSING,
    TEMPLATES,
    duration,
    fill,
    memory,
    percent,
    runs,
    spread,
    table,
)

TOLERANCE = 0.03  # of the saving: what may be lost before an operation is named
REST = "not in the profile"


def page(content: Content, name: str = "") -> str:
    """name: of the file in bench/results that holds the result; without it, for a terminal."""
    origin = (
        f"Written by `python -m bench.report` from `{name}`; [all results](../../BENCHMARKS.md)."
    )
    parts = {
        "ORIGIN": origin if name else "",
        "LOSSES": comparisons.losses(comparisons.of_result(content)),
        "UNFINISHED": _unfinished(content),
        "FIGURES": "\n\n".join(filter(None, BODIES[content["kind"]](content))),
        "RUNS": runs(content),
    }
    return fill(TEMPLATES / f"{content['kind']}.md", parts)


def rows_of(content: Content, *parts: str) -> list[Row]:
    """The rows of these parts, or all, each with the number of its run."""
    return [
        {**row, "run": str(number)}
        for number, run in enumerate(content["runs"], start=1)
        for row in run["rows"]
        if row["part"] in (parts or (row["part"],))
    ]


def _timed(content: Content, *parts: str) -> Iterator[str]:
    """Whatever was timed in turn."""
    rows = rows_of(content, *parts)
    present = dict.fromkeys(row["part"] for row in rows)
    for part in present:
        own = [row for row in rows if row["part"] == part]
        if len(present) > 1 or parts:
            yield f"## {part.capitalize()}"
        yield _timed_table(own)
        yield _absent(own)


def _timed_table(rows: Sequence[Row]) -> str:
    """Columns that nothing stands in are left out."""
    columns = ["what", "image", "variant", "time", "by", "rate", "share of peak", "error"]
    columns += ["peak memory", "its time / ours", "time saved", "FLOPs saved", "paper"]
    columns += ["what keeps time from falling as FLOPs do", "run"]
    lines = []
    for own in comparisons.grouped(rows):
        times = comparisons.timed(own)
        for name, row in times.items():
            ours = comparisons.counterpart(name, times)
            names = [comparisons.topic(row), comparisons.image(row), name]
            lines.append([*names, *figures(row), ratio(row, ours), *_saving(row), row["run"]])
    used = [index for index, cells in enumerate(zip(*lines, strict=True)) if any(cells)]
    chosen = ([line[index] for index in used] for line in lines)
    return table([columns[index] for index in used], chosen) if lines else ""


def figures(row: Row) -> list[str]:
    seconds, rate, share = row["seconds"], "", ""
    if row.get("flops"):
        rate = f"{row['flops'] / seconds['median'] / 1e12:.3g} TFLOP/s"
        share = percent(row["share_of_matmul"], 0) if "share_of_matmul" in row else ""
    elif row.get("bytes"):
        rate = f"{row['bytes'] / seconds['median'] / 1e9:.3g} GB/s"
        share = percent(row["share_of_copy"], 0)
    if row.get("images_per_second"):
        rate += f", {row['images_per_second']:.3g} images/s"
    errors = [float(error) for error in (row.get("errors") or {}).values() if error]
    error = f"{max(errors):.1e} of {row['errors_from']}" if errors else ""
    held = memory(row["peak_bytes"]) if row.get("peak_bytes") else ""
    return [spread(seconds), seconds["method"], rate, share, error, held]


def ratio(row: Row, ours: Row | None) -> str:
    return f"{row['seconds']['median'] / ours['seconds']['median']:.2f} ×" if ours else ""


def _saving(row: Row) -> list[str]:
    if "saving" not in row:
        return [""] * 4
    saving = row["saving"]
    low, high = percent(saving["time"]["p20"]), percent(saving["time"]["p80"])
    return [
        f"{percent(saving['time']['median'])} ({low} to {high})",
        percent(saving["flops"]),
        "" if saving["paper"] is None else percent(saving["paper"], 0),
        largest_loss(saving),
    ]


def largest_loss(saving: Row) -> str:
    """Which operation takes most of what is missing between FLOPs saved and time saved; and the
    saving's own spread where that is too wide to tell."""
    width = saving["time"]["p80"] - saving["time"]["p20"]
    remark = f"; spread of {100 * width:.0f} points" if width > 2 * TOLERANCE else ""
    missing = saving["flops"] - saving["time"]["median"]
    if missing < -TOLERANCE:
        return "nothing: saved more than FLOPs" + remark
    if missing <= TOLERANCE:
        return "nothing: within 3 points" + remark
    name, share = max(lost(saving).items(), key=lambda item: item[1])
    words = f"{name}: {100 * share:.1f} points" if share > missing / 2 else "no single operation"
    return words + remark


def lost(saving: Row) -> dict[str, float]:
    """What is missing, all of it, by operation: the profile is of other passes than those that were
    timed, and of single blocks where these were of the whole model."""
    missing = saving["flops"] - saving["time"]["median"]
    return saving["lost"] | {REST: missing - sum(saving["lost"].values())}


def _savings(content: Content) -> Iterator[str]:
    yield from _timed(content)
    rows = [row for row in rows_of(content) if "saving" in row]
    yield (
        "## Where the time of one block goes\n\nMedians of profiled passes, apart from those that were "
        "timed, and how many points of the saving each operation takes back by this profile (medians "
        "of what passes of one round differ by); what is negative saved more time than FLOPs. The rest "
        "makes up the sum, FLOPs saved less time saved."
    )
    lines = []
    for row in rows:
        size = row["shape"]["size"]
        for variant, seconds in row["saving"]["operations"].items():
            cells = [duration(second) for second in seconds.values()]
            lines.append([size, variant, *cells, "", duration(sum(seconds.values()))])
        shares = list(lost(row["saving"]).values())
        points = [f"{100 * share:+.1f}" for share in (*shares, sum(shares))]
        lines.append([size, "points taken back", *points])
    families = [name for row in rows[:1] for name in row["saving"]["lost"]]
    yield table(("image", "variant", *families, f"rest ({REST})", "sum"), lines)


def _growth(content: Content) -> Iterator[str]:
    peaks = scaling.ceiling(content)
    columns = ("image", "tokens", "time", "exponent", "roofline", "share of it", "peak memory")
    for (variant, dtype), own in scaling.curves(content).items():
        yield f"**{variant}, {dtype}**: {scaling.fits(own)}."
        yield table((*columns, "exponent"), _growth_lines(own, peaks))


def _growth_lines(rows: Sequence[Row], peaks: tuple[float, float]) -> Iterator[list[str]]:
    share = None
    before: list[Row] = []
    for row in rows:
        floor = scaling.roofline(row, peaks)
        least = duration(floor) if floor else ""
        if row.get("seconds"):
            share = floor / scaling.seconds(row) if floor else None
            pair = [*before, row]
            before = [row]
            held = [one for one in pair if scaling.peak_bytes(one)]
            exponents = [
                scaling.fit(some, value) if len(some) > 1 else ""
                for some, value in ((pair, scaling.seconds), (held, scaling.peak_bytes))
            ]
            cells = [spread(row["seconds"]), exponents[0], least]
            cells += [percent(share, 0) if share else "", memory(row["peak_bytes"]), exponents[1]]
        else:
            words = f"; {duration(floor / share)} predicted" if floor and share else ""
            cells = [MISSING + words, "", least, "", MISSING, ""]
        yield [row["shape"]["size"], f"{comparisons.tokens(row):,}", *cells]


def _absent(rows: Iterable[Row]) -> str:
    """A line for each variant and reason, however many cases it is."""
    counts = Counter((row["variant"], row["status"]) for row in rows if row["status"] != "measured")
    lines = []
    for (name, status), count in counts.items():
        reason = " ".join(status.removeprefix(f"{MISSING}: ").split())[:120]
        lines.append(f"- {name}, {_cases(count)}: {reason}")
    return "\n".join([f"{MISSING.capitalize()}:\n", *lines]) if lines else ""


def _cases(count: int) -> str:
    return f"{count} case{'s' * (count > 1)}"


def _unfinished(content: Content) -> str:
    """The cases that came to no end; those that were skipped for one reason in one line."""
    cases = [case for run in content["runs"] for case in run["unfinished"]]
    lost = [case for case in cases if case["event"] != "skipped"]
    lines = []
    for one in lost:
        where = " ".join(filter(None, (one["event"], one["case"], one["variant"])))
        lines.append(f"- {where}: {one['reason'].strip().splitlines()[-1]}")
    skipped = Counter(case["reason"] for case in cases if case["event"] == "skipped")
    lines += [f"- not run, {_cases(count)}: {reason}" for reason, count in skipped.items()]
    return "\n".join(["Came to no end:\n", *lines]) if lines else ""


def _gpu(content: Content) -> Iterator[str]:
    yield from _columns(rows_of(content, "columns"))
    yield from _correctness(rows_of(content, "correctness"))
    yield from _timed(content, "operators", "steps", "pictures", "ladder")
    yield from _launches(rows_of(content, "launches"))
    yield from _backends(rows_of(content, "backends"))
    yield from _configurations(rows_of(content, "configurations"))


def _columns(rows: Sequence[Row]) -> Iterator[str]:
    """Whether the narrowest products are right, and which tails are launched."""
    tried = [row for row in rows if "exact" in row and "config" in row]
    if rows:
        yield "## Narrow products"
    if tried:
        lines = [
            [row["columns"], row["dtype"], row["config"], "yes" if row["exact"] else "**no**"]
            for row in tried
        ]
        yield table(
            ("columns", "dtype", "configuration", "exact"), [list(map(str, x)) for x in lines]
        )
    taken = [row["columns"] for row in rows if "columns" in row and "config" not in row]
    yield f"Tails of V have {taken[-1]} columns in all that follows." if taken else ""
    yield _absent(rows)


def _launches(rows: Sequence[Row]) -> Iterator[str]:
    """Seconds of first calls, in which kernels are compiled or loaded."""
    lines = [
        [row["variant"], *map(duration, row["first_calls"])] for row in rows if "first_calls" in row
    ]
    if lines:
        yield "## First launches"
        yield table(("operator", "first call", "second call"), lines)
    yield _absent(rows) if lines else ""


def _correctness(rows: Sequence[Row]) -> Iterator[str]:
    measured = [row for row in rows if row["status"] == "measured"]
    good, same = (sum(row[key] for row in measured) for key in ("passed", "repeatable"))
    if rows:
        yield (
            f"## Correctness\n\nOf {len(rows)} results, {good} are within twice the "
            f"error of eager PyTorch against fp64, and {same} are the same, bit for bit, from run to run."
        )
    doubtful = [row for row in measured if not (row["passed"] and row["repeatable"])]
    if doubtful:
        columns = ("case", "within twice eager's error", "repeatable", "errors", "eager's")
        yield table(columns, map(_correctness_cells, doubtful))
    yield _absent(rows)


def _correctness_cells(row: Row) -> list[str]:
    errors = [", ".join(_error(*one) for one in row[k].items()) for k in ("errors", "errors_eager")]
    return [row["id"], *("yes" if row[k] else "**no**" for k in ("passed", "repeatable")), *errors]


def _error(name: str, error: float | str) -> str:
    return f"{name} {float(error):.1e}"


def _configurations(rows: Sequence[Row]) -> Iterator[str]:
    """Which of those that can be chosen is the fastest, where it is not the chosen one."""
    swept: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("seconds"):
            case = row["id"].removesuffix(f"/{row['variant']}").removeprefix("configurations/")
            swept.setdefault((case, row["kernel"]), []).append(row)
    lines = []
    for case, candidates in swept.items():
        fastest = min(candidates, key=lambda row: row["seconds"]["median"])
        chosen = next((row for row in candidates if row["chosen"]), None)
        if chosen is None or chosen["seconds"]["median"] > 1.02 * fastest["seconds"]["median"]:
            takes = ratio(chosen, fastest) if chosen else "does not run"
            lines.append([*case, fastest["config"], takes])
    if swept:
        right = len(swept) - len(lines)
        yield f"## Configurations\n\n{right} of {len(swept)} choices are within 2 % of the fastest."
    if lines:
        yield table(("case", "kernel", "fastest", "the chosen one takes"), lines)
    yield _absent(rows)


def _backends(rows: Sequence[Row]) -> Iterator[str]:
    """Which kernels of the GPU each implementation launched."""
    lines = [[row["what"], row["variant"], ", ".join(row["kernels"])] for row in rows]
    if lines:
        yield table(("what", "variant", "kernels, the longest first"), lines)


def _resources(content: Content) -> Iterator[str]:
    yield _predicted(content)
    columns = ["GPU", "kernel", "configuration", "tried first", "registers", "spilled bytes"]
    columns += ["shared KiB", "warps per SM", "tensor", "useful / issued", "exp", "FMA", "ALU"]
    columns += ["waits", "loads", "stores", "cycles: tensor/exp/FMA/ALU/issue"]
    models = ["warpgroups with code of their own", "predicted: tensor + issue"]
    columns += [*models, "defects", "run"]
    lines = []
    for row in rows_of(content):
        name = [row["architecture"], row["what"].strip("_"), row["variant"]]
        counts = _resource_counts(row) if "registers" in row else [""] * 13
        counts += [_partitions(row), _cycles_predicted(row)]
        first, defects = "yes" * row["default"], "; ".join(row["defects"])
        lines.append([*name, first, *counts, defects, row["run"]])
    empty = [
        i for i, name in enumerate(columns) if name in models and not any(line[i] for line in lines)
    ]
    kept = [i for i in range(len(columns)) if i not in empty]
    yield table([columns[i] for i in kept], ([line[i] for i in kept] for line in lines))


def _predicted(content: Content) -> str:
    """Which goals compiled code says will be met."""
    found = [target for run in content["runs"] for target in run.get("targets", ())]
    if not found:
        return ""
    return "\n\n".join(
        [
            "## Attention at head dimension 72 on an H200, predicted",
            "Of 64 queries × 128 keys of one head on one SM, with the configurations that are best by "
            "tensor + issue; `bench/compiled/predictions.py` says what the models are. Nothing was measured.",
            table(targets.COLUMNS, map(targets.words, found)),
            targets.sources(),
            "## Kernels",
        ]
    )


def _partitions(row: Row) -> str:
    """Of warpgroups with code of their own: registers and what is wrong in a turn of each."""
    found = []
    for one in row.get("partitions", ()):
        if any(other["number"] for other in row["partitions"]):
            name = f"{one['number']}{', online' * one['online']}"
            counts = f"{one['waits']} waits for {one['wgmma']} wgmma, {one['spills']} spills"
            found.append(
                f"{name}: {one['registers']} registers, {counts}, {one['exposed']} exposed"
            )
    return "; ".join(found)


def _cycles_predicted(row: Row) -> str:
    found = []
    for one in row.get("predictions", ()):
        law, order = (one[model] for model in targets.MODELS)
        rate = f" ({law['tflops']} TFLOP/s)" if "tflops" in law else ""
        words = f"{one['tensor']} + {one['issue']} = {law['cycles']}{rate}"
        words += f", in order {order['cycles'][0]} to {order['cycles'][1]}"
        found.append("online: " * one["online"] + words)
    return "; ".join(found)


def _resource_counts(row: Row) -> list[str]:
    shared = f"{row['shared_bytes'] / 1024:.0f}"
    useful = f"{row['useful_share']:.3f}" if row["useful_share"] else ""
    found = [row["registers"], row["spill_bytes"], shared, row["resident_warps"]]
    found += [_times(row["tensor"]), useful, row["exp"], row["fma"], row["alu"], row["waits"]]
    found += [_times(row["loads"]), _times(row["stores"])]
    return [*map(str, found), "/".join(str(count) for count in (row["cycles"] or {}).values())]


def _times(counts: Row) -> str:
    """How often each is there."""
    return ", ".join(f"{count} × {name}" for name, count in sorted(counts.items()))


BODIES: dict[str, Callable[[Content], Iterator[str]]] = {
    "saving": _savings,
    "cpu": _timed,
    "growth": _growth,
    "gpu": _gpu,
    "host": lambda content: host.page(rows_of(content)),
    parallel.KIND: lambda content: parallel.page(rows_of(content)),
    "suite": _timed,
    "resources": _resources,
    editing.KIND: lambda content: editing.page(rows_of(content)),
    few_steps.KIND: lambda content: few_steps.page(rows_of(content)),
}
