"""A Ray of this file's own, and small work in its workers."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import own_ray
import pytest

import pixart
from pixart.cluster import Cluster, LostItem, run_on_ray

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    os.environ |= {"RAY_worker_niceness": "0"}
    own_ray.start(logging_level="CRITICAL")
    yield ray
    ray.shutdown()


def _workers() -> list[int]:
    """Processes of this Ray that hold a worker; it is the grandparent of those."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title, (state, parent) = (entry / "cmdline").read_bytes(), _state(entry)
                is_ours = _state(entry.parent / str(parent))[1] == os.getpid()
            except OSError:  # it ended
                continue
            if title.startswith(b"ray::Worker") and is_ours and state != "Z":
                found.append(int(entry.name))
    return found


def _state(process: Path) -> tuple[str, int]:
    """Its state, and the process that started it."""
    state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
    return state, int(parent)


def _opener(work: Callable[[Any], Any]) -> Callable[[], Callable[[Any], Any]]:
    return lambda: work


def test_items_are_taken_as_workers_become_free_and_what_workers_say_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def work(item: int) -> tuple[int, int]:
        import logging
        import os
        import warnings

        logging.getLogger("pixart").info("said by each")
        warnings.warn("an unknown word", stacklevel=1)
        return item, os.getpid()

    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(1, 13):
            taken = item
            yield item

    done = []
    caplog.set_level("INFO", "pixart")
    with closing(run_on_ray(items(), _opener(work), Cluster(workers=2))) as results:
        for result in results:
            done.append(result)
            assert taken <= len(done) + 2
    assert sorted(item for item, _ in done) == [*range(1, 13)]
    said = [record.getMessage() for record in caplog.records]
    assert said.count("said by each") == said.count("warning: an unknown word") == 1


def test_what_a_worker_raises_is_raised_here_and_no_worker_is_left() -> None:
    def work(item: int) -> int:
        if item == 1:
            raise FileNotFoundError("list.jsonl, line 3: no such picture")
        return item

    with pytest.raises(FileNotFoundError, match="^list.jsonl, line 3: no such picture$"):
        [*run_on_ray(range(1000), _opener(work), Cluster(workers=1))]
    ends = time.monotonic() + 60
    while _workers() and time.monotonic() < ends:
        time.sleep(0.2)
    assert not _workers()


def test_an_item_that_kills_its_workers_ends_the_run_with_its_name(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(item: int) -> int:
        import os

        if item == 1:
            os.kill(os.getpid(), 9)
        return item

    monkeypatch.setattr("pixart.cluster.crew.ATTEMPTS", 2)
    names: Callable[[int], str] = "tar {}".format
    with pytest.raises(LostItem, match=r"^tar 1: 2 workers were lost over it, .* was killed"):
        [*run_on_ray(range(2), _opener(work), Cluster(workers=1), named=names)]
    assert "tar 1 is done again (2 of 2 attempts)" in caplog.text


def test_a_machine_with_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixart, "__version__", "999")
    with pytest.raises(ValueError, match=r"pixart must be 999 on all machines, as here, got \d"):
        [*run_on_ray([1], _opener(abs), Cluster(workers=1))]


def test_more_gpus_than_there_are_is_said_instead_of_waited_for() -> None:
    with pytest.raises(ValueError, match="at most 0 in a cluster with 2 CPUs and 0 GPUs"):
        next(run_on_ray([1], _opener(abs), Cluster(gpus=1)))


def test_ctrl_c_in_the_middle_leaves_no_worker() -> None:
    def work(item: int) -> int:
        import time

        time.sleep(600 if item else 0)
        return item

    results = run_on_ray(range(3), _opener(work), Cluster(workers=1))
    assert next(results) == 0
    assert _workers(), "or the end of this test says nothing"
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    ends = time.monotonic() + 60
    while _workers() and time.monotonic() < ends:
        time.sleep(0.2)
    assert not _workers()
