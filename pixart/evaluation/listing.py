"""What `list` tells: prompt sets, metrics and protocols, what each needs, and whether it runs now."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from textwrap import fill
from typing import Any

from pixart.evaluation.metric import Context
from pixart.evaluation.metrics import METRICS, open_metric
from pixart.evaluation.prompt_sets import GENERATED, OWN, SETS
from pixart.evaluation.protocols.protocol import Protocol, load_protocol, shipped

_WIDTH = 100
_KINDS = {"sets": "Prompt sets", "metrics": "Metrics", "protocols": "Protocols"}


@dataclass(frozen=True)
class Row:
    """Something that is listed. title: what it is, in words. runs: whether nothing is missing to use it as it
    stands. because: what is missing, a line each, with where it is to be had."""

    name: str
    title: str
    runs: bool
    because: tuple[str, ...] = ()


def listing(context: Context, names: Sequence[str] = ()) -> dict[str, list[Row]]:
    """Rows of "sets", "metrics" and "protocols". context: where weights and files are looked for. names:
    protocols, shipped or files, instead of all that ship. Nothing is opened or downloaded."""
    protocols = [load_protocol(name) for name in names or shipped()]
    return {
        "sets": list_sets(),
        "metrics": [metric_row(name, context) for name in sorted(METRICS)],
        "protocols": [protocol_row(protocol, context) for protocol in protocols],
    }


def list_sets() -> list[Row]:
    """The prompt sets, generated ones first. Of the others the files are the user's: without --from none
    runs."""
    rows = [Row(name, title, True) for name, title in GENERATED.items()]
    for name, known in SETS.items():
        count = f"{known.count:,} prompts; " if known.count else ""
        files = ", ".join(known.files)
        because = f"--from {files} (from {known.source})"
        also = (f"--reference {known.reference}, for metrics that compare sets",)
        rows.append(
            Row(name, f"{count}{known.title}", False, (because, *(also if known.reference else ())))
        )
    return [*rows, *(Row(name, title, False, ("--from",)) for name, title in OWN.items())]


def metric_row(name: str, context: Context) -> Row:
    """A metric, by what it says it needs. A name that nobody knows does not run."""
    if name not in METRICS:
        return Row(name, "", False, ("no metric has this name",))
    try:
        metric = open_metric(name, context)
        because = tuple(str(need) for need in metric.needs())
    except ValueError as error:  # of a constructor: an option or a file is wrong
        return Row(name, "", False, (str(error),))
    return Row(name, metric.source, not because, because)


def protocol_row(protocol: Protocol, context: Context) -> Row:
    """A protocol: its prompts, its metrics and its reference set."""
    because = [f"prompts {protocol.set}: {one}" for one in _of_set(protocol.set)]
    missing: dict[str, list[str]] = {}  # what several metrics need is told once
    for use in protocol.metrics:
        own = replace(context, options={**use.options, **context.options})
        for one in metric_row(use.name, own).because:
            missing.setdefault(one, []).append(use.name)
    because += [f"{', '.join(names)}: {one}" for one, names in missing.items()]
    if protocol.reference == "set":
        because.append("--reference, the pictures of the prompts")
    return Row(protocol.name, protocol.title, not because, tuple(because))


def _of_set(name: str) -> Sequence[str]:
    if name in GENERATED:
        return ()
    if name not in SETS:
        return ("--set, a file of yours",)
    known = SETS[name]
    return (f"--set {', '.join(known.files)} (from {known.source})",)


def listing_text(found: Mapping[str, Sequence[Row]]) -> str:
    """For a terminal: name, yes or no, what it is; below it what is missing, told in full where it is missing
    first."""
    lines = []
    told: dict[str, str] = {}
    for kind, title in _KINDS.items():
        rows = found[kind]
        width = max((len(row.name) for row in rows), default=0)
        lines.append(f"{title} (runs now?)")
        for row in rows:
            answer = "yes" if row.runs else "no "
            lines.append(_wrapped(f"  {row.name:<{width}}  {answer}  ", row.title))
            for one in row.because:
                *names, what = one.split(": ", 1) if kind == "protocols" else (one,)
                first = told.setdefault(what, row.name)
                short = f"{what.partition(' (')[0]}, as for {first}"
                shown = one if first == row.name else ": ".join((*names, short))
                lines.append(_wrapped(" " * (width + 9) + "needs ", shown))
        lines.append("")
    return "\n".join(lines).rstrip()


def listing_json(found: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """For --json: {"sets": [{"name", "title", "runs", "because"}], ...}."""
    return {
        kind: [{**asdict(row), "because": list(row.because)} for row in rows]
        for kind, rows in found.items()
    }


def _wrapped(start: str, text: str) -> str:
    inside = " " * len(start)
    whole = fill(
        text, max(_WIDTH, len(start) + 40), initial_indent=start, subsequent_indent=inside,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return whole or start.rstrip()
