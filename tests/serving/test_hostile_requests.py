"""What is sent to do harm is refused in one line, by every call; the service goes on."""

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hostile import ADDRESSES, NAMES, png, refused, text_of, values_beyond, with_name, with_picture
from PIL import Image
from serving import Running, running_service

from pixart.config import EMBEDDED
from pixart.pipeline.request import Request
from pixart.serving.drawing.painter import PipelinePainter
from pixart.serving.limits import Limits
from pixart.serving.options import Options
from pixart.serving.orders import Order
from pixart.serving.service import Offer

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
LIMITS = Limits(rate=1_000_000, body=2_000_000)
BOMBS = {
    "100 MP": png(10_000, 10_000),
    "400 MP": png(20_000, 20_000, is_whole=False),
    "2^62 pixels": png(2**31 - 1, 2**31 - 1, is_whole=False),
    "a line": png(1_000_000, 1),
}
JSON = {"Content-Type": "application/json"}
DRAWING = ("/v1/jobs", "/v1/images/generations", "/sdapi/v1/txt2img")
PLACES = [name for name, *_ in with_picture("")]
CHOICES = [name for name, *_ in with_name("")]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    offer = Offer(EMBEDDED, 128, 16, loras=("style",), controls=("edge",))
    with running_service(offer=offer, limits=LIMITS) as running:
        yield running
        alive = httpx.get(f"{running.url}/healthz", timeout=60).json()
        assert alive["status"] == "ok" and alive["waiting"] == 0
        assert running.painter.drawn == []  # nothing of all this was drawn


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


def case(cases: Iterator[tuple[str, str, dict[str, Any]]], name: str) -> tuple[str, dict[str, Any]]:
    return next((path, body) for other, path, body in cases if other == name)


@pytest.mark.parametrize("place", PLACES)
def test_no_path_and_no_url_is_followed(client: httpx.Client, place: str) -> None:
    for address in (*ADDRESSES, "A" * 1000):
        path, body = case(with_picture(address), place)
        refused(client.post(path, json=body), 400)


@pytest.mark.parametrize("place", PLACES)
def test_no_other_kind_of_value_is_a_picture(client: httpx.Client, place: str) -> None:
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for sent in ({"url": "http://127.0.0.1:1/"}, file, [["/etc/passwd"]], 7, True):
        path, body = case(with_picture(sent), place)
        refused(client.post(path, json=body), 400)


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("place", [place for place in PLACES if place != "png-info"])
def test_a_bomb_is_refused_by_its_head(client: httpx.Client, place: str, bomb: str) -> None:
    path, body = case(with_picture(text_of(BOMBS[bomb])), place)
    refused(client.post(path, json=body), 400, 413)


@pytest.mark.parametrize("bomb", BOMBS)
def test_texts_of_a_bomb_are_read_without_its_pixels(client: httpx.Client, bomb: str) -> None:
    answer = client.post("/sdapi/v1/png-info", json={"image": text_of(BOMBS[bomb])})
    assert answer.status_code in (200, 400) and '"parameters":{"' not in answer.text


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/jobs"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_in_a_form_is_refused_by_its_head(
    client: httpx.Client, path: str, bomb: str
) -> None:
    answer = client.post(path, data={"prompt": "a"}, files={"image": ("a.png", BOMBS[bomb])})
    refused(answer, 400, 413)


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/jobs"])
@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\x00.png", "a" * 5000, ""])
def test_the_name_of_a_file_in_a_form_means_nothing(
    client: httpx.Client, path: str, name: str
) -> None:
    answer = client.post(path, data={"prompt": "a"}, files={"image": (name, b"no picture")})
    refused(answer, 400)


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/jobs"])
def test_forms_have_a_bounded_number_of_parts(client: httpx.Client, path: str) -> None:
    many = [("image[]", (f"{number}.png", b"x")) for number in range(500)]
    refused(client.post(path, data={"prompt": "a"}, files=many), 400)
    fields = {f"field{number}": "x" for number in range(2000)}
    refused(client.post(path, data=fields, files={"image": b"x"}), 400)


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/jobs"])
@pytest.mark.parametrize(
    "kind",
    ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=x"],
)
def test_a_form_that_is_none_is_refused(client: httpx.Client, path: str, kind: str) -> None:
    for content in (
        b"",
        b"--",
        b"--x\r\n",
        b"--x\r\nContent-Disposition: form-data\r\n\r\n",
        b"\xff" * 1000,
    ):
        refused(client.post(path, content=content or b"-", headers={"Content-Type": kind}), 400)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "BMP", "PPM", "ICO", "PDF"])
def test_other_formats_are_refused(client: httpx.Client, format: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (32, 32)).save(out, format)
    refused(client.post("/v1/jobs", json={"prompt": "a", "image": text_of(out.getvalue())}), 400)


def test_a_file_with_hundreds_of_pages_is_refused(client: httpx.Client) -> None:
    frames = [Image.new("1", (8, 8), number % 2) for number in range(300)]
    for format in ("TIFF", "PNG", "WEBP"):
        out = io.BytesIO()
        frames[0].convert("RGB").save(out, format, save_all=True, append_images=frames[1:])
        body = {"prompt": "a", "image": text_of(out.getvalue())}
        refused(client.post("/v1/jobs", json=body), 400)


@pytest.mark.parametrize("choice", CHOICES)
def test_what_the_server_has_is_chosen_from_its_list(client: httpx.Client, choice: str) -> None:
    # A1111's clients send '' for none.
    for name in filter(None, NAMES) if choice.startswith("a1111") else NAMES:
        path, body = case(with_name(name), choice)
        refused(client.post(path, json=body), 400, 404)


@pytest.mark.parametrize("path", DRAWING)
def test_values_beyond_all_bounds_are_refused(client: httpx.Client, path: str) -> None:
    for values in values_beyond():
        content = json.dumps({"prompt": "a", **values})  # httpx itself refuses half a character
        refused(client.post(path, content=content, headers=JSON), 400, 413)


@pytest.mark.parametrize("path", DRAWING)
def test_no_more_pictures_than_are_allowed(client: httpx.Client, path: str) -> None:
    field = "batch_size" if path.startswith("/sdapi") else "n"
    for count in (-1, 17, 10**9, 1.5, "x"):
        refused(client.post(path, json={"prompt": "a", field: count}), 400)


@pytest.mark.parametrize("path", [*DRAWING, "/v1/images/edits", "/sdapi/v1/img2img", "/sdapi/v1/png-info",
                                  "/sdapi/v1/options"])  # fmt: skip
def test_what_is_no_json_of_ours_is_refused(client: httpx.Client, path: str) -> None:
    for content in (
        b"", b"{", b"[]", b"null", b"1", b'"a"', b"{}{}", b"\xff\xfe{}", bytes(100), b"[" * 100_000,
        b'{"a":' * 50_000, b'{"prompt": NaN}', b'{"prompt": "a", "guidance": Infinity}',
        b'{"prompt": "a", "cfg_scale": 1e999}', b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
    ):  # fmt: skip
        refused(client.post(path, content=content, headers=JSON), 400, 413)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_no_path_leads_to_a_file(client: httpx.Client, method: str) -> None:
    for path in (
        "/v1/jobs/../../etc/passwd", "/v1/jobs/%2e%2e/%2e%2e/etc/passwd", "/v1/jobs/..%2f..%2fetc%2fpasswd",
        "/v1/jobs/%252e%252e", "/v1/jobs/x/images/-1", "/v1/jobs/x/images/99999999999999999999",
        "/v1/jobs/x/images/0.0", "/v1/jobs/x/images/a", "/v1/jobs/%00", "/v1/jobs/x%0d%0aSet-Cookie:a",
        "/v1//jobs", "/assets/../../etc/passwd", "/static/%2e%2e/%2e%2e/etc/passwd", "/file=/etc/passwd",
        "/etc/passwd", "/%5c%5cevil.example%5ca", "/.git/config", "/.env", "/docs", "/redoc",
        "/v1/models/../x", "/v1/models/http://evil.example", "/internal/ping",
    ):  # fmt: skip
        url = client.base_url.copy_with(raw_path=path.encode())
        refused(client.request(method, url), 400, 404, 405)


def routes(running: Running) -> list[tuple[str, str]]:
    document = httpx.get(f"{running.url}/openapi.json", timeout=60).json()
    return [(method.upper(), path) for path, item in document["paths"].items() for method in item]


@pytest.mark.slow
def test_every_route_refuses_other_names_and_other_pages(
    running: Running, client: httpx.Client
) -> None:
    known = routes(running)
    assert len(known) > 25
    for method, path in known:
        place = path.replace("{id}", "x").replace("{number}", "0").replace("{model}", "x")
        assert "{" not in place
        refused(client.request(method, place, headers={"Host": "evil.example"}), 421)
        site = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        refused(client.request(method, place, headers=site), 403)
        if method != "GET":
            origin = {"Origin": "http://evil.example"}
            refused(client.request(method, place, headers=origin), 403)
            kind = {"Content-Type": "text/plain"}
            refused(client.request(method, place, content=b"{}", headers=kind), 415)
            large = b" " * (LIMITS.body + 1)
            refused(client.request(method, place, content=large, headers=JSON), 413)


@pytest.mark.parametrize("path", ["/", "/v1/jobs", "/openapi.json", "/nothing", "/login"])
def test_no_preflight_of_another_page_succeeds(client: httpx.Client, path: str) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = client.options(path, headers=headers)
    refused(answer, 403)
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_nothing_answers_that_nobody_needs(client: httpx.Client) -> None:
    for method in ("TRACE", "PROPFIND", "PUT", "PATCH"):
        refused(client.request(method, "/v1/jobs"), 405)


@pytest.mark.slow
def test_no_path_is_a_scheduler_to_the_model() -> None:
    """Which the painter here does not look at."""
    painter = PipelinePainter.open(Options(), {}, {})
    for name in ADDRESSES:
        with pytest.raises(ValueError, match="^scheduler"):
            painter.check(Order((Request("a", scheduler=name),)))
    painter.close()
