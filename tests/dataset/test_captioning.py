"""Captions from an endpoint and from models of transformers."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pictures
import pytest
from caption_server import Server
from caption_server import server as server  # a fixture
from PIL import Image
from tiny_captioners import build_blip, build_llava

from pixart.dataset.annotations import read_lines
from pixart.dataset.captioning import (
    CaptionRequest,
    caption_source,
    open_endpoint,
    open_model,
    several,
)
from pixart.dataset.sources import open_source
from pixart.endpoint import EndpointError


def run(source: Path, output: Path, server: Server, request: CaptionRequest) -> Any:
    captioner = open_endpoint(server.address, "vlm", request)
    return caption_source(open_source(source), output, captioner, request, workers=2)


def test_an_endpoint_is_shown_the_picture_and_asked_once(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    source, output = pictures.folder(tmp_path / "s", 2), tmp_path / "o.jsonl"
    request = CaptionRequest("Describe.", max_tokens=17)
    assert run(source, output, server, request).new == 2
    asked = server.asked[0]
    assert asked["path"] == "/v1/chat/completions" and asked["model"] == "vlm"
    assert (asked["max_tokens"], asked["temperature"]) == (17, 0.0)
    text, image = asked["messages"][0]["content"]
    assert text["text"] == "Describe."
    kind, _, data = image["image_url"]["url"].partition(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (80, 60)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert read_lines(output)[0] == {"path": "0.png", "captions": {"long": "a caption"}}
    assert run(source, output, server, request).known == 2 and len(server.asked) == 2


def test_no_key_of_the_hub_goes_to_an_endpoint(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run(pictures.folder(tmp_path / "s", 1), tmp_path / "o.jsonl", server, CaptionRequest("?"))
    assert "hf_secret" not in str(server.headers[0]) and not server.headers[0]["Authorization"]


def test_several_captions_are_sampled_and_numbered(tmp_path: Path, server: Server) -> None:
    server.answer = lambda body: (200, server.completion(f"draw\n {body['seed']}"))
    output = tmp_path / "o.jsonl"
    run(
        pictures.folder(tmp_path / "s", 1),
        output,
        server,
        CaptionRequest("?", name="synthetic", count=3),
    )
    (line,) = read_lines(output)
    assert line["captions"] == {f"synthetic.{n + 1}": f"draw {n}" for n in range(3)}
    assert {body["temperature"] for body in server.asked} == {1.0}


def test_a_busy_endpoint_is_asked_again(tmp_path: Path, server: Server) -> None:
    statuses = iter([429, 503, 200])
    server.answer = lambda _: (next(statuses), server.completion("at last"))
    output = tmp_path / "o.jsonl"
    assert run(pictures.folder(tmp_path / "s", 1), output, server, CaptionRequest("?")).new == 1


def test_a_refused_picture_is_rejected_and_an_empty_caption_too(
    tmp_path: Path, server: Server
) -> None:
    answers = iter(
        [(400, "too large"), (200, server.completion(None)), (200, server.completion("fine"))]
    )
    server.answer = lambda _: next(answers)
    request = CaptionRequest("?")
    captioner = open_endpoint(server.address, "vlm", request)
    source = open_source(pictures.folder(tmp_path / "s", 3))
    tally = caption_source(source, tmp_path / "o.jsonl", captioner, request, workers=1)
    assert tally.new == 1
    assert "refuses this picture: 400" in tally.rejected[0].reason
    assert tally.rejected[1].reason == "the model gave an empty caption"


@pytest.mark.parametrize("status", [401, 404, 500])
def test_an_endpoint_that_refuses_all_stops_and_keeps_what_there_is(
    tmp_path: Path, server: Server, status: int
) -> None:
    served = iter([(200, server.completion("one"))])
    server.answer = lambda _: next(served, (status, "no"))
    request = CaptionRequest("?")
    captioner = open_endpoint(server.address, "vlm", request)
    source = open_source(pictures.folder(tmp_path / "s", 4))
    with pytest.raises(EndpointError, match=f"{status}.*captions so far are kept"):
        caption_source(source, tmp_path / "o.jsonl", captioner, request, workers=1)
    assert len(read_lines(tmp_path / "o.jsonl")) == 1


def test_an_endpoint_that_is_away_or_answers_nonsense_stops(tmp_path: Path, server: Server) -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(EndpointError, match="must answer"):
        open_endpoint("http://127.0.0.1:9/v1", "vlm", CaptionRequest("?"))(image)(0)
    server.answer = lambda _: (200, {"error": "none"})
    with pytest.raises(EndpointError, match=r"choices\[0\]"):
        open_endpoint(server.address, "vlm", CaptionRequest("?"))(image)(0)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        CaptionRequest("?", count=0)
    with pytest.raises(ValueError, match="a word without"):
        CaptionRequest("?", name="a.b")
    with pytest.raises(ValueError, match="must begin with http"):
        open_endpoint("localhost:8000", "vlm", CaptionRequest("?"))


@pytest.mark.parametrize("build", [build_blip, build_llava])
def test_models_of_transformers_caption(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    """Random weights: any words will do, as long as they are of the picture alone."""
    model = build(tmp_path / "model")
    prompt = "" if build is build_blip else "red circle"
    image = Image.open(io.BytesIO(pictures.png())).convert("RGB")
    single = open_model(str(model), CaptionRequest(prompt, max_tokens=6), "cpu")
    once = single(image)(0)
    assert single(image)(1) == once and "<image>" not in once.text and once.likelihood is None
    request = CaptionRequest(prompt, max_tokens=6, count=3)
    sampled = open_model(str(model), request, "cpu")
    texts = [one.text for one in several(sampled(image), request)]
    assert len(set(texts)) == 3
    assert [one.text for one in several(sampled(image), request)] == texts


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a vision-language model"):
        open_model(str(tmp_path), CaptionRequest("?"), "cpu")
