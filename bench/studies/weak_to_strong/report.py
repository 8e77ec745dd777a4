"""The study's report: README.md from results.json and a template, contact sheets from pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import nn

from bench.reporting.text import fill, percent, table
from bench.studies.weak_to_strong.claims import (
    AVERAGING,
    CALIBRATION,
    DEPTHS,
    DEPTHS_RANKED,
    INTERPOLATION,
    SAMPLINGS,
    SAMPLINGS_RANKED,
    Claim,
    Results,
    judge,
    seeds_of,
)
from pixart.config import PixArtConfig
from pixart.files import read_json, write_bytes
from pixart.model.transformer import PixArt

Experiment = dict[str, Any]  # as results.json has it
SIDE = 128  # px of a picture on a sheet
TEMPLATE = Path(__file__).with_name("template.md")
SEEDS = Path(__file__).with_name("seeds.md")  # the template of a section


def contact_sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures side by side, a row each mark; larger ones are scaled down."""
    sheet = Image.new("RGB", (len(rows[0]) * SIDE, len(rows) * SIDE))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(small, (x * SIDE, y * SIDE))
    return sheet


def modulation_costs() -> list[dict[str, Any]]:
    """Parameters and training memory of XL/2 with adaLN-single and with adaLN in every block.

    adaLN as in DiT: a linear layer from the embedded timestep to six vectors of width C in each
    block, in the place of a table of six vectors and one such layer for all; once more with that
    layer left in, idle, which is the paper's count. Memory: bytes of weights, gradients and two
    AdamW moments, fp32, without activations.
    """
    with torch.device("meta"):
        model = PixArt(PixArtConfig())
        layers = [nn.Linear(model.config.hidden_size, 6 * model.config.hidden_size)] * len(
            model.blocks
        )
    tables = sum(p.numel() for name, p in model.named_parameters() if "scale_shift_table" in name)
    last = model.final_layer.scale_shift_table.numel()
    shared = sum(p.numel() for p in model.t_block.parameters())
    single = sum(p.numel() for p in model.parameters())
    per_block = sum(p.numel() for layer in layers for p in layer.parameters())
    whole = single - (tables - last) - shared + per_block
    counts = {
        "adaLN-single": single,
        "adaLN": whole,
        "adaLN, the shared layer left in": whole + shared,
    }
    return [
        {"name": name, "parameters": count, "bytes": 16 * count} for name, count in counts.items()
    ]


def write_report(folder: Path) -> None:
    """FOLDER/README.md from FOLDER/results.json."""
    results = read_json(folder / "results.json")
    write_bytes(folder / "README.md", compose(results).encode())


def compose(results: Results) -> str:
    """The report as Markdown."""
    found = {one["name"]: one for one in results["experiments"]}
    machine, scale, dense = results["machine"], results["scale"], found["dense"]
    doubled = [found["interpolated"], found["extrapolated"]]
    starts = [found[f"conv deep half, {start}"] for start in ("mean", "calibrated", "random")]
    depths, samplings = ([found[name] for name in fids] for fids in (DEPTHS, SAMPLINGS))
    parts = {
        "COMMAND": results["command"],
        "MINUTES": f"{results['seconds'] / 60:.0f}",
        "CORES": machine["cores"],
        "PROCESSOR": machine["processor"],
        "TORCH": machine["libraries"]["torch"],
        "DATE": results["date"],
        "SOURCES": machine["source_sha256"][:12],
        "RECOVERY": scale["recovery"],
        "IMAGES": scale["images"],
        "SCENES": len(dense["marks"][0]["losses"]),
        "SPREAD": _spread(results),
        "DOUBLED": _marks(doubled),
        "INTERPOLATION": judge(INTERPOLATION, results),
        "DOUBLED PICTURES": _sheets(doubled),
        "STARTS": _marks([*starts, dense]),
        "AVERAGING": judge(AVERAGING, results),
        "CALIBRATION": judge(CALIBRATION, results),
        "STARTS PICTURES": _sheets(starts),
        "DEPTHS": _marks(depths),
        "DEPTHS RANKED": _judge_all(DEPTHS_RANKED, results),
        "DEPTHS PICTURES": _sheets(depths),
        "SAMPLINGS": _marks(samplings),
        "SAMPLINGS RANKED": _judge_all(SAMPLINGS_RANKED, results),
        "SAMPLINGS PICTURES": _sheets([*samplings[1:], dense]),
        "SEEDS": _seeds(results),
        "MODULATION": _modulation(results["modulation"]),
    }
    return fill(TEMPLATE, parts)


def _marks(rows: Sequence[Experiment]) -> str:
    steps = [mark["step"] for mark in rows[0]["marks"]]
    columns = [f"{what} @{step}" for what in ("loss", "captions") for step in steps]
    lines = []
    for row in rows:
        losses = [f"{fmean(mark['losses']):.4f}" for mark in row["marks"]]
        lines.append(
            [row["name"], *losses, *(f"{one['right']}/{one['of']}" for one in row["marks"])]
        )
    return table(("", *columns), lines)


def _judge_all(claims: Sequence[Claim], results: Results) -> str:
    """A paragraph for each."""
    return "\n\n".join(judge(claim, results) for claim in claims)


def _spread(results: Results) -> str:
    """How many runs a verdict is of."""
    if "repeats" not in results:
        return (
            "every experiment is one run, and how much another run would differ after its training "
            "was not measured."
        )
    return (
        "every experiment of the tables is one run, and how much another would differ after its "
        "training is not in that error. Verdicts over seeds are of further runs, and have it in theirs; "
        "see “The seeds”."
    )


def _seeds(results: Results) -> str:
    """The section of the runs that were made again, empty if there are none."""
    if not (again := results.get("repeats")):
        return ""
    machine, runs = again["machine"], again["runs"]
    seeds = sorted({one["seed"] for one in runs})
    lines = []
    for one in results["experiments"]:
        if found := seeds_of(results, one["name"]):
            ends = [_course(found[seed], found[seed]) if seed in found else "" for seed in seeds]
            lines.append([one["name"], _course(one, one["marks"][-1]), *ends])
    parts = {
        "COMMAND": again["command"],
        "MINUTES": f"{again['cpu_seconds'] / 60:.0f}",
        "CORES": machine["cores"],
        "PROCESSOR": machine["processor"],
        "TORCH": machine["libraries"]["torch"],
        "DATE": again["date"],
        "SOURCES": ", ".join(one[:12] for one in again["sources"]),
        "STEP": runs[0]["marks"][-1]["step"],
        "RUNS": table(("", "first run", *(f"seed {seed}" for seed in seeds)), lines),
    }
    return fill(SEEDS, parts).strip()


def _course(run: Experiment, followed: Mapping[str, int]) -> str:
    """Of one run: the loss from the first mark to the last, and the captions followed."""
    first, last = (fmean(run["marks"][at]["losses"]) for at in (0, -1))
    return f"{first:.4f} → {last:.4f}, {followed['right']}/{followed['of']}"


def _sheets(rows: Sequence[Experiment]) -> str:
    """The contact sheets, a row of pictures for each mark from the top."""
    steps = ", ".join(str(mark["step"]) for mark in rows[0]["marks"])
    names = [row["name"] for row in rows]
    pictures = [f"![{name}]({file_name(name)}.png)" for name in names]
    return f"Rows from the top: after {steps} steps.\n\n{table(names, [pictures])}"


def file_name(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _modulation(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("", "parameters", "weights, gradients, moments", "adaLN-single saves")
    lines = []
    for row in rows:
        share = 1 - rows[0]["parameters"] / row["parameters"]
        counts = [f"{row['parameters'] / 1e6:.1f} M", f"{row['bytes'] / 1e9:.1f} GB"]
        lines.append([row["name"], *counts, percent(share) if share else ""])
    return table(columns, lines)
