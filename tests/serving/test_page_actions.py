"""What the page does for a client, without Gradio: fields to orders and back, files read, jobs followed."""

import asyncio
import base64
import io
import json
import shlex
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image
from serving import MODEL, SIDE, StubPainter, eventually

from pixart.generation.options import parse_options
from pixart.pipeline.metadata import Metadata
from pixart.pipeline.pictures import encode_picture
from pixart.pipeline.request import SETTINGS, Request, checked
from pixart.serving.drawing.queue import Queue
from pixart.serving.guarding.clients import Clients
from pixart.serving.limits import Limits
from pixart.serving.orders import Job, Order
from pixart.serving.page import show
from pixart.serving.page.actions import Actions
from pixart.serving.page.command_line import command_of
from pixart.serving.page.form import Asked, asked_of, values_of
from pixart.serving.page.reading import HEAD, parse_parameters, read_settings
from pixart.serving.refusal import Refusal
from pixart.serving.service import Offer, Service

OFFER = Offer("shapes", SIDE, 16, loras=("sketch", "ink"), controls=("edges",))
ODD = "it's \"a\" $(red) `circle`; --seed=5\n& 'so' on \\ \u2028 é"


@pytest.fixture
def painter() -> StubPainter:
    return StubPainter()


@pytest.fixture
def actions(painter: StubPainter) -> Any:
    queue = Queue(painter, Limits(pixels=512 * 512))
    yield Actions(Service(queue, OFFER, Clients(), Limits(pixels=512 * 512)))
    painter.release()
    queue.close()


def picture(format: str = "PNG", colour: str = "red") -> str:
    """A data URL of one."""
    out = io.BytesIO()
    Image.new("RGB", (64, 32), colour).save(out, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def refusal(values: dict[str, Any]) -> Refusal:
    with pytest.raises(Refusal) as raised:
        asked_of({"prompt": "a circle", **values})
    return raised.value


def test_empty_fields_leave_everything_to_the_model() -> None:
    empty = dict.fromkeys(("negative", "size", "steps", "guidance", "scheduler", "begin"), "")
    asked = asked_of({"prompt": "a circle", **empty, "apg": False, "loras": [], "count": ""})
    assert asked == Asked({"prompt": "a circle", "seed": None})
    assert asked_of({"prompt": "a circle", "without_plan": False}) == asked
    assert not asked_of({"prompt": "a circle", "without_plan": True}).fast


def test_fields_become_settings_of_their_kinds() -> None:
    asked = asked_of({
        "prompt": "a circle", "seed": " 18446744073709551615 ", "steps": "8", "guidance": "2,5",
        "guidance_end": "0.8", "apg": True, "count": "3", "format": "webp", "outpaint": "0,0,64,0",
        "begin": json.dumps({"image": picture(), "mask": None}),
        "loras": ["ink", "sketch"], "weights": "0.5, -1",
    })  # fmt: skip
    settings = dict(asked.settings)
    assert settings.pop("image") == picture()
    assert settings == {
        "prompt": "a circle", "seed": 2**64 - 1, "steps": 8, "guidance": 2.5, "apg": True,
        "guidance_interval": (0.0, 0.8), "outpaint": "0,0,64,0",
    }  # fmt: skip
    assert asked.loras == (("ink", 0.5), ("sketch", -1.0))
    assert (asked.count, asked.format) == (3, "webp")


def test_an_exact_size_stands_before_shape_and_resolution() -> None:
    fields = {"prompt": "", "aspect": "16:9", "resolution": "512"}
    assert {"aspect", "resolution"} <= {*asked_of(fields).settings}
    assert "aspect" not in asked_of({**fields, "size": "128"}).settings


def test_a_control_goes_by_its_picture() -> None:
    by = {"control_picture": json.dumps({"image": picture()}), "control_scale": "0.5"}
    asked = asked_of({"prompt": "", "control": "edges", **by, "control_end": "0.5"})
    assert asked.controls == ("edges",)
    assert asked.settings["control_scale"] == [0.5]
    assert asked.settings["control_interval"] == [(0.0, 0.5)]
    assert asked_of({"prompt": "", **by}).settings == {"prompt": "", "seed": None}
    assert refusal({"control": "edges"}).field == "control_image"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"seed": "-1"}, "seed"),
        ({"seed": "four"}, "seed"),
        ({"steps": "4.5"}, "steps"),
        ({"guidance": "much"}, "guidance"),
        ({"count": "no"}, "count"),
        ({"loras": ["ink"], "weights": "1, 2"}, "loras"),
        ({"loras": ["ink"], "weights": "x"}, "loras"),
        ({"begin": "{"}, "image"),
        ({"begin": "[1]"}, "image"),
        ({"begin": '{"image": {"path": "/etc/passwd"}}'}, "image"),
        ({"begin": "[" * 100_000}, "image"),
    ],
)
def test_what_no_setting_is_made_of_names_its_field(values: dict[str, Any], field: str) -> None:
    found = refusal(values)
    assert found.status == 400 and found.field == field and "\n" not in found.reason


def test_settings_of_a_request_come_back_out_of_the_fields() -> None:
    request = Request(
        ODD, negative="blue", seed=2**64 - 1, size="128x64", steps=2, guidance=2.5, scheduler="heun",
        timesteps=(999, 499),
        guidance_interval=(0.1, 0.8), guidance_rescale=0.3, apg=True, apg_eta=0.1, apg_momentum=-0.25,
        apg_norm=7.5, pag=3.0, pag_blocks="3-5", upscale="2x", upscale_strength=0.4, upscale_guidance=2.0,
        tiles=64,
    )  # fmt: skip
    assert Request(**asked_of(values_of(request)).settings) == request


def test_jobs_are_of_their_client_alone(actions: Actions) -> None:
    job = asyncio.run(actions.submit({"prompt": "a circle"}, "ann"))
    eventually(lambda: actions.jobs("ann")[0].has_ended)
    assert actions.jobs("bob") == []
    for call in (lambda: actions.cancel(job.id, "bob"), lambda: actions.read_job(job.id, 0, "bob")):
        with pytest.raises(Refusal) as raised:
            call()
        assert raised.value.status == 404
    assert actions.read_job(job.id, 0, "ann").values["prompt"] == "a circle"
    with pytest.raises(Refusal, match="not kept"):
        actions.read_job(job.id, 1, "ann")


def test_a_job_is_followed_until_it_has_ended(actions: Actions, painter: StubPainter) -> None:
    async def follow() -> list[Job]:
        painter.hold()
        seen = []
        async for job in actions.follow(await actions.submit({"prompt": "a circle"}, "ann")):
            seen.append(job)
            painter.let_step()
        return seen

    seen = asyncio.run(follow())
    assert not seen[0].has_ended and seen[-1].state == "done"
    assert [one.version for one in seen] == sorted({one.version for one in seen})
    assert any(one.preview and 0 < one.progress < 1 for one in seen)


def test_a_cancelled_job_ends_within_a_step(actions: Actions, painter: StubPainter) -> None:
    painter.hold()
    job = asyncio.run(actions.submit({"prompt": "a circle", "count": "2"}, "ann"))
    eventually(lambda: actions.jobs("ann")[0].state == "drawing")
    actions.cancel(job.id, "ann")
    eventually(lambda: actions.jobs("ann")[0].state == "cancelled")
    assert len(painter.drawn) == 1


def test_what_failed_is_refused_where_a_picture_was_wanted(
    actions: Actions, painter: StubPainter
) -> None:
    painter.faults["a circle"] = ValueError("prompt must be nicer")
    with pytest.raises(Refusal, match="nicer"):
        asyncio.run(actions.draw(Asked({"prompt": "a circle"}), "ann"))


def test_a_request_that_cannot_be_drawn_is_refused_and_nothing_waits(actions: Actions) -> None:
    for values, field in (
        ({"size": "100"}, "size"), ({"scheduler": "heun", "strength": "0.5"}, "strength"),
        ({"begin": json.dumps({"image": "data:image/png;base64,AAAA"})}, "image"),
        ({"begin": json.dumps({"image": "/etc/passwd"})}, "image"),
        ({"begin": json.dumps({"image": "http://169.254.169.254/"})}, "image"),
        ({"loras": ["../secret"]}, "loras"),
    ):  # fmt: skip
        with pytest.raises(Refusal) as raised:
            asyncio.run(actions.submit({"prompt": "a circle", **values}, "ann"))
        assert raised.value.field == field, raised.value.reason
    assert actions.jobs("ann") == []


def test_sizes_are_told(actions: Actions) -> None:
    assert actions.size_of("", "", "") == "128 × 128 pixels"
    assert actions.size_of("", "2:1", "256") == "352 × 176 pixels"
    assert actions.size_of("64x96", "2:1", "256") == "64 × 96 pixels"
    for size in ("65x32", "1024", "big"):
        with pytest.raises(Refusal) as raised:
            actions.size_of(size, "", "")
        assert raised.value.field == "size"


def test_the_command_line_says_every_setting() -> None:
    request = Request(
        ODD, negative="-x", seed=2**64 - 1, size="128x64", steps=2, guidance=2.5, scheduler="heun",
        timesteps=(999, 499),
        guidance_interval=(0.1, 0.8), guidance_rescale=0.3, apg=True, apg_eta=0.1, apg_momentum=-0.25,
        apg_norm=7.5, pag=3.0, pag_blocks="3-5", image="image", strength=0.5, mask="mask", invert_mask=False,
        mask_blur=3, fit="exact", control_image=("control-1", "control-2"), control_scale=(0.5, 1.0),
        control_preprocessor=("canny", "none"), control_interval=((0.0, 0.5), (0.1, 1.0)), batched=False,
        tile=64,
    )  # fmt: skip
    model = {
        **MODEL,
        "lora": ["ink:0.5", "my sketch"],
        "control": ["edges", "it's"],
        "dtype": "fp32",
    }
    command = command_of(Metadata(request, model, request, model))
    program, *words = shlex.split(command)
    assert (program, words[:2]) == ("python", ["-m", "pixart.generate"])
    options = parse_options("generate", words[2:])
    assert options.prompt == (ODD,)
    for name in SETTINGS:
        if name not in ("prompt", "height", "width"):
            given = {name: getattr(options, name)}
            if given[name] is not None:
                given[name] = checked(name, given[name])
            assert given[name] == getattr(request, name), name
    assert options.lora == ("ink:0.5", "my sketch") and options.control == ("edges", "it's")
    assert (options.model, options.dtype, options.ema) == ("shapes", "fp32", False)


def test_the_command_line_of_a_resolved_request_has_one_size() -> None:
    request = Request("--help", aspect="2:1", resolution="256")
    drawn = replace(request, aspect=None, resolution=None, height=176, width=352)
    words = shlex.split(command_of(Metadata(drawn, MODEL, request, MODEL)))[3:]
    options = parse_options("generate", words)
    assert options.size == "352x176" and options.prompt == ("--help",)


def drawn_file(request: Request, model: dict[str, Any], format: Any = "png") -> bytes:
    resolved = replace(request, size=None, height=64, width=64, steps=9, batched=True, tile=False)
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    return encode_picture(image, Metadata(resolved, model, request, model), format, None)


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_what_was_asked_comes_back_out_of_our_files(format: str) -> None:
    request = Request(ODD, seed=4, size="64", guidance=3.0)
    content = drawn_file(request, MODEL, format)
    read = read_settings(content if format == "webp" else content[:HEAD], OFFER)
    assert Request(**asked_of(read.values).settings) == request
    assert read.left == []


def test_settings_come_out_of_the_beginning_of_a_file_alone() -> None:
    for format in ("png", "jpg"):
        content = drawn_file(Request("a circle"), MODEL, format)
        assert read_settings(content[: len(content) // 2], OFFER).values["prompt"] == "a circle"


def test_of_another_model_come_the_settings_that_it_drew_with() -> None:
    read = read_settings(drawn_file(Request("x"), {**MODEL, "model": "sigma-1024"}), OFFER)
    assert read.values["steps"] == "9" and read.values["size"] == "64x64"
    assert "sigma-1024" in read.left[-1]


def test_loras_and_controls_come_back_by_their_names_here() -> None:
    request = Request("x", control_image=("a.png",), control_scale=(0.5,), image="b.png")
    model = {
        **MODEL,
        "lora": ["/home/me/ink.safetensors:0.5", "fire:2"],
        "control": ["c/edges", "d"],
    }
    request = replace(request, control_image=("a.png", "e.png"), control_scale=(0.5, 1.0))
    read = read_settings(drawn_file(request, model), OFFER)
    assert read.values["loras"] == ["ink"] and read.values["weights"] == "0.5"
    assert read.values["control"] == "edges" and read.values["control_scale"] == "0.5"
    left = " ".join(read.left)
    assert "choose it again" in left and "LoRA fire" in left and "Controls left out: d" in left
    assert "/home" not in left


def test_the_text_of_a1111_is_read() -> None:
    read = parse_parameters(
        "a red circle,\n  on white\nNegative prompt: blue,\nugly\nSteps: 20, Sampler: DPM++ 2M, "
        "Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: c0d1994c73, "
        'Lora hashes: "a: 1, Steps: 3", Denoising strength: 0.4, Version: v1.10'
    )
    assert read.values == {
        "prompt": "a red circle,\n  on white", "negative": "blue,\nugly", "steps": "20", "guidance": "7.0",
        "seed": "965400086", "size": "512x768", "strength": "0.4", "scheduler": "dpm-solver++-karras",
    }  # fmt: skip
    assert len(read.left) == 1 and "choose it again" in read.left[0]


def test_what_of_a1111_cannot_be_taken_is_said() -> None:
    read = parse_parameters("x\nSteps: 20, Sampler: LMS, CFG scale: hot, Seed: -5, Size: 8x8")
    assert read.values == {"prompt": "x", "negative": "", "steps": "20", "size": "8x8"}
    left = " ".join(read.left)
    assert "CFG scale was hot" in left and "Seed was -5" in left and "LMS" in left


def test_a_file_of_a1111_is_read(actions: Actions) -> None:
    from PIL.PngImagePlugin import PngInfo

    info, out = PngInfo(), io.BytesIO()
    info.add_text("parameters", "a circle\nSteps: 4, Sampler: Euler a, Seed: 3")
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=info)
    url = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    read = actions.read_file(url)
    assert read.values["scheduler"] == "euler-a" and read.values["seed"] == "3"


@pytest.mark.parametrize(
    "text", ["", "data:,", "data:image/png;base64,AAAA", "data:x;base64,%%%", "/etc/passwd"]
)
def test_a_file_that_is_no_picture_is_refused(actions: Actions, text: str) -> None:
    with pytest.raises(Refusal) as raised:
        actions.read_file(text)
    assert raised.value.status == 400 and "\n" not in raised.value.reason


def test_a_picture_without_settings_is_refused(actions: Actions) -> None:
    for format in ("PNG", "JPEG", "WEBP"):
        with pytest.raises(Refusal, match="carries no settings"):
            actions.read_file(picture(format))


def test_what_a_client_wrote_is_shown_as_text(actions: Actions) -> None:
    evil = "<img src=x onerror=alert(1)>\"'"
    job = asyncio.run(actions.draw(Asked({"prompt": evil, "seed": 3}), "ann"))
    for shown in (show.now(job), show.gallery([job])):
        assert "<img src=x" not in shown and "&lt;img src=x onerror=alert(1)&gt;" in shown
        assert f"/v1/jobs/{job.id}/images/0" in shown and "seed 3" in shown


def test_how_a_job_stands_is_said_in_words() -> None:
    order = Order((Request("a"), Request("b")))
    job = Job("1", "ann", order, 1, "waiting", 0.0, position=2)
    assert show.said(job) == "Waiting: 2 orders are before yours"
    assert show.said(replace(job, position=1)) == "Waiting: 1 order is before yours"
    assert show.said(replace(job, position=0)) == "Waiting: yours is next"
    drawing = replace(job, state="drawing", stage="denoise", picture=1, step=3, steps=20)
    assert show.said(drawing) == "Drawing: picture 2 of 2, step 3 of 20"
    assert show.said(replace(job, state="cancelled")) == "Cancelled"
    assert show.said(replace(job, state="failed", error="no memory")) == "Not drawn: no memory"


def test_the_gallery_has_the_newest_first_and_no_more_than_it_shows(actions: Actions) -> None:
    for seed in (1, 2):
        asyncio.run(actions.draw(Asked({"prompt": "x", "seed": seed * 10}, count=2), "ann"))
    shown = show.gallery(actions.jobs("ann"))
    assert shown.count("<li>") == 4
    order = [shown.index(f"seed {seed}<") for seed in (21, 20, 11, 10)]
    assert order == sorted(order)
    assert show.gallery(actions.jobs("ann") * 20).count("<li>") == show.SHOWN


@pytest.mark.parametrize("count", [0, 17])
def test_a_wrong_number_of_pictures_is_told_by_the_name_of_the_field(
    actions: Actions, count: int
) -> None:
    with pytest.raises(Refusal, match=f"count must be a whole number from 1 to 16, got '{count}'"):
        asyncio.run(actions.submit({"prompt": "a circle", "count": str(count)}, "ann"))


def test_a_picture_without_a_prompt_has_a_name_for_readers(actions: Actions) -> None:
    job = asyncio.run(actions.draw(Asked({"prompt": "", "seed": 1}), "ann"))
    for page in (show.now(job), show.gallery([job])):
        assert 'alt="No prompt"' in page and 'alt=""' not in page
