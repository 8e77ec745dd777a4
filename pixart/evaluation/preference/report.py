"""The results of a study for people and programs: fit.json, README.md, report.html, the terminal."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from pixart.evaluation.preference.options import Fit
from pixart.evaluation.preference.outcome import Results, Side, estimate_dict
from pixart.evaluation.report.markdown import table
from pixart.evaluation.statistics.estimate import Estimate

Row = Sequence[str]
VERSION = 1  # of how votes become numbers
ALT = "bars: how often the first model is preferred to each other one, by people and judges"
CAPTIONS = {
    "Win rates": "How often the first of two models was preferred, with its 95 % interval",
    "Strengths": "How strong each model is, with its 95 % interval",
    "Agreement": "From 0, as by chance, to 1, always the same answer; with its 95 % interval",
    "Votes": "Of all voters, and of those who passed the attention checks",
}
STYLE = """
:root { color-scheme: light dark; --ground: #fafafa; --text: #1b1b1f; --soft: #55555e; --line: #c4c4cc; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #141416; --text: #ececf0; --soft: #adadb8; --line: #4a4a54; }
}
body { margin: 0 auto; padding: 1rem 1.25rem 3rem; max-width: 62rem; background: var(--ground);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: 50%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .35rem; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem 1rem .35rem 0; text-align: left;
  white-space: nowrap; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .25rem; }
@media (max-width: 44rem) {
  table, caption, tbody, tr { display: block; } thead { display: none; }
  tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  td { display: grid; grid-template-columns: 8rem 1fr; border: 0; padding: .1rem 0; white-space: normal; }
  td::before { content: attr(data-column); color: var(--soft); }
}
:focus-visible { outline: 3px solid #1f5fbf; outline-offset: 2px; }
"""


def as_dict(results: Results, options: Fit) -> dict[str, Any]:
    """fit.json. Intervals that are infinite are null."""
    voters = [
        {"voter": v.name, "votes": v.votes, "checks": v.checks, "failed": v.failed,
         "excluded": not v.is_attentive}
        for v in results.voters
    ]  # fmt: skip
    return {
        "version": VERSION,
        "protocol": protocol_id(results, options),
        "study": results.study.id,
        "models": list(results.key.models),
        "settings": {"prior": options.prior, "resamples": options.resamples, "seed": options.seed},
        "voters": voters,
        "left": estimate_dict(results.left),
        "seconds": results.seconds,
        "results": [_side_dict(side) for side in results.sides],
        "agreement": [
            {"between": one.between, "question": one.question, "measure": one.measure,
             "estimate": estimate_dict(one.estimate), "why_not": one.why_not}
            for one in results.agreements
        ],
    }  # fmt: skip


def _side_dict(side: Side) -> dict[str, Any]:
    values: dict[str, Any] = {
        "by": side.by,
        "question": side.question,
        "rates": [
            {"a": one.a, "b": one.b, "wins": one.wins, "ties": one.ties, "losses": one.losses,
             "rate": estimate_dict(one.rate)}
            for one in side.fitted.rates
        ],
        "points": {model: estimate_dict(one) for model, one in side.fitted.points.items()},
    }  # fmt: skip
    if side.verdicts is not None:
        values |= {
            "pairs": len(side.verdicts.sides),
            "flip_rate": side.verdicts.flip_rate,
            "flipped": estimate_dict(side.verdicts.flipped),
            "usable": side.is_usable,
        }
    return values


def protocol_id(results: Results, options: Fit) -> str:
    """ "preference/HEX8": of the study, which is of its pictures and questions, and of all options that
    decide a number. Two results with one id differ in votes and judgements alone."""
    settings = {"prior": options.prior, "resamples": options.resamples, "seed": options.seed}
    text = json.dumps({"version": VERSION, "study": results.study.id, **settings}, sort_keys=True)
    return f"preference/{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def as_text(results: Results, options: Fit) -> str:
    """For the terminal: what was won, and who was left out."""
    lines = [
        f"{side.by}, {side.question}: {one.a} over {one.b} {share(one.rate)}, n {one.rate.n}"
        for side in results.sides
        for one in side.fitted.rates
        if one.a == results.key.models[0]
    ]
    told = f"protocol {protocol_id(results, options)}: see {results.study.folder}/report.html"
    return "\n".join([*lines, *notes(results), told])


def notes(results: Results) -> list[str]:
    """Sentences that a reader must not miss."""
    found = [
        f"voter {v.name} is left out: {v.failed} of {v.checks} attention checks failed"
        for v in results.voters
        if not v.is_attentive
    ]
    for side in results.sides:
        if side.verdicts is not None and (flipped := side.verdicts.flipped) is not None:
            of, pairs = len(side.verdicts.sides), len(results.study.pairs)
            unusable = "" if side.is_usable else ": unusable, it judges the place"
            found.append(
                f"{side.by}, {side.question}: {of} of {pairs} pairs judged in both orders, another answer "
                f"in the other order for {share(flipped)}{unusable}"
            )
    if results.left is not None:
        found.append(f"people chose the left picture in {share(results.left)} of what was no tie")
    if results.seconds is not None:
        found.append(f"a vote took {results.seconds:.1f} s (median)")
    return found


def tables(results: Results) -> Iterable[tuple[str, Row, Sequence[Row]]]:
    """(title, columns, rows) of all tables."""
    rates = [
        (side.by, side.question, f"{one.a} over {one.b}", share(one.rate), str(one.wins),
         str(one.ties), str(one.losses), one.rate.method)
        for side in results.sides
        for one in side.fitted.rates
    ]  # fmt: skip
    yield (
        "Win rates", ("by", "question", "pair", "(wins + ties / 2) / n", "wins", "ties", "losses",
        "interval"), rates,
    )  # fmt: skip
    strengths = [
        (side.by, side.question, model, points(one), one.method)
        for side in results.sides
        for model, one in sorted(side.fitted.points.items(), key=lambda item: -item[1].value)
    ]
    yield "Strengths", ("by", "question", "model", "points", "interval"), strengths
    agreed = [
        (one.between, one.question, one.measure,
         number(one.estimate) if one.estimate else f"not defined: {one.why_not}")
        for one in results.agreements
    ]  # fmt: skip
    if agreed:
        yield "Agreement", ("between", "question", "measure", "value"), agreed
    if results.voters:
        kept = [v for v in results.voters if v.is_attentive]
        rows = [
            ("voters", str(len(results.voters)), str(len(kept))),
            (
                "votes",
                str(sum(v.votes for v in results.voters)),
                str(sum(v.votes for v in kept)),
            ),
        ]
        yield "Votes", ("", "given", "counted"), rows


def explanation(results: Results, options: Fit) -> list[str]:
    """How the numbers were made."""
    return [
        f"Protocol {protocol_id(results, options)}: of the study, --prior {options.prior:g}, --resamples "
        f"{options.resamples} and --seed {options.seed}.",
        "Brackets are 95 % intervals: the widest of those by resampling prompts, by resampling voters where "
        "there are several, and of Wilson's for win rates or Agresti and Coull's for strengths.",
        f"Points: Bradley and Terry's model, a tie as half a win each, {options.prior:g} games added between "
        "every two models that met; 400 points mean ten wins for a loss, the mean of all models is 0.",
        "Attention checks are not counted; a voter who fails more than a fifth of them is left out. A judge sees "
        "each pair in both orders; if they do not agree it is a tie.",
    ]


def as_markdown(results: Results, options: Fit) -> str:
    parts = [f"# Preference study: {_cell(', '.join(results.key.models))}"]
    if options.figure:
        parts.append(f"![{ALT}](plots/preference.svg)")
    for title, columns, rows in tables(results):
        text = table(map(_cell, columns), (map(_cell, row) for row in rows))
        parts.append(f"## {title}\n\n{text}")
    said = [*notes(results), *explanation(results, options)]
    parts.append("## Notes\n\n" + "\n".join(f"- {_cell(note)}" for note in said))
    return "\n\n".join(parts) + "\n"


def as_html(results: Results, options: Fit) -> str:
    title = f"Preference study: {', '.join(results.key.models)}"
    parts = [f"<h1>{escape(title)}</h1>"]
    if options.figure:
        parts.append(f'<p><img src="plots/preference.svg" alt="{ALT}"></p>')
    for name, columns, rows in tables(results):
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
        body = "\n".join(
            f"<tr>{''.join(_named(*pair) for pair in zip(columns, row, strict=True))}</tr>"
            for row in rows
        )
        parts.append(
            f'<h2>{name}</h2>\n<div class="wide" tabindex="0" role="region" aria-label="{name}"><table>'
            f"<caption>{CAPTIONS[name]}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
        )
    said = [*notes(results), *explanation(results, options)]
    parts.append(
        "<h2>Notes</h2>\n<ul>" + "".join(f"<li>{escape(n)}</li>\n" for n in said) + "</ul>"
    )
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _named(column: str, cell: str) -> str:
    """A cell that says its column itself, for windows in which a row is a list."""
    return f'<td data-column="{escape(column)}">{escape(cell)}</td>'


def share(one: Estimate) -> str:
    return f"{100 * one.value:.1f} % [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def points(one: Estimate) -> str:
    return f"{one.value:+.0f} [{one.low:+.0f}, {one.high:+.0f}]"


def number(one: Estimate) -> str:
    value, low, high = (round(each, 2) + 0.0 for each in (one.value, one.low, one.high))  # no -0.00
    return f"{value:.2f} [{low:.2f}, {high:.2f}], n {one.n}"


def _cell(text: str) -> str:
    """Names are of the user, and a table's cell ends at a bar."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
