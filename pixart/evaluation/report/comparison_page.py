"""What two evaluated folders differ in, as one page that needs no script, and as Markdown."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pixart.evaluation.comparing.pairing import OPEN, A, Change, Comparison
from pixart.evaluation.metric import Estimate, Score
from pixart.evaluation.report import numbers, readme
from pixart.evaluation.report.columns import command_of, label, names_of, sentence
from pixart.evaluation.report.figures import axis, scatter, strip
from pixart.evaluation.report.folder import Evaluated
from pixart.evaluation.report.gallery import shot
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

STRIP = 120
MOST = 6  # pairs of pictures for which one side is better
WORDS = 140


def names(comparison: Comparison) -> tuple[str, str]:
    """Of A and B: the models, or the folders where the model is the same."""
    a, b = names_of([comparison.a, comparison.b])
    return a, b


def difference(change: Change) -> str:
    """ "+0.0120 [0.0070, 0.0170]", with the unit behind the number."""
    one = change.difference
    places = numbers.digits(one.low, one.high, one.difference)
    ends = numbers.interval(one.low, one.high, places)
    return f"{numbers.signed(one.difference, places)}{numbers.spaced(change.unit)} {ends}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def scatters(comparison: Comparison) -> dict[str, Html]:
    """By metric that scores single pictures: each prompt's mean score in A and in B."""
    found = {}
    for name, metric in comparison.a.metrics.items():
        if name not in comparison.b.metrics or not metric.per_picture:
            continue
        ours, theirs = (_of_prompts(one, name) for one in (comparison.a, comparison.b))
        points = [(ours[key], theirs[key]) for key in ours if key in theirs]
        if points:
            title = f"{name} of each prompt, A and B"
            found[name] = scatter(title, points, names(comparison), metric.higher_is_better)
    return found


def comparison_page(comparison: Comparison, drawn: Mapping[str, Html], place: Path) -> str:
    """The page's HTML. drawn: `scatters`. place: the folder that it is written to."""
    a, b = names(comparison)
    parts = [
        ("verdicts", "Verdicts", _verdicts(comparison)),
        ("numbers", "Numbers", _numbers(comparison)),
        ("figures", "Figures", _figures(drawn)),
        ("categories", "Categories", _categories(comparison)),
        ("pictures", "Pictures", _pictures(comparison, place)),
        ("differs", "What differs", _differs(comparison)),
        ("notes", "Notes", _notes(comparison)),
        ("again", "Repeat it", _again(comparison)),
    ]
    sections = [(name, word, one) for name, word, one in parts if one is not None]
    head = joined(
        tag("ul", tag("li", f"{side} ", tag("b", quoted(name))),
            tag("li", "folder ", tag("b", quoted(one.name))),
            tag("li", "protocol ", tag("b", quoted(str(one.protocol.get("id", "unnamed"))))),
            class_="facts", role="list")
        for side, name, one in (("A", a, comparison.a), ("B", b, comparison.b))
    )  # fmt: skip
    return document(f"{a} against {b}", head, sections)


def _verdict(word: str) -> Html:
    return tag("span", word, class_=f"whole {'undecided' if word == OPEN else 'better'}")


def _verdicts(comparison: Comparison) -> Html:
    mains = {one.main for one in comparison.a.metrics.values()}
    cards = [
        tag("li", tag("span", one.name, class_="faint"), _verdict(one.verdict),
            tag("span", f"B {numbers.MINUS} A"), value_cell(difference(one)))
        for one in comparison.numbers
        if one.name in mains
    ]  # fmt: skip
    words = tag("p", "Of the same prompts. A verdict is given where the 95 % interval of the difference "
                "leaves zero out and p is below 0.05.", class_="faint")  # fmt: skip
    return section("verdicts", "Verdicts", words,
                   tag("ul", joined(cards), class_="verdicts", role="list"))  # fmt: skip


def _row(change: Change, note: str) -> list[Html]:
    one = change.difference
    scale = axis([one.low, one.high, one.difference, 0.0], STRIP)
    drawn = strip(scale, Estimate(one.difference, one.low, one.high, one.n, ""), zero=True)
    return [
        tag("span", quoted(change.name), tag("small", f" {note}") if note else None),
        value_cell(numbers.estimate(change.a, change.unit)),
        value_cell(numbers.estimate(change.b, change.unit)),
        value_cell(difference(change), drawn),
        tag("span", p_value(change.decides), class_="whole"),
        _verdict(change.verdict),
    ]


def _numbers(comparison: Comparison) -> Html:
    rows = []
    for one in comparison.numbers:
        better = "higher is better" if one.higher_is_better else "lower is better"
        beside = "" if one.name.startswith(one.metric) else f"of {one.metric}, "
        rows.append(_row(one, beside + better))
    columns = ["Number", "A", "B", f"B {numbers.MINUS} A", "p", "Verdict"]
    caption = "Every number with its 95 % interval; p of no difference. The upright line is zero."
    made = table(caption, columns, rows, "stacked")
    only = None
    if comparison.only:
        only = tag("p", f"In one folder only, and not compared: {', '.join(comparison.only)}.",
                   class_="warning")  # fmt: skip
    return section("numbers", "Numbers", made, only)


def _figures(drawn: Mapping[str, Html]) -> Html | None:
    if not drawn:
        return None
    boxes = [tag("figure", tag("figcaption", name), figure) for name, figure in drawn.items()]
    words = tag("p", "A point is a prompt, a larger one several. Orange ones are better in B, blue ones "
                "in A; on the broken line both are equal.", class_="faint")  # fmt: skip
    return section("figures", "Prompt by prompt", words, tag("div", joined(boxes), class_="charts"))


def _categories(comparison: Comparison) -> Html | None:
    parts: list[Html] = []
    for metric, changes in comparison.categories.items():
        rows = [_row(one, f"n = {one.difference.n:,}") for one in changes.values()]
        columns = ["Category", "A", "B", f"B {numbers.MINUS} A", "p (Holm)", "Verdict"]
        caption = f"{metric} by category; p is adjusted for {len(rows)} categories"
        parts.append(
            details(tag("h3", metric), table(caption, columns, rows, "stacked"), is_open=not parts)
        )
    return section("categories", "By category", *parts) if parts else None


def _of_prompts(one: Evaluated, metric: str) -> dict[str, float]:
    """The mean score of each prompt's pictures."""
    found: dict[str, list[float]] = {}
    for key, score in one.scores(metric).items():
        found.setdefault(key.rpartition("/")[0], []).append(score.value)
    return {key: sum(values) / len(values) for key, values in found.items()}


def differ_most(
    a: Mapping[str, Score], b: Mapping[str, Score], higher_is_better: bool
) -> dict[str, list[str]]:
    """Keys of pictures by how much better one side is, most first; none that are equal."""
    sign = 1.0 if higher_is_better else -1.0
    gaps = {key: sign * (b[key].value - a[key].value) for key in a if key in b}
    best_b = sorted((key for key in gaps if gaps[key] > 0), key=lambda key: (-gaps[key], key))
    best_a = sorted((key for key in gaps if gaps[key] < 0), key=lambda key: (gaps[key], key))
    return {"B better": best_b[:MOST], A: best_a[:MOST]}


def _pictures(comparison: Comparison, place: Path) -> Html | None:
    parts: list[Html] = []
    for name, metric in comparison.a.metrics.items():
        if name not in comparison.b.metrics or not metric.per_picture:
            continue
        scores = (comparison.a.scores(name), comparison.b.scores(name))
        chosen = differ_most(*scores, metric.higher_is_better)
        lists = []
        for title, keys in chosen.items():
            if keys:
                pairs = joined(_pair(comparison, key, scores, metric.unit, place) for key in keys)
                lists += [tag("h4", title), tag("ul", pairs, class_="pairs", role="list")]
        inside = lists or [tag("p", "Every picture has the same score in both.")]
        parts.append(details(tag("h3", name), *inside, is_open=not parts))
    if not parts:
        return None
    words = tag("p", "A on the left, B on the right, each with its score.", class_="faint")
    return section("pictures", "Pictures that differ most", words, *parts)


def _pair(
    comparison: Comparison,
    key: str,
    scores: tuple[Mapping[str, Score], Mapping[str, Score]],
    unit: str,
    place: Path,
) -> Html:
    shots = [
        tag("figure", shot(one.entry(key), place),
            tag("figcaption", f"{side}: {numbers.plain(found[key].value)}{numbers.spaced(unit)}"))
        for side, one, found in zip("AB", (comparison.a, comparison.b), scores, strict=True)
    ]  # fmt: skip
    text = comparison.a.entry(key).prompt.prompt
    return tag("li", tag("div", joined(shots), class_="both"), quoted(text, WORDS))


def _differs(comparison: Comparison) -> Html:
    rows = [[tag("span", name), quoted(a), quoted(b)] for name, a, b in comparison.settings]
    if not rows:
        return section("differs", "What differs", tag("p", "Nothing that either folder tells."))
    made = table("Settings that are not the same", ["Setting", "A", "B"], rows, "settings")
    return section("differs", "What differs", made)


def _ways(comparison: Comparison) -> list[tuple[str, str]]:
    return [
        (label(one.metric, one.name), f"{one.difference.method}, n = {one.difference.n:,}."
         + "".join(f" {sentence(note)}" for note in one.difference.notes))
        for one in comparison.numbers
    ]  # fmt: skip


def _notes(comparison: Comparison) -> Html:
    items = [tag("li", tag("b", name), f": {how}") for name, how in _ways(comparison)]
    return section(
        "notes", "How each difference was made", tag("ul", joined(items), class_="notes")
    )


def commands(comparison: Comparison) -> list[str]:
    ours = dict.fromkeys(command_of(one) for one in (comparison.a, comparison.b))
    folders = shlex.join(str(one.path) for one in (comparison.a, comparison.b))
    return [*ours, f"python -m pixart.evaluate compare {folders}"]


def _again(comparison: Comparison) -> Html:
    parts = [tag("pre", tag("code", command)) for command in commands(comparison)]
    return section("again", "Repeat it", *parts)


def comparison_readme(comparison: Comparison, plots: Sequence[str]) -> str:
    """The same as Markdown. plots: names of the files in plots/."""
    a, b = (readme.words(name) for name in names(comparison))
    head = ["", "A", "B", f"B {numbers.MINUS} A [low, high]", "p", "verdict"]
    parts = [
        f"# {a} against {b}",
        f"A is {a} ({readme.words(comparison.a.name)}), B is {b} ({readme.words(comparison.b.name)}), on the "
        "same prompts. [compare.html](compare.html) shows the pictures that differ most.",
        readme.table(
            head, [_cells(one, label(one.metric, one.name)) for one in comparison.numbers]
        ),
        f"Not compared, in one folder only: {readme.words(', '.join(comparison.only))}."
        if comparison.only
        else "",
        "\n".join(f"![{name.removesuffix('.svg')}](plots/{name})" for name in plots),
    ]
    for metric, changes in comparison.categories.items():
        rows = [_cells(one, one.name) for one in changes.values()]
        parts += [f"## {readme.words(metric)} by category (p after Holm)", readme.table(head, rows)]
    settings = [[readme.words(word) for word in row] for row in comparison.settings]
    parts += [
        "## What differs",
        readme.table(["setting", "A", "B"], settings) if settings else "Nothing.",
    ]
    ways = [f"- **{readme.words(name)}**: {readme.words(how)}" for name, how in _ways(comparison)]
    parts += ["## How each difference was made", "\n".join(ways)]
    parts += ["## Repeat it", readme.fenced("\n".join(commands(comparison)))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(change: Change, name: str) -> list[str]:
    unit = readme.words(change.unit)
    one = change.difference
    places = numbers.digits(one.low, one.high, one.difference)
    value = f"{numbers.signed(one.difference, places)}{numbers.spaced(unit)}"
    return [
        readme.words(name),
        numbers.estimate(change.a, unit),
        numbers.estimate(change.b, unit),
        f"{value} {numbers.interval(one.low, one.high, places)}",
        p_value(change.decides),
        change.verdict,
    ]
