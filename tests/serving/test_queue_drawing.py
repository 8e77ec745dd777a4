"""What becomes of orders: drawn, failed, cancelled; and what the next one sees of it."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
from serving import StubPainter, eventually, order

from pixart.pipeline.request import Request
from pixart.sampler.loop import Cancelled
from pixart.serving.drawing.queue import Queue
from pixart.serving.limits import Limits
from pixart.serving.orders import Job, Order
from pixart.serving.refusal import Refusal


@pytest.fixture
def painter() -> StubPainter:
    return StubPainter()


@pytest.fixture
def queue(painter: StubPainter) -> Iterator[Queue]:
    queue = Queue(painter, Limits(queue=9, queue_of_client=4))
    yield queue
    painter.release()
    queue.close()


def ended(queue: Queue, job: Job) -> Job:
    eventually(lambda: queue.get(job.id, job.owner).has_ended)
    return queue.get(job.id, job.owner)


def test_every_picture_of_an_order_is_drawn_once_in_its_order(
    queue: Queue, painter: StubPainter
) -> None:
    job = ended(queue, queue.submit(order("a cat", "a dog", count=2), "me"))
    assert job.state == "done" and job.progress == 1
    assert [(one.request.prompt, one.request.seed) for one in job.results] == [
        ("a cat", 0), ("a cat", 1), ("a dog", 0), ("a dog", 1),
    ]  # fmt: skip
    assert painter.drawn == [(one.request.prompt, one.request.seed) for one in job.results]


def test_a_fault_fails_its_own_order_alone_with_one_line(
    queue: Queue, painter: StubPainter
) -> None:
    painter.faults = {"bad": ValueError("picture must\nbe finite"), "huge": MemoryError()}
    jobs = [queue.submit(order(text), "me") for text in ("bad", "huge", "good")]
    bad, huge, good = (ended(queue, job) for job in jobs)
    assert (bad.state, bad.error) == ("failed", "picture must be finite")
    assert huge.error == "out of memory; ask for a smaller picture, or try again later"
    assert good.state == "done"


def test_an_unexpected_fault_tells_the_client_nothing_of_the_machine(
    queue: Queue, painter: StubPainter
) -> None:
    painter.faults = {"bad": RuntimeError("/home/me/secret"), "worse": SystemExit(3)}
    bad, worse = (ended(queue, queue.submit(order(text), "me")) for text in ("bad", "worse"))
    assert bad.error == "the service could not draw it (RuntimeError); its log tells why"
    assert worse.state == "failed"
    assert ended(queue, queue.submit(order("good"), "me")).state == "done"


def test_prompts_of_all_who_wait_are_prepared_with_those_of_the_next_first(
    queue: Queue, painter: StubPainter
) -> None:
    painter.hold()
    queue.submit(order("first"), "a")
    eventually(lambda: len(painter.drawn) == 1)
    queue.submit(order("second"), "a")
    last = queue.submit(order("third"), "b")
    painter.release()
    ended(queue, last)
    assert painter.prepared[1] in (["second", "third"], ["third", "second"])


def test_prompts_that_cannot_be_prepared_fail_their_own_order_alone(
    queue: Queue, painter: StubPainter
) -> None:
    painter.hold()
    queue.submit(order("held"), "c")
    eventually(lambda: len(painter.drawn) == 1)
    painter.unprepared = {"unspeakable"}
    good = queue.submit(order("good"), "a")
    bad = queue.submit(order("unspeakable"), "b")
    painter.release()
    assert ended(queue, good).state == "done"
    assert ended(queue, bad).state == "failed"


def test_cancel_ends_what_is_drawn_within_a_step(queue: Queue, painter: StubPainter) -> None:
    painter.hold()
    job = queue.submit(order("a cat", count=2), "me")
    painter.let_step(1)
    eventually(lambda: queue.get(job.id, "me").step == 1)
    after = queue.cancel(job.id, "me")
    assert after.state == "cancelled"
    eventually(lambda: not queue.figures().is_drawing)
    assert queue.get(job.id, "me") == after
    assert len(painter.drawn) == 1


class EndlessPrompts(StubPainter):
    """Encodes until it is cancelled."""

    def prepare(self, orders: tuple[Order, ...], cancel: Callable[[], bool]) -> None:
        eventually(cancel)
        raise Cancelled("cancelled while prompts were encoded")


def test_cancel_ends_an_order_whose_prompts_are_encoded() -> None:
    painter = EndlessPrompts()
    queue = Queue(painter)
    job = queue.submit(order("a cat"), "me")
    eventually(lambda: queue.get(job.id, "me").stage == "text")
    assert queue.cancel(job.id, "me").state == "cancelled"
    eventually(lambda: not queue.figures().is_drawing)
    assert not painter.drawn and queue.get(job.id, "me").error is None
    queue.close()


def test_cancel_takes_what_waits_out_of_the_queue(queue: Queue, painter: StubPainter) -> None:
    painter.hold()
    first, second, third = (queue.submit(order(text), "me") for text in ("1", "2", "3"))
    eventually(lambda: len(painter.drawn) == 1)
    assert queue.get(third.id, "me").position == 1
    queue.cancel(second.id, "me")
    assert queue.get(third.id, "me").position == 0
    painter.release()
    ended(queue, third)
    assert [prompt for prompt, _ in painter.drawn] == ["1", "3"]


def test_what_has_ended_stays_as_it_is_when_it_is_cancelled(queue: Queue) -> None:
    job = ended(queue, queue.submit(order("a cat"), "me"))
    assert queue.cancel(job.id, "me") == job


def test_pictures_finished_before_a_cancel_are_kept(queue: Queue, painter: StubPainter) -> None:
    painter.hold()
    job = queue.submit(order("a cat", count=2), "me")
    painter.let_step(5)
    eventually(lambda: queue.get(job.id, "me").step == 1 and len(painter.drawn) == 2)
    assert len(queue.cancel(job.id, "me").results) == 1


def test_a_deleted_job_is_gone(queue: Queue, painter: StubPainter) -> None:
    painter.hold()
    jobs = [queue.submit(order("a cat"), "me") for _ in range(2)]
    for job in jobs:
        queue.delete(job.id, "me")
        with pytest.raises(Refusal, match="is not there"):
            queue.get(job.id, "me")
    assert queue.list("me") == []
    assert queue.figures().kept_bytes == 0


@pytest.mark.parametrize("call", ["get", "cancel", "delete"])
def test_a_job_of_another_client_is_refused_as_one_that_is_not_there(
    queue: Queue, call: str
) -> None:
    job = queue.submit(order("a cat"), "me")
    with pytest.raises(Refusal) as others:
        getattr(queue, call)(job.id, "you")
    with pytest.raises(Refusal) as none:
        getattr(queue, call)("0" * len(job.id), "me")
    assert others.value.status == none.value.status == 404
    assert str(others.value).replace(job.id, "") == str(none.value).replace("0" * len(job.id), "")
    with pytest.raises(Refusal):
        asyncio.run(queue.wait(job.id, "you", 1, 0))
    assert queue.list("you") == []


def test_a_client_may_have_so_many_orders_waiting_and_others_more(
    queue: Queue, painter: StubPainter
) -> None:
    painter.hold()
    queue.submit(order("drawn"), "me")
    eventually(lambda: len(painter.drawn) == 1)
    for _ in range(4):
        queue.submit(order("waits"), "me")
    with pytest.raises(Refusal, match="4 of your orders wait, 4 may") as full:
        queue.submit(order("too many"), "me")
    assert full.value.status == 429 and full.value.headers["Retry-After"]
    queue.submit(order("waits"), "you")
    assert queue.figures().refused == 1 and queue.figures().waiting == 5


def test_however_many_fill_the_queue_a_newcomer_has_a_place(
    queue: Queue, painter: StubPainter
) -> None:
    painter.hold()
    queue.submit(order("drawn"), "me")
    eventually(lambda: len(painter.drawn) == 1)
    taken = []
    for owner in ("me", "you", "her"):
        with pytest.raises(Refusal, match="of your orders wait"):
            while True:
                queue.submit(order("waits"), owner)
                taken.append(owner)
    assert [taken.count(owner) for owner in ("me", "you", "her")] == [4, 3, 1]
    queue.submit(order("waits"), "him")
    with pytest.raises(Refusal, match="9 orders wait, no more may"):
        queue.submit(order("too many"), "nobody")


def test_an_order_that_cannot_be_drawn_is_refused_at_once(queue: Queue) -> None:
    with pytest.raises(ValueError, match="size must be .* got 17"):
        queue.submit(Order((Request("a cat", size="17"),)), "me")
    with pytest.raises(ValueError, match="one picture at least"):
        queue.submit(order(), "me")


def test_closing_cancels_everything_and_refuses_what_comes(painter: StubPainter) -> None:
    queue = Queue(painter)
    painter.hold()
    jobs = [queue.submit(order("a cat"), "me") for _ in range(3)]
    eventually(lambda: len(painter.drawn) == 1)
    queue.close()
    assert painter.is_closed
    assert [queue.get(job.id, "me").state for job in jobs] == ["cancelled"] * 3
    with pytest.raises(Refusal) as refused:
        queue.submit(order("a cat"), "me")
    assert refused.value.status == 503
    assert not queue.figures().is_alive
    queue.close()
