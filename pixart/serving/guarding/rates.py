"""How often, and how much at once, one asks."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MOST_KNOWN = 4096  # of whom more than their number is kept


class Rates:
    """per_minute: what one may ask in the long run, and at most at once. Those that have asked nothing for
    the longest time are forgotten beyond MOST_KNOWN, so that memory is bounded whoever asks."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = per_minute, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # as of when

    def knows(self, who: str) -> bool:
        return who in self._left

    def wait(self, who: str) -> float:
        """Seconds until one more is allowed, 0 for now. Nothing is counted."""
        return max(0.0, (1.0 - self._now_left(who)) * 60.0 / self._most)

    def take(self, who: str) -> float:
        """Count one. Seconds until it would have been allowed, 0 where it is."""
        wait = self.wait(who)
        if wait == 0.0:
            self._left[who] = (self._now_left(who) - 1.0, self._clock())
            self._left.move_to_end(who)
            while len(self._left) > MOST_KNOWN:
                self._left.popitem(last=False)
        return wait

    def _now_left(self, who: str) -> float:
        left, when = self._left.get(who, (float(self._most), 0.0))
        return min(self._most, left + (self._clock() - when) * self._most / 60.0)


class Crowd:
    """Requests that are answered at the same time, by who asks. most: of one. all: of all together, of which
    nobody takes more than is left for others."""

    def __init__(self, most: int, all: int) -> None:
        self._most, self._all = most, all
        self._inside: Counter[str] = Counter()

    @contextmanager
    def entered(self, who: str) -> Iterator[bool]:
        """Whether there is room for one more; it is taken until the end of the block."""
        own, free = self._inside[who], self._all - self._inside.total()
        if own >= self._most or (own and own >= free):
            yield False
            return
        self._inside[who] += 1
        try:
            yield True
        finally:
            self._inside[who] -= 1
            if not self._inside[who]:
                del self._inside[who]
