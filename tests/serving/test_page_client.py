"""The page's door for programs: gradio_client, and what of Gradio is open to anybody."""

import base64
import contextlib
import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from serving import Running, eventually, running_service

from pixart.pipeline.pictures import read_texts
from pixart.pipeline.request import SETTINGS
from pixart.serving.guarding.clients import Clients
from pixart.serving.page.doors import parse_event
from pixart.serving.refusal import Refusal
from pixart.serving.service import Offer

pytestmark = pytest.mark.slow
ANN, BOB = "ann's token is long", "bob's token is long too"
PLAIN = {"data": ["x", 1, True, None, ["a", [0.5]]], "event_data": None}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    pytest.importorskip("gradio")
    clients = Clients({"ann": ANN, "bob": BOB})
    offer = Offer("shapes", 128, 16, loras=("ink",))
    with running_service(clients=clients, offer=offer, ui=True) as running:
        yield running


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def client_of(running: Running, token: str | None = None) -> Any:
    from gradio_client import Client

    headers = bearer(token) if token else None
    return Client(running.url, headers=headers, verbose=False, analytics_enabled=False)


@pytest.fixture(scope="module")
def ann(running: Running) -> Any:
    return client_of(running, ANN)


def content_of(picture: dict[str, Any]) -> bytes:
    return base64.b64decode(picture["picture"].partition(",")[2])


def test_the_embedded_model_draws_for_a_program() -> None:
    pytest.importorskip("gradio")
    from pixart.serving.drawing.painter import PipelinePainter
    from pixart.serving.options import Options

    with running_service(PipelinePainter.open(Options(), {}, {}), ui=True) as running:
        client = client_of(running)
        settings = {"prompt": "a large red circle on white", "seed": 3, "steps": 4}
        first, second = (client.predict(**settings, api_name="/draw") for _ in range(2))
    [picture] = first
    assert content_of(picture) == content_of(second[0])
    image = Image.open(io.BytesIO(content_of(picture)))
    assert image.size == (picture["width"], picture["height"]) == (128, 128)
    assert picture["seed"] == 3 and "Steps: 4" in picture["parameters"]
    red, green, blue = (channel.tobytes() for channel in image.convert("RGB").split())
    reds = sum(r > 150 and g < 100 and b < 100 for r, g, b in zip(red, green, blue, strict=True))
    assert reds > 500


def test_draw_alone_is_told_of_with_every_setting(ann: Any) -> None:
    [(name, endpoint)] = ann.view_api(return_format="dict")["named_endpoints"].items()
    assert name == "/draw"
    names = [one["parameter_name"] for one in endpoint["parameters"]]
    assert names == [*SETTINGS, "loras", "controls", "count", "format", "fast"]
    needed = [
        one["parameter_name"] for one in endpoint["parameters"] if not one["parameter_has_default"]
    ]
    assert needed == ["prompt"]
    assert ann.view_api(return_format="dict")["unnamed_endpoints"] == {}


def test_what_is_asked_is_what_is_drawn_for_its_client(running: Running, ann: Any) -> None:
    pictures = ann.predict(
        prompt="a circle", negative="blue", seed=8, guidance_interval=[0.0, 0.5], count=2, format="webp",
        loras=[["ink", 0.5]], api_name="/draw",
    )  # fmt: skip
    assert [one["seed"] for one in pictures] == [8, 9]
    for one in pictures:
        assert '"negative": "blue"' in read_texts(content_of(one), "it")[0]
        assert one["picture"].startswith("data:image/webp;base64,")
        address = running.url + one["url"]
        mine, other = (
            httpx.get(address, headers=bearer(token), timeout=60) for token in (ANN, BOB)
        )
        assert mine.content == content_of(one) and other.status_code == 404
    job = running.service.queue.list("ann")[-1]
    assert job.order.loras == (("ink", 0.5),)
    assert running.service.queue.list("bob") == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": "100"}, "size must be a multiple"),
        ({"steps": "many"}, "steps must be"),
        ({"loras": [["../secret", 1]]}, "loras must be names"),
        ({"loras": ["ink"]}, "loras must be pairs"),
        ({"image": "/etc/passwd"}, "image must be"),
        ({"count": "2"}, "count must be a whole number"),
        ({"format": "exe"}, "format must be"),
    ],
)
def test_a_program_is_told_what_cannot_be_drawn(
    ann: Any, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(Exception, match=said):
        ann.predict(prompt="a circle", **settings, api_name="/draw")


def test_programs_wait_in_our_queue_and_in_no_other(running: Running, ann: Any) -> None:
    running.painter.hold()
    asked = [ann.submit(prompt="a circle", seed=seed, api_name="/draw") for seed in range(6)]
    queue = running.service.queue
    eventually(lambda: sum(not job.has_ended for job in queue.list("ann")) == 6)
    running.painter.release()
    assert [one.result()[0]["seed"] for one in asked] == [*range(6)]


def test_nobody_hears_of_the_session_of_another(running: Running) -> None:
    def join(token: str) -> httpx.Response:
        body = {"data": [], "fn_index": 0, "session_hash": "known", "event_data": None}
        return httpx.post(
            f"{running.url}/gradio_api/queue/join", json=body, headers=bearer(token), timeout=60
        )

    def heard(token: str) -> str:
        """What there is to hear until Gradio has no more, or breaks off."""
        address, parts = f"{running.url}/gradio_api/queue/data?session_hash=known", []
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream("GET", address, headers=bearer(token), timeout=60) as answer,
        ):
            parts.extend(answer.iter_text())
        return "".join(parts)

    assert join(ANN).status_code == 200
    assert "process_completed" not in heard(BOB)
    assert "process_completed" in heard(ANN)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd",
        "/gradio_api/proxy=http://169.254.169.254/", "/gradio_api/stream/a/1/2/playlist.m3u8",
        "/gradio_api/component_server", "/gradio_api/run/draw", "/gradio_api/runs", "/monitoring",
        "/gradio_api/deep_link", "/gradio_api/vibe-code", "/login_check", "/token", "/custom_component/a/b/c/d",
        "/gradio_api/mcp/sse", "/theme/../file=/etc/passwd", "/gradio_api/openapi.json",
    ],
)  # fmt: skip
def test_gradios_other_routes_are_closed(running: Running, path: str) -> None:
    for method, body in (("GET", None), ("POST", {})):
        answer = httpx.request(
            method, running.url + path, headers=bearer(ANN), json=body, timeout=60
        )
        assert answer.status_code in (400, 404, 405) and "root:" not in answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b"[" * 100_000, b'"x"',
        b'{"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}',
        b'{"data": ["x", [["y", {"url": "http://169.254.169.254/"}]]]}',
        b'{"data": {"path": "/etc/passwd"}}', b'{"data": [], "event_data": {"a": 1}}',
    ],
)  # fmt: skip
def test_values_that_could_name_a_file_are_refused(body: bytes) -> None:
    with pytest.raises(Refusal) as raised:
        parse_event(body)
    assert raised.value.status == 400


def test_plain_values_pass() -> None:
    import json

    assert parse_event(json.dumps(PLAIN).encode()) == PLAIN and parse_event(b"") == {}
