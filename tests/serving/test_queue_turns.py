"""Whose turn it is: clients one after the other, a picture each, and positions that come true."""

import random

import pytest
from serving import StubPainter, eventually, order

from pixart.serving.drawing.queue import Queue
from pixart.serving.drawing.turns import Turns


def drained(turns: Turns) -> list[str]:
    """The order of a picture each, until none is left."""
    found = []
    while (id := turns.take()) is not None:
        found.append(id)
        turns.give_back()
    return found


def test_a_client_with_many_orders_does_not_hold_up_one_with_one() -> None:
    turns = Turns()
    for number in range(30):
        turns.add(f"many {number}", "a", 1)
    turns.add("one", "b", 1)
    assert drained(turns)[:3] == ["many 0", "one", "many 1"]


def test_an_order_of_many_pictures_does_not_hold_up_one_of_one() -> None:
    turns = Turns()
    turns.add("many", "a", 16)
    turns.add("one", "b", 1)
    assert drained(turns)[:3] == ["many", "one", "many"]


def test_a_clients_own_orders_come_one_after_the_other() -> None:
    turns = Turns()
    turns.add("first", "a", 2)
    turns.add("second", "a", 1)
    assert drained(turns) == ["first", "first", "second"]


def test_who_comes_while_a_picture_is_drawn_goes_before_its_client() -> None:
    turns = Turns()
    turns.add("first", "a", 2)
    turns.take()
    turns.add("later", "b", 1)
    assert turns.positions() == {"first": 0, "later": 0}
    turns.give_back()
    assert drained(turns) == ["later", "first"]


def test_the_last_order_of_a_client_may_end_while_it_is_drawn() -> None:
    turns = Turns()
    turns.add("first", "a", 2)
    turns.add("other", "b", 1)
    turns.take()
    turns.remove("first")
    assert turns.positions() == {"other": 0}
    turns.give_back()
    assert drained(turns) == ["other"]


@pytest.mark.parametrize("seed", range(20))
def test_a_position_is_the_number_of_orders_that_are_drawn_from_before(seed: int) -> None:
    chance, turns = random.Random(seed), Turns()
    ids = [f"order {number}" for number in range(12)]
    for id in ids:
        turns.add(id, f"client {chance.randrange(4)}", chance.randrange(1, 4))
    if chance.random() < 0.5:
        turns.take()
        turns.remove(chance.choice(ids))
    told, drawn = turns.positions(), turns._drawn
    if turns._is_taken:
        turns.give_back()
    begun: list[str] = []
    for id in drained(turns):
        if id not in begun:
            begun.append(id)
    assert told == {id: place for place, id in enumerate(begun)} | ({drawn: 0} if drawn else {})


def test_pictures_of_clients_alternate_in_the_queue() -> None:
    painter = StubPainter()
    queue = Queue(painter)
    painter.hold()
    queue.submit(order("held"), "z")
    eventually(lambda: len(painter.drawn) == 1)
    many = queue.submit(order("many", count=3), "a")
    last = queue.submit(order("last"), "a")
    one = queue.submit(order("one"), "b")
    assert [queue.get(job.id, job.owner).position for job in (many, last, one)] == [0, 2, 1]
    painter.release()
    eventually(lambda: queue.get(last.id, "a").has_ended)
    assert [prompt for prompt, _ in painter.drawn] == [
        "held", "many", "one", "many", "many", "last",
    ]  # fmt: skip
    queue.close()


def test_between_two_pictures_an_order_waits_with_its_position() -> None:
    painter = StubPainter()
    queue = Queue(painter)
    painter.hold()
    two = queue.submit(order("two", count=2), "a")
    eventually(lambda: len(painter.drawn) == 1)
    queue.submit(order("one"), "b")
    queue.submit(order("one"), "c")
    painter.let_step(4)
    eventually(lambda: len(painter.drawn) == 2)
    job = queue.get(two.id, "a")
    assert (job.state, job.stage, job.position, len(job.results)) == ("drawing", "waiting", 1, 1)
    queue.close()
