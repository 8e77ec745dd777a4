"""From options to jobs and files, without a model."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart.generation.drafts import Job
from pixart.generation.jobs import plan
from pixart.generation.names import safe_name
from pixart.generation.options import Options
from pixart.generation.prompts import read_prompts
from pixart.pipeline.metadata import Metadata
from pixart.pipeline.pictures import (
    KEY,
    check_writable,
    find_drawn,
    read_metadata,
    write_picture,
)
from pixart.pipeline.request import VERSION, Request

HOSTILE = {
    "climbing": "../../etc/passwd",
    "absolute": "/dev/null",
    "emoji": "🐈🌵",
    "chinese": "一只猫",
    "nothing left": "?!*",
    "500 letters": "cactus " * 71,
    "control characters": "a\0b\nc\x1b[31m",
    "windows": r"C:\con: <aux>|",
    "hidden": ".bashrc",
    "option": "-rf",
    "template": "{seed}",
}


def names(*prompts: str, **options: Any) -> list[str]:
    jobs, _ = plan(Options(prompt=prompts, **options))
    return [str(job.path) for job in jobs]


def job(path: Path, **changes: Any) -> Job:
    """A picture to draw. changes: settings of its request, or `model`."""
    [planned], _ = plan(Options(prompt=("a cat",), output=path))
    model = changes.pop("model", planned.model)
    return replace(planned, model=model, request=replace(planned.request, **changes))


def metadata(one: Job, **drawn: Any) -> Metadata:
    """As it is when it is written: drawn untiled, both halves of guidance at once."""
    chosen = {"batched": True, "tile": False, **drawn}
    return Metadata(replace(one.request, **chosen), one.model, one.request, one.model)


def write(image: Image.Image, one: Job, **drawn: Any) -> None:
    write_picture(image, one.path, metadata(one, **drawn))


def found(one: Job) -> tuple[int, int] | None:
    there = find_drawn(one.path, one.request, one.model)
    return there and there.size


def picture(color: str = "red") -> Image.Image:
    return Image.new("RGB", (16, 16), color)


def test_names_follow_the_prompt_and_the_seed() -> None:
    assert names("A cat, sitting!") == ["outputs/a-cat-sitting-0.png"]
    assert names("a cat", num_images=2, seed=7) == ["outputs/a-cat-7.png", "outputs/a-cat-8.png"]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("output", ["out", "out/{prompt}.png", "out/{name}"])
def test_whatever_the_prompt_its_file_is_a_plain_name_in_the_folder(text: str, output: str) -> None:
    [name] = names(text, output=Path(output))
    path = Path(name)
    assert path.parent == Path("out")
    assert path.stem.strip("-") == path.stem and len(path.name) <= 80
    assert set(path.stem) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_prompts_that_differ_only_in_what_a_name_cannot_hold_have_names_of_their_own() -> None:
    long = "a photo of a cat " * 8
    for one, other in (
        ("🐈", "🌵"),
        ("猫", "犬"),
        (long + "in snow", long + "in sand"),
        ("?", "!"),
    ):
        assert safe_name(one) != safe_name(other)
    assert safe_name("a cat!") == safe_name("A cat")  # a plain prompt keeps a plain name


@pytest.mark.parametrize(
    "output, format, count, expected",
    [
        ("x.png", None, 1, ["x.png"]),
        ("x.JPG", None, 1, ["x.JPG"]),
        ("x.jpeg", "jpg", 1, ["x.jpeg"]),
        ("a.b.webp", None, 2, ["a.b-0000.webp", "a.b-0001.webp"]),
        ("folder", None, 1, ["folder/cat-0.png"]),
        ("folder", "webp", 2, ["folder/cat-0.webp", "folder/cat-1.webp"]),
        ("v1.2", None, 1, ["v1.2/cat-0.png"]),
        ("{seed}/{prompt}", "jpg", 2, ["0/cat.jpg", "1/cat.jpg"]),
        ("x-{index}.jpg", None, 2, ["x-0000.jpg", "x-0001.jpg"]),
        ("{prompt}.png", None, 3, ["cat.png", "cat-2.png", "cat-3.png"]),
    ],
)
def test_output_is_a_file_a_folder_or_a_template(
    output: str, format: Any, count: int, expected: list[str]
) -> None:
    assert names("cat", output=Path(output), format=format, num_images=count) == expected


@pytest.mark.parametrize(
    "output, format, rule",
    [
        ("x.jpg", "png", "--output must end in .png, got x.jpg"),
        ("{prompt}.jpg", "png", "--output must end in .png"),
        (
            "pic.gif",
            None,
            "--output must end in .png, .jpg or .webp, or name a folder, got pic.gif",
        ),
        ("{prompt}.TIFF", None, "--output must end in .png, .jpg or .webp"),
        (
            "{seeds}.jpg",
            None,
            "--output knows {name}, {prompt}, {seed}, {index}, {negative}, .*, got {seeds}; did you mean "
            "{seed}?",
        ),
    ],
)
def test_an_output_that_cannot_be_meant_is_refused(output: str, format: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        names("cat", output=Path(output), format=format)


def test_no_two_pictures_of_a_run_share_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"  # out of the second's name the third would take the first's
    lines = [{"prompt": "x", "name": "a 0 2"}, {"prompt": "a"}, {"prompt": "a"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    paths = [job.path for job in plan(Options(prompts=file))[0]]
    assert len(set(paths)) == 3


def test_names_are_the_same_in_the_next_run() -> None:
    assert names("cat", "cat", "🐈") == names("cat", "cat", "🐈")


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa cat\r\n\r\n  ein Bär  \r\n".encode())
    assert [line.values for line in read_prompts(file)] == [
        {"prompt": "a cat"},
        {"prompt": "ein Bär"},
    ]


def test_a_jsonl_file_sets_what_it_names_and_options_set_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    line = {"prompt": "a\u2028cat", "seed": 9, "size": "64x32", "name": "First!", "guidance": 2}
    file.write_text(json.dumps(line, ensure_ascii=False) + '\n{"prompt": "a dog"}\n', "utf-8")
    options = Options(prompts=file, steps=5, aspect="16:9", negative="fog", num_images=2)
    jobs, _ = plan(options)
    asked = [job.request for job in jobs]
    assert [one.prompt for one in asked] == ["a\u2028cat"] * 2 + ["a dog"] * 2
    assert [one.seed for one in asked] == [9, 10, 0, 1]
    assert [one.guidance for one in asked] == [2, 2, None, None]
    assert [(one.size, one.aspect) for one in asked[1:3]] == [("64x32", None), (None, "16:9")]
    assert {(one.steps, one.negative) for one in asked} == {(5, "fog")}
    assert jobs[0].path == Path("outputs/first.png")


@pytest.mark.parametrize(
    "name, content, rule",
    [
        ("p.txt", b" \n\n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("p.json", b'[{"prompt": "a"}]', "must be text, a prompt a line, or .jsonl"),
        ("p.jsonl", b'{"prompt": "a"}\n{', "line 2: is not JSON"),
        ("p.jsonl", b'["a"]', 'line 1: must be an object with a "prompt"'),
        ("p.jsonl", b'{"prompt": ""}', 'must be an object with a "prompt"'),
        ("p.jsonl", b'{"prompt": " "}', "prompt must not be empty"),
        ("p.jsonl", b'{"prompt": 5}', "line 1: prompt must be text, got 5"),
        (
            "p.jsonl",
            b'{"prompt": "a", "sed": 1}',
            "line 1: unknown setting 'sed'; did you mean 'seed'",
        ),
        ("p.jsonl", b'{"prompt": "a", "seed": true}', "line 1: seed must be an integer, got True"),
        ("p.jsonl", b'{"prompt": "a\\ud800"}', "prompt must be UTF-8 text, got 'a.ud800'"),
        ("p.jsonl", b'{"prompt": "a", "seed": -1}', "seed must be an integer from 0"),
        ("p.jsonl", b'{"prompt": "a", "steps": 0}', "steps must be an integer from 1 up, got 0"),
        ("p.jsonl", b'{"prompt": "a", "guidance": NaN}', "guidance must be a finite number"),
        ("p.jsonl", b'{"prompt": "a", "name": 5}', "line 1: name must be text, got 5"),
        ("p.jsonl", b'{"prompt": "a", "scheduler": "ddpm"}', "scheduler must be one of dpm-solver"),
        ("absent.txt", None, "cannot be read"),
    ],
)
def test_a_bad_file_of_prompts_is_refused_with_its_line(
    tmp_path: Path, name: str, content: bytes | None, rule: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rule):
        plan(Options(prompts=tmp_path / name))


def test_a_line_may_be_a_whole_request_as_it_is_written(tmp_path: Path) -> None:
    one, file = Request("a", "fog", 3, size="64", steps=2), tmp_path / "p.jsonl"
    file.write_text(json.dumps({**one.to_dict(), "name": "mine"}))
    [job], _ = plan(Options(prompts=file))
    assert job.request == one and job.path.stem == "mine"
    file.write_text(json.dumps({**one.to_dict(), "version": VERSION + 1}))
    with pytest.raises(ValueError, match=f"line 1: version must be {VERSION}, got {VERSION + 1}"):
        plan(Options(prompts=file))


def test_a_png_holds_the_very_pixels(tmp_path: Path) -> None:
    image = Image.effect_noise((64, 32), 80).convert("RGB")
    write(image, job(tmp_path / "x.png"))
    assert Image.open(tmp_path / "x.png").tobytes() == image.tobytes()


def test_a_picture_is_drawn_when_its_file_was_made_by_this_very_request(tmp_path: Path) -> None:
    one = job(tmp_path / "x.png")
    assert found(one) is None
    write(picture(), one)
    assert found(replace(one, index=3)) == (16, 16)
    assert found(job(one.path, tile=False, batched=True)) == (16, 16), "so it was drawn"
    assert found(job(one.path, tile=256)) is None
    for change in ({"seed": 1}, {"steps": 4}, {"model": {**one.model, "dtype": "bf16"}}):
        assert found(job(one.path, **change)) is None


def test_a_choice_that_was_asked_for_in_other_words_than_it_was_drawn_with_is_recognised(
    tmp_path: Path,
) -> None:
    one = job(tmp_path / "x.png", tile=True)  # which the VAE takes for 512
    write(picture(), one, tile=512)
    assert found(one) == found(job(one.path, tile=512)) == found(job(one.path)) == (16, 16)
    assert found(job(one.path, tile=256)) is None


def test_half_a_picture_is_not_drawn(tmp_path: Path) -> None:
    one = job(tmp_path / "x.png")
    write(Image.effect_noise((64, 64), 80).convert("RGB"), one)
    one.path.write_bytes(one.path.read_bytes()[:-500])
    assert found(one) is None


def save_with(path: Path, text: Any) -> None:
    info = PngInfo()
    info.add_itxt(KEY, text if isinstance(text, str) else json.dumps(text))
    picture().save(path, pnginfo=info)


def test_a_foreign_picture_carries_no_request(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    ours = json.loads(metadata(job(path)).to_text())
    request, model = ours["request"], ours["model"]
    foreign = ["", "no JSON", "[" * 10**5, [], 5, {"prompt": "a"}, {**ours, "model": 5}]
    foreign += [{**ours, "version": version} for version in (0, 1, 3, None, "4", True)]
    foreign += [{**ours, "model": {}}, {**ours, "asked": {"tyle": 1}}, {**ours, "batch": "4"}]
    for change in ({"steps": "4"}, {"guidance_interval": [0]}, {"tile": "no"}, {"prompt": None}):
        foreign.append({**ours, "request": {**request, **change}})
    for change in ({"model": None}, {"ema": "yes"}, {"lora": [1]}, {"more": 1}):
        foreign.append({**ours, "model": {**model, **change}})
    foreign += [{**ours, "weights": {"vae": 5}}, {"version": 2, "model": 5}]
    for text in foreign:
        save_with(path, text)
        with pytest.raises(ValueError, match="carries no request of pixart.generate"):
            read_metadata(path)


@pytest.mark.parametrize(
    "content, rule",
    [(b"text", "is not a picture"), (None, "cannot be read"), (b"", "is not a picture")],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes | None, rule: str) -> None:
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=rule):
        read_metadata(tmp_path / "x.png")


def test_a_picture_of_absurd_size_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    write(picture(), job(tmp_path / "x.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="cannot be read"):
        read_metadata(tmp_path / "x.png")


def test_the_request_of_a_picture_gives_what_was_not_given_anew(tmp_path: Path) -> None:
    drawn, _ = plan(
        Options(
            prompt=("a cat",), output=tmp_path / "x.png", model="there", seed=7, steps=9,
            aspect="16:9", guidance_interval=(0.2, 0.8), dtype="bf16",
        )
    )  # fmt: skip
    write(picture(), drawn[0], batched=False, tile=256)
    once_more = tmp_path / "again.png"
    again, options = plan(Options(from_image=tmp_path / "x.png", output=once_more))
    assert again[0].request == replace(drawn[0].request, batched=False, tile=256)
    assert again[0].model == drawn[0].model
    assert options.model == "there"
    [other], _ = plan(Options(from_image=tmp_path / "x.png", steps=3, size="64"))
    asked = other.request
    assert (asked.batched, asked.tile) == (None, None), "chosen for another size"
    assert (asked.steps, asked.size, asked.aspect, asked.seed) == (3, "64", None, 7)


def test_a_picture_is_never_drawn_over_the_one_it_is_drawn_from(tmp_path: Path) -> None:
    [drawn], _ = plan(Options(prompt=("a cat",), output=tmp_path))
    write(picture(), drawn)
    with pytest.raises(ValueError, match="must not be the picture to draw again"):
        plan(Options(from_image=drawn.path, output=tmp_path, steps=3))


def test_a_prompt_too_long_for_a_files_exif_is_refused_before_it_find_drawn(tmp_path: Path) -> None:
    for suffix in ("jpg", "webp"):
        with pytest.raises(ValueError, match="use --format png"):
            plan(Options(prompt=("a" * 70_000,), output=tmp_path / f"x.{suffix}"))
    [job], _ = plan(Options(prompt=("a" * 70_000,), output=tmp_path / "x.png"))
    write(picture(), job)
    assert read_metadata(job.path).request.prompt == job.request.prompt


def test_an_interrupted_write_leaves_the_old_picture_and_nothing_else(
    tmp_path: Path, monkeypatch: Any
) -> None:
    one = job(tmp_path / "x.png")
    write(picture("red"), one)
    before = one.path.read_bytes()

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(picture("blue"), one)
    assert one.path.read_bytes() == before and os.listdir(tmp_path) == ["x.png"]


def test_a_full_disk_is_a_failure_that_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match="x.png: cannot be written .No space left on device"):
        write(picture(), job(tmp_path / "x.png"))
    assert os.listdir(tmp_path) == []


def test_checking_a_place_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable([tmp_path / "a" / "b" / "x.png", tmp_path / "y.png"])
    assert os.listdir(tmp_path) == []


def test_a_name_of_the_longest_length_can_be_written(tmp_path: Path) -> None:
    one = job(tmp_path / ("n" * 251 + ".png"))
    check_writable([one.path])
    write(picture(), one)
    assert os.listdir(tmp_path) == [one.path.name]


@pytest.mark.parametrize(
    "place",
    ["file/x.png", "file/a/b/x.png", "folder.png", f"{'n' * 300}.png", f"{'n' * 300}/x.png"],
)
def test_a_place_that_cannot_be_written_is_refused_beforehand(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="cannot be written .*choose another --output"):
        check_writable([tmp_path / place])


def test_a_picture_is_drawn_again_beside_itself_unless_given_an_output(tmp_path: Path) -> None:
    one = job(tmp_path / "x.png")
    write(picture(), one)
    [again], _ = plan(Options(from_image=one.path))
    assert again.path == tmp_path / "x-again.png"
    [jpg], _ = plan(Options(from_image=one.path, format="jpg"))
    assert jpg.path == tmp_path / "x-again.jpg"
    [elsewhere], _ = plan(Options(from_image=one.path, output=tmp_path / "out"))
    assert elsewhere.path == tmp_path / "out" / "a-cat-0.png"


def test_a_picture_carries_paths_that_hold_wherever_it_is_drawn_again(
    tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "x.pth").touch()
    monkeypatch.chdir(tmp_path)
    [one], _ = plan(Options(prompt=("a",), model="model", transformer="x.pth"))
    assert one.model["model"] == str(tmp_path / "model")
    assert one.model["transformer"] == str(tmp_path / "x.pth")
    [hub], _ = plan(Options(prompt=("a",), model="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"))
    assert hub.model["model"] == "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
    assert plan(Options(prompt=("a",)))[0][0].model["model"] == "shapes"


def test_every_model_option_given_anew_counts_and_the_others_are_carried(
    tmp_path: Path, monkeypatch: Any
) -> None:
    one = job(tmp_path / "x.png")
    model = {**one.model, "model": "elsewhere", "cuda_graph": "on", "ema": True, "variant": "fp16"}
    write(picture(), replace(one, model=model))
    monkeypatch.setattr("pixart.device.check_cuda_graph", lambda *_: None)
    _, options = plan(Options(from_image=one.path))
    assert (options.model, options.cuda_graph, options.ema) == ("elsewhere", "on", True)
    assert options.variant == "fp16"
    [shapes], options = plan(Options(from_image=one.path, model="shapes"))
    assert options.model == "shapes" == shapes.model["model"]
    assert shapes.request.tile is None, "another model needs another memory"
    _, options = plan(Options(from_image=one.path, device="cpu"))
    assert options.cuda_graph == "auto", "graphs belong to the device"
