"""HTML that cannot be broken by what files say: everything is escaped but what was made here.

    tag("td", estimate_text, scope_="row")     text is escaped, Html is not

Texts of strangers lose what commands a terminal or turns the order of letters around, and are put into
<bdi dir="auto">, so that an Arabic prompt does not carry the digits behind it along.
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from pixart.files import without_controls

WHOLE = 40  # letters of a number with its interval
VOID = {"meta", "img", "br", "hr"}


class Html(str):
    """Markup that is safe to put into a page."""


def tag(
    element: str, /, *children: "str | None", **attributes: "str | float | bool | None"
) -> Html:
    """An element. children: text, or Html. attributes: class_, data_label; None and False leave one out,
    True gives one without a value."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{escape(_clean(str(value)), quote=True)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inner = "".join(safe(child) for child in children if child is not None)
    closing = "" if element in VOID else f"{inner}</{element}>"
    return Html(f"<{element}{written}>{closing}")


def safe(text: str) -> Html:
    return text if isinstance(text, Html) else Html(escape(_clean(text), quote=True))


def joined(parts: Iterable[str], between: str = "") -> Html:
    return Html(safe(between).join(safe(part) for part in parts))


def quoted(text: str, most: int = 0) -> Html:
    """Words of a stranger, isolated from what stands around. most: characters, 0 for all."""
    return tag("bdi", shortened(text, most) if most else text, dir="auto")


def shortened(text: str, most: int) -> str:
    text = " ".join(without_controls(text).split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "\u2026"


def table(
    caption: str,
    columns: Iterable[str],
    rows: Iterable[Iterable[str]],
    class_: str | None = None,
) -> Html:
    """The first cell of a row is its header. Roles are said, as a narrow window shows rows as blocks, and
    browsers take a table's meaning away with its layout."""
    columns = list(columns)
    head = joined(tag("th", one, scope="col", role="columnheader") for one in columns)
    body = []
    for row in rows:
        first, *rest = row
        cells = [tag("th", first, scope="row", role="rowheader")]
        cells += [
            tag("td", cell, role="cell", data_label=_plain(columns[number]))
            for number, cell in enumerate(rest, start=1)
        ]
        body.append(tag("tr", joined(cells), role="row"))
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", head, role="row"), role="rowgroup"),
        tag("tbody", joined(body), role="rowgroup"),
        role="table",
        class_=class_,
    )


def value_cell(estimate: str, drawn: Html | None = None) -> Html:
    """A number with its interval, "0.28 [0.27, 0.29]", and the interval drawn below."""
    value, _, interval = estimate.rpartition(" [")
    words = tag("b", value), " ", tag("span", f"[{interval}", class_="range")
    # On one line, but for a unit that is none.
    together = tag("span", *words, class_="whole" if len(estimate) < WHOLE else None)
    return tag("div", together, drawn, class_="value")


def details(summary: str, *inside: str, is_open: bool = False) -> Html:
    return tag("details", tag("summary", summary), *inside, open=is_open)


def section(name: str, title: str, *inside: "str | None", level: int = 2) -> Html:
    return tag(
        "section",
        tag(f"h{level}", title, id=f"{name}-title"),
        *inside,
        id=name,
        aria_labelledby=f"{name}-title",
    )


def document(title: str, head: str, sections: Iterable[tuple[str, str, Html]]) -> str:
    """A whole page. head: what stands in its header, below the title. sections: name, the word for the
    way there, and the section."""
    sections = list(sections)
    ways = joined(tag("li", tag("a", word, href=f"#{name}")) for name, word, _ in sections if word)
    style = styles("page.css", "figures.css")
    return "<!doctype html>\n" + tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            # Nothing runs and nothing is fetched, whatever a file has got into the page.
            tag(
                "meta",
                http_equiv="Content-Security-Policy",
                content="default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data: file:",
            ),
            tag("title", title),
            Html(f"<style>\n{style}</style>"),
        ),
        tag(
            "body",
            tag("a", "To the contents", href="#main", class_="skip"),
            tag("header", tag("h1", title), head),
            tag("nav", tag("ul", ways), aria_label="Parts of this page"),
            tag("main", joined(one for _, _, one in sections), id="main"),
        ),
        lang="en",
    ) + "\n"  # fmt: skip


def styles(*names: str) -> str:
    """Style sheets of this folder."""
    return "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)


def _clean(text: str) -> str:
    return without_controls(text)


def _plain(text: str) -> str:
    """A column's words without its markup."""
    if not isinstance(text, Html):
        return text
    from html import unescape
    from re import sub

    return unescape(sub(r"<[^>]*>", "", text))
