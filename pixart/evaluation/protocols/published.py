"""A paper's numbers beside ours, each with "same protocol? yes, or no, because ...".

The reasons are computed: from what the paper states (`Stated`) and what was done (`Used`, read from
results.json). What a paper leaves open cannot be computed; the protocol's `differs` says it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pixart.config import KVCompression
from pixart.evaluation.protocols.protocol import Column, Protocol, Row, Stated, Table
from pixart.releases import release_named

INCONCLUSIVE = 0.013  # of an FID: training again moves it as much (the FID lottery, 2026)
_WIDTH = 100  # of a terminal, more or less
_WORDS = {
    "set": "the prompts are {ours}, the table's are {theirs}",
    "count": "{ours:,} prompts, the table has {theirs:,}",
    "images_per_prompt": "{ours} pictures of a prompt, the table has {theirs}",
    "size": "the pictures are {ours}, the table's are {theirs}",
    "scheduler": "the sampler is {ours}, the table's is {theirs}",
    "steps": "{ours} steps, the table has {theirs}",
    "guidance": "guidance {ours:g}, the table has {theirs:g}",
    "judge": "the judge is {ours}, the table's is {theirs}",
}


@dataclass(frozen=True)
class Used:
    """What was done. done: as `Stated`, and with all that is known. model: as it was named. kv_compress:
    see `kv_words`; None where it is not known. constants: of each metric. left_out: by metric, how many
    pictures its numbers are not of."""

    done: Stated
    model: str
    kv_compress: str | None = None
    constants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> "Used":
        """Of a results.json, whose "protocol" is `Protocol.record` with the facts of the run: `prompts`,
        and, where the protocol left settings to the model, `resolved` (scheduler, steps, guidance, size)
        and `kv_compress`."""
        protocol = results["protocol"]
        settings = {**protocol.get("sampling", {}), "size": protocol.get("size")}
        resolved = protocol.get("resolved") or {}
        known = {
            name: settings.get(name) if settings.get(name) is not None else resolved.get(name)
            for name in ("size", "scheduler", "steps", "guidance")
        }
        metrics = results.get("metrics", {})
        constants = {name: one.get("constants", {}) for name, one in metrics.items()}
        judges = [one["judge"] for one in constants.values() if one.get("judge")]
        done = Stated(
            set=protocol.get("set"),
            count=protocol.get("prompts", protocol.get("count")),
            images_per_prompt=protocol.get("images_per_prompt"),
            judge=judges[0] if judges else None,
            **known,
        )
        left_out = {name: one["left_out"] for name, one in metrics.items() if one.get("left_out")}
        model = str(results.get("model", ""))
        return cls(done, model, protocol.get("kv_compress"), constants, left_out)


def kv_words(compression: KVCompression | None) -> str:
    """A transformer's KV compression as a row of a table names it: "" for none, else
    LAYERS:RATIO:SAMPLING with layers as ranges, "14-27:2:conv"."""
    if compression is None or compression.ratio == 1 or not compression.layers:
        return ""
    return compression.to_text()


def row_of(table: Table, used: Used) -> Row:
    """The row that stands beside ours: first of those of the model's name, then of its KV compression,
    then of what was done (steps, size); the table's `ours` where nothing decides."""

    def fits(row: Row) -> tuple[bool, bool, int, bool]:
        return (
            _is_model(row, used.model),
            row.kv_compress is not None
            and used.kv_compress is not None
            and _canonical(row.kv_compress) == _canonical(used.kv_compress),
            -sum(theirs != ours for _, ours, theirs in _stated(row.stated, used.done)),
            row.name == table.ours,
        )

    return max(table.rows, key=fits)


def same_protocol(
    protocol: Protocol, column: Column, row: Row, used: Used
) -> tuple[bool, list[str]]:
    """Whether a number of ours and the table's were made the same way, and all that says no."""
    assert protocol.paper is not None
    stated = _merged(protocol.paper.stated, row.stated, column.stated)
    own = replace(used.done, judge=used.constants.get(column.metric, {}).get("judge"))
    because = [
        _WORDS[name].format(ours=ours, theirs=theirs)
        for name, ours, theirs in _stated(stated, own)
        if not (_same_judge(ours, theirs) if name == "judge" else _equal(ours, theirs))
    ]
    constants = used.constants.get(column.metric, {})
    for name, theirs in column.constants.items():
        if not _equal(constants.get(name), theirs):
            because.append(
                f"{name} of {column.metric} is {constants.get(name)}, the table's is {theirs}"
            )
    if left_out := used.left_out.get(column.metric, 0):
        because.append(f"{left_out:,} pictures are missing or cannot be scored")
    because += _of_weights(row, used)
    because += [*column.differs, *protocol.differs]
    return not because, because


def paper_table(protocol: Protocol, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The paper's table and ours, as JSON holds it; None for a protocol without one.

    {"source", "title", "row", "model", "columns": [...], "rows": [{"name", "values", "unconfirmed",
    "source"}]}. A column: {"name", "metric", "value", "category", "higher_is_better", "ours": {"value",
    "low", "high", "n"} or None, "paper": number or None, "unconfirmed", "same_protocol", "because",
    "verdict"}; an end of ours that is not known is None. verdict: "not comparable" where the protocols
    differ, "inconclusive" where the paper's number lies in our interval, or an FID nearer than 1.3 %,
    else "better" or "worse"; None without ours.
    """
    table = protocol.paper
    if table is None:
        return None
    used = Used.of(results)
    row = row_of(table, used)
    return {
        "source": table.source,
        "title": protocol.title,
        "protocol": results["protocol"].get("id", protocol.name),
        "row": row.name,
        "model": used.model,
        "columns": [_column(protocol, one, row, used, results) for one in table.columns],
        "rows": [
            {
                "name": one.name,
                "values": dict(one.values),
                "unconfirmed": list(one.unconfirmed),
                "source": one.source or table.source,
            }
            for one in table.rows
        ],
    }


def with_paper(protocol: Protocol, results: Mapping[str, Any]) -> dict[str, Any]:
    """results.json with the paper's numbers: the table as "paper", and each number beside its metric's,
    as "paper" of the metric by the name of the value, or "CATEGORY/VALUE", in the metric's unit."""
    table = paper_table(protocol, results)
    if table is None:
        return dict(results)
    assert protocol.paper is not None
    scales = {one.name: one.scale for one in protocol.paper.columns}
    metrics = {name: dict(one) for name, one in results.get("metrics", {}).items()}
    for column in table["columns"]:
        metric = metrics.get(column["metric"])
        if metric is None or column["paper"] is None:
            continue
        key = "/".join(filter(None, (column["category"], column["value"])))
        metric["paper"] = metric.get("paper", {}) | {
            key: {
                "value": column["paper"] / scales[column["name"]],
                "source": f"{table['source']}, {table['row']}",
                "same_protocol": column["same_protocol"],
                "because": column["because"],
            }
        }
    return {**results, "metrics": metrics, "paper": table}


def _column(
    protocol: Protocol, column: Column, row: Row, used: Used, results: Mapping[str, Any]
) -> dict[str, Any]:
    value = column.value or column.metric
    metric = results.get("metrics", {}).get(column.metric, {})
    values = (
        metric.get("categories", {}).get(column.category, {})
        if column.category
        else metric.get("values", {})
    )
    ours = values.get(value)
    if ours is not None:
        # An end that is not known is null.
        scaled = {
            name: None if ours[name] is None else ours[name] * column.scale
            for name in ("value", "low", "high")
        }
        ours = {**scaled, "n": ours["n"]}
    same, because = same_protocol(protocol, column, row, used)
    paper = row.values.get(column.name)
    return {
        "name": column.name,
        "metric": column.metric,
        "value": value,
        "category": column.category,
        "higher_is_better": column.higher_is_better,
        "ours": ours,
        "paper": paper,
        "unconfirmed": column.name in row.unconfirmed,
        "same_protocol": same,
        "because": because,
        "verdict": _verdict(column, ours, paper, same),
    }


def _verdict(
    column: Column, ours: Mapping[str, float | None] | None, paper: float | None, same: bool
) -> str | None:
    if ours is None or ours["value"] is None or paper is None:
        return None
    if not same:
        return "not comparable"
    value, low, high = ours["value"], ours["low"], ours["high"]
    near = column.metric.startswith("fid") and abs(value - paper) < INCONCLUSIVE * paper
    if near or low is None or high is None or low <= paper <= high:
        return "inconclusive"
    return "better" if (value > paper) == column.higher_is_better else "worse"


def _of_weights(row: Row, used: Used) -> list[str]:
    """Of a published checkpoint whether it is the row's. Another model has weights of its own, and may be
    compared."""
    if release_named(used.model) is None or _is_model(row, used.model):
        return []
    if not row.models:
        return [f"the weights of {row.name!r} are not published"]
    return [f"the weights are {used.model}, those of {row.name!r} are {' or '.join(row.models)}"]


def _is_model(row: Row, model: str) -> bool:
    release = release_named(model)
    names = {
        model,
        model.rpartition("/")[2],
        *((release.hub_id, release.place, release.name) if release else ()),
    }
    if release and release.file:  # the repository of several checkpoints
        names.discard(release.hub_id)
    return bool(names & set(row.models))


def _merged(*several: Stated) -> Stated:
    """The last that says something, by field."""
    found: dict[str, Any] = {}
    for stated in several:
        for one in fields(stated):
            if getattr(stated, one.name) is not None:
                found[one.name] = getattr(stated, one.name)
    return Stated(**found)


def _stated(stated: Stated, done: Stated) -> list[tuple[str, Any, Any]]:
    """(name, ours, the paper's) of what the paper states and we know."""
    pairs = [
        (one.name, getattr(done, one.name), getattr(stated, one.name)) for one in fields(stated)
    ]
    return [pair for pair in pairs if pair[1] is not None and pair[2] is not None]


def _same_judge(ours: str, theirs: str) -> bool:
    """A judge's id says how it is asked before its name, and no owner of its repository."""
    return ours.rpartition(":")[2].casefold() == theirs.rpartition("/")[2].casefold()


def _equal(ours: object, theirs: object) -> bool:
    numbers = (int, float)
    if isinstance(ours, numbers) and isinstance(theirs, numbers):
        return abs(ours - theirs) < 1e-9
    return ours == theirs


def _canonical(words: str) -> str:
    return kv_words(KVCompression.parse(words)) if words else ""


def table_text(*tables: Mapping[str, Any]) -> str:
    """Tables of `paper_table` of one protocol for a terminal: the paper's rows, ours with their intervals,
    and the answers. Several where several models were drawn, each beside a row of its own."""
    first = tables[0]
    columns: Sequence[Mapping[str, Any]] = first["columns"]
    beside = {table["row"] for table in tables}
    lines = [["", *(one["name"] for one in columns)]]
    for row in first["rows"]:
        unsure = row["unconfirmed"]
        cells = [_number(row["values"].get(one["name"]), one["name"] in unsure) for one in columns]
        lines.append([("> " if row["name"] in beside else "  ") + row["name"], *cells])
    for table in tables:
        cells = [_interval(one["ours"]) for one in table["columns"]]
        lines.append([f"  ours: {table['model']}", *cells])
    body = min(_aligned(lines), _aligned(list(zip(*lines, strict=True))), key=_too_wide)
    if any(row["unconfirmed"] for row in first["rows"]):
        body.append("? not read in the paper itself")
    head = f"{first['title']} ({first['source']}); protocol {first['protocol']}"
    answers = [line for table in tables for line in _answers(table, len(tables) > 1)]
    return "\n".join([head, *body, "", *answers])


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _too_wide(body: Sequence[str]) -> int:
    """By how much it is wider than a terminal: a table of many columns is turned on its side."""
    return max(0, max(map(len, body)) - _WIDTH)


def _answers(table: Mapping[str, Any], several: bool) -> list[str]:
    """A line for each answer, with all columns that have it."""
    found: dict[str, list[str]] = {}
    for one in table["columns"]:
        if one["ours"] is not None:
            found.setdefault(_answer(one, table["row"]), []).append(one["name"])
    whose = f"{table['model']} beside {table['row']!r}, " if several else ""
    return [
        f"{whose}{', '.join(names) if len(found) > 1 else 'every column'}: {answer}"
        for answer, names in found.items()
    ]


def _answer(column: Mapping[str, Any], row: str) -> str:
    if column["paper"] is None:
        return f"the table has no number of {row}"
    if column["same_protocol"]:
        return f"same protocol? yes; {column['verdict']}"
    return f"same protocol? no, because {'; '.join(column['because'])}"


def _number(value: float | None, unconfirmed: bool) -> str:
    return "-" if value is None else f"{value:.6g}{'?' if unconfirmed else ''}"


def _interval(ours: Mapping[str, float | None] | None) -> str:
    if ours is None or ours["value"] is None:
        return "-"
    low, high = ("?" if ours[end] is None else f"{ours[end]:.4g}" for end in ("low", "high"))
    return f"{ours['value']:.4g} [{low}, {high}]"
