"""`compare A B`: which of two evaluated folders is better, by metric, or that nobody can tell."""

from pathlib import Path

from pixart.evaluation.comparing.pairing import OPEN, Change, Comparison, compared
from pixart.evaluation.report.columns import label
from pixart.evaluation.report.comparison_page import (
    comparison_page,
    comparison_readme,
    difference,
    names,
    p_value,
    scatters,
)
from pixart.evaluation.report.figures import standalone
from pixart.evaluation.report.folder import open_evaluated
from pixart.evaluation.report.writing import PLOTS, README, beside, file_name, write_plots
from pixart.files import write_bytes, write_json

__all__ = [
    "OPEN",
    "Change",
    "Comparison",
    "compare_folders",
    "comparison_folder",
    "comparison_text",
]
PAGE, VALUES = "compare.html", "compare.json"


def compare_folders(
    a: Path, b: Path, output: Path | None = None, *, pair_sets: bool = True
) -> Comparison:
    """Compare two folders that `run` or `score` filled, B - A on the same prompts, and write compare.html,
    README.md, compare.json and plots/.

    output: where to; "compare-A-B" beside A by default. pair_sets: see `pixart.evaluation.comparing.pairing`.
    ValueError, with all that differs, where they were not evaluated in the same way; OSError if the disk
    refuses.
    """
    comparison = compared(open_evaluated(a), open_evaluated(b), pair_sets=pair_sets)
    place = output or comparison_folder(a, b)
    drawn = scatters(comparison)
    figures = {file_name(name): figure for name, figure in drawn.items()}
    write_plots(place / PLOTS, {name: standalone(figure) for name, figure in figures.items()})
    write_json(place / VALUES, comparison.values(), indent=2)
    write_bytes(place / README, comparison_readme(comparison, sorted(figures)).encode())
    page = comparison_page(comparison, drawn, place)
    write_bytes(place / PAGE, page.encode())
    return comparison


def comparison_folder(a: Path, b: Path) -> Path:
    """Where a comparison goes unless somebody says where."""
    return beside(a, f"compare-{a.resolve().name}-{b.resolve().name}")


def comparison_text(comparison: Comparison) -> str:
    """For a terminal: a line for each number, and for each category that is decided."""
    a, b = names(comparison)
    lines = [f"A {a} ({comparison.a.name}), B {b} ({comparison.b.name}); B - A:"]
    lines += [_line(one, label(one.metric, one.name)) for one in comparison.numbers]
    for metric, changes in comparison.categories.items():
        decided = [one for one in changes.values() if one.verdict != OPEN]
        lines.append(f"{metric} by category: {len(decided)} of {len(changes)} decided (Holm)")
        lines += [f"  {_line(one, one.name)}" for one in decided]
    if comparison.only:
        lines.append(f"in one folder only: {', '.join(comparison.only)}")
    return "\n".join(lines)


def _line(change: Change, name: str) -> str:
    p = p_value(change.decides)
    return (
        f"{name}: {difference(change)}, p {p if p.startswith('<') else f'= {p}'}: {change.verdict}"
    )
