"""What `trust` found as pages: report.html, README.md and plots/."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixart.evaluation.metric import Estimate
from pixart.evaluation.report import numbers
from pixart.evaluation.report.figures import bars, standalone
from pixart.evaluation.report.markdown import table
from pixart.evaluation.report.markup import Html, document, joined, section, tag
from pixart.evaluation.report.markup import table as html_table
from pixart.evaluation.report.readme import words
from pixart.evaluation.report.writing import PAGE, PLOTS, README, file_name, write_plots
from pixart.evaluation.trust.wrong_facts import Pair
from pixart.files import write_bytes

Block = Mapping[str, Any]
_TITLES = {
    "caption": "A wrong fact in the caption",
    "picture": "A wrong fact in the picture",
}
_CHANCE = "Chance is 0.5; the checker is right by definition."


def write_pages(output: Path, results: Mapping[str, Any], examples: Sequence[Pair]) -> None:
    """Write report.html, README.md and plots/ of results into a folder. examples: a pair of each kind."""
    figures = _figures(results["metrics"])
    files = {file_name(name): standalone(figure) for name, figure in figures.items()}
    write_plots(output / PLOTS, files)
    write_bytes(output / README, _readme(results, sorted(files)).encode())
    write_bytes(output / PAGE, _page(results, figures, examples).encode())


def _of_pairs(blocks: Mapping[str, Block]) -> dict[str, Block]:
    return {name: block for name, block in blocks.items() if "verdicts" in block}


def _of_sets(blocks: Mapping[str, Block]) -> dict[str, Block]:
    return {name: block for name, block in blocks.items() if "verdicts" not in block}


def _estimate(values: Mapping[str, Any]) -> Estimate:
    ends = {"low": -float("inf"), "high": float("inf")}
    low, high = (end if values[name] is None else values[name] for name, end in ends.items())
    notes = tuple(values["notes"])
    return Estimate(values["value"], low, high, values["n"], values["method"], notes)


def _number(block: Block, kind: str, name: str) -> Estimate:
    return _estimate(block["categories"][kind][name])


def _figures(blocks: Mapping[str, Block]) -> dict[str, Html]:
    """Bars by kind, a series for each metric; of each metric of sets, bars by damage."""
    found = {}
    of_pairs = _of_pairs(blocks)
    kinds = list(next(iter(of_pairs.values()))["categories"])
    for direction, title in _TITLES.items():
        groups = {
            kind: tuple(
                _number(block, kind, name if direction == "caption" else f"{name}/{direction}")
                for name, block in of_pairs.items()
            )
            for kind in kinds
        }
        found[f"wrong-{direction}"] = bars(f"{title}: paired accuracy", groups, list(of_pairs))
    for name, block in _of_sets(blocks).items():
        groups = {damage: (_number(block, damage, name),) for damage in block["categories"]}
        found[f"{name}-damages"] = bars(f"{name} by damage", groups, [name], block["unit"])
    return found


def _rows(blocks: Mapping[str, Block], direction: str) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each kind: of each metric, paired accuracy and AUC."""
    of_pairs = _of_pairs(blocks)
    columns = ["kind of fact"]
    for name in of_pairs:
        columns += [name, f"{name}, AUC"]
    rows = []
    for kind in next(iter(of_pairs.values()))["categories"]:
        row = [kind]
        for name, block in of_pairs.items():
            own = name if direction == "caption" else f"{name}/{direction}"
            for one in (own, f"{name}/{direction}-auc"):
                row.append(numbers.estimate(_number(block, kind, one)))
        rows.append(row)
    return columns, rows


def _damage_rows(blocks: Mapping[str, Block]) -> tuple[list[str], list[list[str]]]:
    of_sets = _of_sets(blocks)
    columns = ["pictures", *(f"{name} {block['unit']}".strip() for name, block in of_sets.items())]
    rows = [
        [
            damage,
            *(numbers.estimate(_number(block, damage, name)) for name, block in of_sets.items()),
        ]
        for damage in (next(iter(of_sets.values()))["categories"] if of_sets else ())
    ]
    return columns, rows


def _model_rows(blocks: Mapping[str, Block]) -> list[list[str]]:
    return [
        [name, numbers.estimate(_estimate(block["model"])), f"{block['model']['n']:,}"]
        for name, block in blocks.items()
        if "model" in block
    ]


def _model_words(results: Mapping[str, Any]) -> str:
    return (
        f"Pictures of {results['model']} at 1 to 20 steps and guidance from 1 to 8: Spearman's correlation of "
        "the metric with the share of a caption's statements that hold. One that is near 0 could not have "
        "told which settings are better."
    )


def _how(results: Mapping[str, Any]) -> str:
    protocol = results["protocol"]
    return (
        f"{protocol['pairs']:,} pairs of each kind, drawn exactly ({protocol['size']} pixels, seed "
        f"{protocol['seed']}): two scenes that differ in one fact, and their captions. The metric must score "
        f"the true one higher. {_CHANCE} Intervals are of 95 %, over scenes; a kind counts as seen if its "
        "interval leaves chance out, and as not seen only if it leaves 0.75 out too."
    )


def tables(results: Mapping[str, Any]) -> str:
    """All numbers as Markdown: sentences, a table for each direction, for distances and for a model."""
    blocks = results["metrics"]
    parts = ["\n".join(f"- {words(block['sentence'])}" for block in blocks.values())]
    for direction, title in _TITLES.items():
        parts += [f"## {title}", table(*_rows(blocks, direction))]
    if _of_sets(blocks):
        parts += ["## What distances of sets see", table(*_damage_rows(blocks))]
    if rows := _model_rows(blocks):
        parts += ["## Pictures of a model", words(_model_words(results))]
        parts.append(table(["metric", "Spearman", "n"], rows))
    return "\n\n".join(parts)


def _readme(results: Mapping[str, Any], plots: Sequence[str]) -> str:
    parts = ["# What metrics see", _how(results), tables(results)]
    parts += ["\n".join(f"![{name.removesuffix('.svg')}](plots/{name})" for name in plots)]
    parts.append(
        f"Protocol {results['protocol']['id']}. [report.html](report.html) is the same page."
    )
    return "\n\n".join(parts) + "\n"


def _page(results: Mapping[str, Any], figures: Mapping[str, Html], examples: Sequence[Pair]) -> str:
    blocks = results["metrics"]
    said = joined(tag("li", block["sentence"]) for block in blocks.values())
    parts = [section("seen", "What they see", tag("p", _how(results)), tag("ul", said))]
    names = [("seen", "What they see")]
    for direction, title in _TITLES.items():
        columns, rows = _rows(blocks, direction)
        made = html_table(f"Paired accuracy and AUC. {_CHANCE}", columns, rows, "numbers")
        parts.append(section(direction, title, figures[f"wrong-{direction}"], made))
        names.append((direction, title))
    if _of_sets(blocks):
        drawn = joined(figures[f"{name}-damages"] for name in _of_sets(blocks))
        columns, rows = _damage_rows(blocks)
        made = html_table("Damaged pictures against undamaged ones.", columns, rows, "numbers")
        parts.append(section("sets", "What distances of sets see", drawn, made))
        names.append(("sets", "Distances"))
    if rows := _model_rows(blocks):
        columns = ["metric", "Spearman", "n"]
        made = html_table("Correlation over pictures.", columns, rows, "numbers")
        parts.append(section("model", "Pictures of a model", tag("p", _model_words(results)), made))
        names.append(("model", "A model"))
    parts.append(section("examples", "One pair of each kind", _examples(examples)))
    names.append(("examples", "Examples"))
    sections = [(name, word, part) for (name, word), part in zip(names, parts, strict=True)]
    head = tag("p", f"Protocol {results['protocol']['id']}.")
    return document("What metrics see", head, sections)


def _examples(pairs: Sequence[Pair]) -> Html:
    items = []
    for pair in pairs:
        shots = [
            tag("figure", _shot(picture, text), tag("figcaption", text))
            for picture, text in (
                (pair.picture, pair.caption),
                (pair.other_picture, pair.other_caption),
            )
        ]
        items.append(tag("li", tag("strong", pair.kind), tag("div", joined(shots), class_="both")))
    return tag("ul", joined(items), class_="pairs", role="list")


def _shot(picture: Any, text: str) -> Html:
    """In the page itself: drawn, a picture has a kilobyte."""
    from PIL import Image

    file = io.BytesIO()
    image = Image.fromarray(picture)
    image.save(file, "PNG")
    content = base64.b64encode(file.getvalue()).decode()
    drawn = tag(
        "img",
        src=f"data:image/png;base64,{content}",
        alt=text,
        width=image.width,
        height=image.height,
    )
    return tag("span", drawn, class_="shot")
