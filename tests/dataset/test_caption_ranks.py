"""Several captions of a picture, ordered by the likelihood that the model gives them."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pictures
import pytest
import torch
from caption_server import Server
from caption_server import server as server  # a fixture
from PIL import Image
from tiny_captioners import build_blip, build_llava

from pixart import data
from pixart.dataset import captioning
from pixart.dataset.annotations import read_lines
from pixart.dataset.captioning import (
    DRAWS,
    CaptionRequest,
    Written,
    caption_source,
    open_endpoint,
    open_model,
    several,
)
from pixart.dataset.images import ImageError
from pixart.dataset.sources import open_source
from pixart.endpoint import EndpointError


def ranked(prompt: str = "red circle", count: int = 5) -> CaptionRequest:
    return CaptionRequest(prompt, max_tokens=6, name="synth", count=count, is_ranked=True)


def evaluated(folder: Path, image: Image.Image, prompt: str, seed: int) -> tuple[str, float]:
    """A sampled caption, and its likelihood by one forward over all of it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    is_blip = type(model).__name__.startswith("Blip")
    if is_blip:
        inputs = processor(images=image, return_tensors="pt")
    else:
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt",
        )  # fmt: skip
    torch.manual_seed(seed)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=True)
        # BLIP begins with a token of its own, which it does not draw.
        begun = 1 if is_blip else inputs["input_ids"].shape[1]
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**whole).logits[0]
    log = logits.double().log_softmax(1)
    drawn = ids[0, begun:]
    each = [float(log[begun + place - 1, token]) for place, token in enumerate(drawn)]
    return processor.decode(drawn, skip_special_tokens=True).strip(), sum(each) / len(each)


@pytest.mark.parametrize("build", [build_blip, build_llava])
def test_likelihoods_are_those_of_a_direct_evaluation(
    tmp_path: Path, build: Callable[[Path], Path]
) -> None:
    folder = build(tmp_path / "model")
    prompt = "" if build is build_blip else "red circle"
    image = Image.open(io.BytesIO(pictures.png())).convert("RGB")
    write = open_model(str(folder), ranked(prompt), "cpu")(image)
    for seed in range(4):
        one = write(seed)
        text, likelihood = evaluated(folder, image, prompt, seed)
        # fp32 over six tokens: rounding of logits of order 1, 6e-8 each, through two layers.
        assert one.text == text and one.likelihood == pytest.approx(likelihood, abs=2e-5)


def test_the_likeliest_comes_first_and_the_run_goes_on(tmp_path: Path) -> None:
    folder, output = build_llava(tmp_path / "model"), tmp_path / "synth.jsonl"
    source = pictures.folder(tmp_path / "s", 2)
    command = ["caption", str(source), str(output), "--model", str(folder), "--name", "synth"]
    command += ["--count", "5", "--rank", "--prompt", "red", "--max-tokens", "6", "--device", "cpu"]
    assert data.main(command) == 0
    lines = read_lines(output)
    for line in lines:
        names = [f"synth.{number}" for number in range(1, 6)]
        assert list(line["captions"]) == list(line["likelihoods"]) == names
        assert len(set(line["captions"].values())) == 5
        values = list(line["likelihoods"].values())
        assert values == sorted(values, reverse=True) and values[0] > values[4]
    content = output.read_bytes()
    output.write_bytes(content[: content.index(b"\n") + 20])  # broken off in the second line
    assert data.main(command) == 0
    assert output.read_bytes() == content


def test_captions_differ_and_fewer_are_kept_where_there_are_no_more() -> None:
    tried: list[int] = []

    def write(seed: int) -> Written:
        tried.append(seed)
        return Written(["a", " a", "", "b\n"][seed % 4], -1.0 - seed % 4)

    assert several(write, ranked(count=2)) == [Written("a", -1.0), Written("b", -4.0)]
    assert tried == [0, 1, 2, 3]
    tried.clear()
    assert [one.text for one in several(write, ranked())] == ["a", "b"]
    assert tried == list(range(5 * DRAWS))
    with pytest.raises(ImageError, match="empty caption"):
        several(lambda _: Written(" ", -1.0), ranked())


def test_a_picture_with_fewer_captions_is_done(tmp_path: Path) -> None:
    source, output = pictures.folder(tmp_path / "s", 1), tmp_path / "o.jsonl"
    calls: list[int] = []

    def write(seed: int) -> Written:
        calls.append(seed)
        return Written("ab"[seed % 2], -2.0 + seed % 2)

    def run(request: CaptionRequest) -> Any:
        return caption_source(open_source(source), output, lambda _: write, request, 1)

    assert run(ranked()).new == 1
    (line,) = read_lines(output)
    assert line["captions"] == {"synth.1": "b", "synth.2": "a"} and line["asked"] == 5
    assert line["likelihoods"] == {"synth.1": -1.0, "synth.2": -2.0}
    calls.clear()
    assert run(ranked()).known == 1 and not calls
    assert run(ranked(count=2)).known == 1 and not calls


def test_ranked_captions_are_not_mixed_with_others(tmp_path: Path) -> None:
    source, output = pictures.folder(tmp_path / "s", 1), tmp_path / "o.jsonl"
    old = {"path": "0.png", "captions": {"synth.1": "a", "synth.2": "b"}}
    output.write_text(json.dumps(old) + "\n")
    with pytest.raises(
        ValueError, match=r"must hold ranked captions.*give another OUTPUT or --name"
    ):
        caption_source(
            open_source(source), output, lambda _: lambda n: Written(str(n), -1.0), ranked(), 1
        )
    assert read_lines(output) == [old]


def with_likelihoods(text: str, *each: float) -> dict[str, Any]:
    answer = Server.completion(text)
    answer["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": n} for n in each]}
    return answer


def test_an_endpoint_ranks_by_its_log_likelihoods(tmp_path: Path, server: Server) -> None:
    each = {0: (-3.0, -1.0), 1: (-0.5,), 2: (-9.0, 0.0, 0.0)}
    server.answer = lambda body: (
        200,
        with_likelihoods(f"draw {body['seed']}", *each[body["seed"]]),
    )
    output = tmp_path / "o.jsonl"
    captioner = open_endpoint(server.address, "vlm", ranked(count=3))
    source = open_source(pictures.folder(tmp_path / "s", 1))
    caption_source(source, output, captioner, ranked(count=3), 1)
    (line,) = read_lines(output)
    assert line["captions"] == {"synth.1": "draw 1", "synth.2": "draw 0", "synth.3": "draw 2"}
    assert line["likelihoods"] == {"synth.1": -0.5, "synth.2": -2.0, "synth.3": -3.0}
    assert all(body["logprobs"] is True and body["temperature"] == 1.0 for body in server.asked)


@pytest.mark.parametrize(
    "answer",
    [
        (200, Server.completion("no likelihoods")),
        (200, with_likelihoods("none")),
        (200, with_likelihoods("not finite", -math.inf)),
        (200, Server.completion("x") | {"choices": [{"message": {"content": "x"}, "logprobs": None}]}),
        (400, {"error": "logprobs are not supported"}),
    ],
)  # fmt: skip
def test_an_endpoint_without_likelihoods_is_one_clear_line(
    server: Server, answer: tuple[int, Any]
) -> None:
    server.answer = lambda _: answer
    write = open_endpoint(server.address, "vlm", ranked())(Image.new("RGB", (8, 8)))
    with pytest.raises(
        EndpointError, match=r"\(logprobs\) for --rank, it does not; leave --rank out"
    ):
        write(0)


def test_a_model_without_likelihoods_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlavaForConditionalGeneration

    folder = build_llava(tmp_path / "model")
    generate = LlavaForConditionalGeneration.generate

    def bare(self: Any, **options: Any) -> Any:
        return generate(self, **options).sequences

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", bare)
    write = open_model(str(folder), ranked(), "cpu")(Image.new("RGB", (32, 32)))
    with pytest.raises(ValueError, match="must give likelihoods for --rank"):
        write(0)


def test_one_caption_has_no_order() -> None:
    with pytest.raises(ValueError, match="--rank must have captions to order, got --count 1"):
        ranked(count=1)


def test_likelihoods_that_are_no_numbers_reject_the_picture() -> None:
    """A model that overflows gives NaN, which JSON cannot hold and nothing orders."""
    logits = (torch.tensor([[0.0, math.nan]]),)
    given = SimpleNamespace(logits=logits, sequences=torch.tensor([[5, 1]]))
    with pytest.raises(ImageError, match="gives a likelihood of nan"):
        captioning._likelihood(given, "a model")


@pytest.mark.parametrize("likelihoods", [5, None, ["synth.1"], "synth.1"])
def test_lines_whose_likelihoods_are_none_are_not_ranked(
    tmp_path: Path, likelihoods: object
) -> None:
    items = list(open_source(pictures.folder(tmp_path / "s", 1)))
    line = {
        "path": getattr(items[0], "key", ""),
        "captions": {"synth.1": "a"},
        "likelihoods": likelihoods,
    }
    output = tmp_path / "o.jsonl"
    output.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="must hold ranked captions with --rank"):
        caption_source(items, output, lambda image: lambda seed: Written("b"), ranked(count=3), 1)
