"""The report as Markdown, for a folder that is read on a forge or in a terminal."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pixart.evaluation.report import numbers
from pixart.evaluation.report.columns import (
    command_of,
    flattened,
    label,
    metrics_of,
    names_of,
    numbers_of,
    ways,
)
from pixart.evaluation.report.folder import Evaluated, Paper
from pixart.evaluation.report.gallery import SHOWN, choose, link
from pixart.evaluation.report.markdown import table
from pixart.evaluation.report.markup import shortened

LISTED = 50
WORDS = 100


def report_readme(
    folders: Sequence[Evaluated], place: Path, plots: Sequence[str], paper: Sequence[str] = ()
) -> str:
    """The text. place: the folder it is written to. plots: names of the files in plots/. paper: what stands
    of a paper's table."""
    names = names_of(folders)
    parts = [
        f"# {words(' and '.join(names))}: evaluation",
        _facts(folders, names),
        "Every number stands with its 95 % interval. [report.html](report.html) shows the pictures.",
        "## Numbers",
        number_table(folders, names, with_paper=not paper),
        *paper,
    ]
    if plots:
        images = [f"![{name.removesuffix('.svg')}](plots/{name})" for name in plots]
        parts += ["## Figures", "\n".join(images)]
    if len(folders) == 1:
        parts += _pictures(folders[0], place)
    parts += _missing(folders, names)
    parts += ["## How each number was made", _notes(folders, names)]
    parts += ["## Protocol", _protocol(folders, names)]
    parts += ["## Repeat it", fenced("\n".join(command_of(one) for one in folders))]
    return "\n\n".join(part for part in parts if part) + "\n"


def words(text: str, most: int = 0) -> str:
    """A stranger's text as Markdown and HTML show it and do nothing with."""
    text = shortened(text, most or len(text) + 1)
    return "".join(f"\\{letter}" if letter in "\\`*_[]|~" else _entity(letter) for letter in text)


def number_table(
    folders: Sequence[Evaluated], names: Sequence[str], with_paper: bool = True
) -> str:
    """Metric, ours with intervals, n; and the paper's, and whether both were made the same way."""
    several = len(folders) > 1
    ours = [words(name) for name in names] if several else ["ours [low, high]"]
    rows = []
    for row in numbers_of(folders):
        shown = [one for one in row.ours if one is not None]
        cells = [numbers.estimate(one, words(row.metric.unit)) if one else "" for one in row.ours]
        counts = " and ".join(f"{n:,}" for n in sorted({one.n for one in shown}))
        paper = _published(row.paper) if with_paper else ()
        rows.append([words(label(row.metric.name, row.name)), *cells, *paper, counts])
    heads = ["paper", "same protocol?"] if with_paper else []
    return table(["metric", *ours, *heads, "n"], rows)


def _published(paper: Paper | None) -> tuple[str, str]:
    if paper is None:
        return "", ""
    because = "; ".join(words(reason) for reason in paper.because)
    same = "yes" if paper.same_protocol else "no"
    return (
        f"{numbers.plain(paper.value)} ({words(paper.source)})",
        f"{same}, because {because}" if because else same,
    )


def _facts(folders: Sequence[Evaluated], names: Sequence[str]) -> str:
    lines = []
    for one, name in zip(folders, names, strict=True):
        who = f"{words(name)}: " if len(folders) > 1 else ""
        lines.append(
            f"{who}protocol {words(str(one.protocol.get('id', 'unnamed')))}, "
            f"{one.results.get('pictures', 0):,} pictures of "
            f"{one.protocol.get('prompts', len(one.prompts)):,} prompts, "
            f"{one.results.get('errors', 0):,} missing or failed."
        )
    return "\n".join(lines)


def _pictures(one: Evaluated, place: Path) -> list[str]:
    """The best and the worst of each metric, by name: the page shows them."""
    parts = []
    for name, metric in one.metrics.items():
        scores = one.scores(name) if metric.per_picture else {}
        if not scores:
            continue
        chosen = choose(scores, metric.higher_is_better)
        rows = [
            [
                title.lower(),
                f"[{words(key)}]({link(one.entry(key).path, place)})",
                numbers.plain(scores[key].value),
                words(one.entry(key).prompt.prompt, WORDS),
            ]
            for title in ("Best", "Worst")
            for key in chosen[title][: SHOWN // 4]
        ]
        parts += [f"### {words(name)}", table(["", "picture", "score", "prompt"], rows)]
    return ["## Pictures", *parts] if parts else []


def _missing(folders: Sequence[Evaluated], names: Sequence[str]) -> list[str]:
    lines = []
    for one, name in zip(folders, names, strict=True):
        for line in one.errors:
            rest = ", ".join(f"{what}: {value}" for what, value in line.items() if what != "key")
            who = f"{words(name)}, " if len(folders) > 1 else ""
            lines.append(f"- {who}{words(str(line.get('key', 'unknown')))}: {words(rest, 300)}")
    more = [f"- and {len(lines) - LISTED:,} more"] if len(lines) > LISTED else []
    return ["## Missing or failed pictures", "\n".join([*lines[:LISTED], *more]) or "None."]


def _notes(folders: Sequence[Evaluated], names: Sequence[str]) -> str:
    lines = []
    for row in numbers_of(folders):
        for how, who in ways(row, names).items():
            of = f" of {words(' and '.join(who))}" if len(who) < len(folders) else ""
            lines.append(f"- **{words(label(row.metric.name, row.name))}**{of}: {words(how)}")
    return "\n".join(lines)


def _protocol(folders: Sequence[Evaluated], names: Sequence[str]) -> str:
    lines = []
    for one, name in zip(folders, names, strict=True):
        if len(folders) > 1:
            lines.append(f"- **{words(name)}**")
        settings = {"model": one.model, **one.protocol, "weights": one.results.get("weights") or {}}
        lines += [f"- {words(key)}: {words(value)}" for key, value in flattened(settings)]
    for metric in metrics_of(folders).values():
        constants = "".join(
            f"; {words(key)} {words(value)}" for key, value in flattened(metric.constants)
        )
        source = f"; {words(metric.source)}" if metric.source else ""
        lines.append(f"- {words(metric.name)}: version {words(metric.version)}{constants}{source}")
    return "\n".join(lines)


def fenced(text: str) -> str:
    """A block of commands, whatever they hold."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}sh\n{text}\n{fence}"


def _entity(letter: str) -> str:
    return escape(letter, quote=False)
