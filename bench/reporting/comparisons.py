"""How many times as fast as somebody else ours is, taken from the rows of a result."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from bench.measure.results import Content, Row
from bench.workloads import sizes

OURS, DIFFUSERS = "ours", "diffusers"


class Comparison(NamedTuple):
    """ratio: their median over ours, above 1 where ours is faster; low, high: with the quantiles of
    20 % and 80 %, theirs short and ours long, and the other way round."""

    topic: str
    image: str
    tokens: int
    against: str
    ratio: float
    low: float
    high: float
    run: Row

    @property
    def is_loss(self) -> bool:
        """Slower by more than the spread of both."""
        return self.high < 1

    def __str__(self) -> str:
        return f"{self.ratio:.2f} × {self.against}{self.image and f' at {self.image}'}"


def of_result(content: Content) -> Iterator[Comparison]:
    """Ours against each peer that was timed in turn with it, and what compression saves."""
    for run in content["runs"]:
        # On a CPU “eager” is our own code.
        own = ("eager",) if run["machine"] and run["machine"]["device"] == "cpu" else ()
        for rows in grouped(run["rows"]):
            times = timed(rows)
            for name, row in times.items():
                ours = counterpart(name, times)
                if ours and not name.startswith(OURS) and name not in own:
                    yield _compare(name, ours, row, run)
                elif ours and "saving" in row:
                    yield _saved(row, run)


def _compare(against: str, ours: Row, theirs: Row, run: Row) -> Comparison:
    a, b = ours["seconds"], theirs["seconds"]
    low, high = b["p20"] / a["p80"], b["p80"] / a["p20"]
    where = topic(ours), image(ours), tokens(ours), against
    return Comparison(*where, b["median"] / a["median"], low, high, run)


def _saved(row: Row, run: Row) -> Comparison:
    """Of pairs of a round, so that the spread is that of the saving."""
    ratio, low, high = (1 / (1 - row["saving"]["time"][key]) for key in ("median", "p20", "p80"))
    name = f"{topic(row)}, {row['variant'].removeprefix(OURS).strip()}"
    return Comparison(name, image(row), tokens(row), "ours dense", ratio, low, high, run)


def counterpart(name: str, times: Mapping[str, Row]) -> Row | None:
    """What a variant's time is held against: ours as it comes, but a peer that keeps no activations
    against ours that keeps none either."""
    alike = name.replace(DIFFUSERS, OURS) if name == f"{DIFFUSERS} checkpointed" else OURS
    return times.get(alike, times.get(OURS))


def timed(rows: Iterable[Row]) -> dict[str, Row]:
    """Those that have a time, by variant."""
    return {row["variant"]: row for row in rows if row.get("seconds")}


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Those that are comparable in one list; lists of one topic stand together, small images first.
    run: of a row, where they are of several."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row["part"], row["what"], str(row["shape"]), str(row["dtype"]), row.get("run", ""))
        groups.setdefault(key, []).append(row)
    topics = list(dict.fromkeys(topic(group[0]) for group in groups.values()))
    return sorted(
        groups.values(),
        key=lambda group: (topics.index(topic(group[0])), tokens(group[0])),
    )


def topic(row: Row) -> str:
    """What was timed, whatever the size of the image: batch, ratio and dtype stand in it where they
    are not 1, as published and bf16."""
    shape, words = row["shape"], [row["what"]]
    words += ["(two blocks)"] * shape.get("size", "").endswith(sizes.SHALLOW)
    words += [f"R = {shape['ratio']}"] if shape.get("ratio", sizes.RATIO) != sizes.RATIO else []
    words += [f"batch {shape['batch']}"] if shape.get("batch", 1) != 1 else []
    words += [str(row["dtype"])] * (row["dtype"] not in (None, "bfloat16"))
    return " ".join(words)


def image(row: Row) -> str:
    """Its size, and whether a block of the model stands for all."""
    size = row["shape"].get("size", "").removesuffix(sizes.SHALLOW)
    return size + " (one block)" * (row.get("scope") == "block")


def tokens(row: Row) -> int:
    """Of the image; 0 where there is none."""
    return row["shape"].get("tokens", 0)


def losses(found: Iterable[Comparison]) -> str:
    """Where ours is slower by more than the spread of both, the worst first; empty if nowhere."""
    lost = sorted((one for one in found if one.is_loss), key=lambda one: one.ratio)
    names = "; ".join(f"{one.topic}: {one}" for one in lost)
    return f"**Slower than a peer by more than the spread of both:** {names}." if lost else ""
