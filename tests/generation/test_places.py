"""No earlier picture is lost: names that are free, the same request that is not drawn again, and
templates of names."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stub_pipeline import StubPipeline

from pixart.files import written_aside
from pixart.generate import main
from pixart.generation import drawing
from pixart.generation.jobs import plan
from pixart.generation.names import Places, Template, safe_name
from pixart.generation.options import Options
from pixart.pipeline.pictures import read_metadata
from pixart.pipeline.request import Request


def steps_in(folder: str = ".") -> dict[str, int | None]:
    """Name of each picture: the steps that it was drawn with."""
    return {
        path.name: read_metadata(path).request.steps
        for path in sorted(Path(folder).iterdir())
        if path.suffix == ".png"
    }


@pytest.mark.parametrize("output", ["x.png", "{prompt}.png", "out"])
def test_another_request_takes_another_name(stub: StubPipeline, output: str) -> None:
    for steps in ("1", "2", "3"):
        assert main(["a cat", "--steps", steps, "--output", output]) == 0
    stem = {"x.png": "x", "{prompt}.png": "a-cat", "out": "a-cat-0"}[output]
    found = steps_in("out" if output == "out" else ".")
    assert found == {f"{stem}.png": 1, f"{stem}-2.png": 2, f"{stem}-3.png": 3}


def test_the_same_request_is_skipped_and_said_wherever_its_picture_is(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in ("1", "2", "3"):
        assert main(["a cat", "--steps", steps, "--output", "x.png"]) == 0
    os.remove("x-2.png")
    capsys.readouterr()
    assert main(["a cat", "--steps", "3", "--output", "x.png", "--json"]) == 0
    out, printed = capsys.readouterr()
    assert "1 of 1 pictures are there already (x-3.png); --overwrite draws them again" in printed
    [image] = json.loads(out)["images"]
    assert image["file"] == "x-3.png" and image["settings"]["steps"] == 3
    assert stub.opened == 3, "the fourth opened no model"


def test_overwrite_draws_again_in_place_and_takes_the_place_of_others(stub: StubPipeline) -> None:
    for steps in ("1", "2"):
        assert main(["a cat", "--steps", steps, "--output", "x.png"]) == 0
    before = Path("x-2.png").stat().st_mtime_ns
    assert main(["a cat", "--steps", "2", "--output", "x.png", "--overwrite"]) == 0
    assert Path("x-2.png").stat().st_mtime_ns > before and steps_in() == {"x.png": 1, "x-2.png": 2}
    assert main(["a cat", "--steps", "3", "--output", "x.png", "--overwrite"]) == 0
    assert steps_in() == {"x.png": 3, "x-2.png": 2}


def test_a_picture_that_is_drawn_again_may_go_meanwhile(
    stub: StubPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["a cat", "--output", "x.png"]) == 0

    def write(*arguments: Any) -> Any:
        Path("x.png").unlink(missing_ok=True)
        return written(*arguments)

    written = drawing._write
    monkeypatch.setattr(drawing, "_write", write)
    assert main(["--from-image", "x.png", "--num-images", "2", "--output", "again"]) == 0
    assert len(list(Path("again").iterdir())) == 2


def test_what_is_not_ours_keeps_its_name(stub: StubPipeline) -> None:
    Image.new("RGB", (8, 8)).save("X.PNG")
    Path("x-2.png").symlink_to("nowhere.png")
    Path("x-3.png").write_text("notes")
    os.mkfifo("x-4.png")
    assert main(["a cat", "--output", "x.png"]) == 0
    assert sorted(os.listdir()) == ["X.PNG", "x-2.png", "x-3.png", "x-4.png", "x-5.png"]


def test_names_that_differ_in_case_or_punctuation_are_one_name(stub: StubPipeline) -> None:
    lines = [
        {"prompt": "A cat!"}, {"prompt": "a cat"}, {"prompt": "a  CAT"}, {"prompt": "b", "name": "A-Cat 0"}
    ]  # fmt: skip
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for _ in range(2):
        assert main(["--prompts", "p.jsonl", "--output", "out"]) == 0
    expected = ["a-cat-0.png", "a-cat-0-2.png", "a-cat-0-3.png", "a-cat-0-4.png"]
    found = {name: read_metadata(Path("out") / name).request.prompt for name in expected}
    assert list(found.values()) == [line["prompt"] for line in lines]
    assert sorted(os.listdir("out")) == sorted(expected) and len(stub.drawn) == 4


def test_a_name_in_another_case_or_accent_is_taken(tmp_path: Path) -> None:
    Path("Cafe\u0301.png").touch()
    places = Places()
    assert places.free(Path("café.png")) == Path("café-2.png")
    places.take(Path("CAFÉ-2.png"))
    assert places.free(Path("café.png")) == Path("café-3.png")
    assert places.free(Path("sub/café.png")) == Path("sub/café.png")


def test_names_that_windows_keeps_for_itself_are_not_given() -> None:
    for name in ("con", "AUX", "com1", "lpt9", "nul"):
        assert safe_name(name) != name.lower() and safe_name(name).startswith(name.lower())


def test_of_two_processes_that_want_a_name_one_gets_another(
    stub: StubPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another writes between the moment when names were given and the moment when this one writes."""
    from pixart.generation import drawing

    write, others = drawing.write_picture, ["x.png", "y.png", "y-2.png"]

    def late(image: Image.Image, path: Path, metadata: Any, **options: Any) -> None:
        if path.name in others:
            others.remove(path.name)
            write(image, path, metadata if path.name == "x.png" else dog)
        write(image, path, metadata, **options)

    assert main(["a dog", "--output", "dog.png"]) == 0
    dog = read_metadata(Path("dog.png"))
    monkeypatch.setattr(drawing, "write_picture", late)
    assert main(["a cat", "--output", "x.png"]) == 0
    assert "x.png was drawn elsewhere meanwhile" in capsys.readouterr().err
    assert main(["a cat", "--output", "y.png"]) == 0
    found = {path.name: read_metadata(path).request.prompt for path in Path().glob("[xy]*.png")}
    assert found == {"x.png": "a cat", "y.png": "a dog", "y-2.png": "a dog", "y-3.png": "a cat"}


def test_a_file_where_a_folder_should_be_ends_the_run(
    stub: StubPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes to be there while the pictures are drawn."""
    monkeypatch.setattr("pixart.generation.drawing.check_writable", lambda _: Path("out").touch())
    for more in ([], ["--overwrite"]):
        assert main(["a cat", "--output", "out/x.png", *more]) == 2
        assert "out/x.png: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_is_whole_and_replaces_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    wins: list[int] = []

    def write(number: int) -> None:
        try:
            with written_aside(Path("new"), replace=False) as aside:
                aside.write_text(str(number) * 999)
            wins.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1 and Path("new").read_text() == str(wins[0]) * 999
    assert os.listdir() == ["new"]


def named(output: str, **settings: Any) -> str:
    [job], _ = plan(Options(prompt=("a cat",), output=Path(output), **settings))
    return str(job.path)


@pytest.mark.parametrize(
    "output, expected",
    [
        ("{seed}-{guidance:.1f}-{prompt}.webp", "7-4.5-a-cat.webp"),
        ("{seed:05d}/{index:02d}", "00007/00.png"),
        ("{scheduler}-{steps:3d}-{size}", "dpm-solver++--20-64x64.png"),
        ("{aspect}-{batched}-{tile}-{negative}-{guidance_interval:.2f}", "auto-true-auto-none-0.00-0.50.png"),
        ("{{{prompt:.3s}}}", "{a-c}.png"),
        ("{guidance:.0%}", "450-.png"),
    ],
)  # fmt: skip
def test_a_template_has_every_setting_and_a_format(output: str, expected: str) -> None:
    settings = {
        "seed": 7, "guidance": 4.5, "scheduler": "dpm-solver++", "steps": 20, "size": "64",
        "batched": True, "guidance_interval": (0.0, 0.5),
    }  # fmt: skip
    assert named(output, **settings) == expected


@pytest.mark.parametrize(
    "output, reason",
    [
        ("{sede}", "got {sede}; did you mean {seed}?"),
        ("{a}{b}", "got {a}, {b}"),
        ("{}", "got {}"),
        ("{0}", "got {0}"),
        ("{seed.__class__}", "got {seed.__class__}"),
        ("{prompt[0]}", "got {prompt[0]}"),
        ("{seed!r}", "got '!r'"),
        ("{seed:{index}}", "got '{index}'"),
        ("{seed:999999999d}", "got '999999999d'"),
        ("{seed:c}", "got 'c'"),
        ("{seed:/>9}", "got '/>9'"),
        ("{prompt:d}", "{prompt:d} cannot be made of 'a-cat'"),
        ("{seed", "must be a template such as {seed}-{prompt}.png, got {seed"),
        ("a}{seed}", "must be a template"),
    ],
)
def test_a_template_that_reaches_further_is_refused(output: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        named(output)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_that_fills_a_template_leaves_the_folder() -> None:
    hostile = Request("../../etc/passwd", "/..", scheduler="../x", size="../y", aspect=None)
    template = Template.parse("out/{prompt}{negative}{scheduler}{size}{name}.png")
    path = template.fill(hostile, 0, safe_name("../../name"))
    assert path.parent == Path("out") and ".." not in path.stem.split("-")


def test_a_field_that_the_model_decides_is_filled_when_it_has(stub: StubPipeline) -> None:
    arguments = ["a cat", "--output", "{steps}-{guidance:.1f}-{width}.png"]
    assert main(arguments) == 0 and main(arguments) == 0
    assert steps_in() == {"20-4.5-32.png": 20} and len(stub.drawn) == 1


def test_a_brace_in_the_name_of_a_folder_is_a_brace() -> None:
    assert named("a}b/x.png") == "a}b/x.png" and named("a}b") == "a}b/a-cat-0.png"
