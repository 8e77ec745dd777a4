"""/healthz and /metrics."""

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Running, running_service

from pixart.serving.limits import Limits


@pytest.fixture
def running() -> Iterator[Running]:
    with running_service(limits=Limits(queue=1)) as service:
        yield service


def numbers(url: str) -> dict[str, float]:
    answer = httpx.get(f"{url}/metrics", timeout=60)
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        "/".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_a_service_that_draws_is_healthy(running: Running) -> None:
    answer = httpx.get(f"{running.url}/healthz", timeout=60).json()
    assert (answer["status"], answer["model"], answer["waiting"]) == ("ok", "shapes", 0)


def test_a_service_whose_queue_has_ended_is_not(running: Running) -> None:
    running.service.queue.close()
    answer = httpx.get(f"{running.url}/healthz", timeout=60)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "dead"
    assert numbers(running.url)["pixart_alive"] == 0


def test_what_is_drawn_is_counted(running: Running) -> None:
    before = numbers(running.url)
    assert before["pixart_pictures_total"] == before["pixart_kept_bytes"] == 0
    with httpx.Client(base_url=running.url, timeout=60) as client:
        job = client.post("/v1/jobs", json={"prompt": "x", "n": 2}).json()["id"]
        client.get(f"/v1/jobs/{job}/events")
        [first, second] = client.get(f"/v1/jobs/{job}").json()["pictures"]
    after = numbers(running.url)
    assert (after["pixart_pictures_total"], after["pixart_orders_total/done"]) == (2, 1)
    assert after["pixart_kept_bytes"] >= first["bytes"] + second["bytes"]
    assert after["pixart_seconds_total/denoise"] == 2.0  # what the stub says


def test_what_waits_and_what_is_refused_is_counted(running: Running) -> None:
    running.painter.hold()
    orders = [
        httpx.post(f"{running.url}/v1/jobs", json={"prompt": "x"}, timeout=60) for _ in range(4)
    ]
    refused = [order for order in orders if order.status_code == 429]
    assert refused and all(order.headers["retry-after"] for order in refused)
    now = numbers(running.url)
    assert now["pixart_orders_total/refused"] == len(refused)
    assert now["pixart_waiting_orders"] == 1


def test_no_client_is_named(running: Running) -> None:
    headers = {"Authorization": "Bearer a-name-of-mine"}
    httpx.post(f"{running.url}/v1/jobs", json={"prompt": "a secret"}, headers=headers, timeout=60)
    text = httpx.get(f"{running.url}/metrics", timeout=60).text
    assert "secret" not in text and "name-of-mine" not in text and "bearer" not in text
