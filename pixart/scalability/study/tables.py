"""The tables of the study's report, each of the runs that are there."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pixart.evaluation.report.markdown import table
from pixart.scalability.study.plan import BASE, CAPTIONS, DATA, QUALITY, REPEATS, SHAPES, SIZES, Run
from pixart.scalability.study.verdicts import Results, shares_of
from pixart.shapes.caption import KINDS


def _present(results: Results, runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [results.runs[run.name] for run in runs if run.name in results]


def named(*names: str, among: Sequence[Run]) -> list[Run]:
    return [run for run in among if run.name in names]


def millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def macs(run: dict[str, Any]) -> str:
    """Multiply-adds of a forward pass."""
    return f"{run['forward_flops'] / 2e6:.0f} M"


def final(run: dict[str, Any]) -> list[str]:
    """Loss at the end, with the weights as they are and averaged."""
    last = run["marks"][-1]
    return [f"{last['loss']:.4f}", f"{last['ema_loss']:.4f}"]


def _held(run: dict[str, Any]) -> str:
    return f"{100 * fmean(shares_of(run)):.0f} %"


def _right(run: dict[str, Any]) -> str:
    last = run["accuracy"][-1]
    return f"{last['all_right']}/{last['captions']}"


def sizes(results: Results) -> str:
    """Loss of every size at every level."""
    levels = [f"{level:g}" for level in results.told["scale"]["levels"]]
    rows = []
    for run in _present(results, SIZES):
        losses = [
            f"{results.mark(run, run['levels'][level])['loss']:.4f}"
            if level in run["levels"]
            else ""
            for level in levels
        ]
        shared = next(
            (m for m in run["marks"] if m["step"] == results.told["scale"]["shared"]), None
        )
        rows.append(
            [run["name"], millions(run["parameters"]), macs(run), f"{run['steps']:,}", *losses]
            + [f"{shared['loss']:.4f}" if shared else "", final(run)[1]]
        )
    columns = ["", "parameters", "MACs", "steps", *(f"loss @{level} TFLOP" for level in levels)]
    shared_step = results.told["scale"]["shared"]
    return table([*columns, f"loss @{shared_step} steps", "averaged weights, end"], rows)


def kinds(results: Results, runs: Sequence[Run] = SIZES) -> str:
    """What holds in pictures, by kind of statement, at each measurement."""
    present = _present(results, runs)
    seen = [
        kind for kind in KINDS if any(kind in run["accuracy"][-1]["by_kind"] for run in present)
    ]
    rows = []
    for run in present:
        for place, drawn in enumerate(run["accuracy"]):
            counts = [drawn["by_kind"].get(kind) for kind in seen]
            cells = [f"{100 * count[0] / count[1]:.0f}" if count else "" for count in counts]
            compute = results.mark(run, drawn["step"])["tflop"]
            whole = f"{drawn['all_right']}/{drawn['captions']}"
            rows.append(
                [run["name"], f"{compute:.3g}", whole, f"{100 * fmean(shares_of(run, place)):.0f}"]
                + cells
            )
    return table(
        ["", "TFLOP", "all right", "statements, %", *(f"{kind}, %" for kind in seen)], rows
    )


def shapes(results: Results) -> str:
    """Deep and narrow beside shallow and wide, by rising parameters."""
    order = (SHAPES[1], SHAPES[0], SHAPES[2], SIZES[3], SHAPES[3])
    rows = []
    for run in _present(results, order):
        cost = [millions(run["parameters"]), macs(run), f"{run['marks'][-1]['tflop']:.3g}"]
        rows.append([run["name"], *cost, *final(run), _right(run), _held(run)])
    return table(["", "parameters", "MACs", "TFLOP", *_ENDS], rows)


def data(results: Results) -> str:
    """Loss on scenes that were trained on and on others."""
    rows = []
    for run in [*_present(results, DATA), *_present(results, named(BASE, among=SIZES))]:
        last = run["marks"][-1]
        scenes = run["scenes"] or results.told["scale"]["pool"]
        rows.append(
            [
                f"{scenes:,}",
                f"{run['steps'] * run['batch'] / scenes:,.1f}",
                f"{last['own_loss']:.4f}",
            ]
            + [*final(run), f"{last['loss'] - last['own_loss']:+.4f}", _right(run), _held(run)]
        )
    columns = [
        "scenes",
        "times each",
        "loss on its own scenes",
        "loss on others",
        "averaged weights",
    ]
    return table([*columns, "gap", *_ENDS[2:]], rows)


def captions(results: Results) -> str:
    names = {BASE: "one of five descriptions", "raw captions": "raw alone"}
    names |= {"raw and synthetic": "raw, or one of five", "top caption": "the top one of five"}
    runs = [*CAPTIONS[:2], *named(BASE, among=SIZES), CAPTIONS[2]]
    rows = [
        [names[run["name"]], *final(run), _right(run), _held(run)]
        for run in _present(results, runs)
    ]
    return table(["captions", *_ENDS], rows)


def quality(results: Results) -> str:
    names = {BASE: "right", "wrong captions": "30 % wrong", "filtered": "30 % wrong, filtered"}
    runs = [*named(BASE, among=SIZES), *QUALITY]
    rows = [
        [names[run["name"]], f"{run['seen_scenes']:,}", *final(run), _right(run), _held(run)]
        for run in _present(results, runs)
    ]
    return table(["captions", "scenes seen", *_ENDS], rows)


def denoisers(results: Results) -> str:
    names = {BASE: "transformer, 144x4", "UNet": "UNet, 32 and 64 channels"}
    rows = []
    for name in (BASE, "UNet"):
        for run in results.seeds(name):
            label = f"{names[name]}, seed {run['seed']}"
            cost = [millions(run["parameters"]), macs(run), f"{run['steps']:,}"]
            seconds = f"{1e3 * run['cpu_seconds'] / run['steps']:.0f} ms"
            rows.append([label, *cost, *final(run), _right(run), _held(run), seconds])
    columns = ["", "parameters", "MACs", "steps", *_ENDS, "CPU time a step, measuring included"]
    return table(columns, rows)


def seeds(results: Results) -> str:
    """Runs that were repeated."""
    rows = []
    for names in REPEATS:
        for run in results.seeds(names[0]):
            rows.append([run["name"], *final(run), _right(run), _held(run)])
    return table(["", *_ENDS], rows)


_ENDS = ["loss, end", "averaged weights", "captions all right", "statements that hold"]
