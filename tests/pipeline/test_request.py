"""Every sampling setting, spelt once: values, kinds, and what is refused in one line."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest

from pixart import resolution
from pixart.generation.options import SAMPLING, Options
from pixart.pipeline import limits
from pixart.pipeline.request import SETTINGS, VERSION, Request, passes

FULL = Request(
    "a cat", "fog", 7, steps=9, guidance=2, guidance_interval=(0.2, 0.8), scheduler="euler",
    height=64, width=128, batched=False, tile=256,
)  # fmt: skip


EDITED = Request(
    "a cat", image="x.png", strength=0.5, fit="exact", mask="alpha", invert_mask=True, mask_blur=4,
    outpaint="0,8,16,0", tiles=64, guidance_rescale=0.7, apg=True, apg_eta=0.5, apg_momentum=-0.3,
    apg_norm=2, pag=3, pag_blocks="12-14,20", control_image=("a", "b"), control_scale=(1, 0.5),
    control_preprocessor=("canny",), control_interval=((0, 0.5), (0.2, 1)),
)  # fmt: skip
ENLARGED = Request("", image="x.png", upscale="2k", upscale_strength=0.3)


@pytest.mark.parametrize(
    "request_",
    [Request("a cat"), FULL, EDITED, ENLARGED, Request("猫\0\n", size="64x32")],
    ids=["plain", "full", "edited", "enlarged", "hostile"],
)
def test_a_request_survives_json(request_: Request) -> None:
    text = json.dumps(request_.to_dict())
    assert Request.from_dict(json.loads(text)) == request_
    assert request_.to_dict()["version"] == VERSION


def test_a_request_may_be_a_key_whatever_is_in_it() -> None:
    assert len({FULL, EDITED, ENLARGED, replace(EDITED), Request.from_dict(EDITED.to_dict())}) == 3


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"outpaint": [0, 8, 16, 0], "image": "x"}, {"outpaint": "0,8,16,0"}),
        ({"pag_blocks": 14, "pag": 3}, {"pag_blocks": "14"}),
        ({"upscale": 2048}, {"upscale": "2048"}),
        ({"pag_blocks": [12, 14], "pag": 3}, {"pag_blocks": "12,14"}),
        ({"control_image": "a", "control_scale": 1}, {"control_image": ("a",), "control_scale": (1,)}),
        ({"control_image": ["a", "b"]}, {"control_image": ("a", "b")}),
        ({"control_image": "a", "control_interval": [0, 0.5]}, {"control_interval": ((0, 0.5),)}),
        ({"apg": False, "apg_eta": 0.5}, {"apg": False, "apg_eta": 0.5}),
    ],
)  # fmt: skip
def test_what_may_be_written_in_two_ways_is_kept_in_one(
    given: dict[str, Any], kept: dict[str, Any]
) -> None:
    one = Request.from_dict({"prompt": "a", **given})
    assert {name: getattr(one, name) for name in kept} == kept


def test_the_final_size_is_that_of_the_finished_picture() -> None:
    drawn = Request("a", height=64, width=96)
    assert drawn.final_size == (64, 96)
    assert replace(drawn, upscale="384x256").final_size == (256, 384)
    for one in (Request("a"), replace(drawn, upscale="2k"), Request("a", height=64)):
        with pytest.raises(ValueError, match="size must be known; Pipeline.resolve says"):
            one.final_size  # noqa: B018


def test_a_picture_alone_is_made_larger_and_anything_else_is_drawn() -> None:
    assert ENLARGED.only_enlarges
    assert not any(r.only_enlarges for r in (EDITED, replace(ENLARGED, strength=0.5), Request("a")))
    assert not Request("a", upscale="2k").only_enlarges


@pytest.mark.parametrize(
    ("request_", "off"),
    [
        (Request("a"), {"image", "strength", "apg", "apg_eta", "pag_blocks", "control_scale", "tiles"}),
        (EDITED, {"upscale", "upscale_strength"}),
        (Request("a", apg=False, pag=0), {"apg_eta", "pag_blocks"}),
    ],
)  # fmt: skip
def test_what_is_none_because_nothing_of_its_kind_is_done_is_off(
    request_: Request, off: set[str]
) -> None:
    assert off <= {name for name in SETTINGS if limits.is_off(request_, name)}
    for name in ("steps", "guidance", "scheduler", "size", "batched", "tile", "prompt"):
        assert not limits.is_off(request_, name)
    assert not limits.is_off(Request("a", image="x"), "strength")


def test_what_is_left_out_has_its_default() -> None:
    assert Request.from_dict({"prompt": "a cat"}) == Request("a cat")


def test_a_size_may_be_a_number_and_an_interval_a_list() -> None:
    one = Request.from_dict(
        {"prompt": "a", "size": 64, "guidance_interval": [0, 1], "upscale": 256}
    )
    assert (one.size, one.guidance_interval, one.upscale) == ("64", (0, 1), "256")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"sede": 1}, "unknown setting 'sede'; did you mean 'seed'?"),
        ({"guidance_scale": 1}, "unknown setting 'guidance_scale'; did you mean 'guidance'?"),
        ({"mask_image": "a.png"}, "unknown setting 'mask_image'; did you mean 'mask'?"),
        ({"xyzzy": 1}, "unknown setting 'xyzzy'; known are prompt, negative, seed"),
        ({"version": VERSION + 1}, f"version must be {VERSION}, got {VERSION + 1}"),
        ({"seed": True}, "seed must be an integer, got True"),
        ({"seed": 1.0}, "seed must be an integer, got 1.0"),
        ({"seed": -1}, "seed must be an integer from 0 to 2\\*\\*64 - 1, got -1"),
        ({"seed": 2**64}, "seed must be an integer from 0"),
        ({"prompt": 5}, "prompt must be text, got 5"),
        ({"prompt": "\ud800"}, "prompt must be UTF-8 text"),
        ({"negative": "\udcff"}, "negative must be UTF-8 text"),
        ({"negative": None}, "negative must be text, got None"),
        ({"steps": 0}, "steps must be an integer from 1 up, got 0"),
        ({"steps": "4"}, "steps must be an integer or none, got '4'"),
        ({"guidance": float("nan")}, "guidance must be a finite number from 0 up, got nan"),
        ({"guidance": -1}, "guidance must be a finite number from 0 up, got -1"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval must be 0 <= start <= end <= 1"),
        ({"guidance_interval": [0]}, "guidance_interval must be two numbers or none, got \\(0,\\)"),
        ({"guidance_interval": "01"}, "guidance_interval must be two numbers or none, got '01'"),
        ({"tile": 8}, "tile must be True, False, None or at least 16 pixels, got 8"),
        ({"tile": "no"}, "tile must be an integer or true or false or none, got 'no'"),
        ({"batched": 1}, "batched must be true or false or none, got 1"),
        ({"height": 64, "size": "64"}, "size must be given without height, got both"),
        (
            {"size": "64", "aspect": "1:1"},
            "size must be given without aspect and resolution, got 64",
        ),
        ({"size": 64, "resolution": "1k"}, "aspect and resolution, got 64 and resolution 1k"),
        ({"width": 64, "aspect": "1:1"}, "aspect must be given without width, got both"),
    ],
)
def test_what_no_model_can_draw_is_refused_in_one_line(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        Request.from_dict({"prompt": "a cat", **values})
    assert "\n" not in str(caught.value)


def test_a_prompt_must_be_given() -> None:
    with pytest.raises(ValueError, match="prompt must be given"):
        Request.from_dict({"seed": 1})


def test_the_command_line_has_every_setting_and_none_has_a_value_unless_given() -> None:
    assert {*SETTINGS} - {*SAMPLING} == {"prompt", "height", "width"}
    named = {one.name for one in fields(Options)}
    assert named >= {*SAMPLING}
    assert all(getattr(Options(), name) is None for name in SAMPLING)


def test_a_pass_takes_neighbours_that_differ_in_prompts_and_seed_alone() -> None:
    a, b = Request("a", seed=1), Request("b", "fog", seed=2)
    other = replace(a, steps=3)
    assert list(passes([a, b, a, other, a], 2)) == [[a, b], [a], [other], [a]]
    assert list(passes([a, b], 1)) == [[a], [b]]
    assert list(passes([], 4)) == []


def test_requests_are_read_without_torch() -> None:
    code = "import sys, pixart.pipeline.request, pixart.pipeline.metadata; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pixart.pipeline.request" in done.stdout.split()
    assert not {"torch", "tyro", "PIL"} & {*done.stdout.split()}


def test_sizes_of_a_request_are_bounded_as_those_of_a_command_line() -> None:
    assert limits.MAX_SIDE == resolution.MAX_SIDE
    for settings in ({"height": 8208}, {"width": 10**12}, {"tile": 10**9}, {"height": 0}):
        with pytest.raises(ValueError, match="must be .*8192 pixels"):
            Request("a", **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guidance must be a finite number"):
        Request("a", guidance=10**400)
