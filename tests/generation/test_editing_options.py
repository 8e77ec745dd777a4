"""Pictures from pictures on the command line: options, lists, sweeps, names, labels, and what files say."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stub_pipeline import StubPipeline

from pixart.files import sha256_of
from pixart.generate import main
from pixart.generation import sheet
from pixart.generation.jobs import plan
from pixart.generation.options import Options, parse_options
from pixart.generation.sheet import Cell
from pixart.pipeline.limits import BUCKET, EXACT_SIZE
from pixart.pipeline.metadata import CHOICES, Metadata
from pixart.pipeline.pictures import read_metadata
from pixart.pipeline.request import SETTINGS, Request


@pytest.fixture(autouse=True)
def pictures(elsewhere: None) -> None:
    Path("list/m").mkdir(parents=True)
    for place, name in enumerate(("photo", "other", "mask", "edges", "list/photo", "list/m/mask",
                                  "list/mask", "list/edges", "list/other")):  # fmt: skip
        Image.new("RGBA", (48, 32), (20 * place, 200, 9, 200)).save(f"{name}.png")


def at(name: str) -> str:
    return os.path.abspath(name)


@pytest.mark.parametrize(
    "words, settings",
    [
        (["--apg", "a cat"], {"apg": True}),
        (["a cat", "--apg"], {"apg": True}),
        (["--no-apg", "a cat"], {"apg": False}),
        (["--apg", "True", "a cat"], {"apg": True}),
        (["--mask", "m", "--invert-mask", "a cat", "--image", "x"],
         {"image": "x", "mask": "m", "invert_mask": True}),
        (["--no-invert_mask", "a cat"], {"invert_mask": False}),
        (["--outpaint", "0,8,16,0", "a cat"], {"outpaint": "0,8,16,0"}),
        (["--control-image", "A", "--control-image", "B", "a cat"], {"control_image": ("A", "B")}),
        (["--control-scale", "1", "--control-scale", "0.5", "a cat"], {"control_scale": (1.0, 0.5)}),
        (["--control-interval", "0", "1", "a cat"], {"control_interval": ((0.0, 1.0),)}),
        (["--control-preprocessor", "canny", "a cat"], {"control_preprocessor": ("canny",)}),
        (["--control", "A", "--control", "B", "a cat"], {"control": ("A", "B")}),
        (["--preprocessor-weights", "hed=x", "a cat"], {"preprocessor_weights": ("hed=x",)}),
        (["--batched", "a cat"], {"batched": True}),
        (["--preview", "--apg", "a cat"], {"preview": 1, "apg": True}),
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_are_read_as_people_type_them_and_leave_the_prompt(
    words: list[str], settings: dict[str, Any]
) -> None:
    assert parse_options("generate", words) == Options(prompt=("a cat",), **settings)


def test_what_follows_two_dashes_is_a_prompt() -> None:
    assert parse_options("generate", ["--", "--apg"]).prompt == ("--apg",)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--strength", "much"], "--strength must be a number, got 'much'"),
        (["--control-scale", "much"], "--control-scale must be a number, got 'much'"),
        (["--control-interval", "0", "x"], "--control-interval must be 2 numbers, got ['0', 'x']"),
        (["--imag", "x"], "unknown option --imag; did you mean --image"),
        (["--apg=maybe"], "--apg must be one of False, True, got 'maybe'"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_an_option_that_cannot_be_read_is_named(words: list[str], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_options("generate", ["a cat", *words])
    assert reason in str(caught.value)


def test_help_shows_what_belongs_together(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options("generate", ["--help"])
    shown = capsys.readouterr().out
    places = [shown.index(title) for title in ("input-picture options", "upscaling options",
              "guiding options", "controls options", "previews options")]  # fmt: skip
    assert places == sorted(places)
    assert places[0] < shown.index("--mask-blur") < places[1] < shown.index("--tiles") < places[2]
    assert places[2] < shown.index("--pag-blocks") < places[3] < shown.index("--control-scale")


def test_a_picture_is_made_larger_without_a_prompt(stub: StubPipeline, capsys: Any) -> None:
    assert main(["--image", "photo.png", "--upscale", "2x", "--json"]) == 0
    [image] = json.loads(capsys.readouterr().out)["images"]
    assert image["file"] == "outputs/photo-0.png" and (image["width"], image["height"]) == (96, 64)
    assert image["settings"]["strength"] is None and image["settings"]["image"] == at("photo.png")
    assert image["inputs"] == {at("photo.png"): sha256_of(Path("photo.png"))}
    assert main(["--upscale", "2x", "--sweep", "image=photo.png,other.png", "--output", "two"]) == 0
    assert sorted(os.listdir("two")) == ["other-0.png", "photo-0.png"]


@pytest.mark.parametrize(
    "words",
    [
        ["--image", "photo.png"],
        ["--image", "photo.png", "--upscale", "2x", "--strength", "0.5"],
        ["--upscale", "2x"],
    ],
    ids=" ".join,
)
def test_a_prompt_is_required_elsewhere(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(words) == 2
    assert "give one of: prompts, --prompts FILE" in capsys.readouterr().err
    assert main(["", *words]) == 2
    assert stub.opened == 0


def lines(*values: dict[str, Any], folder: str = "list") -> Path:
    path = Path(folder) / "p.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, values)))
    return path


def requests(**options: Any) -> list[Request]:
    return [job.request for job in plan(Options(**options))[0]]


def test_pictures_of_a_list_lie_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", os.getcwd())
    path = lines(
        {"prompt": "a", "image": "photo.png", "mask": "m/mask.png", "strength": 0.5},
        {"prompt": "b", "image": at("photo.png"), "mask": "alpha"},
        {"image": "~/photo.png", "upscale": "2k"},
    )
    found = requests(prompts=path)
    assert (found[0].image, found[0].mask) == (at("list/photo.png"), at("list/m/mask.png"))
    assert (found[1].image, found[1].mask) == (at("photo.png"), "alpha")
    assert (found[2].image, found[2].prompt) == (at("photo.png"), "")
    path = lines(
        {"prompt": "a", "control_image": ["edges.png", "../edges.png"], "control_scale": 0},
        {"prompt": "b", "control_image": ["edges.png"] * 2, "control_interval": [0, 0.5]},
    )
    found = requests(prompts=path, control=("a", "b"))
    assert found[0].control_image == (at("list/edges.png"), at("edges.png"))
    assert found[0].control_scale == (0,) and found[1].control_interval == ((0, 0.5),)


def test_a_line_adds_to_the_options() -> None:
    path = lines({"prompt": "a", "strength": 0.3}, {"prompt": "b", "mask": "mask.png"})
    found = requests(prompts=path, image="photo.png")
    assert [one.image for one in found] == [at("photo.png")] * 2, "of options: where one stands"
    assert (found[0].strength, found[1].mask) == (0.3, at("list/mask.png"))


def test_a_list_may_make_pictures_larger() -> None:
    path = lines({"image": "photo.png"}, {"image": "other.png", "prompt": "a cat"})
    assert [one.prompt for one in requests(prompts=path, upscale="2x")] == ["", "a cat"]
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1: prompt must not be empty"):
        requests(prompts=path)


def swept(*sweeps: str, **options: Any) -> list[str]:
    jobs, _ = plan(Options(prompt=("a cat",), sweep=sweeps, output=Path("out"), **options))
    return [job.path.name for job in jobs]


def test_names_say_what_is_swept() -> None:
    assert swept("image=photo.png,other.png", "strength=0.3,0.6")[1:3] == [
        "a-cat-0-image-photo-strength-0.6.png", "a-cat-0-image-other-strength-0.3.png",
    ]  # fmt: skip
    assert swept("apg=true,false") == ["a-cat-0-apg-true.png", "a-cat-0-apg-false.png"]
    assert swept("control_scale=0,1", control_image=("edges.png",), control=("c",)) == [
        "a-cat-0-control-scale-0.0.png", "a-cat-0-control-scale-1.0.png",
    ]  # fmt: skip
    assert swept("control_interval=0:1,0:0.5", control_image=("edges.png",), control=("c",))[1] == (
        "a-cat-0-control-interval-0.0-0.5.png"
    )


@pytest.mark.parametrize(
    "output, options, name",
    [
        ("{image}-{strength:.1f}.png", {"image": "a b/Ph ÖTO.x.png", "strength": 0.5}, None),
        ("{image}-{mask}.png", {"image": "photo.png", "mask": "alpha"}, "photo-alpha.png"),
        ("{control_image}.png", {"control_image": ("list/photo.png", "edges.png"), "control": ("a", "b")},
         "photo-edges.png"),
        ("{upscale}-{apg}-{strength}.png", {}, "none-none-none.png"),
        ("{apg_eta}-{pag_blocks}.png", {"apg": False, "pag": 0.0}, "none-none.png"),
    ],
)  # fmt: skip
def test_a_template_takes_pictures_by_their_names(
    output: str, options: dict[str, Any], name: str | None
) -> None:
    Path("a b").mkdir()
    Path("photo.png").rename("a b/Ph ÖTO.x.png") if name is None else None
    [job], _ = plan(Options(prompt=("a cat",), output=Path(output), **options))
    if name is None:
        assert job.path.name.endswith("-0.5.png") and job.path.name.isascii()
        assert job.path.parent == Path() and " " not in job.path.name
    else:
        assert str(job.path) == name


def test_what_a_model_fills_in_is_in_names(stub: StubPipeline) -> None:
    words = ["a cat", "--image", "photo.png", "--output", "{image}-{strength:.2f}-{fit}.png"]
    assert main(words) == 0
    assert Path("photo-0.60-crop.png").is_file()


def test_labels_of_a_sheet_say_what_pictures_are_drawn_from() -> None:
    one = Request(
        "a cat", image="/x/photo.png", strength=0.6, height=64, width=64, upscale="128x96", apg=True,
        control_image=("a.png", "b.png"), control_scale=(1.0, 0.5), control_interval=((0.0, 0.5),),
    )  # fmt: skip
    title, [first, second] = sheet._describe(
        [
            Cell(Path(), replace(one, image=image), {"image": image})
            for image in ("/x/photo.png", "b")
        ]
    )
    assert (first, second) == ("image photo", "image b")
    assert title.splitlines()[1] == (
        "seed 0, strength 0.6, apg yes, control image a and b, control scale 1 and 0.5, "
        "control interval 0 to 0.5, 128x96"
    )


def test_labels_know_every_setting() -> None:
    elsewhere = {"prompt", *EXACT_SIZE, *BUCKET, "upscale"}  # in the title, and as pixels
    assert {*SETTINGS} - {*sheet._NAMED} == elsewhere | {*CHOICES}


def drawn_from(stub: StubPipeline, *words: str) -> Metadata:
    assert main(["a cat", *words, "--output", "x.png", "--overwrite"]) == 0
    return read_metadata(Path("x.png"))


def test_a_file_says_which_pictures_drew_it(stub: StubPipeline) -> None:
    one = drawn_from(stub, "--image", "photo.png", "--mask", "mask.png", "--mask-blur", "4")
    assert set(one.inputs) == {at("photo.png"), at("mask.png")}
    assert all(len(digest) == 64 for digest in one.inputs.values())
    assert one.asked.image == one.request.image == at("photo.png") and one.asked.strength is None
    settings = one.to_parameters().splitlines()[-1]
    assert "Size: 32x32, Denoising strength: 0.6, Mask blur: 4" in settings


def test_a_mask_and_a_jpeg_are_drawn_and_told(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["a cat", "--image", "photo.png", "--mask", "mask.png", "--output"]
    said = "kept stay as they are in .png alone"
    assert main([*words, "x.jpg"]) == 0 and Path("x.jpg").is_file()
    assert said in capsys.readouterr().err
    assert main([*words, "x.png"]) == 0
    assert said not in capsys.readouterr().err


def test_gallery_tools_are_told_the_size_of_the_file_and_the_controls(stub: StubPipeline) -> None:
    one = drawn_from(
        stub, "--upscale", "2x", "--control", "c/edges.safetensors", "--control-image", "edges.png",
        "--control-preprocessor", "canny", "--control-scale", "0.5",
    )  # fmt: skip
    assert one.model["control"] == ["c/edges.safetensors"]
    settings = one.to_parameters().splitlines()[-1]
    assert "Size: 96x64, Denoising strength: 0.35" in settings
    assert (
        'ControlNet 0: "Module: canny, Model: edges, Weight: 0.5, Guidance Start: 0, Guidance End: 1"'
        in settings
    )


def test_seconds_tell_of_encoding_where_a_picture_is_drawn_from(
    stub: StubPipeline, capsys: Any
) -> None:
    assert main(["a cat", "--image", "photo.png", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"][0]["seconds"]["encode"] == result["seconds"]["encode"] == 0.125


def test_one_bar_counts_both_rounds_of_an_upscale(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixart.progress.FIRST_SECONDS", 0.0)
    assert main(["a cat", "--upscale", "2x", "--num-images", "2"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("draw: ")]
    for stage in ("denoise 1/4", "denoise 4/4"):
        assert any(stage in line for line in lines), lines
    done = [int(line.split()[1]) for line in lines]
    assert done == sorted(done) and done[-1] == 2


def test_networks_of_preprocessors_are_opened_and_noted_with_their_paths(
    stub: StubPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def opened(model: str, **options: Any) -> StubPipeline:
        given.update(options)
        return stub

    monkeypatch.setattr("pixart.pipeline.text_to_image.Pipeline.from_pretrained", opened)
    Path("hed.pth").touch()
    words = ["a cat", "--control", "c", "--control-image", "edges.png", "--output", "a.png"]
    options = ["--control-preprocessor", "hed", "--preprocessor-weights", "hed=hed.pth"]
    assert main([*words, *options]) == 0
    assert given["preprocessors"] == {"hed": "hed.pth"}
    assert read_metadata(Path("a.png")).model["preprocessor_weights"] == [f"hed={at('hed.pth')}"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preprocessor-weights", "hed.pth"], "must be hed=PLACE, depth=PLACE, pose=PLACE, person="),
        (["--preprocessor-weights", "hed=x"], "networks that --control-preprocessor has, got hed with none"),
        (["--control-preprocessor", "canny", "--control", "c", "--control-image", "edges.png",
          "--preprocessor-weights", "hed=x"], "got hed with canny"),
    ],
)  # fmt: skip
def test_networks_that_nothing_reads_are_refused(
    stub: StubPipeline, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["a cat", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
