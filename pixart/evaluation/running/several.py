"""`run --variants FOLDER`: the models of a folder of training runs, one after another, in one table."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pixart.evaluation.options import Run
from pixart.evaluation.protocols.published import table_text
from pixart.evaluation.running.variants import find_variants

Told = tuple[str, Mapping[str, Any]]  # what a command prints, in words and as JSON


def run_variants(options: Run, run: Callable[[Run], Told]) -> Told:
    """`run` of every variant into a folder of --output under its name, each drawn in --model's pipeline; then a
    report of all side by side, and the paper's table with all of ours. What is there already goes on."""
    from pixart.evaluation.report import write_report

    assert options.variants is not None
    if options.transformer is not None:
        raise ValueError(
            "--variants has transformers of its own, got --transformer too; give one of them"
        )
    results: dict[str, Any] = {}
    texts = []
    folders = []
    for one in find_variants(options.variants):
        folder = options.output / one.name.replace("/", "-")
        own = replace(
            options, variants=None, transformer=str(one.transformer), name=one.name, output=folder
        )
        text, values = run(own)
        if "metrics" not in values:  # other processes have still to draw
            texts.append(text)
            continue
        results[one.name] = values
        folders.append(folder)
        texts.append(f"{one.name}: see {folder}")
    if folders:
        texts.append(f"report: {write_report(folders, options.output / 'report')}")
    tables = [one["paper"] for one in results.values() if one.get("paper")]
    return "\n".join([*texts, *(["", table_text(*tables)] if tables else [])]), results
