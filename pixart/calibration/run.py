"""From a model and a budget to a plan: single probes, a greedy search, and pictures that verify it.

1. Probes. Each block is merged alone, at one evaluation in the middle of each band of timesteps, by each ratio:
   the relative squared error of the guided prediction. Single errors add up in squares to within a fifth.
2. Gains. What an error of predictions in a band does to the finished latents is measured once a band, with all
   that can be merged by the smallest ratio.
3. Search: greedy by saved FLOPs per squared error, see pixart.calibration.search.
4. Verification, on scenes that no probe saw, over all steps: the longest part of the greedy order whose error
   keeps the budget, by bisection. The error is the upper end of a one-sided interval of 95 % of the root of the
   mean squared relative error of the latents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from torch import Tensor

from pixart.calibration.journal import Journal
from pixart.calibration.search import Choice, Prefix, bands_of, prefixes
from pixart.calibration.studio import Call, Scene, Settings, Studio
from pixart.cost import block_flops
from pixart.plans.schedule import RATIOS, KVSchedule, Rule, check_ratio, own_ratios
from pixart.progress import Bar

if TYPE_CHECKING:
    pass

BANDS = 5  # of timesteps
_Z = 1.645  # of a normal distribution, one-sided 95 %
_FINE = 0.002  # of a picture's FLOPs: bisection ends where less is to be gained


@dataclass(frozen=True)
class Found:
    """A schedule that keeps the budget, None if none does. error: as verified."""

    schedule: KVSchedule | None
    error: float


class Calibration:
    """Of a model at one size. settings: how it is drawn, but for the schedule."""

    def __init__(
        self, studio: Studio, settings: Settings, journal: Journal, *, bands: int = BANDS,
        ratios: Sequence[int] = RATIOS[1:], quiet: bool = False,
    ) -> None:  # fmt: skip
        self._studio, self._settings, self._journal = studio, settings, journal
        self._ratios, self._quiet = sorted(ratios), quiet
        self._config = studio.pipe.opened.config
        self._references: dict[Scene, Tensor] = {}
        times = [float(one.timestep) for one in studio.walk(settings).evaluations]
        bands_found = bands_of(times, bands)
        self._members = [members for members, _ in bands_found]
        self._bands = [edges for _, edges in bands_found]

    def find(self, budget: float, probed: Sequence[Scene], verified: Sequence[Scene]) -> Found:
        """The schedule that saves most within a budget of relative error of the latents."""
        order = prefixes(self._choices(probed))
        return self._verify(order, budget, verified)

    def _choices(self, scenes: Sequence[Scene]) -> list[Choice]:
        cells = self._cells()
        errors = self._probe(scenes, cells)
        gains = self._gains(scenes, errors)
        saved = [self._saved(scenes[0], band, cells) for band in range(len(self._bands))]
        return [
            Choice(block, band, ratio, gains[band] * error, saved[band][block, ratio])
            for (block, band, ratio), error in errors.items()
            if saved[band][block, ratio] > 0
        ]

    def _cells(self) -> list[tuple[int, int]]:
        """(block, ratio): all that can be merged further than it is."""
        own = own_ratios(self._config)
        return [
            (block, ratio)
            for block in range(self._config.depth)
            for ratio in self._ratios
            if ratio > own[block] and _can(self._config.kv_compression, block, ratio)
        ]

    def _probe(
        self, scenes: Sequence[Scene], cells: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int, int], float]:
        """By (block, band, ratio): the mean over scenes."""
        bands = range(len(self._bands))
        names = [(block, band, ratio) for band in bands for block, ratio in cells]
        sums = dict.fromkeys(names, 0.0)
        with Bar("probe", len(scenes) * len(names), quiet=self._quiet) as bar:
            for number, scene in enumerate(scenes):
                # Drawn when the first of them is not known.
                calls = cache(partial(self._studio.calls, scene, self._settings))
                for block, band, ratio in names:
                    measure = partial(self._probed, calls, block, band, ratio)
                    name = f"probe/{number}/{block}/{band}/{ratio}"
                    sums[block, band, ratio] += self._journal.measured(name, measure)[0]
                    bar.advance()
        return {name: total / len(scenes) for name, total in sums.items()}

    def _probed(
        self, calls: Callable[[], list[Call]], block: int, band: int, ratio: int
    ) -> list[float]:
        members = self._members[band]
        call = calls()[members[len(members) // 2]]
        return [self._changed(call, KVSchedule((Rule((block,), ratio),)))]

    def _changed(self, call: Call, schedule: KVSchedule) -> float:
        """Squared relative error of the guided prediction."""
        channels = self._config.in_channels
        before, after = (
            call.output[:, :channels].float(),
            call.again(schedule)[:, :channels].float(),
        )
        if call.captions == "both":
            before, after = (self._guided(one) for one in (before, after))
        return relative_square(after, before)

    def _guided(self, both: Tensor) -> Tensor:
        unconditional, conditional = both.chunk(2)
        return unconditional + self._settings.guidance * (conditional - unconditional)

    def _gains(
        self, scenes: Sequence[Scene], errors: dict[tuple[int, int, int], float]
    ) -> list[float]:
        """For each band: squared error of the latents for each squared error of predictions in it."""
        least: dict[int, int] = {}
        for block, ratio in sorted(self._cells(), reverse=True):
            least[block] = ratio
        gains = []
        with Bar("gains", len(self._bands) * len(scenes), quiet=self._quiet) as bar:
            for band, (high, low) in enumerate(self._bands):
                rules = [Rule((block,), ratio, (high, low)) for block, ratio in least.items()]
                predicted = sum(errors[block, band, ratio] for block, ratio in least.items())
                total = 0.0
                for number, scene in enumerate(scenes):
                    total += self._error(f"gain/{band}/{number}", scene, KVSchedule(tuple(rules)))
                    bar.advance()
                gains.append(total / len(scenes) / predicted if predicted > 0 else 0.0)
        return gains

    def _error(self, name: str, scene: Scene, schedule: KVSchedule) -> float:
        """Squared relative error of a scene's latents."""

        def measure() -> list[float]:
            return [relative_square(self._drawn(scene, schedule), self._reference(scene))]

        return self._journal.measured(name, measure)[0]

    def _reference(self, scene: Scene) -> Tensor:
        if scene not in self._references:
            self._references[scene] = self._drawn(scene, None)
        return self._references[scene]

    def _drawn(self, scene: Scene, schedule: KVSchedule | None) -> Tensor:
        return self._studio.latents(scene, self._settings.with_schedule(schedule)).cpu()

    def _saved(
        self, scene: Scene, band: int, cells: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], int]:
        """FLOPs of a picture by (block, ratio), in the evaluations of a band."""
        studio = self._studio
        grid = (studio.height // studio.pipe.multiple, studio.width // studio.pipe.multiple)
        (start, end), steps = self._settings.interval, studio.walk(self._settings).evaluations
        is_guided = self._settings.guidance > 1
        halves = {
            n: 2 if is_guided and start <= steps[n].share < end else 1 for n in self._members[band]
        }
        reuse = self._settings.reuse

        def times(block: int) -> int:
            """How often it is computed."""
            left_out = () if reuse is None or block < reuse.first else reuse.steps
            return sum(count for n, count in halves.items() if n + 1 not in left_out)

        def flops(block: int, ratio: int | None) -> int:
            return sum(block_flops(self._config, block, grid, 0, ratio).values())

        return {
            (block, ratio): times(block) * (flops(block, None) - flops(block, ratio))
            for block, ratio in cells
        }

    def _verify(self, order: list[Prefix], budget: float, scenes: Sequence[Scene]) -> Found:
        whole = self._studio.cost(self._settings, scenes[0])
        good, bad, best = 0, len(order), 0.0  # of none the error is 0
        place = max(n for n, one in enumerate(order) if one.error <= budget)
        with Bar("verify", None, quiet=self._quiet) as bar:
            while bad - good > 1:
                place = min(max(place, good + 1), bad - 1)
                error = self._bound(order[place], scenes)
                bar.advance(note=f"{order[place].saved / whole:.1%} saved, error {error:.4f}")
                if error <= budget:
                    good, best = place, error
                else:
                    bad = place
                left = order[bad - 1].saved - order[good].saved
                if left < _FINE * whole:
                    break
                place = (good + bad) // 2
        return Found(order[good].schedule(self._bands), best)

    def _bound(self, prefix: Prefix, scenes: Sequence[Scene]) -> float:
        schedule = prefix.schedule(self._bands)
        assert schedule is not None
        squares = [
            self._error(f"verify/{schedule}/{number}", scene, schedule)
            for number, scene in enumerate(scenes)
        ]
        return upper_error(squares)


def upper_error(squares: Sequence[float]) -> float:
    """The upper end of a one-sided interval of 95 % of the root of a mean, from squared errors of scenes."""
    n, mean = len(squares), sum(squares) / len(squares)
    spread = math.sqrt(sum((one - mean) ** 2 for one in squares) / (n - 1)) if n > 1 else mean
    return math.sqrt(mean + _Z * spread / math.sqrt(n))


def relative_square(changed: Tensor, before: Tensor) -> float:
    """|changed - before|² / |before|²."""
    changed, before = changed.double(), before.double()
    return float((changed - before).square().sum() / before.square().sum())


def _can(compression: object, block: int, ratio: int) -> bool:
    try:
        check_ratio(compression, block, ratio)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True
