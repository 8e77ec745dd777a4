"""Of one client's jobs, pictures, previews and events nothing is visible to another, by any call."""

import itertools
from collections.abc import Iterator

import httpx
import pytest
from hostile import refused
from serving import Running, StubPainter, eventually, running_service

from pixart.serving.guarding.clients import Clients
from pixart.serving.limits import Limits

ANN, BOB = "ann's-token-0123456789", "bob's-token-0123456789"
SECRET = "a secret red fox"


@pytest.fixture
def running() -> Iterator[Running]:
    clients = Clients({"ann": ANN, "bob": BOB})
    with running_service(clients=clients, limits=Limits(rate=1_000_000)) as running:
        yield running


def client(running: Running, token: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=running.url, headers=headers, timeout=30)


@pytest.fixture
def ann(running: Running) -> Iterator[httpx.Client]:
    with client(running, ANN) as client_:
        yield client_


@pytest.fixture
def bob(running: Running) -> Iterator[httpx.Client]:
    with client(running, BOB) as client_:
        yield client_


def job_of(asking: httpx.Client, painter: StubPainter) -> str:
    """A job with a finished picture, a preview, and a second picture under way."""
    painter.hold()
    body = {"prompt": SECRET, "n": 2, "preview_every": 1}
    id = str(asking.post("/v1/jobs", json=body).json()["id"])
    painter.let_step(5)
    eventually(lambda: asking.get(f"/v1/jobs/{id}").json()["picture"] == 1)
    eventually(lambda: asking.get(f"/v1/jobs/{id}/preview").status_code == 200)
    return id


def test_another_clients_job_is_not_there_by_any_call(
    running: Running, ann: httpx.Client, bob: httpx.Client
) -> None:
    id = job_of(ann, running.painter)
    assert ann.get(f"/v1/jobs/{id}/images/0").status_code == 200
    calls = [
        ("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("GET", "/preview"), ("POST", "/cancel"),
        ("DELETE", ""), ("HEAD", "/images/0"),
    ]  # fmt: skip
    for method, rest in calls:
        theirs = bob.request(method, f"/v1/jobs/{id}{rest}")
        absent = bob.request(method, f"/v1/jobs/{'0' * len(id)}{rest}")
        assert theirs.status_code == absent.status_code and theirs.status_code in (404, 405)
        # Not even that it exists: the same words for an id that there is and one that there is not.
        assert theirs.text.replace(id, "") == absent.text.replace("0" * len(id), "")
        assert SECRET not in theirs.text
    assert ann.get(f"/v1/jobs/{id}").json()["state"] == "drawing"
    running.painter.release()
    eventually(lambda: ann.get(f"/v1/jobs/{id}").json()["state"] == "done")


def test_lists_and_numbers_tell_nothing_of_others(
    running: Running, ann: httpx.Client, bob: httpx.Client
) -> None:
    id = job_of(ann, running.painter)
    assert [job["id"] for job in ann.get("/v1/jobs").json()["data"]] == [id]
    assert bob.get("/v1/jobs").json()["data"] == []
    for path in ("/metrics", "/healthz", "/v1/models", "/openapi.json", "/sdapi/v1/options"):
        text = bob.get(path).text
        assert SECRET not in text and id not in text and '"ann"' not in text
    running.painter.release()


def test_calls_about_the_current_picture_are_about_ones_own(
    running: Running, ann: httpx.Client, bob: httpx.Client
) -> None:
    id = job_of(ann, running.painter)
    progress = bob.get("/sdapi/v1/progress").json()
    assert progress["progress"] == 0 and not progress["current_image"]
    for path in ("/sdapi/v1/interrupt", "/sdapi/v1/skip"):
        bob.post(path)
    assert ann.get(f"/v1/jobs/{id}").json()["state"] == "drawing"
    running.painter.release()


def test_ids_cannot_be_guessed(ann: httpx.Client) -> None:
    ids = [ann.post("/v1/jobs", json={"prompt": "a"}).json()["id"] for _ in range(20)]
    assert all(len(id) >= 32 for id in ids)
    # No two share more of their beginnings or ends than chance lets them.
    for one, other in itertools.combinations(ids, 2):
        assert one[:8] != other[:8] and one[-8:] != other[-8:]


def test_a_stranger_sees_nothing(running: Running, ann: httpx.Client) -> None:
    id = job_of(ann, running.painter)
    with httpx.Client(base_url=running.url, timeout=60) as stranger:
        for path in (
            f"/v1/jobs/{id}",
            f"/v1/jobs/{id}/images/0",
            "/v1/jobs",
            "/metrics",
            "/openapi.json",
        ):
            refused(stranger.get(path), 401)
        for headers in ({"Authorization": f"Bearer {id}"}, {"Cookie": f"pixart-0={ANN}"}):
            refused(stranger.get(f"/v1/jobs/{id}", headers=headers), 401)
    running.painter.release()


def test_two_browsers_without_tokens_are_two_clients() -> None:
    with running_service() as running:
        browsers = [httpx.Client(base_url=running.url, timeout=60) for _ in range(2)]
        for browser in browsers:
            browser.get("/openapi.json", headers={"Accept": "text/html"})
            assert browser.cookies
        one, other = browsers
        id = one.post("/v1/jobs", json={"prompt": SECRET}).json()["id"]
        assert one.get(f"/v1/jobs/{id}").status_code == 200
        refused(other.get(f"/v1/jobs/{id}"), 404)
        refused(httpx.get(f"{running.url}/v1/jobs/{id}", timeout=60), 404)
        for browser in browsers:
            browser.close()


def test_two_browsers_with_one_token_see_the_same(running: Running, ann: httpx.Client) -> None:
    id = ann.post("/v1/jobs", json={"prompt": "a"}).json()["id"]
    with httpx.Client(base_url=running.url, timeout=60) as browser:
        browser.post("/login", data={"token": ANN})
        assert browser.get(f"/v1/jobs/{id}").status_code == 200
