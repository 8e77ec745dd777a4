"""Who waits for a job hears of every change, from any number of event loops, and leaves nothing behind."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from serving import SOON, StubPainter, eventually, order

from pixart.serving.drawing.queue import Queue
from pixart.serving.orders import Job


@pytest.fixture
def painter() -> StubPainter:
    return StubPainter()


@pytest.fixture
def queue(painter: StubPainter) -> Iterator[Queue]:
    queue = Queue(painter)
    painter.hold()
    yield queue
    painter.release()
    queue.close()


@pytest.fixture
def job(queue: Queue, painter: StubPainter) -> Job:
    """Drawn, and held before its first step."""
    job = queue.submit(order("a cat", preview_every=2), "me")
    eventually(lambda: queue.get(job.id, "me").stage == "denoise")
    return queue.get(job.id, "me")


async def followed(queue: Queue, job: Job) -> list[Job]:
    """All versions that one waiter sees."""
    found = [job]
    while not found[-1].has_ended:
        found.append(await queue.wait(job.id, job.owner, found[-1].version, SOON))
    return found


def test_a_change_wakes_whoever_waits(queue: Queue, painter: StubPainter, job: Job) -> None:
    async def changed() -> Job:
        waiting = asyncio.create_task(queue.wait(job.id, "me", job.version, SOON))
        await asyncio.sleep(0)
        painter.let_step()
        return await waiting

    after = asyncio.run(changed())
    assert after.step == 1 and after.version > job.version


def test_another_version_is_told_at_once(queue: Queue, job: Job) -> None:
    assert asyncio.run(queue.wait(job.id, "me", job.version - 1, SOON)) == job


def test_without_a_change_the_wait_ends_with_its_time(queue: Queue, job: Job) -> None:
    assert asyncio.run(queue.wait(job.id, "me", job.version, 0.01)) == job


def test_what_has_ended_is_not_waited_for(queue: Queue, job: Job) -> None:
    ended = queue.cancel(job.id, "me")
    assert asyncio.run(queue.wait(job.id, "me", ended.version, SOON)) == ended


def test_whoever_waits_for_a_job_that_is_deleted_is_told_that_it_has_ended(
    queue: Queue, job: Job
) -> None:
    async def deleted() -> Job:
        waiting = asyncio.create_task(queue.wait(job.id, "me", job.version, SOON))
        await asyncio.sleep(0)
        queue.delete(job.id, "me")
        return await waiting

    assert asyncio.run(deleted()).state == "cancelled"


def test_many_waiters_in_many_loops_all_see_the_end(
    queue: Queue, painter: StubPainter, job: Job
) -> None:
    ends: list[str] = []

    async def all_of_one_loop() -> None:
        seen = await asyncio.gather(*(followed(queue, job) for _ in range(20)))
        for versions in seen:
            numbers = [one.version for one in versions]
            assert numbers == sorted(set(numbers))
            ends.append(versions[-1].state)

    threads = [threading.Thread(target=lambda: asyncio.run(all_of_one_loop())) for _ in range(4)]
    before = threading.active_count()
    for thread in threads:
        thread.start()
    eventually(lambda: len(queue._entries[job.id].wakes) == 80)
    assert threading.active_count() == before + 4
    painter.release()
    for thread in threads:
        thread.join(SOON)
    assert ends == ["done"] * 80


def test_a_waiter_that_is_cancelled_leaves_nothing_behind(queue: Queue, job: Job) -> None:
    async def left() -> None:
        waiting = asyncio.create_task(queue.wait(job.id, "me", job.version, SOON))
        await asyncio.sleep(0)
        assert queue._entries[job.id].wakes
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(left())
    assert not queue._entries[job.id].wakes


def test_a_loop_that_ended_without_its_waiters_stops_nobody(
    queue: Queue, painter: StubPainter, job: Job
) -> None:
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(queue.wait(job.id, "me", job.version, SOON))
    loop.run_until_complete(asyncio.sleep(0.01))
    assert queue._entries[job.id].wakes
    loop.close()
    painter.release()
    eventually(lambda: queue.get(job.id, "me").state == "done")
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]


def test_progress_grows_with_every_step_and_picture(queue: Queue, painter: StubPainter) -> None:
    two = queue.submit(order("a cat", count=2, preview_every=2), "you")
    painter.release()
    seen = asyncio.run(followed(queue, two))
    shares = [job.progress for job in seen]
    assert shares == sorted(shares) and shares[-1] == 1
    last = seen[-1].preview
    assert last is not None and (last.picture, last.step) == (1, 4)
