"""/v1/images and /v1/models, by the client that OpenAI publishes and by hand."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from serving import REMARK, Running, StubPainter, eventually, running_service

from pixart.serving.guarding.clients import Clients
from pixart.serving.limits import Limits
from pixart.serving.service import Offer

OFFER = Offer("shapes", native=128, multiple=16, loras=("ink",), controls=("edges",))


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with running_service(offer=OFFER, limits=Limits(rate=100_000)) as service:
        yield service


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    running.painter.release()
    with made(running.url) as client:
        yield client


@pytest.fixture
def held(running: Running, client: openai.OpenAI) -> Iterator[StubPainter]:
    running.painter.hold()
    yield running.painter
    running.painter.release()


def made(url: str, key: str = "any", **how: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60, **how)


def png(mode: str = "RGB", size: tuple[int, int] = (64, 64), colour: Any = "red") -> bytes:
    content = io.BytesIO()
    Image.new(mode, size, colour).save(content, "PNG")
    return content.getvalue()


def opened(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.fixture
def orders(running: Running, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is submitted from here on."""
    found: list[Any] = []
    submit = running.service.queue.submit

    def spy(order: Any, owner: str) -> Any:
        found.append(order)
        return submit(order, owner)

    monkeypatch.setattr(running.service.queue, "submit", spy)
    return found


def test_pictures_are_generated(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="x", n=2, size="160x96", model="shapes")
    assert answer.data is not None and len(answer.data) == 2
    assert {opened(one.b64_json).size for one in answer.data} == {(160, 96)}
    assert (answer.size, answer.output_format, answer.background) == ("160x96", "png", "opaque")
    assert answer.usage is not None and answer.usage.output_tokens == 2 * 10 * 6
    first, second = (one.model_extra or {} for one in answer.data)
    assert second["seed"] == first["seed"] + 1


def test_auto_is_the_models_own_size(client: openai.OpenAI) -> None:
    assert client.images.generate(prompt="x", size="auto").size == "128x128"


def test_settings_and_names_of_diffusers_are_taken(
    client: openai.OpenAI, orders: list[Any]
) -> None:
    client.images.generate(
        prompt="x",
        extra_body={
            "seed": 5, "num_inference_steps": 3, "guidance_scale": 2, "negative_prompt": "y",
            "guidance_interval": [0, 0.5], "loras": {"ink": 0.5},
        },
    )  # fmt: skip
    [request] = orders[0].requests
    assert (request.seed, request.steps, request.guidance, request.negative) == (5, 3, 2, "y")
    assert request.guidance_interval == (0, 0.5) and orders[0].loras == (("ink", 0.5),)


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_pictures_come_in_the_format_that_was_asked_for(
    client: openai.OpenAI, name: Any, kind: str
) -> None:
    answer = client.images.generate(prompt="x", output_format=name)
    assert answer.data and opened(answer.data[0].b64_json).format == kind
    assert answer.output_format == name


@pytest.mark.parametrize(("compression", "quality"), [(0, 1), (40, 40), (100, 100), (None, None)])
def test_compression_is_the_quality_of_the_file(
    client: openai.OpenAI, orders: list[Any], compression: Any, quality: int | None
) -> None:
    client.images.generate(prompt="x", output_format="jpeg", output_compression=compression)
    assert (orders[0].format, orders[0].quality) == ("jpg", quality)


def test_what_has_no_effect_is_named(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="x", quality="hd", style="vivid", user="me", moderation="auto", background="auto"
    )
    assert (answer.model_extra or {})["ignored"] == ["quality", "style", "user"]


def test_without_the_plan_a_picture_comes_with_that_remark(client: openai.OpenAI) -> None:
    for extra, remarks in (({}, []), ({"fast": "off"}, [REMARK])):
        answer = client.images.generate(prompt="x", extra_body=extra)
        assert (answer.model_extra or {})["remarks"] == remarks
        *_, last = client.images.generate(prompt="x", extra_body=extra, stream=True)
        assert (last.model_extra or {})["remarks"] == remarks


def test_a_picture_is_edited_where_the_mask_is_transparent(
    client: openai.OpenAI, orders: list[Any]
) -> None:
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    content = io.BytesIO()
    mask.save(content, "PNG")
    client.images.edit(image=png(), mask=content.getvalue(), prompt="x")
    ours = orders[0].pictures["mask"]
    assert (ours.mode, ours.getpixel((0, 0)), ours.getpixel((63, 0))) == ("L", 255, 0)
    assert (orders[0].requests[0].image, orders[0].requests[0].mask) == ("image", "mask")


def test_a_mask_that_cannot_be_transparent_is_white_where_it_is_drawn(
    client: openai.OpenAI, orders: list[Any]
) -> None:
    client.images.edit(image=png(), mask=png("L", colour=255), prompt="x")
    assert orders[0].pictures["mask"].getpixel((0, 0)) == 255


def test_a_list_of_one_picture_is_that_picture(client: openai.OpenAI, orders: list[Any]) -> None:
    client.images.edit(
        image=[png()], prompt="x", extra_body={"strength": 0.25, "loras": {"ink": 1}}
    )
    assert (orders[0].requests[0].strength, orders[0].loras) == (0.25, (("ink", 1.0),))


def test_the_pictures_own_size_keeps_it(client: openai.OpenAI, orders: list[Any]) -> None:
    client.images.edit(image=png(size=(70, 90)), prompt="x", size="70x90")
    client.images.edit(image=png(size=(70, 90)), prompt="x", size="128x64")
    [own], [other] = (order.requests for order in orders)
    assert (own.size, own.fit) == (None, "exact")
    assert (other.size, other.fit) == ("128x64", None)


def test_several_pictures_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="image must be one picture") as raised:
        client.images.edit(image=[png(), png()], prompt="x")
    assert raised.value.param == "image"


Call = Callable[..., Any]
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": "url"}, "response_format", "ordered from /v1/jobs"),
    ({"background": "transparent"}, "background", "this model draws all"),
    ({"output_format": "gif"}, "output_format", "png or jpeg or webp"),
    ({"quality": "best"}, "quality", "got 'best'"),
    ({"partial_images": 2}, "partial_images", "given with stream"),
    ({"output_compression": 50}, "output_compression", "left out for png"),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "100"),
    ({"n": 0}, "n", "1"),
    ({"n": 17}, "n", "from 1 to 16"),
    ({"size": "100x100"}, "size", "try 96x96 or 112x112"),
    ({"size": "large"}, "size", "WIDTHxHEIGHT"),
    ({"extra_body": {"steps": 3, "num_inference_steps": 3}}, "num_inference_steps", "once"),
    ({"extra_body": {"stepz": 3}}, "stepz", "did you mean 'steps'"),
    ({"extra_body": {"steps": 201}}, "steps", "at most 200"),
    ({"extra_body": {"loras": {"../x": 1}}}, "loras", "known: ink"),
    ({"extra_body": {"image": "http://localhost/a.png"}}, "image", "URLs are not followed"),
    ({"extra_body": {"stream": "yes"}}, "stream", "boolean"),
]


@pytest.mark.parametrize(("changes", "field", "reason"), REFUSED)
def test_what_is_not_done_is_refused_with_the_field_and_the_reason(
    client: openai.OpenAI, changes: dict[str, Any], field: str, reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as raised:
        client.images.generate(prompt="x", **changes)
    assert (raised.value.param, raised.value.type) == (field, "invalid_request_error")


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.images.generate(prompt="x", model="dall-e-3")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")


def test_models_are_listed(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert client.models.retrieve("shapes") == model
    assert (model.id, model.model_extra) == (
        "shapes", {"native": 128, "multiple": 16, "loras": ["ink"], "controls": ["edges"], "fast": None},
    )  # fmt: skip


def test_a_stream_shows_pictures_before_their_end(client: openai.OpenAI, held: StubPainter) -> None:
    events = []
    held.let_step(4)
    for event in client.images.generate(
        prompt="x", stream=True, partial_images=2, extra_body={"steps": 10, "seed": 3}
    ):
        events.append(event)
        held.let_step(4)
    *partial, last = events
    assert [one.type for one in partial] == ["image_generation.partial_image"] * 2
    assert [one.partial_image_index for one in partial] == [0, 1]  # type: ignore[union-attr]
    assert {opened(one.b64_json).format for one in partial} == {"JPEG"}
    assert {one.output_format for one in partial} == {"jpeg"}
    assert last.type == "image_generation.completed" and opened(last.b64_json).format == "PNG"
    assert last.usage.output_tokens == 64 and last.size == "128x128"
    assert (last.model_extra or {})["seed"] == 3


def test_a_stream_of_several_pictures_completes_each(client: openai.OpenAI) -> None:
    stream = client.images.edit(image=png(), prompt="x", n=3, stream=True)
    events = [(event.type, (event.model_extra or {})["seed"]) for event in stream]
    assert [name for name, _ in events] == ["image_edit.completed"] * 3
    assert [seed - events[0][1] for _, seed in events] == [0, 1, 2]


def test_a_failure_is_told_and_not_tried_again(running: Running, client: openai.OpenAI) -> None:
    running.painter.faults["broken"] = ValueError("latents must be finite")
    begun = len(running.painter.drawn)
    with pytest.raises(openai.InternalServerError, match="latents must be finite"):
        client.with_options(max_retries=2).images.generate(prompt="broken")
    assert len(running.painter.drawn) == begun + 1
    with pytest.raises(openai.APIError, match="latents must be finite"):
        list(client.images.generate(prompt="broken", stream=True))


def test_an_answered_job_is_not_kept(running: Running, client: openai.OpenAI) -> None:
    client.images.generate(prompt="x")
    list(client.images.generate(prompt="x", stream=True))
    assert client.get("/jobs", cast_to=object) == {"object": "list", "data": []}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_has_its_job_cancelled(
    running: Running, held: StubPainter, stream: bool
) -> None:
    begun = len(held.drawn)
    body = {"prompt": "left", "stream": stream, "partial_images": 1 if stream else None}
    with (
        httpx.Client(base_url=running.url, timeout=httpx.Timeout(60, read=0.5)) as leaving,
        pytest.raises(httpx.ReadTimeout),
        leaving.stream("POST", "/v1/images/generations", json=body) as answer,
    ):
        answer.read()
    eventually(lambda: not running.service.queue.figures().is_drawing)
    figures = running.service.queue.figures()
    assert len(held.drawn) <= begun + 1 and figures.waiting == 0


def test_tokens_are_demanded_where_there_are_some() -> None:
    clients = Clients({"ann": "a" * 32})
    with running_service(clients=clients) as running:
        with pytest.raises(openai.AuthenticationError):
            made(running.url, "b" * 32).images.generate(prompt="x")
        assert made(running.url, "a" * 32).images.generate(prompt="x").data


def test_too_many_are_told_to_wait() -> None:
    with running_service(limits=Limits(queue=1)) as running:
        running.painter.hold()
        for _ in range(2):
            httpx.post(f"{running.url}/v1/jobs", json={"prompt": "x"}, timeout=60)
        eventually(lambda: running.service.queue.figures().is_drawing)
        with pytest.raises(openai.RateLimitError) as raised:
            client = made(running.url)
            for _ in range(2):
                client.images.generate(prompt="x", timeout=5)
        assert raised.value.code == "queue_full"
        assert int(raised.value.response.headers["retry-after"]) >= 1


def test_json_is_taken_for_edits_too(running: Running) -> None:
    body = {"prompt": "x", "image": base64.b64encode(png()).decode(), "mask": "alpha"}
    answer = httpx.post(f"{running.url}/v1/images/edits", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["settings"]["mask"] == "alpha"


def test_an_edit_without_a_picture_is_refused(running: Running) -> None:
    answer = httpx.post(f"{running.url}/v1/images/edits", json={"prompt": "x"}, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"


def test_events_are_named_as_openais_are(running: Running) -> None:
    body = {"prompt": "x", "stream": True}
    answer = httpx.post(f"{running.url}/v1/images/generations", json=body, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    [block] = answer.text.strip().split("\n\n")
    first, second = block.splitlines()
    assert first == "event: image_generation.completed"
    assert json.loads(second.removeprefix("data: "))["type"] == "image_generation.completed"
