"""What cannot be drawn from a picture: one line that names it, exit code 2, before a model is opened where
that can be known."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stub_pipeline import StubPipeline

from pixart.command import LONGEST
from pixart.generate import main
from pixart.pipeline.pictures import read_metadata


@pytest.fixture(autouse=True)
def pictures(elsewhere: None) -> None:
    gradient = Image.linear_gradient("L").resize((128, 128))
    gradient.convert("RGB").save("photo.png")
    gradient.save("mask.png")
    gradient.resize((64, 128)).save("narrow.png")
    Image.new("L", (128, 128), 0).save("black.png")
    Image.new("L", (128, 128), 255).save("white.png")
    Image.new("RGB", (3, 3)).save("tiny.png")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:300])
    Path("text.png").write_text("no picture")
    Path("folder.png").mkdir()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that is printed; no file is made."""
    before = sorted(os.listdir())
    assert main([*words, "--quiet"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sorted(os.listdir()) == before and len(line) < LONGEST + 50
    assert line.startswith("pixart.generate: ")
    return line.removeprefix("pixart.generate: ")


FROM = ["a cat", "--image", "photo.png"]
EARLY: list[tuple[list[str], str]] = [
    ([*FROM, "--mask", "narrow.png"], "narrow.png: must be as large as the picture, 128x128, got 64x128"),
    ([*FROM, "--mask", "black.png"], "black.png: must not be black all over as a mask"),
    ([*FROM, "--mask", "white.png", "--invert-mask"], "white.png: must not be white all over"),
    ([*FROM, "--mask", "alpha"], "photo.png: must be transparent somewhere for mask alpha"),
    ([*FROM, "--mask", "absent.png"], "absent.png: cannot be read (No such file or directory)"),
    ([*FROM, "--strength", "0"], "strength must be above 0 and at most 1, got 0"),
    ([*FROM, "--strength", "2"], "strength must be above 0 and at most 1, got 2"),
    ([*FROM, "--strength", "nan"], "strength must be above 0 and at most 1, got nan"),
    ([*FROM, "--fit", "stretch"], "fit must be crop or exact, got 'stretch'"),
    ([*FROM, "--outpaint", "all,around"], "outpaint must be LEFT,TOP,RIGHT,BOTTOM in pixels up to 8192"),
    ([*FROM, "--outpaint", "0,0,0,0"], "outpaint must add pixels on one side at least"),
    ([*FROM, "--mask", "mask.png", "--mask-blur", "-1"], "mask_blur must be 0 to 1024 pixels, got -1"),
    ([*FROM, "--upscale", "2x", "--mask", "mask.png"], "upscale must be given without mask"),
    ([*FROM, "--upscale", "2x", "--outpaint", "8,8,8,8"], "upscale must be given without outpaint"),
    ([*FROM, "--upscale", "2x", "--upscale-strength", "0"], "upscale_strength must be above 0"),
    ([*FROM, "--upscale", "2x", "--upscale-guidance", "2"], "upscale_guidance must be left out"),
    (["a cat", "--upscale", "2x", "--upscale-guidance", "nan"], "upscale_guidance must be a finite"),
    (["a cat", "--upscale-guidance", "2"], "upscale_guidance must be given with upscale"),
    ([*FROM, "--tiles", "8"], "tiles must be at least 16 pixels (64 with most models), got 8"),
    (["a cat", "--image", "tiny.png"], "tiny.png: must be at least 16 px a side to draw from, got 3x3"),
    (["a cat", "--image", "folder.png"], "folder.png: cannot be read (a folder, a pipe or a device"),
    (["a cat", "--image", "absent.png"], "absent.png: cannot be read (No such file or directory)"),
    (["a cat", "--image", "text.png"], "text.png: is not a picture"),
    (["a cat", "--image", "cut.png"], "cut.png: cannot be read ("),
    (["a cat", "--image", "/dev/zero"], "/dev/zero: cannot be read (a folder, a pipe or a device"),
    (["a cat", "--image", ""], "image must name a file, got ''"),
    (["a cat", "--strength", "0.5"], "strength must be given with image, got 0.5 alone"),
    (["a cat", "--mask", "mask.png"], "mask must be given with image"),
    (["a cat", "--invert-mask"], "invert_mask must be given with mask, got True alone"),
    (["a cat", "--tiles", "64"], "tiles must be given with image or upscale, got 64 alone"),
    (["a cat", "--upscale-strength", "0.5"], "upscale_strength must be given with upscale"),
    (["a cat", "--apg-eta", "0.5"], "apg_eta must be given with apg, got 0.5 alone"),
    (["a cat", "--apg", "--apg-momentum", "nan"], "apg_momentum must be from -1 to 1, got nan"),
    (["a cat", "--apg", "--apg-norm", "inf"], "apg_norm must be a finite number from 0 up, got inf"),
    (["a cat", "--guidance-rescale", "1.5"], "guidance_rescale must be from 0 to 1, got 1.5"),
    (["a cat", "--pag", "nan"], "pag must be a finite number from 0 up, got nan"),
    (["a cat", "--pag-blocks", "14"], "pag_blocks must be given with pag"),
    (["a cat", "--pag", "3", "--pag-blocks", "9-7"], "pag_blocks must be blocks such as 14 or 12-14,20"),
    (["a cat", "--control-image", "photo.png"],
     "control_image must be given once for each --control, got 1 for 0"),
    (["a cat", "--control", "c.pth"], "control_image must be given once for each --control, got 0 for 1"),
    (["a cat", "--control", "c.pth", "--control-image", "cut.png"], "cut.png: cannot be read ("),
    (["a cat", "--control", "c.pth", "--control-image", "tiny.png"], "tiny.png: must be at least 16 px"),
    (["a cat", "--control-image", "photo.png", "--control-preprocessor", "sobel"],
     "control_preprocessor must be one of none, canny, hed, depth, pose, got 'sobel'"),
    (["a cat", "--control-image", "photo.png", "--control-scale", "nan"],
     "control_scale must be a finite number, got nan"),
    (["a cat", "--control-image", "photo.png", "--control-interval", "0.5", "0.2"],
     "control_interval must be 0 <= start <= end <= 1"),
    (["a cat", "--control-image", "photo.png", "--control-scale", "1", "--control-scale", "1"],
     "control_scale must be one or as many as control_image, 1, got 2"),
    (["a cat", "--sweep", "strength=0.5,2", "--image", "photo.png"], "--sweep: strength must be above 0"),
    (["a cat", "--sweep", "image=photo.png,cut.png"], "cut.png: cannot be read ("),
]  # fmt: skip


@pytest.mark.parametrize("words, reason", EARLY, ids=lambda value: " ".join(value)[:60])
def test_what_no_model_could_draw_from_is_refused_before_one_is_opened(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    assert reason in refused(capsys, *words)
    assert stub.opened == 0


@pytest.mark.parametrize(
    "line, reason",
    [
        ('"image": "absent.png"', "absent.png: cannot be read"),
        ('"image": "photo.png", "mask": "black.png"', "black.png: must not be black"),
        ('"image": ["photo.png"]', "image must be text or none"),
        ('"image": ""', "image must name a file"),
        ('"image": "photo.png", "strength": "half"', "strength must be a number or none, got 'half'"),
        ('"image": "photo.png", "strength": NaN', "strength must be above 0"),
        ('"image": "photo.png", "outpaint": [1, 2]', "outpaint must be LEFT,TOP,RIGHT,BOTTOM"),
        ('"image": "photo.png", "outpaint": [9e9, 0, 0, 0]', "outpaint must be LEFT,TOP"),
        ('"control_image": [1]', "control_image must be texts or none"),
        ('"control_image": []', "control_image must be 1 to 16 pictures, got 0"),
        ('"control_image": "photo.png"', "control_image must be given once for each --control"),
        ('"image": "a\\u0000b"', "b: cannot be read (embedded null byte)"),
        ('"apg": 1', "apg must be true or false or none, got 1"),
    ],
)  # fmt: skip
def test_a_line_of_a_list_is_named(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str], line: str, reason: str
) -> None:
    Path("p.jsonl").write_text(f'{{"prompt": "a"}}\n{{"prompt": "b", {line}}}')
    said = refused(capsys, "--prompts", "p.jsonl")
    assert said.startswith("p.jsonl, line 2: ") and reason in said
    assert stub.opened == 0


LATE: list[tuple[list[str], str]] = [
    ([*FROM, "--upscale", "64x64"], "upscale must make the picture larger, which has 128x128, got 64x64"),
    ([*FROM, "--upscale", "huge"], "upscale must be 256, 512, 1k"),
    ([*FROM, "--upscale", "100x"], "upscale must have up to 8192 px a side"),
    ([*FROM, "--outpaint", "8192,0,0,0"], "px a side to be drawn as it is"),
    ([*FROM, "--outpaint", "8,8,8,8", "--fit", "crop"], "outpaint must be given without fit crop"),
    ([*FROM, "--steps", "2", "--strength", "0.01"], "strength"),
]  # fmt: skip


@pytest.mark.parametrize("words, reason", LATE, ids=lambda value: " ".join(value)[:60])
def test_what_a_model_cannot_draw_from_is_refused_before_anything_is_drawn(
    capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    assert reason in refused(capsys, *words, "--device", "cpu", "--no-cache")


def draw(*words: str) -> None:
    assert main(["a cat", *words, "--output", "x.png", "--quiet"]) == 0


def test_a_picture_is_drawn_again_from_the_very_files_alone(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    draw("--image", "photo.png", "--mask", "mask.png")
    again = ["--from-image", "x.png", "--output", "again.png", "--overwrite"]
    assert main(again) == 0
    shutil.copy("mask.png", "kept.png")
    opened = stub.opened
    Image.new("L", (128, 128), 9).save("mask.png")
    capsys.readouterr()
    line = refused(capsys, *again)
    assert "x.png: was drawn from " in line and "mask.png, which is another picture now" in line
    assert line.endswith("give it anew by --mask")
    os.unlink("mask.png")
    line = refused(capsys, *again)
    assert "mask.png: cannot be read (No such file" in line and line.endswith("anew by --mask")
    os.rename("photo.png", "moved.png")
    assert refused(capsys, *again, "--mask", "kept.png").endswith("anew by --image")
    assert stub.opened == opened


def test_a_picture_that_is_given_anew_is_not_compared(stub: StubPipeline) -> None:
    draw("--image", "photo.png", "--mask", "mask.png")
    os.rename("mask.png", "moved.png")
    assert main(["--from-image", "x.png", "--mask", "moved.png", "--output", "y.png"]) == 0
    one = read_metadata(Path("y.png"))
    assert one.request.mask == os.path.abspath("moved.png") and len(one.inputs) == 2
    assert main(["--from-image", "x.png", "--sweep", "mask=moved.png,white.png"]) == 0


def test_a_list_is_taken_up_where_the_pictures_are_the_same(stub: StubPipeline) -> None:
    words = ["a cat", "--image", "photo.png"]
    assert main(words) == main(words) == 0
    assert len(stub.drawn) == 1
    Image.new("RGB", (128, 128), "red").save("photo.png")
    assert main(words) == 0
    assert len(stub.drawn) == 2 and sorted(os.listdir("outputs")) == [
        "a-cat-0-2.png",
        "a-cat-0.png",
    ]
    assert main([*words, "--strength", "0.6"]) == 0
    assert len(stub.drawn) == 3, "asked for, where the other was left open"


def test_what_a_model_took_because_of_a_picture_is_taken_anew_with_another(
    stub: StubPipeline,
) -> None:
    draw("--image", "photo.png", "--upscale", "2x", "--strength", "0.5", "--size", "64")

    def again(*words: str) -> Any:
        assert main(["--from-image", "x.png", *words, "--output", "y.png", "--overwrite"]) == 0
        return stub.drawn[-1], read_metadata(Path("y.png")).asked

    first, asked = again()
    assert (first.upscale, asked.upscale, asked.size) == ("96x64", "2x", "64")
    drawn, asked = again("--image", "mask.png")
    assert drawn.strength == 0.5 and asked.image == os.path.abspath("mask.png")
    assert (asked.upscale, asked.size) == ("2x", "64")
    drawn, _ = again("--no-apg")
    assert drawn.apg is False


def test_in_memory_names_are_no_files(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python drew from a picture that it held cannot be drawn again from the file alone."""
    from dataclasses import replace

    from pixart.pipeline.pictures import write_picture

    draw("--image", "photo.png")
    one = read_metadata(Path("x.png"))
    held = replace(one, request=replace(one.request, image="image"), inputs={"image": "0" * 64})
    held = replace(held, asked=replace(one.asked, image="image"))
    write_picture(Image.new("RGB", (32, 32)), Path("x.png"), held)
    line = refused(capsys, "--from-image", "x.png")
    assert "x.png: was drawn from image: cannot be read" in line and "--image" in line
    assert main(["--from-image", "x.png", "--image", "photo.png"]) == 0
