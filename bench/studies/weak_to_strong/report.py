"""The study's report: README.md from results.json, contact sheets from pictures."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from pixart.config import PixArtConfig
from pixart.model.transformer import PixArt

SIDE = 128  # px of a picture on a sheet
PAPER_SIGMA = "arXiv 2403.04692"
PAPER_ALPHA = "arXiv 2310.00426"


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
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(compose(results), encoding="utf-8")


def compose(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    found = {one["name"]: one for one in results["experiments"]}
    machine, scale = results["machine"], results["scale"]
    doubled = [found["interpolated"], found["extrapolated"]]
    starts = [found[f"conv deep half, {start}"] for start in ("mean", "calibrated", "random")]
    depths, samplings = ([found[name] for name in fids] for fids in (_DEPTHS, _SAMPLINGS))
    dense = found["dense"]
    parts = [
        "# From weak to strong, in the embedded world",
        "",
        f"Written by `{results['command']}` in {results['seconds'] / 60:.0f} minutes on "
        f"{machine['cores']} cores of {machine['processor']}, torch "
        f"{machine['libraries']['torch']}, {results['date']}, sources "
        f"{machine['source_sha256'][:12]}; every number stands in `results.json`.",
        "",
        "All experiments start from the same weights: the embedded model without its compression, "
        f"trained on for {scale['recovery']} steps. Each changes one thing and trains the "
        f"transformer on, {scale['images']} pictures of 128 px a step or as many pixels; the text "
        "encoder stays as it is. Loss: mean squared error of the velocity on the same "
        f"{len(dense['marks'][0]['losses'])} scenes, noise and timesteps. Captions: pictures in "
        "which every statement of the caption holds, of one thing in (a), of a pair in (b) and (c). "
        "A difference counts when it is more than "
        "twice its standard error over the scenes; every experiment is one run, and how much another "
        "run would differ after its training was not measured. The claims are those of PixArt-Σ "
        f"({PAPER_SIGMA}).",
        "",
        "## (a) Twice the resolution, 256 to 512 px, with position interpolation and without",
        "",
        *_table(doubled),
        "",
        _compare(doubled[0], doubled[1], "interpolation starts lower"),
        "",
        *_sheets(doubled),
        "## (b) Compression in the deeper half: how the convolution starts",
        "",
        *_table([*starts, dense]),
        "",
        _compare(starts[0], starts[2], "averaging starts lower than random weights"),
        "",
        _compare(
            starts[1],
            starts[0],
            "the calibrated start lies lower than averaging (ours, not the paper's)",
        ),
        "",
        *_sheets(starts),
        "## (c) Which blocks are compressed, and how",
        "",
        *_table(depths),
        "",
        *_compare_as_ranked(found, _DEPTHS, "3a"),
        "The paper compresses 14 of 28 blocks at a time, at 512 px; here it is 2 of 6, at 128 px.",
        "",
        *_table(samplings),
        "",
        *_compare_as_ranked(found, _SAMPLINGS, "3b"),
        "“discard” keeps the first token of every 2×2 window, where the paper drops tokens at "
        "random. “average” is the mean of a window, where the published code's `ave` takes one token.",
        "",
        *_sheets(depths),
        *_sheets([*samplings[1:], dense]),
        "## (d) adaLN-single against adaLN in every block, XL/2",
        "",
        "Counted, not trained: parameters, and bytes of weights, gradients and AdamW's moments in "
        f"fp32. The paper ({PAPER_ALPHA}, figure 6) has 611 M for 833 M parameters and 23 GB for "
        "29 GB, activations and its batch included. Its 833 M fits the last row: adaLN in every "
        "block, counted with the layer that adaLN-single shares, which is then idle. The saving has "
        "its price: after 200K steps FID is 22.37 with adaLN-single and 18.20 with adaLN.",
        "",
        *_modulation(results["modulation"]),
        "",
    ]
    return "\n".join(parts)


# What stands for a row of PixArt-Σ's table 3a and 3b here, with that row's FID at 512 px.
_DEPTHS = {"conv shallow third": 9.278, "conv middle third": 9.063, "conv deep third": 8.532}
_SAMPLINGS = {
    "conv deep half, mean": 8.505,
    "discard deep half": 8.918,
    "average deep half": 9.415,
}


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    marks = [mark["step"] for mark in rows[0]["marks"]]
    head = " | ".join(f"loss @{step}" for step in marks)
    head += " | " + " | ".join(f"captions @{step}" for step in marks)
    lines = [f"| | {head} |", "|---" * (1 + 2 * len(marks)) + "|"]
    for row in rows:
        losses = [f"{_mean(mark['losses']):.4f}" for mark in row["marks"]]
        shares = [f"{mark['right']}/{mark['of']}" for mark in row["marks"]]
        lines.append(f"| {row['name']} | {' | '.join(losses + shares)} |")
    return lines


def _compare(low: dict[str, Any], high: dict[str, Any], claim: str, at: int = 0) -> str:
    """Whether the first has the lower loss at a mark, as a sentence."""
    pairs = zip(low["marks"][at]["losses"], high["marks"][at]["losses"], strict=True)
    differences = [b - a for a, b in pairs]
    mean, error = _mean(differences), _standard_error(differences)
    step = low["marks"][at]["step"]
    verdict = "Agrees" if mean > 0 else "Does not agree"
    if abs(mean) <= 2 * error:
        verdict = "Not decided here"
    return (
        f"**{verdict}**: {claim}. At step {step} the loss of “{high['name']}” minus that of "
        f"“{low['name']}” is {mean:+.5f} ± {error:.5f}."
    )


def _compare_as_ranked(
    found: Mapping[str, dict[str, Any]], fids: Mapping[str, float], table: str
) -> list[str]:
    """A paragraph for each two: whether the one of lower FID in the paper's table ends lower."""
    lines = []
    for low, high in combinations(sorted(fids, key=fids.__getitem__), 2):
        claim = (
            f"“{low}” ends lower than “{high}” "
            f"(table {table}: FID {fids[low]:.3f} against {fids[high]:.3f})"
        )
        lines += [_compare(found[low], found[high], claim, at=-1), ""]
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    mean = _mean(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return math.sqrt(variance / len(values))


def _sheets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The contact sheets, a row of pictures for each mark from the top."""
    marks = ", ".join(str(mark["step"]) for mark in rows[0]["marks"])
    names = [row["name"] for row in rows]
    cells = " | ".join(f"![{name}]({file_name(name)}.png)" for name in names)
    return [
        f"Rows from the top: after {marks} steps.",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(rows) + "|",
        f"| {cells} |",
        "",
    ]


def file_name(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _modulation(rows: Sequence[dict[str, Any]]) -> list[str]:
    single = rows[0]
    lines = [
        "| | parameters | weights, gradients, moments | adaLN-single saves |",
        "|---" * 4 + "|",
    ]
    for row in rows:
        saved = f"{1 - single['parameters'] / row['parameters']:.1%}" if row is not single else ""
        lines.append(
            f"| {row['name']} | {row['parameters'] / 1e6:.1f} M | {row['bytes'] / 1e9:.1f} GB | "
            f"{saved} |"
        )
    return lines
