"""The service itself, many requests in a row and many clients at once: nothing lost, none doubled, and no
memory that grows."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from pixart.pipeline.pictures import read_picture

COUNT = 200  # requests in a row
WARM_UP = 40  # requests, after which allocators have what they keep
MOST_GROWTH = 1.05
LONG = 300.0  # seconds after which a test gives up
SMALL = {"steps": 1, "size": "64"}
COLOURS = ("red", "green", "blue", "yellow", "white")
SHAPES = ("circle", "square", "triangle", "star")


@dataclass
class Soaked:
    url: str
    pid: int

    def memory(self) -> int:
        """Kilobytes in RAM."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])


@contextmanager
def served(*options: str) -> Iterator[Soaked]:
    command = [sys.executable, "-m", "pixart.serve", "--port", "0", "--no-ui", "--rate", "1000000"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Soaked(process.stdout.readline().split()[0], process.pid)
        finally:
            process.terminate()
            process.wait(LONG)


@pytest.fixture
def service() -> Iterator[Soaked]:
    with served() as found:
        yield found


class Client:
    """A program with a name of its own."""

    def __init__(self, service: Soaked, name: str) -> None:
        headers = {"Authorization": f"Bearer {name}"}
        self._http = httpx.Client(base_url=service.url, headers=headers, timeout=LONG)

    def order(self, **settings: Any) -> str:
        """The id, as soon as there is room."""
        until = time.monotonic() + LONG
        while time.monotonic() < until:
            answer = self._http.post("/v1/jobs", json={**SMALL, **settings})
            if answer.status_code != 429:
                assert answer.status_code == 202, answer.text
                return str(answer.json()["id"])
            time.sleep(min(1.0, float(answer.headers["Retry-After"])))
        raise AssertionError("was never taken")

    def result(self, id: str) -> bytes:
        """The picture, once it is there."""
        with self._http.stream("GET", f"/v1/jobs/{id}/events") as events:
            assert any(line == "event: end" for line in events.iter_lines())
        job = self._http.get(f"/v1/jobs/{id}").json()
        assert job["state"] == "done", job
        return self._http.get(f"/v1/jobs/{id}/images/0").content

    def ids(self) -> list[str]:
        return [job["id"] for job in self._http.get("/v1/jobs").json()["data"]]

    def pictures(self) -> int:
        """That the service has drawn for all clients."""
        metrics = self._http.get("/metrics").text
        return int(float(re.findall(r"^pixart_pictures_total (\S+)", metrics, re.M)[0]))


def prompt(number: int) -> str:
    colour, shape = COLOURS[number % 5], SHAPES[number // 5 % 4]
    return f"a small {colour} {shape}" + " and a large circle" * (number // 20 % 2)


def check_is(content: bytes, place: Path, wanted: dict[str, Any]) -> None:
    """The picture of this very request, by what its file says."""
    place.write_bytes(content)
    request = read_picture(place).metadata.request
    assert {name: getattr(request, name) for name in wanted} == wanted


@pytest.mark.exhaustive
def test_requests_in_a_row_are_all_drawn_once_in_the_same_memory(
    service: Soaked, tmp_path: Path
) -> None:
    client, before, ids = Client(service, "one"), 0, []
    for number in range(COUNT):
        wanted = {"prompt": prompt(number), "seed": number}
        ids.append(client.order(**wanted))
        check_is(client.result(ids[-1]), tmp_path / "picture.png", wanted)
        if number == WARM_UP:
            before = service.memory()
    after = service.memory()
    print(f"{COUNT} requests: {before} kB after {WARM_UP}, {after} kB at the end")
    assert client.ids() == ids and len({*ids}) == COUNT
    assert client.pictures() == COUNT
    assert after < MOST_GROWTH * before


@pytest.mark.parametrize(
    "rounds",  # pictures of a client's own, besides one that all want
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.exhaustive)],
)
def test_twenty_clients_at_once_each_get_their_own_and_all_of_it(
    service: Soaked, tmp_path: Path, rounds: int
) -> None:
    names = [f"client {number}" for number in range(20)]

    def drawn(place: int) -> tuple[list[str], bytes]:
        client = Client(service, names[place])
        own = [{"prompt": prompt(place), "seed": 100 * place + k} for k in range(rounds)]
        common = {"prompt": "a large blue star", "seed": 7}
        ids = [client.order(**settings) for settings in (*own, common)]
        files = [client.result(id) for id in ids]
        for settings, content in zip((*own, common), files, strict=True):
            check_is(content, tmp_path / f"{place}.png", settings)
        assert client.ids() == ids
        return ids, files[-1]

    with ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(drawn, range(len(names))))
    all_ids = [id for ids, _ in found for id in ids]
    assert len({*all_ids}) == len(all_ids) == len(names) * (rounds + 1)
    assert len({content for _, content in found}) == 1  # the bits do not depend on who else asks
    assert Client(service, "one more").pictures() == len(all_ids)
    assert Client(service, "one more").ids() == []
