"""`report`: report.html, README.md and plots/ of evaluated folders. The same results, the same bytes."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pixart.evaluation.report.charts import charts
from pixart.evaluation.report.figures import standalone
from pixart.evaluation.report.folder import open_evaluated
from pixart.evaluation.report.page import report_page
from pixart.evaluation.report.paper import paper_markdown
from pixart.evaluation.report.readme import report_readme
from pixart.files import write_bytes, written_aside

PAGE, README, PLOTS = "report.html", "README.md", "plots"


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of folders that `run` or `score` filled, side by side if there are several.

    output: where to; the folder itself for one, "report" beside them for several. Returns the page's
    path. ValueError or FileNotFoundError for folders without results, OSError if the disk refuses.
    """
    if not folders:
        raise ValueError("report must be given a folder that run or score has filled, got none")
    evaluated = [open_evaluated(Path(folder)) for folder in folders]
    place = output or _place([one.path for one in evaluated])
    figures = {file_name(key): figure for key, figure in charts(evaluated).items()}
    write_plots(place / PLOTS, {name: standalone(figure) for name, figure in figures.items()})
    write_bytes(
        place / README,
        report_readme(evaluated, place, sorted(figures), paper_markdown(evaluated)).encode(),
    )
    write_bytes(place / PAGE, report_page(evaluated, place).encode())
    return place / PAGE


def write_plots(folder: Path, plots: Mapping[str, str]) -> None:
    """Replace the folder by these files; without any it is taken away."""
    if not plots:
        shutil.rmtree(folder, ignore_errors=True)
        return
    with written_aside(folder, durable=False) as aside:
        aside.mkdir()
        for name, content in plots.items():
            (aside / name).write_text(content, encoding="utf-8", newline="\n")


def file_name(key: str) -> str:
    """A file for a figure's key: names of metrics may come from others."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', key).strip('.-')[:80] or 'plot'}.svg"


def beside(folder: Path, name: str) -> Path:
    """A folder of this name next to another."""
    return folder.resolve().parent / name


def _place(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    return Path(os.path.commonpath([path.resolve().parent for path in folders])) / "report"
