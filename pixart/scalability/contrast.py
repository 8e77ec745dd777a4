"""`python -m pixart.scaling contrast`: MobileDiffusion beside PixArt-Σ, a small UNet beside a transformer.

What was published stands apart from what is counted and measured here, and every cell that is empty says what
it needs.
"""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pixart.checkpoint.load import open_transformer
from pixart.config import EMBEDDED, KVCompression, PixArtConfig
from pixart.device import choose_device
from pixart.files import read_json
from pixart.pipeline.directory import open_directory
from pixart.scalability.counting import Count, count_transformer
from pixart.scalability.measuring import Machine, ask, machine
from pixart.scalability.options import Contrast
from pixart.scalability.parts import (
    CLIP_L,
    SDXL_VAE,
    T5_XXL,
    count_clip,
    count_decoder,
    count_t5,
)
from pixart.scalability.rows import VAE

WORKER = "pixart.scalability.one_picture"
COLUMNS = {
    "mobile": "MobileDiffusion",
    "sigma": "PixArt-Σ",
    "here": "counted here",
    "embedded": "embedded model, here",
}
SOURCES = {"mobile": "arXiv 2311.16567", "sigma": "arXiv 2403.04692"}
SIZES = {256: "256 px", 512: "512 px", 1024: "1K", 2048: "2K", 4096: "4K"}
COMPRESSED = KVCompression(tuple(range(14, 28)), 2)  # PixArt-Σ's, deep half
CLIP_TOKENS = 77
UNPUBLISHED = "needs weights, which are not published"
NEEDS_SIGMA = "needs weights: pixart generate PROMPT --model sigma-512 --json tells"
NO_FIGURE = "not quoted here"
NEEDS_MEASURE = "not measured: needs --measure"
WARNINGS = (
    "Not a phone: what is measured here is measured on the machine named below, and says nothing of 0.2 s on an "
    "iPhone 15 Pro.",
    "The two published pairs of FID and CLIP score are not comparable: MobileDiffusion's are of COCO-30K, "
    "PixArt-Σ's of a set of 30,000 pictures of its own, and the CLIP models need not be the same. Which is "
    "better they do not tell; `pixart evaluate run` would, with both models' pictures of one set.",
)


@dataclass(frozen=True)
class Line:
    """A row of the table: what is compared, a cell for each of COLUMNS."""

    what: str
    mobile: str
    sigma: str
    here: str
    embedded: str


def contrast(options: Contrast) -> str:
    """The table as text or JSON."""
    measured: tuple[dict[str, Any], Machine] | None = None
    if options.measure:
        measured = ask(WORKER, {"model": EMBEDDED}), machine(choose_device(None))
    lines = [*counted_lines(), *measured_lines(measured and measured[0])]
    if options.json:
        return json.dumps(as_json(lines, measured), ensure_ascii=False)
    return "\n".join(as_text(lines, measured and measured[1]))


def counted_lines() -> list[Line]:
    """What is known without weights, and what was published of it."""
    parts = embedded_parts()
    decoder, small_decoder = count_decoder(SDXL_VAE, 512), count_decoder(parts["vae"], 512)
    dense, own = PixArtConfig(), parts["transformer"]
    t5 = count_t5(T5_XXL, dense.model_max_length)
    small_t5 = count_t5(parts["text"], own.model_max_length)
    denoiser = count_transformer(dense, 64, dense.model_max_length)
    small = count_transformer(own, 64, own.model_max_length)
    clip = count_clip(CLIP_L, CLIP_TOKENS)
    return [
        Line(
            "denoiser", "UNet, 386 M parameters", "transformer, 0.6 B",
            _millions(denoiser), _millions(small),
        ),
        Line(
            "text encoder", "CLIP ViT-L/14, 123 M", "Flan-T5-XXL, 300 tokens",
            f"T5-XXL {_millions(t5)}; CLIP ViT-L/14 {_millions(clip)}", f"T5 {_millions(small_t5)}",
        ),
        Line(
            "text encoder's weights", NO_FIGURE, NO_FIGURE,
            f"T5-XXL {_bytes(t5, dense.model_max_length)}; CLIP ViT-L/14 {_bytes(clip, CLIP_TOKENS)}",
            _bytes(small_t5, own.model_max_length),
        ),
        Line(
            "VAE's decoder", NO_FIGURE, "SDXL's", _millions(decoder), _millions(small_decoder),
        ),
        *(_forward(dense, own, size) for size in SIZES),
        Line(
            "GMACs a prompt", NO_FIGURE, NO_FIGURE,
            f"T5-XXL {_giga(t5)}, {dense.model_max_length} tokens; "
            f"CLIP ViT-L/14 {_giga(clip)}, {CLIP_TOKENS} tokens",
            f"{_giga(small_t5)}, {own.model_max_length} tokens",
        ),
        Line(
            "GMACs to decode 512 px", NO_FIGURE, NO_FIGURE, _giga(decoder), _giga(small_decoder),
        ),
        Line("denoising steps", "1 (8), or 50 of DDIM", "20", "-", "20"),
        Line(
            "FID / CLIP score", "8.65 / 0.325 (50 steps), 11.67 / 0.320 (1 step), COCO-30K",
            "8.23 / 0.2797, a set of its own of 30K",
            "needs weights and pictures: pixart evaluate run sigma-table-6",
            "needs none of these: pixart evaluate run shapes has its own measure",
        ),
        Line("training images", "150 M", "33 M", "-", "drawn as they are needed"),
    ]  # fmt: skip


def measured_lines(found: Mapping[str, Any] | None) -> list[Line]:
    """Seconds and bytes. found: of the embedded model, None where nothing was measured."""
    cells = dict.fromkeys(("picture", "text", "memory"), NEEDS_MEASURE)
    if found is not None and "left_out" in found:
        cells = dict.fromkeys(cells, f"not measured: {found['left_out']}")
    elif found is not None:
        seconds, peak = found["seconds"], found["peak_bytes"]
        width, height = found["size"]
        cells["picture"] = (
            f"{sum(seconds.values()):.2f} s, {width} x {height} px, {found['steps']} steps, guidance "
            f"{found['guidance']:g}: denoising {seconds['denoise']:.2f}, decoding {seconds['decode']:.2f}"
        )
        cells["text"] = f"{1e3 * seconds['text']:.0f} ms"
        cells["memory"] = "not told by this system" if peak is None else f"{peak / 2**20:.0f} MiB"
    return [
        Line(
            "time of a picture", "0.2 s, 512 px, 1 step, iPhone 15 Pro", NO_FIGURE, NEEDS_SIGMA,
            cells["picture"],
        ),
        Line("time of a prompt's text", NO_FIGURE, NO_FIGURE, NEEDS_SIGMA, cells["text"]),
        Line("memory at the peak", NO_FIGURE, NO_FIGURE, NEEDS_SIGMA, cells["memory"]),
        Line("the UNet on this machine", UNPUBLISHED, "-", UNPUBLISHED, "-"),
    ]  # fmt: skip


def embedded_parts() -> dict[str, Any]:
    """The configurations of the embedded model: its weights are not read."""
    folder = open_directory(EMBEDDED, True)
    vae = read_json(folder / "vae" / "config.json")
    return {
        "transformer": open_transformer(folder).config,
        "text": read_json(folder / "text_encoder" / "config.json"),
        "vae": {name: vae[name] for name in vae if not name.startswith("_")},
    }


def _forward(dense: PixArtConfig, own: PixArtConfig, size: int) -> Line:
    """GMACs of one pass at a size in pixels, QKᵀ and AV included."""
    from dataclasses import replace

    side, text = size // VAE, dense.model_max_length
    found = count_transformer(dense, side, text)
    cell = f"{_giga(found)} (layers {found.layers / 1e9:,.0f})"
    if size >= 1024:
        merged = count_transformer(replace(dense, kv_compression=COMPRESSED), side, text)
        cell += f"; compressed {_giga(merged)}"
    small = count_transformer(own, side, own.model_max_length)
    return Line(f"GMACs a pass, {SIZES[size]}", NO_FIGURE, NO_FIGURE, cell, _giga(small))


def _millions(count: Count) -> str:
    return f"{count.parameters / 1e6:,.1f} M"


def _bytes(text_encoder: Count, tokens: int) -> str:
    """Of its weights in bf16, and at least with its linear layers in 8 and 4 bits, as bitsandbytes has them."""
    linear = text_encoder.layers // tokens  # each of their weights takes part once a token
    rest = text_encoder.parameters - linear
    sizes = ((linear * bits / 8 + 2 * rest) / 1e6 for bits in (16, 8, 4))
    return "{:,.0f} MB in bf16, {:,.0f} in 8 bits, {:,.0f} in 4".format(*sizes)


def _giga(count: Count) -> str:
    total = (count.layers + count.attention) / 1e9
    return f"{total:,.0f}" if total >= 100 else f"{total:.3g}"


def as_json(
    lines: list[Line], measured: tuple[dict[str, Any], Machine] | None = None
) -> dict[str, Any]:
    """For --json."""
    values: dict[str, Any] = {
        "columns": dict(COLUMNS),
        "sources": SOURCES,
        "rows": [asdict(line) for line in lines],
        "warnings": list(WARNINGS),
    }
    if measured is not None:
        values["measured"] = {"machine": asdict(measured[1]), "model": EMBEDDED, **measured[0]}
    return values


def as_text(lines: list[Line], where: Machine | None = None) -> list[str]:
    """Lines for a terminal: cells are wrapped in their columns."""
    titles = COLUMNS | {
        name: f"{COLUMNS[name]}, published ({source})" for name, source in SOURCES.items()
    }
    found = _wrapped(["", *titles.values()])
    found.append("")
    for line in lines:
        found += _wrapped(list(asdict(line).values()))
    for warning in WARNINGS:
        found += ["", *textwrap.wrap(warning, 100)]
    found += [
        "",
        "GMACs: 1e9 multiply-adds, QKᵀ and AV included; counted as in `pixart scaling table`.",
    ]
    if where is not None:
        found.append(f"Measured on {where}.")
    return found


_WIDTHS = (24, 24, 24, 30, 30)


def _wrapped(cells: list[str]) -> list[str]:
    columns = [
        textwrap.wrap(cell, width, break_long_words=False) or [""]
        for cell, width in zip(cells, _WIDTHS, strict=True)
    ]
    height = max(map(len, columns))
    padded = [column + [""] * (height - len(column)) for column in columns]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, _WIDTHS, strict=True)).rstrip()
        for row in zip(*padded, strict=True)
    ]
