"""Results as Markdown: a section for each kind of file.

Every table names its runs by number, and they stand below it. What a table has room for and no result
fills is called not measured.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bench.reporting.format import MISSING, duration, memory, percent, saved, spread, table
from bench.reporting.provenance import runs
from bench.reporting.summary import unfinished, what
from bench.workloads import sizes

Content = dict[str, Any]
Row = dict[str, Any]

TOLERANCE = 0.03  # of the saving: what may be lost before the culprit is named
REST = "not in the profile"


def saving(content: Content) -> str:
    """Time saved by key/value compression, of a file of bench.saving."""
    rows, number = _numbered(content)
    head = (
        "### Time saved by key/value compression (`kv_compression_saving`)\n\n"
        "One denoising step of XL/2 with random weights, batch 1, keys and values merged R × R in the "
        "deeper half of the blocks. “Whole” was measured on all blocks; “one block” means that one "
        "dense and one compressed block were measured and composed to the model's. Times are medians "
        "with 20 % and 80 % quantiles, and so is the saving, of rounds that time every model once, "
        "diffusers' dense `PixArtTransformer2DModel` among them. Ours has made the caption's keys and "
        "values before, as a sampler does once per prompt; diffusers makes them in every step. The "
        "paper's figure is of drawing an image (PixArt-Σ, table 3 d)."
    )
    rows_table = table(
        ("image", "tokens", "R", "measured", "dense", "compressed", "diffusers, dense")
        + ("time saved", "FLOPs saved", "paper", "what eats the difference", "run"),
        (
            _saving_cells(rows.get(f"{size}/R{ratio}"), size, ratio, number)
            for size in _sizes(rows, ("512", "1k", "2k", "4k"))
            for ratio in sorted({2, 4} | {row["ratio"] for row in rows.values()})
        ),
    )
    parts = [head, rows_table, *_operations(rows.values()), runs(content)]
    return "\n\n".join(parts)


def _saving_cells(row: Row | None, size: str, ratio: int, number: dict[str, int]) -> list[str]:
    if row is None:
        return [size, "", str(ratio), MISSING, *[""] * 8]
    whole = row["scope"] == "whole"
    low, high = percent(row["time_saved_p20"]), percent(row["time_saved_p80"])
    return [
        size,
        f"{row['tokens']:,}",
        str(ratio),
        "whole" if whole else f"one block × {row['depth']}",
        spread(row["dense"]),
        spread(row["compressed"]),
        spread(row["diffusers"]) if "diffusers" in row else MISSING,  # of an older file
        f"{percent(row['time_saved'])} ({low} to {high})",
        percent(row["flops_saved"]),
        "" if row["paper"] is None else percent(row["paper"], 0),
        culprit(row),
        str(number[row["case"]]),
    ]


def culprit(row: Row) -> str:
    """Which operation eats most of what is missing between FLOPs saved and time saved; and the
    saving's own spread where that is too wide to tell."""
    width = row["time_saved_p80"] - row["time_saved_p20"]
    said = f"; spread of {100 * width:.0f} points" if width > 2 * TOLERANCE else ""
    return _largest_eater(row) + said


def _largest_eater(row: Row) -> str:
    missing = row["flops_saved"] - row["time_saved"]
    if missing < -TOLERANCE:
        return "nothing: saved more than FLOPs"
    if missing <= TOLERANCE:
        return "nothing: within 3 points"
    name, share = max(_eaten(row).items(), key=lambda item: item[1])
    return f"{name}: {100 * share:.1f} points" if share > missing / 2 else "no single operation"


def _eaten(row: Row) -> dict[str, float]:
    """What eats the difference, all of it: the profile is of other passes than those that were timed,
    and of single blocks where these were of the whole model."""
    missing = row["flops_saved"] - row["time_saved"]
    return row["eaten"] | {REST: missing - sum(row["eaten"].values())}


def _operations(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    if not rows:
        return []
    families = list(rows[0]["eaten"])
    lines = []
    for row in rows:
        for kind, ratio in (("dense", 1), ("compressed", row["ratio"])):
            seconds = row["operations"][kind]
            cells = [duration(seconds[family]) for family in families]
            lines.append([row["size"], str(ratio), *cells, "", duration(sum(seconds.values()))])
        shares = _eaten(row)
        eaten = [f"{100 * shares[name]:+.1f}" for name in (*families, REST)]
        lines.append([row["size"], "eaten", *eaten, f"{100 * sum(shares.values()):+.1f}"])
    text = (
        "Where the time of one block goes (medians of profiled passes, apart from those that were "
        "timed), and how many points of the saving each operation eats by this profile (medians of "
        "what passes of one round differ by); what is negative saved more time than FLOPs. The rest "
        "makes up the sum, FLOPs saved less time saved."
    )
    return [text, table(("image", "R", *families, f"rest ({REST})", "sum"), lines)]


def cpu(content: Content) -> str:
    """Forward passes against diffusers', of a file of bench.cpu."""
    rows, number = _numbered(content)
    head = (
        "### Forward pass on a CPU, against diffusers\n\n"
        "The full-size model and diffusers' `PixArtTransformer2DModel` with the same random weights, "
        "batch 1, 300 caption tokens, in turn in one process. “Caption encoded” is ours as a sampler "
        "calls it; the other two make the caption's keys and values, and count that work. The peak is "
        "that of the row's dtype. Above 1.00 × ours is faster. Memory is what the pass held at its "
        "peak beyond the weights; the difference is that of the outputs, relative."
    )
    variants = ("ours", "ours, caption encoded", "diffusers")
    cases = [
        (size, dtype, variant)
        for size in _sizes(rows, ("256", "512", "1k"))
        for dtype in ("float32", "bfloat16")
        for variant in variants
    ]
    rows_table = table(
        ("image", "dtype", "model", "time", "GFLOP/s", "share of peak")
        + ("diffusers' time / this", "difference", "peak memory", "run"),
        (_cpu_cells(rows.get("/".join(case)), *case, number) for case in cases),
    )
    return "\n\n".join([head, *_losses(rows), rows_table, runs(content)])


def _cpu_cells(
    row: Row | None, size: str, dtype: str, variant: str, number: dict[str, int]
) -> list[str]:
    if row is None:
        return [size, dtype, variant, MISSING, *[""] * 6]
    return [
        size,
        dtype,
        variant,
        spread(row),
        f"{row['flops'] / row['median'] / 1e9:.0f}",
        percent(row["share_of_matmul"], 0) if "share_of_matmul" in row else "",
        f"{row['times_as_fast']:.2f} ×",
        f"{row['difference_from_diffusers']:.1e}",
        memory(row["peak_bytes"]),
        str(number[row["case"]]),
    ]


def _losses(rows: dict[str, Row]) -> list[str]:
    pairs = [(row, rows.get(f"{row['size']}/{row['dtype']}/diffusers")) for row in rows.values()]
    slower = [row for row, theirs in pairs if theirs and _is_faster(theirs, row)]
    if not slower:
        return []
    names = "; ".join(f"{row['variant']} at {row['size']} in {row['dtype']}" for row in slower)
    return [f"**Slower than diffusers by more than the spread of both:** {names}."]


def growth(content: Content) -> str:
    """Time and memory against tokens, of a file of bench.growth."""
    rows, number = _numbered(content)
    head = (
        "### How cost grows with the number of tokens\n\n"
        "One block of XL/2, batch 1: measured alone, at every size, and not composed. The exponent is "
        "that of the growth from the size before; memory is what the pass held at its peak beyond "
        "weights and inputs. The roofline is the time that the work takes at least, each operation "
        "bound by its FLOPs or its bytes, at the peaks of the run that measured the largest size. "
        "A time that is expected where nothing was measured is the roofline over the share of it that the "
        "largest measured size reached. diffusers makes the caption's keys and values in every call, "
        "whereas ours has made them once per prompt; its share is one of our roofline, without them."
    )
    parts, peaks = [head], ceiling(content)
    for dtype, variant in sorted({(row["dtype"], row["variant"]) for row in rows.values()}):
        own = [row for row in rows.values() if (row["dtype"], row["variant"]) == (dtype, variant)]
        own.sort(key=lambda row: row["tokens"])
        by_size = {row["size"]: row for row in own}
        parts += [f"**{variant}, {dtype}**: {_fits(own)}", _growthtable(by_size, number, peaks)]
    return "\n\n".join([*parts, runs(content)])


def _fits(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if "median" in row]
    held = [row for row in timed if row["peak_bytes"]]
    return (
        f"time grows with tokens to the power of {_fit(timed, 'median')} over all sizes, "
        f"{_fit(timed[-2:], 'median')} between the last two; "
        f"memory {_fit(held, 'peak_bytes')} and {_fit(held[-2:], 'peak_bytes')}."
    )


def _fit(rows: Sequence[Row], field: str) -> str:
    if len({row["tokens"] for row in rows}) < 2:
        return MISSING
    return f"{exponent([(row['tokens'], row[field]) for row in rows]):.2f}"


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """b of the least-squares fit y = a·x^b, which is a line through the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    rise = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return rise / sum((x - mean_x) ** 2 for x, _ in logs)


def ceiling(content: Content) -> tuple[float, float]:
    """FLOP/s and bytes/s of the run that measured the largest size."""
    largest = {
        max((row["tokens"] for row in run["rows"] if "median" in row), default=0): run
        for run in content["runs"]
    }
    peaks = largest[max(largest)]["peaks"]
    return peaks["matmul"]["per_second"], peaks["copy"]["per_second"]


def roofline(row: Row, peaks: tuple[float, float]) -> float | None:
    """Seconds that a row's operations take at least; None in a dtype that has no measured peak."""
    if row["floors"] is None:
        return None
    return sum(max(flops / peaks[0], moved / peaks[1]) for flops, moved in row["floors"])


def _growthtable(rows: dict[str, Row], number: dict[str, int], peaks: tuple[float, float]) -> str:
    lines, share = [], None
    before: Row | None = None
    for size in sorted(_sizes(rows, ("256", "512", "1k", "2k", "4k")), key=sizes.tokens):
        if size not in rows:
            lines.append([size, "", MISSING, *[""] * 6])
            continue
        row = rows[size]
        floor = roofline(row, peaks)
        if "median" not in row:
            said = f"; {duration(floor / share)} expected" if floor and share else ""
            cells = [MISSING + said, "", duration(floor) if floor else "", "", MISSING, ""]
        else:
            share = floor / row["median"] if floor else None
            pair = [before, row] if before else []
            before = row
            held = pair if all(one["peak_bytes"] for one in pair) else []
            cells = [spread(row), _fit(pair, "median") if pair else ""]
            cells += [duration(floor), percent(share, 0)] if floor and share else ["", ""]
            cells += [memory(row["peak_bytes"]), _fit(held, "peak_bytes") if held else ""]
        lines.append([row["size"], f"{row['tokens']:,}", *cells, str(number[row["case"]])])
    columns = ("image", "tokens", "time", "exponent", "roofline", "share of it", "peak memory")
    return table((*columns, "exponent", "run"), lines)


def operators(content: Content) -> str:
    """Operators and steps on a GPU, of a file of bench.gpu."""
    rows = [row for run in content["runs"] for row in run["rows"]]
    parts = ["### Operators and steps"]
    if checked := [row for row in rows if row["part"] == "correctness"]:
        good = sum(bool(row.get("passed")) for row in checked)
        same = sum(bool(row.get("repeatable")) for row in checked)
        parts.append(
            f"Of {len(checked)} results at real shapes, {good} are within twice the error of eager "
            f"PyTorch against fp64, and {same} are the same, bit for bit, from run to run."
        )
    for part in ("operators", "steps"):
        parts += _timed([row for row in rows if row["part"] == part])
    if lost := [line for run in content["runs"] for line in unfinished(run)]:
        parts.append("\n".join(["Came to no end:\n", *(f"- {line}" for line in lost)]))
    return "\n\n".join([*parts, runs(content)])


def suite(content: Content) -> str:
    """The benchmarks of `pytest bench`, of its JSON."""
    rows = [row for run in content["runs"] for row in run["rows"]]
    parts = [
        "### `pytest bench`\n\n“Shallow” is a model of the full width with two blocks; “compressed” "
        "is the second of them, or both where it says “everywhere”. In brackets are quartiles. In "
        "every denoising step diffusers makes the caption's keys and values, whereas ours has made "
        "them once per prompt. Training has batch 1. Peak memory has the weights in it and, in "
        "training, gradients and optimizer states; a stage of the pipeline counts from its own "
        "beginning. A picture is the embedded model's; “picture/1k” and “4k” (merged as published) "
        "have random weights of the published sizes, read from files just written. On a CPU “ours” "
        "and “eager” are the same code."
    ]
    for bench in dict.fromkeys(row["bench"] for row in rows):
        parts += [f"`{bench}`", *_timed([row for row in rows if row["bench"] == bench])]
    return "\n\n".join([*parts, runs(content)])


def _timed(rows: Sequence[Row]) -> list[str]:
    """Each variant against ours, losses told first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((what(row), row.get("resolution", "")), []).append(row)
    lines, slower = [], []
    for (label, resolution), own in groups.items():
        ours = next((row for row in own if row["variant"] == "ours" and "median" in row), None)
        for row in own:
            lines.append([label, resolution, row["variant"], *_timed_cells(row, ours)])
            if ours and "median" in row and _is_faster(row, ours):
                slower += [] if row["variant"].startswith("ours") else [" ".join(lines[-1][:3])]
    columns = ["what", "image", "variant", "time", "timed by", "rate", "share of peak"]
    columns += ["peak memory", "its time / ours"]
    head = "**Slower than a peer by more than the spread of both:**"
    said = [f"{head} {'; '.join(slower)}."] if slower else []
    return [*said, table(columns, lines)] if lines else []


def _is_faster(row: Row, other: Row) -> bool:
    """By more than the spread of both."""
    return row["p80"] < other["p20"]


def _timed_cells(row: Row, ours: Row | None) -> list[str]:
    if "median" not in row:
        reason = " ".join(row["status"].removeprefix(f"{MISSING}: ").split())[:120]
        return [f"{MISSING}: {reason}".replace("|", "\\|"), *[""] * 5]
    ratio = "" if ours is None else f"{row['median'] / ours['median']:.2f} ×"
    held = memory(row["peak_bytes"]) if row.get("peak_bytes") else ""
    rate, share = _rates(row)
    if row.get("images_per_second"):
        rate += f", {row['images_per_second']:.3g} images/s"
    if "time_saved" in row:
        rate += f", {saved(row)}"
    return [spread(row), row["method"], rate, share, held, ratio]


def _rates(row: Row) -> tuple[str, str]:
    """TFLOP/s or GB/s of a row, and the share of the peak measured in the same process."""
    if "flops_per_second" in row:
        rate = f"{row['flops_per_second'] / 1e12:.3g} TFLOP/s"
        return rate, percent(row["share_of_matmul"], 0)
    if "bytes_per_second" in row:
        return f"{row['bytes_per_second'] / 1e9:.3g} GB/s", percent(row["share_of_copy"], 0)
    return "", ""


def _numbered(content: Content) -> tuple[dict[str, Row], dict[str, int]]:
    """Rows by case, and the number of the run that made each."""
    rows, number = {}, {}
    for index, run in enumerate(content["runs"], start=1):
        for row in run["rows"]:
            rows[row["case"]], number[row["case"]] = row, index
    return rows, number


def _sizes(rows: dict[str, Row], expected: Sequence[str]) -> list[str]:
    """Those that a full run has, and what else was measured, by number of tokens."""
    others = {row["size"]: row["tokens"] for row in rows.values() if row["size"] not in expected}
    return [*expected, *sorted(others, key=lambda size: others[size])]
