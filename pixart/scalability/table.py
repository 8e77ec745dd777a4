"""`python -m pixart.scaling table`: what denoisers are made of, beside what the scalability paper printed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pixart.device import check_kernels, choose_device
from pixart.progress import counted
from pixart.scalability.counting import Count
from pixart.scalability.measuring import Machine, Pass, machine, measure, passes_json, passes_text
from pixart.scalability.options import Table
from pixart.scalability.rows import ALPHA, PAPER_SIZE, ROWS, Row, check_size, choose

BATCHES, DTYPES = (1, 8), ("fp32",)  # of a measured pass, where none are given
MOST_BATCH = 1024
COUNTED = (
    "One picture, one forward pass. GMACs are 1e9 multiply-adds of linear layers and convolutions, as the paper "
    "counts; it leaves QKᵀ and AV out, which the next column adds. The last columns are GMACs of layers in "
    "transformer blocks (of IF-XL: in attention): of SDXL and its variations the paper's are those without the "
    "middle of the network, and ours here too."
)
HEADS = (
    "parameters, 1e9        GMACs                  with  in transformer blocks",
    "here   paper     off    here  paper     off    QKᵀAV    here  share  paper",
)
_WIDTH = max(map(len, ROWS))


def table(options: Table) -> str:
    """The table as text or JSON."""
    check_size(options.size)
    rows = choose(options.only)
    _check_measuring(options)
    counts = {row.name: row.count(options.size) for row in counted(rows, "counted", len(rows))}
    measured: tuple[list[Pass], Machine] | None = None
    if options.measure:
        measured = _measure(rows, counts, options)
    if options.json:
        return json.dumps(as_json(rows, counts, options.size, measured), ensure_ascii=False)
    return "\n".join(as_text(rows, counts, options.size, measured))


def _check_measuring(options: Table) -> None:
    """ValueError for what says how to measure where nothing is measured, and for nonsense."""
    given = {"batch": options.batch, "dtype": options.dtype, "device": options.device}
    for name, value in given.items():
        if value and not options.measure:
            raise ValueError(f"{name} must be left out without --measure, got {_words(value)}")
    for batch in options.batch:
        if not 1 <= batch <= MOST_BATCH:
            raise ValueError(f"batch must be from 1 to {MOST_BATCH}, got {batch}")
    if options.measure:
        check_kernels(choose_device(options.device))


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _measure(
    rows: Sequence[Row], counts: Mapping[str, Count], options: Table
) -> tuple[list[Pass], Machine]:
    device = choose_device(options.device)
    batches, dtypes = options.batch or BATCHES, options.dtype or DTYPES
    passes = []
    wanted = [(row, dtype, batch) for row in rows for dtype in dtypes for batch in batches]
    for row, dtype, batch in counted(wanted, "measured", len(wanted)):
        size = counts[row.name].parameters
        passes.append(measure(row.name, size, device, options.size, dtype, batch))
    return passes, machine(device)


def deviation(here: float, paper: float | None) -> float | None:
    """Of what was printed."""
    return None if paper is None else here / paper - 1


def deviations(row: Row, count: Count, size: int) -> dict[str, float | None]:
    """Of parameters and MACs, None where the paper has no figure of the same."""
    paper = row.paper
    is_same = paper is not None and size == PAPER_SIZE and row.name != ALPHA
    return {
        "parameters": deviation(count.parameters / 1e9, paper.parameters if paper else None),
        "macs": deviation(count.layers / 1e9, paper.macs if paper and is_same else None),
    }


def as_json(
    rows: Sequence[Row],
    counts: Mapping[str, Count],
    size: int,
    measured: tuple[list[Pass], Machine] | None = None,
) -> dict[str, Any]:
    """For --json: counts as whole numbers, the paper's figures as it prints them."""
    found = []
    for row in rows:
        count, paper = counts[row.name], row.paper
        found.append(
            {
                "name": row.name,
                "kind": "unet" if row.is_unet else "transformer",
                "text": {"channels": row.channels, "tokens": row.tokens},
                "parameters": count.parameters,
                "macs": count.layers,
                "macs_with_attention": count.layers + count.attention,
                "macs_in_transformer_blocks": count.inside,
                "paper": None if paper is None else _paper_json(row, size),
                "deviation": deviations(row, count, size),
                "note": row.note,
            }
        )
    values = {"size": size, "source": "arXiv 2404.02883, tables 1 and 2", "counted": COUNTED}
    values |= {"rows": found}
    return values if measured is None else values | {"measured": passes_json(*measured)}


def _paper_json(row: Row, size: int) -> dict[str, float | None]:
    paper, is_same = row.paper, size == PAPER_SIZE
    assert paper is not None
    return {
        "parameters_1e9": paper.parameters,
        "macs_1e9": paper.macs if is_same else None,
        "macs_in_transformer_blocks_1e9": paper.inside if is_same else None,
    }


def as_text(
    rows: Sequence[Row],
    counts: Mapping[str, Count],
    size: int,
    measured: tuple[list[Pass], Machine] | None = None,
) -> list[str]:
    """Lines for a terminal."""
    lines = [f"Denoisers at {size} px, beside arXiv 2404.02883, tables 1 and 2", *_wrapped(COUNTED)]
    if size != PAPER_SIZE:
        lines += _wrapped(f"The paper's GMACs are of {PAPER_SIZE} px: beside {size} px stand none.")
    lines += ["", *(f"{'':<{_WIDTH}}  {head}" for head in HEADS)]
    notes: list[str] = []
    for row in rows:
        mark = ""
        if row.note:
            notes.append(row.note)
            mark = f"[{len(notes)}]"
        lines.append(f"{_line(row, counts[row.name], size)}  {mark}".rstrip())
    for number, note in enumerate(notes, 1):
        lines += ["", *_wrapped(f"[{number}] {note}.")]
    if measured is not None:
        macs = {row.name: counts[row.name].layers / 1e9 for row in rows}
        lines += ["", *passes_text(measured[0], macs, measured[1])]
    return lines


def _line(row: Row, count: Count, size: int) -> str:
    paper, off = row.paper, deviations(row, count, size)
    has_macs = paper is not None and size == PAPER_SIZE
    parameters = _printed(paper.parameters if paper else None, 5)
    total = count.layers + count.attention
    return (
        f"{row.name:<{_WIDTH}}  {count.parameters / 1e9:.4f}  {parameters}  "
        f"{_percent(off['parameters'])}  {count.layers / 1e9:>6.1f}  "
        f"{_printed(paper.macs if paper and has_macs else None, 5)}  {_percent(off['macs'])}  "
        f"{total / 1e9:>7.1f}  {count.inside / 1e9:>6.1f}  {count.inside / count.layers:>5.0%}  "
        f"{_printed(paper.inside if paper and has_macs else None, 5)}"
    )


def _printed(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:g}':>{width}}"


def _percent(value: float | None) -> str:
    return f"{'-' if value is None else f'{100 * value:+.1f} %':>7}"


def _wrapped(text: str) -> list[str]:
    from textwrap import wrap

    return wrap(text, 100, break_long_words=False, break_on_hyphens=False)
