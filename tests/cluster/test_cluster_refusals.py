"""What is refused before anything starts, and the parts of a run that need no Ray."""

import socket
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixart.cluster import Cluster, run_on_ray
from pixart.cluster.crew import _Queue
from pixart.cluster.room import Room, room_for
from pixart.cluster.worker import _answered
from pixart.command import exit_code
from pixart.generate import main
from pixart.generation.shards.on_ray import _as_many_as


def _ray(*machines: dict[str, float]) -> Any:
    return SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": one} for one in machines])


@pytest.mark.parametrize(
    ("machines", "cluster", "room"),
    [
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}], Cluster("auto"), Room(3, 1, 1)),
        ([{"CPU": 8, "GPU": 2}], Cluster("auto", gpus=0), Room(1, 8, 0)),
        ([{"CPU": 4}, {"CPU": 8}], Cluster("auto"), Room(3, 4, 0)),
        ([{"CPU": 3}, {"CPU": 3}], Cluster("auto", 3), Room(3, 1, 0)),
        ([{"CPU": 0}, {"CPU": 1}, {"CPU": 1}], Cluster("auto"), Room(2, 1, 0)),
    ],
)
def test_workers_share_what_a_cluster_has(
    machines: list[dict[str, float]], cluster: Cluster, room: Room
) -> None:
    assert room_for(_ray(*machines), cluster) == room


@pytest.mark.parametrize(
    ("machines", "cluster", "message"),
    [
        (
            [{"CPU": 8, "GPU": 2}],
            Cluster("auto", 3),
            "at most 2 in a cluster with 8 CPUs and 2 GPUs",
        ),
        ([{"CPU": 8}], Cluster("auto", gpus=1), "at most 0 .* and 0 GPUs on 1 machines"),
        ([{"CPU": 2}], Cluster("auto", 3), "at most 2 .*got 3"),
        ([{"CPU": 2}, {"CPU": 2}], Cluster("auto", 1, cpus=3), "at most 0"),
    ],
)
def test_more_than_a_cluster_has_is_refused(
    machines: list[dict[str, float]], cluster: Cluster, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        room_for(_ray(*machines), cluster)


def test_a_queue_takes_items_as_they_are_asked_for_and_what_came_back_first() -> None:
    taken: list[int] = []
    queue = _Queue((taken.append(k) or k for k in range(4)), window=2)  # type: ignore[func-returns-value]
    first, second = queue.next(), queue.next()
    assert taken == [0, 1] and first is not None and second is not None
    queue.finish(second)
    assert queue.next() is None, "the oldest is two back"
    queue.give_back(first)
    assert queue.next() is first
    queue.finish(first)
    assert [queue.next().item, queue.next().item] == [2, 3]  # type: ignore[union-attr]
    assert not queue.is_done and queue.next() is None


class _OwnError(ValueError):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("line 3"), 2),
        (OSError(28, "No space left"), 1),
        (_OwnError("a", "b"), 2),
        (KeyError("k"), None),
    ],
)
def test_an_error_of_a_worker_means_here_what_it_meant_there(
    error: Exception, code: int | None
) -> None:
    def work() -> None:
        raise error

    answer = _answered(work)
    assert answer.error is not None and exit_code(answer.error) == code
    assert str(error) in answer.trace


@pytest.mark.parametrize(
    "address", ["here", "host", "host:", "host:x", ":1", "ray://", "a b:1", "u@h:1", "h:70000"]
)
def test_addresses_that_cannot_be(address: str) -> None:
    with pytest.raises(ValueError, match="must be auto, HOST:PORT or ray://HOST:PORT"):
        Cluster(address)


def test_a_cluster_that_does_not_answer_is_said_in_one_line() -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ValueError, match=f"127.0.0.1:{port} does not answer .*refused.*ray start"):
        next(run_on_ray([1], lambda: lambda item: item, Cluster(f"127.0.0.1:{port}")))


def test_a_ray_that_is_nowhere_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    services = pytest.importorskip("ray._private.services")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", cache(set))
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    with pytest.raises(ValueError, match=r"no Ray runs on this machine.*give --address HOST:PORT"):
        next(run_on_ray([1], lambda: lambda item: item, Cluster("auto")))


def test_no_worker_is_asked_for_that_has_no_tar() -> None:
    assert [_as_many_as(Cluster(workers=given), tars).workers
            for given, tars in [(40, 2), (2, 40), (3, 0), (None, 2)]] == [2, 2, 1, None]  # fmt: skip


def test_where_nothing_is_to_be_done_no_cluster_is_joined() -> None:
    assert [*run_on_ray([], lambda: lambda item: item, Cluster("127.0.0.1:1"))] == []


def _refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and said.startswith("pixart.generate: ")
    return said


def test_without_ray_the_way_to_it_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    output = tmp_path / "tars" / "{shard:05d}.tar"
    said = _refused(capsys, "a red circle", "--output", str(output), "--engine", "ray", "--quiet")
    assert 'pip install "pixart-fast[ray]"' in said
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "ray", "--output", "{shard}.tar", "--workers", "0"], "workers must be at least 1"),
        (["--engine", "ray", "--output", "{shard}.tar", "--address", "x"], "auto, HOST:PORT or ray://"),
        (["--engine", "ray", "--output", "{shard}.tar", "--device", "cuda:1"], "cpu or cuda with --engine"),
        (["--engine", "ray", "--output", "{shard}.tar", "--processes", "2"], "with --engine ray, got 2; give --w"),
        (["--engine", "ray", "--output", "a.png"], "--engine ray must be given with tars"),
        (["--engine", "ray"], "--engine ray must be given with tars"),
        (["--address", "auto", "--output", "{shard}.tar"], "--address must be given with --engine ray"),
        (["--workers", "2"], "--workers must be given with --engine ray"),
    ],
)  # fmt: skip
def test_options_that_would_do_nothing_or_cannot_be(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in _refused(capsys, "a red circle", *words)
    assert not [*tmp_path.iterdir()]
