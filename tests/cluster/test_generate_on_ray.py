"""Tars that are drawn on a cluster of two machines, of which one is lost, as are a worker and the driver."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pixart.generate import main

ROOT = Path(__file__).parent.parent.parent
STORE = 80 * 2**20
SIZE = 5  # pictures of a tar
OPTIONS = ["--shard-size", str(SIZE), "--steps", "1", "--size", "64", "--device", "cpu"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Any]]]:
    """A Ray with two machines of one CPU each: its address, and those."""
    pytest.importorskip("ray")
    # Its workers give way to all else otherwise, and may not start for minutes beside other tests.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "600")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from ray.cluster_utils import Cluster

    machines = Cluster()
    try:
        common = {"object_store_memory": STORE, "num_gpus": 0}
        machines.add_node(num_cpus=0, include_dashboard=False, **common)
        both = [machines.add_node(num_cpus=1, **common) for _ in range(2)]
        machines.wait_for_nodes()
        yield machines.address, both
    finally:
        machines.shutdown()


def _until(true: Callable[[], Any], driver: "subprocess.Popen[str]") -> Any:
    while not (found := true()):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.1)
    return found


def _at_work(machines: list[Any]) -> list[int]:
    """Workers of these machines that draw."""
    raylets = {machine.all_processes["raylet"][0].process.pid for machine in machines}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title, parent = (entry / "cmdline").read_bytes(), _parent(entry)
            except OSError:  # it ended
                continue
            if title.startswith(b"ray::Worker.do") and parent in raylets:
                found.append(int(entry.name))
    return found


def _parent(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(40, marks=pytest.mark.slow),
        pytest.param(200, marks=pytest.mark.exhaustive),
    ],
)
def test_every_picture_is_drawn_once_whatever_is_lost(
    count: int, cluster: tuple[str, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colours = ("red", "blue", "green", "yellow")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a {colours[k % 4]} circle on black" for k in range(count)))
    plain, rayed = tmp_path / "plain", tmp_path / "rayed"
    words = ["--prompts", str(prompts), *OPTIONS]
    assert main([*words, "--output", str(plain / "{shard:05d}.tar"), "--quiet"]) == 0
    names = sorted(path.name for path in plain.iterdir())
    assert len(names) == count // SIZE

    address, machines = cluster
    command = [sys.executable, "-m", "pixart.generate", *words, "--json"]
    command += ["--output", str(rayed / "{shard:05d}.tar"), "--engine", "ray", "--address", address]

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )

    def there() -> list[Path]:
        return sorted(rayed.glob("0*.tar"))

    driver = start()
    _until(there, driver)
    os.kill(_until(lambda: _at_work(machines), driver)[0], signal.SIGKILL)
    _until(lambda: len(there()) >= 3, driver)
    driver.kill()
    _, said = driver.communicate()
    assert "was lost: its process died, or was killed" in said
    before = {path.name: path.stat().st_mtime_ns for path in there()}

    driver = start()
    _until(lambda: len(there()) > len(before), driver)
    machines[1].all_processes["raylet"][0].process.kill()
    out, said = driver.communicate(timeout=1800)
    assert driver.returncode == 0, said
    report = json.loads(out)
    assert [Path(one["file"]).name for one in report["shards"]] == names
    kept = {Path(one["file"]).name for one in report["shards"] if one["note"] == "there already"}
    assert kept >= before.keys() and report["drawn"] == count - SIZE * len(kept)
    assert [path.name for path in there()] == names
    assert all((rayed / name).stat().st_mtime_ns == time for name, time in before.items())
    for name in names:
        assert (rayed / name).read_bytes() == (plain / name).read_bytes()
    with capsys.disabled():
        print(f"\n{count} pictures, {len(before)} tars by the killed driver; then: {said.strip()}")
