"""Texts of strangers that would keep a server busy for hours: each is answered as any other is."""

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from serving import SIDE

from pixart.config import EMBEDDED
from pixart.files import near, parse_json
from pixart.pipeline.pictures import GALLERY_KEY
from pixart.pipeline.request import SETTINGS, Request, check_keys
from pixart.serving.a1111.fields import Text
from pixart.serving.a1111.infotext import infotext, pairs_of
from pixart.serving.a1111.reading import is_model, order_from
from pixart.serving.calls.sent_pictures import bytes_of_text
from pixart.serving.limits import Limits
from pixart.serving.page.reading import parse_parameters
from pixart.serving.refusal import Refusal
from pixart.serving.service import Offer, Service

MANY = 300_000
SERVICE = Service(None, Offer(EMBEDDED, SIDE, 16, controls=("edges",)), None, Limits())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "data:" + "a" * MANY,
        "data:image/" + "a" * MANY + ";base64,",
        "data:" + ";a=a" * MANY + ";base64,AAAA",
        " " * MANY + "!",
    ],
    ids=["no end", "long kind", "parameters", "spaces"],
)
def test_a_text_that_is_no_picture_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="must be the picture itself"):
        bytes_of_text(text, "image")


@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "DATA:;base64,", "data:image/png;charset=utf-8;base64,", ""]
)
def test_a_data_url_is_a_picture(head: str) -> None:
    content = b"\x89PNG\r\n\x1a\nmore"
    assert bytes_of_text(head + base64.b64encode(content).decode(), "image") == content


@pytest.mark.parametrize(
    "end",
    [
        " " * MANY + "x",
        "a" * MANY,
        "a " * MANY,
        '"\\' * MANY,
        'a:"' * MANY,
        "," * MANY,
        ",a:" * MANY,
    ],
    ids=["spaces", "letters", "words", "escapes", "quotes", "commas", "names"],
)
def test_settings_in_a_picture_are_read_once(end: str) -> None:
    line = f"Steps: 7, Seed: 5, Size: 64x64, {end}"
    assert dict(pairs_of(line))["Seed"] == "5"
    assert parse_parameters(f"a circle\n{line}").values["seed"] == "5"


def test_a_value_in_quotes_may_hold_commas() -> None:
    line = 'Steps: 7, Lora hashes: "a: b, c: \\"d\\"", odd, Seed: 5'
    assert dict(pairs_of(line)) == {"Steps": "7", "Lora hashes": '"a: b, c: \\"d\\""', "Seed": "5"}


def test_a_picture_that_says_much_is_read() -> None:
    content, info = io.BytesIO(), PngInfo()
    info.add_text(GALLERY_KEY, "a circle\nSteps: 7, Seed: 5, Size: 1x1, " + " " * 900_000 + "x")
    Image.new("RGB", (1, 1)).save(content, "PNG", pnginfo=info)
    assert infotext(content.getvalue())[1]["Seed"] == "5"


@pytest.mark.parametrize("name", [" " * MANY + "x", "[" * MANY, "a [" + "0" * MANY])
def test_a_long_name_is_no_model(name: str) -> None:
    assert not is_model(name, SERVICE)


@pytest.mark.parametrize("name", [EMBEDDED, f"{EMBEDDED} [0a1b2c]", f"{EMBEDDED}.safetensors []"])
def test_a_model_may_be_named_with_its_hash(name: str) -> None:
    assert is_model(name, SERVICE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sampler_name": "e" * MANY}, "sampler_name must be one of"),
        ({"e" * MANY: 1}, "unknown field"),
        ({"prompt": f"<lora:{'e' * MANY}:1>"}, "must name LoRAs"),
    ],
    ids=["sampler", "field", "lora"],
)
def test_near_names_are_looked_for_in_the_beginning(changes: Any, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        order_from(Text(**{"prompt": "a circle", **changes}), SERVICE)


def test_a_long_setting_is_unknown() -> None:
    with pytest.raises(ValueError, match="unknown setting"):
        check_keys(["e" * 10 * MANY], SETTINGS)


def test_a_near_name_is_found() -> None:
    assert near("promt", SETTINGS) == "prompt"
    assert near("xyzzy", SETTINGS) is None


def test_a_key_that_comes_twice_among_many_is_found() -> None:
    pairs = ", ".join(f'"{number}": 0' for number in [*range(100_000), 99_999])
    with pytest.raises(ValueError, match="'99999' twice"):
        parse_json(f"{{{pairs}}}", "body", 10 * MANY, unique=True)


def test_lists_of_blocks_are_short() -> None:
    with pytest.raises(ValueError, match="pag_blocks must be 1000 characters at most"):
        Request("a circle", pag=1.0, pag_blocks="0-999," * MANY)


@pytest.mark.parametrize("number", [10**300, 10**400, float("inf"), float("nan"), True, "1"])
def test_numbers_of_a_unit_are_numbers(number: Any) -> None:
    units = {"controlnet": {"args": [{"image": "AAAA", "model": "edges", "weight": number}]}}
    with pytest.raises(Refusal, match="weight of a ControlNet unit must be a number"):
        order_from(Text(prompt="a circle", alwayson_scripts=units), SERVICE)


def test_a_number_of_a_unit_may_have_many_digits() -> None:
    body = json.loads(
        '{"args": [{"image": "AAAA", "model": "edges", "weight": 1%s}]}' % ("0" * 400)
    )
    with pytest.raises(Refusal, match="weight"):
        order_from(Text(prompt="a circle", alwayson_scripts={"controlnet": body}), SERVICE)
