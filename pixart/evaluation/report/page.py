"""The report as one page: it needs no script, no network, and no other file but the pictures it links to."""

from collections.abc import Sequence
from pathlib import Path

from pixart.evaluation.report import numbers
from pixart.evaluation.report.charts import charts
from pixart.evaluation.report.columns import (
    Number,
    command_of,
    flattened,
    label,
    metrics_of,
    names_of,
    numbers_of,
    ways,
)
from pixart.evaluation.report.figures import axis, strip
from pixart.evaluation.report.folder import Evaluated, Paper
from pixart.evaluation.report.gallery import choose, gallery, shot, tied
from pixart.evaluation.report.markup import (
    Html,
    details,
    document,
    joined,
    quoted,
    section,
    table,
    tag,
    value_cell,
)
from pixart.evaluation.report.paper import paper_section, tables

STRIP = 150  # of the drawn interval
LISTED = 200  # lines of missing pictures that a page can hold
ROWS = 12  # of pictures of several folders


def report_page(folders: Sequence[Evaluated], place: Path) -> str:
    """The page's HTML. place: the folder that it is written to, from which its links start."""
    names = names_of(folders)
    parts = [
        ("numbers", "Numbers", _numbers(folders, names)),
        ("paper", "Beside the paper", paper_section(folders)),
        ("figures", "Figures", _figures(folders)),
        ("pictures", "Pictures", _pictures(folders, names, place)),
        ("missing", "Missing pictures", _missing(folders, names)),
        ("notes", "Notes", _notes(folders, names)),
        ("protocol", "Protocol", _protocol(folders, names)),
        ("again", "Repeat it", _again(folders, names)),
    ]
    sections = [(name, word, one) for name, word, one in parts if one is not None]
    title = f"{' and '.join(names)}: evaluation"
    return document(title, joined(_facts(one, names) for one in folders), sections)


def _facts(one: Evaluated, names: Sequence[str]) -> Html:
    results = one.results
    facts = [
        ("", one.model) if len(names) > 1 else ("", ""),
        ("protocol", str(one.protocol.get("id", "unnamed"))),
        ("pictures", f"{results.get('pictures', 0):,}"),
        ("prompts", f"{one.protocol.get('prompts', len(one.prompts)):,}"),
        ("missing or failed", f"{results.get('errors', 0):,}"),
    ]
    items = [
        tag("li", f"{word} " if word else None, tag("b", quoted(value)))
        for word, value in facts
        if value
    ]
    return tag("ul", joined(items), class_="facts", role="list")


def _numbers(folders: Sequence[Evaluated], names: Sequence[str]) -> Html:
    rows = numbers_of(folders)
    has_paper = any(row.paper for row in rows) and not tables(folders)
    several = len(folders) > 1
    columns = ["Metric", *(names if several else ["Ours [95 % interval]"])]
    columns += ["Paper", "Same protocol?"] if has_paper else []
    columns += ["n"]
    body = [_row(row, has_paper) for row in rows]
    protocols = {str(one.protocol.get("id")) for one in folders}
    warning = None
    if len(protocols) > 1:
        warning = tag("p", "These folders were made by different protocols: ",
                      ", ".join(sorted(protocols)),
                      ". What differs stands under Protocol.", class_="warning")  # fmt: skip
    key = "The line is the 95 % interval, the point the number"
    key += ", the diamond the paper's." if has_paper or tables(folders) else "."
    caption = f"Every number with its 95 % interval, n what it was made of. {key}"
    return section(
        "numbers", "Numbers", warning, table(caption, columns, body, "stacked" if several else None)
    )


def _row(row: Number, has_paper: bool) -> list[Html]:
    shown = [one for one in row.ours if one is not None]
    paper = row.paper.value if row.paper and has_paper else None
    ends = [end for one in shown for end in (one.low, one.high, one.value)]
    scale = axis(ends + ([paper] if paper is not None else []), STRIP)
    better = "higher is better" if row.metric.higher_is_better else "lower is better"
    own = row.name == row.metric.main
    beside = "" if row.name.startswith(row.metric.name) else f"of {row.metric.name}"
    cells = [tag("span", row.name, " ", tag("small", better if own else beside))]
    cells += [
        value_cell(numbers.estimate(one, row.metric.unit), strip(scale, one, paper, number))
        if one
        else Html("")
        for number, one in enumerate(row.ours)
    ]
    if has_paper:
        cells += [_paper(row.paper), _same(row.paper)]
    counts = sorted({one.n for one in shown})
    cells.append(tag("span", " and ".join(f"{count:,}" for count in counts)))
    return cells


def _paper(paper: Paper | None) -> Html:
    if paper is None:
        return tag("span", "none", class_="faint")
    return tag("div", tag("span", numbers.plain(paper.value)), " ", tag("small", paper.source))


def _same(paper: Paper | None) -> Html:
    if paper is None:
        return Html("")
    word = (
        tag("span", "yes", class_="yes") if paper.same_protocol else tag("span", "no", class_="no")
    )
    reasons = joined(tag("li", reason) for reason in paper.because)
    because = tag("ul", reasons, class_="reasons") if paper.because else None
    return tag("div", word, ", because" if because else None, because)


def _figures(folders: Sequence[Evaluated]) -> Html | None:
    drawn = charts(folders)
    if not drawn:
        return None
    boxes = []
    for name, figure in drawn.items():
        metric, _, by = name.partition("-by-category")
        words = (
            f"{metric}, by category" if by is not None and name.endswith("-by-category") else name
        )
        boxes.append(tag("figure", tag("figcaption", words), figure))
    has_paper = any('class="paper"' in figure for figure in drawn.values())
    diamonds = ", diamonds the paper's numbers" if has_paper else ""
    words = tag("p", f"Lines are 95 % intervals{diamonds}.", class_="faint")
    return section("figures", "Figures", words, tag("div", joined(boxes), class_="charts"))


def _pictures(folders: Sequence[Evaluated], names: Sequence[str], place: Path) -> Html | None:
    if len(folders) > 1:
        return _beside(folders, names, place)
    (one,) = folders
    scored = {name: one.scores(name) for name, metric in one.metrics.items() if metric.per_picture}
    scored = {name: scores for name, scores in scored.items() if scores}
    if not scored:
        return None
    parts: list[Html] = []
    for name, scores in scored.items():
        metric = one.metrics[name]
        lists = []
        for title, keys in choose(scores, metric.higher_is_better).items():
            equal = tied(scores, keys)
            words = f"{equal:,} pictures share the score of the last one."
            entries = [(one.entry(key), scores[key]) for key in keys]
            lists += [tag("h4", title), tag("p", words, class_="faint") if equal else None,
                      gallery(entries, metric.unit, place)]  # fmt: skip
        parts.append(details(tag("h3", name), *filter(None, lists), is_open=not parts))
    words = tag("p", "Of every metric that scores single pictures: its score, and the prompt. A picture "
                "leads to its file.", class_="faint")  # fmt: skip
    return section("pictures", "Best, median and worst pictures", words, *parts)


def _beside(folders: Sequence[Evaluated], names: Sequence[str], place: Path) -> Html | None:
    """The same prompts of all folders, evenly over the set."""
    common = [
        prompt for prompt in folders[0].prompts if all(prompt in one.prompts for one in folders)
    ]
    chosen = common[:: max(1, -(-len(common) // ROWS))][:ROWS]
    if not chosen:
        return None
    items = []
    for prompt in chosen:
        shots = [
            tag(
                "figure",
                shot(one.entry(f"{prompt}/0000"), place),
                tag("figcaption", quoted(name, 40)),
            )
            for one, name in zip(folders, names, strict=True)
        ]
        text = folders[0].prompts[prompt].prompt
        items.append(tag("li", tag("div", joined(shots), class_="both"), quoted(text, 160)))
    words = tag("p", f"The same {len(chosen)} prompts, evenly over the set.", class_="faint")
    return section("pictures", "Pictures side by side", words,
                   tag("ul", joined(items), class_="pairs", role="list"))  # fmt: skip


def _missing(folders: Sequence[Evaluated], names: Sequence[str]) -> Html:
    rows, total = [], 0
    for one, name in zip(folders, names, strict=True):
        total += len(one.errors)
        for line in one.errors[:LISTED]:
            key = str(line.get("key", "unknown"))
            rest = [f"{what}: {value}" for what, value in line.items() if what != "key"]
            where = f"{name}, {key}" if len(folders) > 1 else key
            rows.append([quoted(where, 200), quoted(", ".join(rest), 400)])
    if not rows:
        return section("missing", "Missing or failed pictures", tag("p", "None."))
    more = tag("p", f"{len(rows):,} of {total:,} are shown.") if total > len(rows) else None
    made = table("Pictures that no number counts", ["Picture", "What is wrong"], rows)
    return section("missing", "Missing or failed pictures", made, more)


def _notes(folders: Sequence[Evaluated], names: Sequence[str]) -> Html:
    items = []
    for row in numbers_of(folders):
        for how, who in ways(row, names).items():
            of = f" of {' and '.join(who)}" if len(who) < len(folders) else ""
            items.append(tag("li", tag("b", f"{label(row.metric.name, row.name)}{of}"), f": {how}"))
    return section("notes", "How each number was made", tag("ul", joined(items), class_="notes"))


def _protocol(folders: Sequence[Evaluated], names: Sequence[str]) -> Html:
    parts = [_settings(folders, names)]
    for metric in metrics_of(folders).values():
        rows = [["version", metric.version], *map(list, flattened(metric.constants))]
        rows += [["source", metric.source]] if metric.source else []
        cells = [[tag("span", name), quoted(value)] for name, value in rows]
        made = table(f"Constants of {metric.name}", ["Name", "Value"], cells, "settings")
        parts.append(details(tag("h3", metric.name), made))
    return section("protocol", "Protocol", *parts)


def _settings(folders: Sequence[Evaluated], names: Sequence[str]) -> Html:
    settings = [
        dict(flattened({"model": one.model, **one.protocol, "weights": one.results.get("weights") or {}}))
        for one in folders
    ]  # fmt: skip
    keys = list(dict.fromkeys(key for one in settings for key in one))
    rows = []
    for key in keys:
        values = [one.get(key, "not set") for one in settings]
        differs = tag("small", " differs") if len(set(values)) > 1 else None
        rows.append([tag("span", key, differs), *(quoted(value) for value in values)])
    columns = ["Setting", *(names if len(folders) > 1 else ["Value"])]
    return table("All that decides the numbers", columns, rows, "settings")


def _again(folders: Sequence[Evaluated], names: Sequence[str]) -> Html:
    commands = dict.fromkeys(command_of(one) for one in folders)
    words = tag(
        "p", "Pictures, features and scores that are there are not made again.", class_="faint"
    )
    return section(
        "again", "Repeat it", *(tag("pre", tag("code", command)) for command in commands), words
    )
