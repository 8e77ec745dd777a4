"""Orders of what clients send: every setting, by name and in range, with pictures that are sent and never
named."""

import base64
import io
import math
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from pixart.pipeline.request import SETTINGS, Request, checked
from pixart.serving.calls.schemas import (
    RANGES,
    SEEDS,
    order_of,
    other_names,
    ours,
    parsed,
    settings_model,
    settings_of,
    submit,
)
from pixart.serving.limits import Limits, check_resolved
from pixart.serving.refusal import Refusal
from pixart.serving.service import Offer, Service

MODEL = settings_model("Model", **other_names())
OFFER = Offer("shapes", native=128, multiple=16, loras=("ink", "pen"), controls=("edges", "depth"))
VALUES: dict[str, Any] = {
    "prompt": "x", "negative": "y", "seed": 3, "size": "128x64", "aspect": "1:1", "resolution": "256",
    "height": 64, "width": 64, "steps": 3, "timesteps": [999, 499, 9], "guidance": 2.5,
    "guidance_interval": [0.1, 1],
    "scheduler": "ddim", "image": "aGk=", "strength": 0.5, "fit": "crop", "mask": "alpha",
    "invert_mask": True, "mask_blur": 2, "outpaint": [1, 2, 3, 4], "upscale": "2x",
    "upscale_strength": 0.2, "upscale_guidance": 1, "tiles": 64, "guidance_rescale": 0.3, "apg": True,
    "apg_eta": 0, "apg_momentum": -0.5, "apg_norm": 15, "pag": 3, "pag_blocks": [1, 2],
    "control_image": ["aGk="], "control_preprocessor": "canny", "control_scale": [0.5, 1],
    "control_interval": [0, 0.5], "kv_schedule": "0-2:2@1000-500", "reuse_blocks": "1:3,5",
    "batched": False, "tile": 512,
}  # fmt: skip


class Queue:
    """Takes whatever it is told to."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault

    def submit(self, order: Any, owner: str) -> Any:
        if self.fault is not None:
            raise self.fault
        return order, owner


def service(limits: Limits | None = None, queue: Any = None) -> Service:
    return Service(queue or Queue(), OFFER, None, limits or Limits())  # type: ignore[arg-type]


def picture(side: int = 32) -> Image.Image:
    return Image.new("RGB", (side, side), "red")


def png(side: int = 32) -> bytes:
    content = io.BytesIO()
    picture(side).save(content, "PNG")
    return content.getvalue()


def refusal(settings: dict[str, Any], **how: Any) -> Refusal:
    with pytest.raises(Refusal) as raised:
        order_of(settings, service(how.pop("limits", None)), **how)
    return raised.value


def test_a_model_has_every_setting_and_takes_each() -> None:
    assert VALUES.keys() == {*SETTINGS}
    assert parsed(MODEL, VALUES) == VALUES


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_told_in_words_without_dashes(name: str) -> None:
    text = MODEL.model_json_schema()["properties"][name]["description"]
    assert text and "--" not in text


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "prompt"])
def test_null_is_what_is_left_out(name: str) -> None:
    assert parsed(MODEL, {"prompt": "x", name: None})
    if name != "seed":
        left_out = order_of({"prompt": "x", "seed": 1}, service())
        assert order_of({"prompt": "x", "seed": 1, name: None}, service()) == left_out


@pytest.mark.parametrize("name", RANGES)
def test_ranges_in_the_document_are_those_of_a_request(name: str) -> None:
    kind = int if "int" in str(MODEL.model_fields[name].annotation) else float
    for end, value in RANGES[name].items():
        if name == "seed" and end == "ge":
            continue  # -1 is by chance, and no request's
        beyond = value + (1 if end == "le" else -1) * (1 if kind is int else 0.01)
        if end != "gt":
            assert checked(name, value) == value
        with pytest.raises(ValueError, match=name):
            checked(name, value if end == "gt" else beyond)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"prompt": "x", "steps": "5"}, "steps"),
        ({"prompt": "x", "steps": True}, "steps"),
        ({"prompt": "x", "steps": math.inf}, "steps"),
        ({"prompt": "x", "guidance": math.nan}, "guidance"),
        ({"prompt": "x", "seed": 2**64}, "seed"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x", "control_scale": [1, "a"]}, "control_scale"),
        ({"prompt": "x", "image": {"path": "/etc/passwd"}}, "image"),
        ({"prompt": "x", "num_inference_steps": "5"}, "num_inference_steps"),
    ],
)
def test_values_of_another_kind_are_refused_by_their_field(
    values: dict[str, Any], field: str
) -> None:
    with pytest.raises(Refusal) as raised:
        parsed(MODEL, values)
    assert (raised.value.status, raised.value.field) == (400, field)
    assert "\n" not in raised.value.reason


def test_an_unknown_setting_is_refused_with_the_near_one() -> None:
    with pytest.raises(Refusal, match="'stepz'; did you mean 'steps'") as raised:
        parsed(MODEL, {"prompt": "x", "stepz": 5})
    assert raised.value.code == "unknown_parameter"


@pytest.mark.parametrize("body", [[], "x", None, 3])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(Refusal, match="must be an object"):
        parsed(MODEL, body)


def test_names_of_other_programs_become_ours_and_are_given_once() -> None:
    assert ours({"num_inference_steps": 4, "guidance_scale": 2}) == {"steps": 4, "guidance": 2}
    with pytest.raises(Refusal, match="steps must be given once"):
        ours({"steps": 4, "num_inference_steps": 4})


def test_pictures_have_the_seeds_from_the_first() -> None:
    order = order_of({"prompt": "x", "seed": 7}, service(), n=3)
    assert [request.seed for request in order.requests] == [7, 8, 9]


@pytest.mark.parametrize("seed", [{}, {"seed": None}, {"seed": -1}])
def test_without_a_seed_one_is_drawn_by_chance(seed: dict[str, Any]) -> None:
    seeds = {order_of({"prompt": "x", **seed}, service()).requests[0].seed for _ in range(8)}
    assert len(seeds) > 1 and max(seeds) < SEEDS


@pytest.mark.parametrize("sent", [picture(), png(), base64.b64encode(png()).decode()])
def test_pictures_are_opened_and_named_by_us(sent: Any) -> None:
    settings = {"prompt": "x", "image": sent, "mask": sent, "control_image": [sent, sent]}
    order = order_of(settings, service(), controls=("edges", "depth"))
    [request] = order.requests
    assert (request.image, request.mask) == ("image", "mask")
    assert request.control_image == ("control-1", "control-2")
    assert {one.size for one in order.pictures.values()} == {(32, 32)}
    assert order.pictures.keys() == {"image", "mask", "control-1", "control-2"}


def test_alpha_is_a_mask_and_no_picture() -> None:
    order = order_of({"prompt": "x", "image": picture(), "mask": "alpha"}, service())
    assert order.requests[0].mask == "alpha" and order.pictures.keys() == {"image"}


@pytest.mark.parametrize("field", ["image", "mask", "control_image"])
@pytest.mark.parametrize("name", ["/etc/passwd", "http://localhost/a.png", "image", "../a.png"])
def test_no_path_and_no_url_is_followed(field: str, name: str) -> None:
    settings = {"prompt": "x", "image": picture(), field: name}
    refused = refusal(settings, controls=("edges",) if field == "control_image" else ())
    assert (refused.status, refused.field) == (400, field)


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"loras": [("ink/../pen", 1)]}, "loras"),
        ({"loras": [("ink", 1), ("ink", 1)]}, "loras"),
        ({"loras": [("ink", math.nan)]}, "loras"),
        ({"loras": [("ink", "1")]}, "loras"),
        ({"controls": ["other"]}, "controls"),
        ({"controls": ["edges"]}, "controls"),
        ({"preview_every": -1}, "preview_every"),
        ({"quality": 90}, "quality"),
        ({"quality": 101, "format": "jpg"}, "quality"),
    ],
)
def test_orders_beyond_the_offer_are_refused(how: dict[str, Any], field: str) -> None:
    assert refusal({"prompt": "x"}, **how).field == field


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"prompt": "x" * 21}, "prompt"),
        ({"negative": "x" * 21}, "negative"),
        ({"steps": 11}, "steps"),
        ({"timesteps": [*range(11, 0, -1)]}, "timesteps"),
        ({"height": 64, "width": 128}, "height"),
    ],
)
def test_too_much_is_refused_before_a_model_is_asked(settings: dict[str, Any], field: str) -> None:
    limits = Limits(prompt=20, steps=10, pixels=64 * 64)
    refused = refusal({"prompt": "x", **settings}, limits=limits)
    assert (refused.status, refused.code, refused.field) == (400, "over_limit", field)


def test_the_pictures_of_an_order_are_bounded_together() -> None:
    limits = Limits(picture_pixels=32 * 32 + 1)
    assert order_of({"prompt": "x", "image": picture()}, service(limits))
    refused = refusal({"prompt": "x", "image": picture(), "mask": picture()}, limits=limits)
    assert (refused.status, refused.field) == (413, "mask")


@pytest.mark.parametrize("field", ["prompt", "negative"])
def test_text_has_no_nul(field: str) -> None:
    assert refusal({"prompt": "x", field: "a\0b"}).field == field


def test_settings_that_exclude_each_other_are_refused_by_name() -> None:
    assert refusal({"prompt": "x", "strength": 0.5}).field == "strength"
    assert refusal({"prompt": "x", "size": "64", "height": 64}).field == "size"


def test_what_the_queue_finds_wrong_is_the_clients_fault() -> None:
    fault = ValueError("size must be a multiple of 16, got 100")
    with pytest.raises(Refusal) as raised:
        submit({"prompt": "x"}, service(queue=Queue(fault)), "ann")
    assert (raised.value.status, raised.value.field) == (400, "size")


def test_a_body_is_submitted_with_loras_and_controls() -> None:
    values = {
        "prompt": "x", "n": 2, "loras": {"ink": 0.5}, "controls": "edges", "control_image": png(),
    }  # fmt: skip
    order, owner = submit(values, service(), "ann", format="webp")  # type: ignore[misc]
    assert (order.loras, order.controls, len(order.requests)) == ((("ink", 0.5),), ("edges",), 2)
    assert (order.format, owner) == ("webp", "ann")


def test_settings_of_a_drawn_picture_are_taken_again() -> None:
    [request] = order_of({"prompt": "x", "seed": 5, "image": picture()}, service()).requests
    settings = settings_of(replace(request, strength=0.5, height=64, width=64))
    assert "image" not in settings and parsed(MODEL, settings)
    again = order_of({**settings, "image": picture()}, service())
    assert again.requests == (replace(request, strength=0.5, height=64, width=64),)


RESOLVED = Request("x", steps=10, height=1024, width=1024)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, "size"),
        ({"height": 256, "width": 256, "upscale": "1024x1024"}, "upscale"),
        ({"height": 256, "width": 256, "steps": 31}, "steps"),
        ({"height": 64, "width": 64, "upscale": "512x512", "upscale_strength": 0.8}, "steps"),
        ({"height": 256, "width": 512, "tile": False}, "tile"),
        ({"height": 256, "width": 512, "tile": 512}, "tile"),
        ({"height": 512, "width": 512, "tile": 16, "image": "image"}, None),
    ],
)
def test_too_much_is_refused_once_a_model_has_resolved_it(
    changes: dict[str, Any], field: str | None
) -> None:
    limits = Limits(pixels=600 * 600, steps=30, undivided=256 * 256)
    if field is None:
        check_resolved([replace(RESOLVED, **changes)], limits)
        return
    with pytest.raises(Refusal) as raised:
        check_resolved([replace(RESOLVED, **changes)], limits)
    assert (raised.value.status, raised.value.field) == (400, field)


def test_a_picture_is_not_cut_into_a_million_parts() -> None:
    large = replace(RESOLVED, height=4096, width=4096, tile=16)
    with pytest.raises(Refusal, match="tile must make at most 4096 parts"):
        check_resolved([large], Limits())
