"""A paper's table and ours, as `protocols.published` left them in results.json: what is beside
what, whether both were made in the same way, and what says no."""

from collections.abc import Mapping, Sequence
from typing import Any

from pixart.evaluation.metric import Estimate
from pixart.evaluation.report import numbers, readme
from pixart.evaluation.report.figures import axis, strip
from pixart.evaluation.report.folder import Evaluated
from pixart.evaluation.report.markup import (
    Html,
    details,
    joined,
    quoted,
    section,
    table,
    tag,
    value_cell,
)

STRIP = 130
UNREAD = "not read in the paper itself"


def tables(folders: Sequence[Evaluated]) -> list[tuple[Evaluated, Mapping[str, Any]]]:
    """Of the folders whose protocol has one."""
    return [(one, one.results["paper"]) for one in folders if one.results.get("paper")]


def ours_of(column: Mapping[str, Any]) -> Estimate | None:
    """Our number in the paper's unit, None if it was not measured."""
    told = column.get("ours")
    if told is None or told["value"] is None:
        return None
    low = float("-inf") if told["low"] is None else told["low"]
    high = float("inf") if told["high"] is None else told["high"]
    return Estimate(told["value"], low, high, told["n"], "")


def common_reasons(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """What says no of every column: told once."""
    if len(columns) < 2:
        return []
    first, *others = (list(one.get("because") or ()) for one in columns)
    return [reason for reason in first if all(reason in other for other in others)]


def paper_section(folders: Sequence[Evaluated]) -> Html | None:
    """For the page; None where no protocol has a paper's table."""
    parts: list[Html] = []
    for one, told in tables(folders):
        columns = told["columns"]
        common = common_reasons(columns)
        source = f"{told['source']}, row \u201c{told['row']}\u201d"
        parts.append(tag("h3", told["title"], f" ({one.name})" if len(folders) > 1 else None))
        heads = ["Column", "Ours [95 % interval]", "Paper", "Same protocol?", "Verdict", "n"]
        rows = [_row(column, common) for column in columns]
        parts.append(table(f"Ours beside {source}", heads, rows))
        if common:
            reasons = joined(tag("li", reason) for reason in common)
            parts += [tag("p", "Not the same protocol in any column, because"), tag("ul", reasons)]
        parts.append(details("The paper's whole table", _whole(told)))
    return section("paper", "Beside the paper", *parts) if parts else None


def _row(column: Mapping[str, Any], common: Sequence[str]) -> list[Html]:
    one, paper = ours_of(column), column["paper"]
    better = "higher is better" if column["higher_is_better"] else "lower is better"
    cells = [tag("span", column["name"], " ", tag("small", better))]
    unread = tag("small", f" {UNREAD}") if column["unconfirmed"] else None
    published = tag("span", "none" if paper is None else numbers.plain(paper), unread)
    if one is None:
        return [*cells, tag("span", "not measured", class_="faint"), published, *[Html("")] * 3]
    ends = [one.low, one.high, one.value] + ([paper] if paper is not None else [])
    drawn = strip(axis(ends, STRIP), one, paper)
    cells += [value_cell(numbers.estimate(one), drawn), published]
    own = [reason for reason in column["because"] if reason not in common]
    reasons = tag("ul", joined(tag("li", one) for one in own), class_="reasons") if own else None
    same = column["same_protocol"]
    word = tag("span", "yes" if same else "no", class_="yes" if same else "no")
    cells.append(tag("div", word, ", because" if reasons else None, reasons))
    cells.append(tag("span", column["verdict"] or "", class_=_class(column["verdict"])))
    cells.append(tag("span", f"{one.n:,}"))
    return cells


def _class(verdict: str | None) -> str | None:
    return {"better": "better", "worse": "no", "inconclusive": "undecided"}.get(verdict or "")


def _whole(told: Mapping[str, Any]) -> Html:
    columns = [one["name"] for one in told["columns"]]
    rows = [
        [
            tag("span", quoted(row["name"])),
            *(tag("span", _published(row, name)) for name in columns),
        ]
        for row in told["rows"]
    ]
    ours = [ours_of(one) for one in told["columns"]]
    rows.append([tag("b", "ours: ", quoted(told["model"])),
                 *(tag("b", numbers.estimate(one)) if one else Html("") for one in ours)])  # fmt: skip
    return table(f"{told['source']}; ? marks what was {UNREAD}", ["Row", *columns], rows)


def _published(row: Mapping[str, Any], column: str) -> str:
    value = row["values"].get(column)
    mark = "?" if column in row["unconfirmed"] else ""
    return "" if value is None else f"{numbers.plain(value)}{mark}"


def paper_markdown(folders: Sequence[Evaluated]) -> list[str]:
    """The same for README.md."""
    parts = []
    for one, told in tables(folders):
        common = common_reasons(told["columns"])
        title = f"{told['title']} ({one.name})" if len(folders) > 1 else told["title"]
        parts.append(f"## Beside the paper: {readme.words(title)}")
        rows = []
        for column in told["columns"]:
            ours, paper = ours_of(column), column["paper"]
            own = [readme.words(reason) for reason in column["because"] if reason not in common]
            same = "yes" if column["same_protocol"] else "no"
            rows.append([
                readme.words(column["name"]),
                numbers.estimate(ours) if ours else "not measured",
                "" if paper is None else numbers.plain(paper) + "?" * column["unconfirmed"],
                f"{same}, because {'; '.join(own)}" if own else same,
                column["verdict"] or "",
                f"{ours.n:,}" if ours else "",
            ])  # fmt: skip
        heads = ["column", "ours [low, high]", "paper", "same protocol?", "verdict", "n"]
        parts.append(readme.table(heads, rows))
        row = f"{told['source']}, row {told['row']}"
        parts.append(f"Paper: {readme.words(row)}. A number with ? was {UNREAD}.")
        if common:
            reasons = "; ".join(map(readme.words, common))
            parts.append(f"Not the same protocol in any column, because {reasons}.")
    return parts
