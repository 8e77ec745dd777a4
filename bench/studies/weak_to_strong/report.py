"""The study's report: README.md from results.json and a template, contact sheets from pictures."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from PIL import Image
from torch import nn

from bench.reporting.text import fill, percent, table
from pixart.config import PixArtConfig
from pixart.files import read_json, write_bytes
from pixart.model.transformer import PixArt

Experiment = dict[str, Any]  # as results.json has it
SIDE = 128  # px of a picture on a sheet
TEMPLATE = Path(__file__).with_name("template.md")


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


def compose(results: dict[str, Any]) -> str:
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
        "DOUBLED": _marks(doubled),
        "INTERPOLATION": compare(doubled[0], doubled[1], "interpolation starts lower"),
        "DOUBLED PICTURES": _sheets(doubled),
        "STARTS": _marks([*starts, dense]),
        "AVERAGING": compare(starts[0], starts[2], "averaging starts lower than random weights"),
        "CALIBRATION": compare(starts[1], starts[0], CALIBRATED),
        "STARTS PICTURES": _sheets(starts),
        "DEPTHS": _marks(depths),
        "DEPTHS RANKED": _compare_as_ranked(found, DEPTHS, "3a"),
        "DEPTHS PICTURES": _sheets(depths),
        "SAMPLINGS": _marks(samplings),
        "SAMPLINGS RANKED": _compare_as_ranked(found, SAMPLINGS, "3b"),
        "SAMPLINGS PICTURES": _sheets([*samplings[1:], dense]),
        "MODULATION": _modulation(results["modulation"]),
    }
    return fill(TEMPLATE, parts)


CALIBRATED = "the calibrated start lies lower than averaging (ours, not the paper's)"
# What stands for a row of PixArt-Σ's table 3a and 3b here, with that row's FID at 512 px.
DEPTHS = {"conv shallow third": 9.278, "conv middle third": 9.063, "conv deep third": 8.532}
SAMPLINGS = {
    "conv deep half, mean": 8.505,
    "discard deep half": 8.918,
    "average deep half": 9.415,
}


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


def compare(low: Experiment, high: Experiment, claim: str, at: int = 0) -> str:
    """Whether the first has the lower loss at a mark, as a sentence."""
    pairs = zip(low["marks"][at]["losses"], high["marks"][at]["losses"], strict=True)
    differences = [b - a for a, b in pairs]
    mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    verdict = "Agrees" if mean > 0 else "Does not agree"
    if abs(mean) <= 2 * error:
        verdict = "Not decided here"
    return (
        f"**{verdict}**: {claim}. At step {low['marks'][at]['step']} the loss of “{high['name']}” minus "
        f"that of “{low['name']}” is {mean:+.5f} ± {error:.5f}."
    )


def _compare_as_ranked(
    found: Mapping[str, Experiment], fids: Mapping[str, float], source: str
) -> str:
    """A paragraph for each two: whether the one of lower FID in the paper's table ends lower."""
    sentences = []
    for low, high in combinations(sorted(fids, key=fids.__getitem__), 2):
        claim = (
            f"“{low}” ends lower than “{high}” "
            f"(table {source}: FID {fids[low]:.3f} against {fids[high]:.3f})"
        )
        sentences.append(compare(found[low], found[high], claim, at=-1))
    return "\n\n".join(sentences)


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
