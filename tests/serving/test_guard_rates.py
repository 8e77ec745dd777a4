"""Counting requests by the minute, in bounded memory."""

import contextlib

from pixart.serving.guarding import rates
from pixart.serving.guarding.rates import Crowd, Rates


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_as_many_as_a_minute_has_at_once_and_then_one_by_one() -> None:
    clock = Clock()
    counted = Rates(6, clock)
    assert [counted.take("ann") for _ in range(7)] == [0.0] * 6 + [10.0]
    clock.now += 4
    assert counted.take("ann") == 6.0
    clock.now += 6
    assert counted.take("ann") == 0.0 and counted.take("ann") == 10.0
    clock.now += 3600  # no more than a minute's are saved up
    assert [counted.take("ann") for _ in range(7)] == [0.0] * 6 + [10.0]


def test_one_does_not_use_up_anothers() -> None:
    counted = Rates(1, Clock())
    assert counted.take("ann") == 0.0 and counted.take("bob") == 0.0 and counted.take("ann") == 60.0


def test_those_that_ask_no_more_are_forgotten_first() -> None:
    clock = Clock()
    counted = Rates(1, clock)
    for number in range(rates.MOST_KNOWN + 10):
        counted.take(str(number))
        clock.now += 60
        counted.take("steady")
    assert len(counted._left) == rates.MOST_KNOWN and counted.knows("steady")
    assert not counted.knows("1") and counted.knows(str(rates.MOST_KNOWN + 9))


def test_a_crowd_has_room_again_when_one_leaves() -> None:
    crowd = Crowd(2, 9)
    with (
        crowd.entered("ann") as first,
        crowd.entered("ann") as second,
        crowd.entered("ann") as third,
        crowd.entered("bob") as other,
    ):
        assert (first, second, third, other) == (True, True, False, True)
    with crowd.entered("ann") as again:
        assert again
    assert not crowd._inside


def test_however_large_a_crowd_a_newcomer_has_room() -> None:
    crowd = Crowd(4, 9)
    with contextlib.ExitStack() as inside:
        counts: dict[str, int] = {}
        for who in ("ann", "bob", "cy"):
            counts[who] = 0
            while inside.enter_context(crowd.entered(who)):
                counts[who] += 1
        assert counts == {"ann": 4, "bob": 3, "cy": 1}
        assert inside.enter_context(crowd.entered("dee"))
    assert not crowd._inside
