"""Nothing is kept without bound: pictures for a time and up to so many bytes, then their names, then none."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from PIL import Image
from serving import StubPainter, eventually, order

from pixart.serving.drawing import results
from pixart.serving.drawing.queue import Queue
from pixart.serving.drawing.results import bytes_of
from pixart.serving.limits import Limits
from pixart.serving.orders import Job, Order
from pixart.serving.refusal import Refusal

LIMITS = Limits(keep_seconds=100, keep_bytes=100_000)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def painter() -> StubPainter:
    return StubPainter()


@pytest.fixture
def queue(painter: StubPainter, clock: Clock) -> Iterator[Queue]:
    queue = Queue(painter, LIMITS, clock=clock)
    yield queue
    painter.release()
    queue.close()


def ended(queue: Queue, one: Order) -> Job:
    job = queue.submit(one, "me")
    eventually(lambda: queue.get(job.id, "me").has_ended)
    return queue.get(job.id, "me")


def sent(side: int = 100) -> dict[str, Image.Image]:
    return {"image": Image.new("RGB", (side, side))}


def test_results_are_kept_for_a_time_then_the_job_then_nothing(queue: Queue, clock: Clock) -> None:
    job = ended(queue, order("a cat"))
    clock.now += 99
    assert queue.get(job.id, "me") == job
    clock.now += 1
    late = queue.get(job.id, "me")
    assert (late.state, late.is_kept, late.results, late.preview) == ("done", False, (), None)
    assert late.version > job.version
    assert queue.list("me") == [late] and queue.figures().kept_bytes == 0
    clock.now += 100
    assert queue.list("me") == []
    with pytest.raises(Refusal):
        queue.get(job.id, "me")


def test_the_oldest_goes_where_bytes_are_short(queue: Queue) -> None:
    count = LIMITS.keep_bytes // bytes_of(ended(queue, order("a cat")))
    jobs = [ended(queue, order("a cat")) for _ in range(count)]
    first, *others = queue.list("me")
    assert not first.is_kept
    assert all(job.is_kept for job in others) and len(others) == len(jobs)
    assert queue.figures().kept_bytes == sum(map(bytes_of, others)) <= LIMITS.keep_bytes


def test_the_last_one_is_kept_whatever_its_size(painter: StubPainter) -> None:
    queue = Queue(painter, Limits(keep_bytes=1))
    ended(queue, order("a cat"))
    ended(queue, order("a dog"))
    assert [job.is_kept for job in queue.list("me")] == [False, True]
    queue.close()


def test_however_many_end_so_many_are_kept_and_remembered(
    queue: Queue, painter: StubPainter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "MOST_KEPT", 3)
    monkeypatch.setattr(results, "MOST_REMEMBERED", 2)
    for _ in range(9):
        ended(queue, order("a cat"))
    assert [job.is_kept for job in queue.list("me")] == [False] * 2 + [True] * 3
    for _ in range(9):  # those that never were drawn too
        painter.hold()
        queue.cancel(queue.submit(order("a dog"), "me").id, "me")
    assert len(queue.list("me")) == 5


def test_pictures_that_came_with_an_order_go_when_it_ends(
    queue: Queue, painter: StubPainter
) -> None:
    painter.hold()
    job = queue.submit(order("a cat", pictures=sent()), "me")
    assert queue.get(job.id, "me").order.pictures
    painter.release()
    eventually(lambda: queue.get(job.id, "me").has_ended)
    assert not queue.get(job.id, "me").order.pictures


def test_pictures_of_orders_that_wait_take_so_many_bytes(
    queue: Queue, painter: StubPainter
) -> None:
    painter.hold()
    for owner in ("me", "them", "us"):
        queue.submit(order("a cat", pictures=sent()), owner)
    with pytest.raises(Refusal, match="the pictures of the orders that wait take 90,000") as full:
        queue.submit(order("a cat", pictures=sent()), "you")
    assert full.value.status == 429
    assert queue.submit(order("a cat"), "you").state == "waiting"


def test_pictures_of_one_client_leave_room_for_those_of_others(
    queue: Queue, painter: StubPainter
) -> None:
    painter.hold()
    queue.submit(order("a cat", pictures=sent()), "me")
    with pytest.raises(Refusal, match="the pictures of your orders that wait take 30,000"):
        queue.submit(order("a cat", pictures=sent()), "me")
    for owner, pictures in (("me", {}), ("you", sent())):
        assert queue.submit(order("a cat", pictures=pictures), owner).state == "waiting"


def test_one_order_is_taken_whatever_its_pictures_are(queue: Queue) -> None:
    assert ended(queue, order("a cat", pictures=sent(300))).state == "done"


def test_long_prompts_count_as_well(queue: Queue) -> None:
    short, long = ended(queue, order("a")), ended(queue, order("a" * 1500))
    assert bytes_of(long) - bytes_of(short) >= 1499


def test_who_has_most_loses_the_oldest_where_bytes_are_short(
    queue: Queue, painter: StubPainter
) -> None:
    mine = ended(queue, order("a cat"))
    for _ in range(2 * LIMITS.keep_bytes // bytes_of(mine)):
        job = queue.submit(order("a cat"), "you")
        eventually(lambda id=job.id: queue.get(id, "you").has_ended)  # type: ignore[misc]
    assert queue.get(mine.id, "me").is_kept
    assert queue.figures().kept_bytes <= LIMITS.keep_bytes


def test_orders_that_came_to_nothing_push_no_picture_out(
    queue: Queue, painter: StubPainter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "MOST_KEPT", 3)
    mine = ended(queue, order("a cat")), ended(queue, order("a cat"))
    painter.hold()
    for number in range(20):
        owner = f"nobody {number}"
        queue.cancel(queue.submit(order("a dog"), owner).id, owner)
    assert all(queue.get(job.id, "me").is_kept for job in mine)
    assert queue.figures().kept_jobs == 3
