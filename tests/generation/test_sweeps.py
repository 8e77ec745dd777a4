"""Sweeps, the sheet of a run, seeds by lot, quality, progress, and what --json tells of each picture."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stub_pipeline import StubPipeline

from pixart.generate import main
from pixart.generation import sheet
from pixart.generation.jobs import plan
from pixart.generation.options import Options
from pixart.generation.prompts import located
from pixart.generation.sheet import Cell, draw_sheet
from pixart.pipeline.pictures import read_metadata
from pixart.pipeline.request import SETTINGS, Request


def planned(*sweep: str, **options: Any) -> list[Request]:
    jobs, _ = plan(Options(**{"prompt": ("a cat",), "sweep": sweep, **options}))
    return [job.request for job in jobs]


def test_every_combination_is_drawn(stub: StubPipeline) -> None:
    sweeps = ["--sweep", "guidance=3,4.5,6", "--sweep", "steps=10,20"]
    assert main(["a cat", "--seed", "5", "--output", "out", *sweeps]) == 0
    drawn = [(one.guidance, one.steps, one.seed) for one in stub.drawn]
    assert drawn == [(g, s, 5) for g in (3.0, 4.5, 6.0) for s in (10, 20)]
    assert "a-cat-5-guidance-4.5-steps-20.png" in os.listdir("out") and len(os.listdir("out")) == 6


# What a setting does nothing without.
PICTURE, CONTROL = {"image": "x.png"}, {"control_image": ("x.png",), "control": ("c",)}
NEEDED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("strength", "fit", "mask", "outpaint", "tiles"), PICTURE),
    **dict.fromkeys(("invert_mask", "mask_blur"), PICTURE | {"mask": "m.png"}),
    **dict.fromkeys(("apg_eta", "apg_momentum", "apg_norm"), {"apg": True}),
    **dict.fromkeys(("control_preprocessor", "control_scale", "control_interval"), CONTROL),
    "upscale_strength": {"upscale": "2k"},
    "upscale_guidance": {"upscale": "2k"},
    "pag_blocks": {"pag": 3.0},
    "control_image": {"control": ("c",)},
}


@pytest.mark.parametrize(
    "text, values",
    [
        ("seed=1,2", [1, 2]),
        ("negative=,fog", ["", "fog"]),
        ("size=64,128x64", ["64", "128x64"]),
        ("aspect=1:1,16:9", ["1:1", "16:9"]),
        ("resolution=256,1k", ["256", "1k"]),
        ("height=64,128", [64, 128]),
        ("steps=none,5", [None, 5]),
        ("timesteps=999:499,400,none", [(999, 499), (400,), None]),
        ("guidance=1,7.5", [1.0, 7.5]),
        ("guidance-interval=0:1,0.2:0.8", [(0.0, 1.0), (0.2, 0.8)]),
        ("guidance_interval=[[0, 1], [0.5, 1]]", [(0, 1), (0.5, 1)]),
        ("scheduler=ddim,euler", ["ddim", "euler"]),
        ("batched=true,false,none", [True, False, None]),
        ("tile=true,false,64", [True, False, 64]),
        ("image=a.png,b.png", ["a.png", "b.png"]),
        ("strength=0.3,0.6", [0.3, 0.6]),
        ("fit=crop,exact", ["crop", "exact"]),
        ("mask=alpha,m.png", ["alpha", "m.png"]),
        ("invert_mask=true,false", [True, False]),
        ("mask_blur=0,8", [0, 8]),
        ('outpaint=["0,0,64,0", [8, 8, 8, 8]]', ["0,0,64,0", "8,8,8,8"]),
        ("upscale=2k,2x,512x256", ["2k", "2x", "512x256"]),
        ("upscale-strength=0.2,none", [0.2, None]),
        ("upscale-guidance=1,2.5", [1.0, 2.5]),
        ("tiles=64,512", [64, 512]),
        ("kv_schedule=0-2:2,none", ["0-2:2", None]),
        ("reuse_blocks=1:3-9/2,none", ["1:3-9/2", None]),
        ("guidance_rescale=0,0.7", [0.0, 0.7]),
        ("apg=true,false", [True, False]),
        ("apg_eta=0,1", [0.0, 1.0]),
        ("apg_momentum=-0.5,0", [-0.5, 0.0]),
        ("apg_norm=0,15", [0.0, 15.0]),
        ("pag=0,3", [0.0, 3.0]),
        ("pag_blocks=14,7-9", ["14", "7-9"]),
        ("control_image=a.png,b.png", [("a.png",), ("b.png",)]),
        ("control_preprocessor=canny,none", [("canny",), ("none",)]),
        ("control_scale=0,1", [(0.0,), (1.0,)]),
        ("control_interval=0:1,0:0.5", [((0.0, 1.0),), ((0.0, 0.5),)]),
    ],
)
def test_any_setting_is_swept(text: str, values: list[Any]) -> None:
    name = text.partition("=")[0].replace("-", "_")
    needed = NEEDED.get(name, {})
    for file in ("a.png", "b.png", "m.png", "x.png"):
        Image.new("RGBA", (32, 32), (255, 255, 255, 99)).save(file)
    expected = [located({name: value})[name] for value in values]
    assert [getattr(one, name) for one in planned(text, **needed)] == expected


def test_every_setting_has_a_case_above_or_is_the_prompt() -> None:
    cases = test_any_setting_is_swept.pytestmark[0].args[1]  # type: ignore[attr-defined]
    named = {text.partition("=")[0].replace("-", "_") for text, _ in cases}
    assert {*SETTINGS} - named == {"prompt", "width"}


def test_prompts_are_swept_with_commas_in_a_list() -> None:
    texts = [one.prompt for one in planned('prompt=["a cat, asleep", "a dog"]', prompt=())]
    assert texts == ["a cat, asleep", "a dog"]


@pytest.mark.parametrize(
    "sweep, options, reason",
    [
        (["gudance=1"], {}, "--sweep: unknown setting 'gudance'; did you mean 'guidance'?"),
        (["steps"], {}, "--sweep must be SETTING=VALUE,VALUE,... got 'steps'"),
        (["steps=1,many"], {}, "--sweep: steps must be an integer or none, got 'many'"),
        (["steps=1,0"], {}, "--sweep: steps must be an integer from 1 up, got 0"),
        (["guidance=nan"], {}, "--sweep: guidance must be a finite number"),
        (["guidance=1,"], {}, "--sweep: guidance must be a number or none, got ''"),
        (["guidance_interval=0:2"], {}, "guidance_interval must be 0 <= start"),
        (["batched=maybe"], {}, "batched must be true or false or none, got 'maybe'"),
        (["steps=[1,"], {}, "--sweep steps: is not JSON"),
        (["steps=[]"], {}, "--sweep steps must have a value"),
        (["steps=5,5"], {}, "--sweep steps must have each value once, got 5 twice"),
        (["steps=1", "steps=2"], {}, "must name steps once"),
        (["steps=1,2"], {"steps": 3}, "options must leave out steps, as --sweep sets steps"),
        (["aspect=1:1,2:1"], {"size": "64"}, "options must leave out size"),
        (["size=64,128"], {"resolution": "256"}, "options must leave out resolution"),
        (["seed=1,2"], {"num_images": 2}, "--num-images must be 1 where seed is swept"),
        (["prompt=a,b"], {}, "got several"),
        (["prompt=a, "], {"prompt": ()}, "prompt must not be empty"),
        (["scheduler=ddim,ddpm"], {}, "scheduler must be one of"),
        ([f"seed={','.join(map(str, range(200)))}", f"steps={','.join(map(str, range(1, 99)))}"], {},
         "at most 10,000 combinations, got 19,600"),
        ([], {"num_images": 10**9}, "a run must be of at most 1,000,000 pictures"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_meant_is_refused(
    sweep: list[str], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError) as caught:
        planned(*sweep, **options)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_value_that_the_model_refuses_is_refused_before_anything_is_drawn(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["a cat", "--sweep", "size=64,65", "--output", "out"]) == 2
    assert "size must be a multiple of 16, got 65" in capsys.readouterr().err
    assert not stub.drawn and not os.path.exists("out")


def test_a_line_that_says_what_is_swept_is_refused_by_its_place() -> None:
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "steps": 3}')
    with pytest.raises(ValueError, match="p.jsonl, line 2: the line must leave out steps"):
        planned("steps=1,2", prompt=(), prompts=Path("p.jsonl"))


def test_a_picture_that_is_drawn_again_is_swept(stub: StubPipeline) -> None:
    assert main(["a cat", "--seed", "5", "--steps", "3", "--output", "x.png"]) == 0
    assert main(["--from-image", "x.png", "--sweep", "guidance=1,2"]) == 0
    again = [read_metadata(path).request for path in sorted(Path().glob("x-again*.png"))]
    assert [(one.guidance, one.steps, one.seed) for one in again] == [(1.0, 3, 5), (2.0, 3, 5)]


def test_a_seed_by_lot_is_said_and_stored(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = set()
    for _ in range(2):
        assert main(["a cat", "--seed", "random", "--num-images", "2", "--json"]) == 0
        out, printed = capsys.readouterr()
        first, second = json.loads(out)["images"]
        assert second["seed"] == first["seed"] + 1 and f"seed {first['seed']}\n" in printed
        assert read_metadata(Path(first["file"])).request.seed == first["seed"]
        seeds.add(first["seed"])
    assert len(seeds) == 2, "2**-32 that this fails by chance"


def test_comments_and_escapes_of_a_text_file() -> None:
    Path("p.txt").write_text("# a list\na cat\n  # indented\n\\#1 fan\nfield #3\n")
    jobs, _ = plan(Options(prompts=Path("p.txt")))
    assert [job.request.prompt for job in jobs] == ["a cat", "#1 fan", "field #3"]
    Path("p.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        plan(Options(prompts=Path("p.txt")))


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_quality_is_that_of_the_file(stub: StubPipeline, kind: str) -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    from pixart.pipeline import pictures

    assert main(["a cat", "--output", f"x.{kind}"]) == 0
    sizes = []
    for quality in (10, 60, None):
        path = Path(f"q{quality}.{kind}")
        pictures.write_picture(noise, path, read_metadata(Path(f"x.{kind}")), quality=quality)
        sizes.append(path.stat().st_size)
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--quality", "80"], "--quality must be left out for .png"),
        (["--quality", "80", "--output", "x.PNG"], "--quality must be left out for .png"),
        (["--quality", "0", "--format", "jpg"], "--quality must be from 1 to 100, got 0"),
        (["--quality", "101", "--format", "webp"], "--quality must be from 1 to 100, got 101"),
        (["--grid", "--num-images", "401"], "--grid must be of at most 400 pictures, got 401"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main(["a cat", *arguments]) == 2
    assert reason in capsys.readouterr().err and not os.path.exists("outputs")


def test_json_tells_every_setting_and_the_seconds_of_each_picture(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["a cat", "a dog", "--json", "--quality", "70", "--format", "jpg"]) == 0
    result = json.loads(capsys.readouterr().out)
    for image in result["images"]:
        assert set(image["settings"]) == {*SETTINGS}
        left = {name for name, value in image["settings"].items() if value is None}
        editing = SETTINGS[SETTINGS.index("image") : SETTINGS.index("batched")]
        assert left == {"size", "aspect", "resolution", "timesteps", *editing}, (
            "height and width say it"
        )
        assert image["model"]["dtype"] == "fp32"
        assert {"text", "load", "denoise", "decode", "write"} == set(image["seconds"])
        assert image["seconds"]["denoise"] == 1.0 and image["seconds"]["write"] > 0
    assert result["seconds"]["denoise"] == 2.0


def test_one_progress_counts_the_pictures_of_the_run(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixart.progress.FIRST_SECONDS", 0.0)
    assert main(["a cat", "--num-images", "5", "--batch", "2"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("draw: ")]
    done = [int(line.split()[1]) for line in lines]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 5
    assert all(" of 5" in line for line in lines) and all(" s left" in line for line in lines[1:])
    assert any(line.endswith("denoise 1/2") for line in lines)


def test_a_sheet_shows_every_picture_over_its_label(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["a cat", "--output", "out", "--sweep", "guidance=1,2,3", "--sweep", "steps=4,5"]
    assert main([*arguments, "--grid", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["grid"] == "out/grid.png" and len(result["images"]) == 6
    drawn = np.asarray(Image.open("out/grid.png"))
    for image in result["images"]:
        colour = np.asarray(Image.open(image["file"]))[0, 0]
        assert (drawn == colour).all(axis=2).sum() >= 32 * 32
    assert main([*arguments, "--grid"]) == 0
    assert sorted(Path("out").glob("grid*")) == [Path("out/grid.png")], "the same sheet"
    assert main(["a dog", "--output", "out", "--grid"]) == 0
    assert np.array_equal(np.asarray(Image.open("out/grid.png")), drawn)
    assert Path("out/grid-2.png").is_file()


def cells(count: int, side: int = 40, prompt: str = "a cat", **swept: list[Any]) -> list[Cell]:
    found = []
    for k in range(count):
        path = Path(f"{k}.png")
        Image.new("RGB", (side, side + 8 * (k % 3)), (255, 0, k % 256)).save(path)
        own = {name: values[k] for name, values in swept.items()}
        request = Request(prompt, seed=k // 2, height=side, width=side, steps=5, guidance=2.0)
        found.append(Cell(path, request, own))
    return found


@pytest.mark.parametrize(
    "made",
    [
        {"count": 1, "prompt": "a very long prompt " * 40},
        {"count": 7, "prompt": "кот 猫 🐈 " * 9},
        {"count": 6, "negative": ["W" * 300] * 3 + ["猫" * 200] * 3, "steps": [1, 2, 3] * 2},
        {"count": 24, "side": 600, "steps": list(range(24))},
        {"count": 400, "side": 16, "seed": list(range(400))},
    ],
    ids=["one", "alphabets", "long words", "large", "many"],
)
def test_labels_overlap_neither_pictures_nor_each_other(
    made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boxes of all that is drawn, as they were drawn."""
    boxes: list[tuple[float, float, float, float]] = []
    paste, write = Image.Image.paste, sheet._write

    def pasted(self: Image.Image, picture: Image.Image, place: tuple[int, int]) -> None:
        boxes.append((*place, place[0] + picture.width, place[1] + picture.height))
        paste(self, picture, place)

    def written(canvas: Any, lines: list[str], x: int, y: int, size: int) -> None:
        for number, line in enumerate(lines):
            top = y + number * sheet._line_height(size)
            boxes.append((x, top, x + sheet._width(line, size), top + sheet._line_height(size)))
        write(canvas, lines, x, y, size)

    some = cells(**made)
    monkeypatch.setattr(Image.Image, "paste", pasted)
    monkeypatch.setattr(sheet, "_write", written)
    image = draw_sheet(some)
    assert len(boxes) > len(some) and max(image.size) < 12_000
    corners = np.array(boxes)
    assert corners.min() >= 0 and (corners[:, 2:] <= np.array(image.size)).all()
    for place, (left, top, right, bottom) in enumerate(boxes):
        others = np.delete(corners, place, 0)
        apart = (
            (others[:, 0] >= right) | (others[:, 2] <= left)
            | (others[:, 1] >= bottom) | (others[:, 3] <= top)
        )  # fmt: skip
        assert apart.all()


def test_a_row_of_the_sheet_is_what_was_swept_last() -> None:
    both = cells(12, guidance=[g for g in (1, 2, 3, 4) for _ in range(3)], steps=[5, 6, 7] * 4)
    assert sheet._columns(both) == 3
    assert sheet._columns(cells(3) + cells(3, prompt="a dog")) == 3, "seeds of a prompt"
    title, labels = sheet._describe(both)
    assert title.splitlines()[0] == "a cat" and "40x40" in title
    assert labels[4] == "guidance 2\n6 steps\nseed 2"


def test_labels_say_each_setting_once_and_in_plain_words() -> None:
    made = cells(3, negative=["", "fog", "fog"], steps=[1, 2, 2], size=["40", "40x48", None])
    _, labels = sheet._describe(made)
    assert labels[0] == "no negative\n1 step\n40x40\nseed 0"
    assert labels[1] == "negative fog\n2 steps\n40x40\nseed 0"
