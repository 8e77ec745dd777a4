"""Seconds from a prompt to a square picture, rung by rung: predicted from what is counted, measured where a GPU
was there, beside what others publish.

A prediction is a range: each kind of work at the least and at the most of what is taken for its rate (`Rates`).
No figure of ours is typed here; assumptions and what others published are, with their source.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from bench.compiled.predictions import CLOCK, SMS
from bench.measure.results import Row
from bench.reporting import targets
from bench.reporting.plots import Named
from bench.reporting.text import MISSING, machine_name, percent, spread, table
from bench.workloads import ladder, sizes
from bench.workloads.ladder import DECODING, DENOISING, RUNGS, SIZE, TEXT, WHOLE, Rung
from bench.workloads.operators.modulation import elementwise_bytes
from pixart import cost
from pixart.config import PixArtConfig

GPU = "H200"
PART = "ladder"
PEAK = 4096 * SMS * CLOCK  # FLOP/s: 32 cycles a product of 64 × 64 × 16 on one SM
BANDWIDTH = 4.8e12  # bytes/s of an H200 (NVIDIA's data sheet)
# What is taken for the rate of all but attention, as shares of these two. The VAE's are low: half of its FLOPs are
# one head of 512 channels, for which there is no fast kernel.
PRODUCTS, T5, VAE, MOVED = (0.55, 0.8), (0.2, 0.7), (0.1, 0.4), (0.6, 0.9)
WAYS = {"Triton, the default": "forward, Triton", "Gluon": "forward, Gluon"}
ITEM = 2  # bytes of bf16
Range = tuple[float, float]  # the least, the most


class Published(NamedTuple):
    """seconds: as printed, by size. note: on that of 4k."""

    name: str
    seconds: dict[str, float]
    source: str
    note: str = ""


_SANA = "Sana, arXiv 2410.10629, table 14: one A100, fp16, batch 1, 20 steps"
PUBLISHED = (
    Published("PixArt-Σ, dense", {"1k": 2.7, "2k": 18.1, "4k": 186}, _SANA),
    Published("Sana-0.6B", {"1k": 0.9, "2k": 2.5, "4k": 9.6}, _SANA),
    Published(
        "Sana-1.6B",
        {"1k": 1.2, "2k": 4.1, "4k": 5.9},
        _SANA,
        "less than the smaller model's, though its 0.066 pictures a second there are fewer",
    ),
    Published("Sana-1.6B", {"4k": 17.551}, "xDiT, docs/performance/sana.md: one A100, 20 steps"),
)
BASE = PUBLISHED[0]


class Rates(NamedTuple):
    """FLOP/s of attention and of other products, bytes/s of what only moves; the slowest and the fastest."""

    attention: Range
    products: Range
    moved: Range

    @classmethod
    def of(cls, attention: Range) -> "Rates":
        peak, speed = (
            [share * whole for share in shares]
            for shares, whole in ((PRODUCTS, PEAK), (MOVED, BANDWIDTH))
        )
        return cls(attention, (peak[0], peak[1]), (speed[0], speed[1]))


def attention_rates(results: Iterable[Named], way: str) -> Range | None:
    """FLOP/s by both models of compiled code, with and without a running maximum, of all compilers; None where
    nothing was compiled. way: how the name of a prediction begins."""
    law, order = targets.MODELS
    rates = [
        rate
        for _, result in results
        for run in result["runs"]
        for found in run.get("targets", ())
        if found["name"] == way or found["name"].startswith(f"{way},")
        for rate in (found[law]["tflops"], *found[order]["tflops"])
    ]
    return (1e12 * min(rates), 1e12 * max(rates)) if rates else None


def denoising(rung: Rung, size: str, rates: Rates) -> Range:
    """Seconds of all evaluations."""
    config = sizes.config(size, rung.compression)
    found = [0.0, 0.0]
    for one in ladder.evaluations(rung, size):
        attention, products, moved = work(config, sizes.grid(size), one.ratios)
        for end in (0, 1):
            seconds = attention / rates.attention[end] + products / rates.products[end]
            found[1 - end] += one.halves * (seconds + moved / rates.moved[end])
    return found[0], found[1]


def work(
    config: PixArtConfig, grid: tuple[int, int], ratios: Sequence[int]
) -> tuple[int, int, int]:
    """Of one evaluation of one picture: FLOPs of attention, FLOPs of other products, and the bytes of what is
    neither, each tensor read and written once by each of our operators."""
    count, width = grid[0] * grid[1], config.hidden_size
    own = [None] * config.depth
    layers = [
        cost.block_flops(config, layer, grid, ratio=ratio)
        for layer, ratio in enumerate(ratios or own)
    ]
    attention = sum(one[name] for one in layers for name in cost.ATTENTION)
    whole = cost.forward_flops(config, grid, encoded=True, kv_ratios=ratios)
    merging = sum(one["merging keys and values"] for one in layers)
    kernels = ("gate_add", ""), ("gate_add_modulate", "plain"), ("gate_add_modulate", "gated")
    moved = config.depth * sum(
        elementwise_bytes(*kernel, count, width, ITEM, backward=False) for kernel in kernels
    )
    merged = config.kv_compression
    if merged is not None:
        moved += len(merged.layers) * cost.merging_bytes(grid, merged.ratio, width, ITEM)
    return attention, whole - attention - merging, moved


def stages(rung: Rung, size: str, rates: Rates) -> dict[str, Range]:
    """Seconds of each part of a picture, and of all."""
    text, vae = ladder.text_flops(size) / PEAK, ladder.decoder_flops(size) / PEAK
    found = {
        TEXT: (text / T5[1], text / T5[0]),
        DENOISING: denoising(rung, size, rates),
        DECODING: (vae / VAE[1], vae / VAE[0]),
    }
    return found | {WHOLE: (sum(x[0] for x in found.values()), sum(x[1] for x in found.values()))}


def overview(results: Sequence[Named], size: str = SIZE) -> str:
    """The table, what it takes for given, and the sources."""
    rates = {name: attention_rates(results, way) for name, way in WAYS.items()}
    columns = ["what is drawn", "evaluations", "PFLOP", *(f"predicted, {name}" for name in WAYS)]
    columns += [f"measured on an {GPU}", "an A100 at the published rate"]
    lines = [_line(rung, size, rates, results) for rung in RUNGS]
    lines += [*_parts(size, results), *_published(size)]
    return f"{table(columns, lines)}\n\n{assumptions(rates, size)}"


def _line(
    rung: Rung, size: str, rates: dict[str, Range | None], results: Sequence[Named]
) -> list[str]:
    flops, halves = (
        ladder.flops(rung, size),
        sum(one.halves for one in ladder.evaluations(rung, size)),
    )
    predicted = [
        "no kernel was compiled"
        if rate is None
        else between(stages(rung, size, Rates.of(rate))[WHOLE])
        for rate in rates.values()
    ]
    there = BASE.seconds[size] * flops / ladder.flops(RUNGS[0], size)
    measured = _reached(rung, WHOLE, size, results)
    published = between((there, there)) if rung is not RUNGS[0] else ""
    return [rung.name, str(halves), f"{flops / 1e15:.3g}", *predicted, measured, published]


def _parts(size: str, results: Sequence[Named]) -> Iterator[list[str]]:
    """What is the same in all rungs."""
    last = RUNGS[-1]
    found = stages(last, size, Rates.of((PEAK, PEAK)))  # whatever attention takes
    for name, stage, flops in (
        ("in each: T5, two captions", TEXT, ladder.text_flops(size)),
        ("in each: the VAE, the picture as a whole", DECODING, ladder.decoder_flops(size)),
    ):
        seconds = [between(found[stage])] * len(WAYS)
        yield [name, "", f"{flops / 1e15:.2g}", *seconds, _reached(last, stage, size, results), ""]


def _published(size: str) -> Iterator[list[str]]:
    for one in PUBLISHED:
        if size in one.seconds:
            words = f"**{one.seconds[size]:g} s**, published" + (
                f": {one.note}" if one.note else ""
            )
            yield [f"{one.name}, by others", "", "", *[""] * len(WAYS), "", words]


def _reached(rung: Rung, stage: str, size: str, results: Sequence[Named]) -> str:
    found = [
        f"{spread(row['seconds'])}{_peak(row)}"
        for _, result in results
        for run in result["runs"]
        if result["kind"] == "gpu" and GPU in machine_name(run["machine"])
        for row in run["rows"]
        if _is_of(row, rung, stage, size)
    ]
    return "; ".join(found) or MISSING


def _is_of(row: Row, rung: Rung, stage: str, size: str) -> bool:
    asked = row["part"] == PART and row["variant"] == stage and row["shape"]["size"] == size
    return asked and row.get("rung") == rung.name and "seconds" in row


def _peak(row: Row) -> str:
    return f", {row['peak_bytes'] / 2**30:.1f} GiB at its peak" if row.get("peak_bytes") else ""


def between(seconds: Range) -> str:
    """Two digits: a prediction has no more."""
    low, high = (f"{float(f'{one:.2g}'):g}" for one in seconds)
    return f"{low} s" if low == high else f"{low} to {high} s"


def assumptions(rates: dict[str, Range | None], size: str) -> str:
    said = [
        f"{name}: {rate[0] / 1e12:.0f} to {rate[1] / 1e12:.0f} useful TFLOP/s"
        for name, rate in rates.items()
        if rate is not None
    ]
    products, t5, vae, moved = (
        f"{percent(low, 0)} to {percent(high, 0)}" for low, high in (PRODUCTS, T5, VAE, MOVED)
    )
    schedule = ladder.ASSUMED_SCHEDULE.format(last=sizes.config(size).depth - 1)
    sources: dict[str, list[str]] = {}
    for one in PUBLISHED:
        if size in one.seconds:
            sources.setdefault(one.source, []).append(one.name)
    named = (f"{', '.join(names)}: {source}" for source, names in sources.items())
    lines = [
        f"Attention as its compiled code is predicted, {'; '.join(said) or 'none here'}: the least and the "
        "most that both models say, of all compilers, with and without a running maximum.",
        f"Taken for given: other products at {products}, T5 at {t5} and the VAE at {vae} of {PEAK / 1e12:.0f} "
        f"TFLOP/s ({SMS} SMs of 4,096 a cycle at {CLOCK / 1e9:g} GHz); what only moves at {moved} of "
        f"{BANDWIDTH / 1e12:g} TB/s.",
        "One picture at a time in bf16, captions of full length, all weights on the device; `balanced` is the "
        f"plan of any model, `{schedule}` stands for what a calibration may find, and the few steps are "
        f"{ladder.FEW}.",
        f"An A100 at the published rate is computed: the {BASE.seconds[size]:g} s of {BASE.name}, times the "
        "share of the denoiser's FLOPs. Whether these seconds have T5 and the VAE in them is not said, and "
        "nothing of our kernels is in it; an H200 has 3.2 times the bf16 peak of an A100.",
        f"Published: {'; '.join(named)}.",
    ]
    return "\n".join(f"- {line}" for line in lines)
