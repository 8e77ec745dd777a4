"""Killed in the middle of a picture and started again: nothing is left over, and it works."""

import base64
import signal
from pathlib import Path

import httpx
import pytest
from serve_process import SECONDS, Served, served
from serving import eventually

PROMPT = "a large red circle on white"

pytestmark = pytest.mark.slow


def _draw(one: Served) -> bytes:
    body = {"prompt": PROMPT, "seed": 3, "steps": 4}
    answer = httpx.post(f"{one.url}sdapi/v1/txt2img", json=body, timeout=SECONDS)
    return base64.b64decode(answer.json()["images"][0])


def _begin(one: Served) -> None:
    """A long picture, in the middle of its steps."""
    job = httpx.post(
        f"{one.url}v1/jobs", json={"prompt": PROMPT, "steps": 200}, timeout=SECONDS
    ).json()
    address = f"{one.url}v1/jobs/{job['id']}"
    eventually(lambda: httpx.get(address, timeout=SECONDS).json()["step"] > 0)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="kill"),
        pytest.param(signal.SIGTERM, id="term", marks=pytest.mark.exhaustive),
    ],
)
def test_one_that_ends_in_the_middle_of_a_picture_starts_clean(
    number: signal.Signals, tmp_path: Path
) -> None:
    with served(tmp_path, "--no-ui") as first:
        before = _draw(first)
        _begin(first)
        assert first.end(number) == -number
    left = first.leftovers()
    assert bool(left) == (number == signal.SIGKILL)  # nobody could remove it

    with served(tmp_path, "--no-ui", "--port", str(first.port)) as second:
        assert second.port == first.port
        assert not {*left} & {*second.leftovers()} and len(second.leftovers()) == 1
        assert httpx.get(f"{second.url}v1/jobs", timeout=60).json()["data"] == []
        assert _draw(second) == before
        assert second.end(signal.SIGINT) == 130
    assert second.leftovers() == []
