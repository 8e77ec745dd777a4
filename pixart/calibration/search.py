"""Which blocks are merged when, so that most is saved for the error that it costs. Imports no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pixart.plans.schedule import NOISIEST, KVSchedule, Rule

Cell = tuple[int, int]  # a block, and a band of timesteps


@dataclass(frozen=True)
class Choice:
    """A cell merged by a ratio. error: what it alone is predicted to add to the squared relative error of the
    latents. saved: FLOPs of a picture."""

    block: int
    band: int
    ratio: int
    error: float
    saved: int

    @property
    def cell(self) -> Cell:
        return self.block, self.band


@dataclass(frozen=True)
class Prefix:
    """The first of the moves that a greedy search makes: what all together save, and are predicted to cost:
    errors of single cells add up in squares, to within a fifth."""

    chosen: Mapping[Cell, Choice]

    @property
    def error(self) -> float:
        """Predicted, relative."""
        return sum(one.error for one in self.chosen.values()) ** 0.5

    @property
    def saved(self) -> int:
        return sum(one.saved for one in self.chosen.values())

    def schedule(self, bands: Sequence[tuple[float, float]]) -> KVSchedule | None:
        """None where nothing is chosen. bands: their (high, low) timesteps, the noisiest first."""
        ratios = {cell: one.ratio for cell, one in self.chosen.items()}
        blocks: dict[tuple[int, int, int], list[int]] = {}
        for block in sorted({block for block, _ in ratios}):
            for first, last, ratio in _runs([ratios.get((block, n)) for n in range(len(bands))]):
                blocks.setdefault((first, last, ratio), []).append(block)
        rules = [
            Rule(tuple(members), ratio, (bands[first][0], bands[last][1]))
            for (first, last, ratio), members in sorted(blocks.items())
        ]
        return KVSchedule(tuple(rules)) if rules else None


def prefixes(choices: Sequence[Choice]) -> list[Prefix]:
    """Of a greedy search, from nothing chosen on, each one move longer: a cell merged, or merged further,
    whichever saves most for each squared error that it adds. What adds none comes first."""
    chosen: dict[Cell, Choice] = {}
    found = [Prefix({})]
    while moves := [one for one in choices if _more(one, chosen) > 0]:
        best = max(moves, key=lambda one: _worth(one, chosen))
        chosen = {**chosen, best.cell: best}
        found.append(Prefix(chosen))
    return found


def bands_of(timesteps: Sequence[float], count: int) -> list[tuple[list[int], tuple[float, float]]]:
    """`count` bands of consecutive evaluations, or as many as there are: the numbers of those in each, and the
    timesteps (high, low) that it covers; together all that there are."""
    count = min(count, len(timesteps))
    ends = [round(part * len(timesteps) / count) for part in range(count + 1)]
    members = [list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    between = [(timesteps[end - 1] + timesteps[end]) / 2 for end in ends[1:-1]]
    # Six digits, as a schedule is written with.
    edges = [NOISIEST, *(round(one, 6) for one in between), 0.0]
    return [(one, (edges[n], edges[n + 1])) for n, one in enumerate(members)]


def _more(move: Choice, chosen: Mapping[Cell, Choice]) -> int:
    before = chosen.get(move.cell)
    return move.saved - (before.saved if before else 0)


def _worth(move: Choice, chosen: Mapping[Cell, Choice]) -> tuple[float, float]:
    before = chosen.get(move.cell)
    added = move.error - (before.error if before else 0.0)
    more = _more(move, chosen)
    return (float("inf") if added <= 0 else more / added, more)


def _runs(ratios: Sequence[int | None]) -> Iterator[tuple[int, int, int]]:
    """(first, last, ratio) of equal ratios that follow each other."""
    first = 0
    for place, ratio in enumerate(ratios):
        if place + 1 == len(ratios) or ratios[place + 1] != ratio:
            if ratio is not None:
                yield first, place, ratio
            first = place + 1
