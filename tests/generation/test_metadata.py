"""What pictures carry: to be drawn again, whatever version drew them, and for gallery tools."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from tiny_preprocessors import hed_tensors

from pixart import __version__
from pixart.generate import main
from pixart.generation.jobs import plan
from pixart.generation.options import Options
from pixart.pipeline.metadata import MODEL_OPTIONS, VERSION, Metadata
from pixart.pipeline.pictures import KEY, find_drawn, read_metadata, write_picture
from pixart.pipeline.request import SETTINGS, Request

# What has no number in a picture from text alone.
EDITING = SETTINGS[SETTINGS.index("image") : SETTINGS.index("batched")]
OLD = Path(__file__).parent.parent / "golden" / "pictures"
MODEL = dict.fromkeys(MODEL_OPTIONS) | {
    "model": "shapes", "lora": [], "control": [], "preprocessor_weights": [], "ema": False, "cuda_graph": "auto",
}  # fmt: skip
OPENED = {
    "dtype": "fp32",
    "text_encoder_dtype": "fp32",
    "null_caption": "own-mask",
    "device": "cpu",
    "cuda_graph": "off",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.chdir(tmp_path)


def drawn(prompt: str = "a cat", **changes: Any) -> Metadata:
    asked = Request(prompt, size="512", **changes)
    request = replace(
        asked, size=None, height=512, width=512, steps=20, guidance=4.5, scheduler="dpm-solver++",
        guidance_interval=(0.0, 1.0), batched=True, tile=False,
    )  # fmt: skip
    weights = {"transformer": "0123456789abcdef" * 4, "vae": "f" * 64}
    return Metadata(request, {**MODEL, **OPENED}, asked, MODEL, weights, "DPM++ 2M", 3)


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def parameters_of(path: Path) -> str:
    image = Image.open(path)
    if path.suffix == ".png":
        return image.info["parameters"]
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("prompt", ["a cat", "a 🐈,\n\x00\x1b[31m 'cat': \"猫\"", "Steps: 5"])
def test_what_drew_a_picture_is_read_as_it_was_written(
    tmp_path: Path, kind: str, prompt: str
) -> None:
    path, one = tmp_path / "new" / f"x.{kind}", drawn(prompt, negative="fog\r\nrain")
    write_picture(Image.new("RGB", (64, 64)), path, one)
    assert read_metadata(path) == one
    assert Image.open(path).format == {"jpg": "JPEG"}.get(kind, kind.upper())
    assert [other.name for other in path.parent.iterdir()] == [path.name]
    prompt_line, negative, settings = parameters_of(path).split("\n")
    assert prompt_line == " ".join(re.split(r"[\s\x00\x1b]+", prompt))
    assert negative == "Negative prompt: fog rain"
    assert settings == (
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 4.5, Seed: 0, Size: 512x512, "
        f"Model hash: 0123456789, Model: shapes, Version: pixart {__version__}"
    )


def test_the_line_of_gallery_tools_names_the_model_and_quotes_what_would_end_it() -> None:
    one = drawn()
    assert one.to_parameters().splitlines()[0] == "a cat", "no negative prompt, no line"
    for transformer, name in (
        ("/models/PixArt-Sigma-XL-2-2K-MS.pth", "PixArt-Sigma-XL-2-2K-MS"),
        ("PixArt-alpha/PixArt-XL-2-512x512", "PixArt-XL-2-512x512"),
        ("/models/my, best: model", '"my, best: model"'),
    ):
        other = replace(one, model={**one.model, "transformer": transformer})
        assert f"Model: {name}, Version" in other.to_parameters()


def test_nothing_is_left_open_and_what_was_is_listed() -> None:
    values = json.loads(drawn().to_text())
    assert values["version"] == VERSION == 8
    assert values["library"] == f"pixart {__version__}"
    left_open = {"size": "512", "height": None, "width": None, "steps": None, "guidance": None,
                 "guidance_interval": None, "scheduler": None, "batched": None, "tile": None}  # fmt: skip
    assert values["asked"] == {**left_open, **dict.fromkeys(OPENED), "cuda_graph": "auto"}
    request = values["request"]
    kept_open = {
        "size",
        "aspect",
        "resolution",
        "timesteps",
        *EDITING,
    }  # height and width say it, the scheduler knows its own; nothing is edited
    assert {name for name, value in request.items() if value is None} == kept_open
    assert values["inputs"] == {}


def test_a_picture_of_version_5_had_attention_in_full() -> None:
    one = drawn()
    values = json.loads(one.to_text()) | {"version": 5}
    del values["inputs"]
    for name in ("control", "preprocessor_weights", "fast", "text_encoder", "quantize"):
        del values["model"][name]
    with pytest.raises(ValueError, match="version 5 has no attention"):
        Metadata.from_text(json.dumps(values))
    del values["model"]["attention"]
    read = Metadata.from_text(json.dumps(values))
    assert (read.model, read.asked_model) == (one.model, one.asked_model)


def test_a_picture_of_a_later_version_is_refused_by_saying_so(tmp_path: Path, capsys: Any) -> None:
    values = json.loads(drawn().to_text())
    info = PngInfo()
    info.add_itxt(KEY, json.dumps({**values, "version": VERSION + 1, "more": "than we know"}))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    assert main(["--from-image", "x.png"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "pixart.generate: x.png: was drawn by a newer pixart (version 9 of its metadata, this one reads "
        "1 to 8); update pixart"
    ]


def old_pictures() -> list[Path]:
    return sorted(OLD.iterdir())


@pytest.mark.parametrize("path", old_pictures(), ids=lambda path: path.name)
def test_a_picture_of_every_version_is_read(path: Path) -> None:
    version = int(path.name[1])
    one = read_metadata(path)
    assert one.version == version
    text = json.loads(Image.open(path).info.get(KEY) or Image.open(path).getexif()[0x010E])
    asked = text if version < 4 else text["request"] | text["model"] | text["asked"]
    for name in ("prompt", "negative", "seed", "steps", "guidance", "scheduler", "aspect"):
        assert getattr(one.asked, name) == asked[name]
    assert one.asked.size == (None if asked["size"] is None else str(asked["size"]))
    words = {"cuda_graph": "auto"}  # they said false, whether it was asked for or not
    model = text["model"] if version < 4 else {k: asked[k] for k in text["model"]}
    assert {**one.asked_model, **model, **words} == one.asked_model
    chosen = text if version < 4 else text["request"]
    assert (one.request.batched, one.request.tile) == (chosen.get("batched"), chosen.get("tile"))
    assert one.asked_model["lora"] == one.asked_model["control"] == []
    assert {name: getattr(one.request, name) for name in EDITING} == dict.fromkeys(EDITING)
    assert one.inputs == {} and bool(one.weights) == (version > 3)


@pytest.mark.parametrize(
    "path",
    [path for path in old_pictures() if "plain" in path.name or path.name == "v1-settings.png"],
    ids=lambda path: path.name,
)
def test_a_picture_of_every_version_is_drawn_again(path: Path) -> None:
    """Two levels: another CPU may round otherwise than the one that drew them."""
    assert main(["--from-image", str(path), "--output", "again.png", "--no-cache", "--quiet"]) == 0
    apart = np.abs(pixels(path).astype(int) - pixels("again.png").astype(int)).max()
    assert apart <= 2
    again = read_metadata(Path("again.png"))
    old = read_metadata(path)
    assert again.version == VERSION and again.request.seed == old.request.seed
    assert (again.request.width, again.request.height) == Image.open(path).size


def test_a_list_that_an_older_version_drew_is_not_drawn_again() -> None:
    for path in (OLD / "v2-plain.png", OLD / "v3-plain.png", OLD / "v6-jpg.jpg"):
        asked = read_metadata(path).asked
        [job], _ = plan(Options(prompt=(asked.prompt,), seed=asked.seed, size="64", steps=4))
        there = find_drawn(path, job.request, job.model)
        assert there is not None and there.size == (64, 64)
        assert find_drawn(path, replace(job.request, seed=8), job.model) is None


def save(path: Path, one: Metadata) -> None:
    write_picture(Image.new("RGB", (16, 16)), path, one)


def test_what_was_left_open_stays_as_drawn_unless_it_depends_on_what_is_given_anew(
    tmp_path: Path,
) -> None:
    save(tmp_path / "x.png", drawn())

    def planned(**options: Any) -> tuple[Request, Options]:
        [job], opened = plan(Options(from_image=tmp_path / "x.png", **options))
        return job.request, opened

    request, options = planned(seed=3)
    assert request == replace(drawn().request, seed=3)
    assert (options.dtype, options.null_caption, options.device) == ("fp32", "own-mask", None)
    request, options = planned(scheduler="lcm")
    assert (request.scheduler, request.steps, request.guidance) == ("lcm", None, None)
    assert (request.width, options.dtype) == (512, "fp32")
    request, _ = planned(aspect="2:1")
    assert (request.width, request.size, request.aspect, request.steps) == (None, None, "2:1", 20)
    assert (request.batched, request.tile) == (None, None)
    request, options = planned(model="elsewhere")
    assert request == drawn().asked
    assert (options.dtype, options.null_caption) == (None, None)
    request, options = planned(seed=0, negative="", guidance_interval=(0.0, 1.0))
    assert request == drawn().request, "given, though it is the default"


def test_whether_a_graph_drew_a_picture_is_kept_for_machines_that_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = drawn()

    def planned(used: str, asked: str, device: str, **options: Any) -> str:
        monkeypatch.setattr("pixart.device.choose_device", lambda _, **given: torch.device(device))
        models = {**one.model, "cuda_graph": used}, {**one.asked_model, "cuda_graph": asked}
        save(tmp_path / "x.png", replace(one, model=models[0], asked_model=models[1]))
        [job], opened = plan(Options(from_image=tmp_path / "x.png", **options))
        assert job.model["cuda_graph"] == opened.cuda_graph
        return opened.cuda_graph

    for used, asked in (("on", "auto"), ("off", "auto"), ("on", "on"), ("off", "off")):
        assert planned(used, asked, "cuda") == used
    assert planned("on", "auto", "cpu") == planned("off", "auto", "cpu") == "auto"
    assert planned("off", "off", "cpu") == "off"
    assert planned("on", "auto", "cuda", cuda_graph="off") == "off"
    assert planned("on", "auto", "cuda", model="elsewhere") == "auto"
    with pytest.raises(ValueError, match=r"x\.png: cuda_graph must be False on cpu, got True"):
        planned("on", "on", "cpu")


def test_pictures_that_say_true_and_false_of_graphs_are_read() -> None:
    values = json.loads(drawn().to_text())

    def read(used: object, **asked: object) -> tuple[object, object]:
        left_open = {k: v for k, v in values["asked"].items() if k != "cuda_graph"} | asked
        model = {**values["model"], "cuda_graph": used}
        one = Metadata.from_text(json.dumps({**values, "model": model, "asked": left_open}))
        return one.model["cuda_graph"], one.asked_model["cuda_graph"]

    assert read(False) == ("off", "auto"), "nobody asked for it"
    assert read(True) == ("on", "on") and read("on", cuda_graph="auto") == ("on", "auto")
    assert read("off") == ("off", "off")
    for wrong in ("yes", 1, None):
        with pytest.raises(ValueError, match="cuda_graph must be"):
            read(wrong)


def test_what_was_left_open_is_left_open_in_a_picture_that_was_drawn_again(tmp_path: Path) -> None:
    assert main(["a red circle", "--size", "64", "--steps", "1", "--output", "x.png"]) == 0
    assert main(["--from-image", "x.png", "--seed", "3", "--no-cache"]) == 0
    first, second = read_metadata(Path("x.png")), read_metadata(Path("x-again.png"))
    assert second.request == replace(first.request, seed=3) and second.model == first.model
    assert second.asked == replace(first.asked, seed=3)
    assert second.asked_model == first.asked_model
    assert second.asked.batched is second.asked_model["dtype"] is None

    def planned(**options: Any) -> tuple[Request, dict[str, Any]]:
        [job], _ = plan(Options(from_image=tmp_path / "x-again.png", **options))
        assert (job.request.batched, job.request.tile) == (None, None)
        assert job.asked.seed == job.request.seed == 3
        return job.asked, dict(job.model)

    asked, _ = planned(resolution="128")
    assert asked == replace(second.asked, size=None, resolution="128")
    asked, model = planned(model="elsewhere")
    assert asked == second.asked and model["dtype"] is model["null_caption"] is None


def test_every_option_that_is_given_anew_was_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "x.png", drawn())
    given: dict[str, Any] = {"seed": 7, "scheduler": "ddim", "guidance": 2.0, "tile": 64}
    options: dict[str, Any] = {"dtype": "bf16", "device": "cpu", "ema": True}
    jobs, _ = plan(Options(from_image=tmp_path / "x.png", num_images=2, **given, **options))
    assert [job.asked.seed for job in jobs] == [job.request.seed for job in jobs] == [7, 8]
    assert jobs[0].asked == replace(drawn().asked, **given)
    assert jobs[0].asked_model == {**MODEL, **options}


def test_a_picture_is_not_drawn_again_without_end(tmp_path: Path) -> None:
    save(tmp_path / "x.png", drawn())
    with pytest.raises(ValueError, match="a run must be of at most 1,000,000 pictures"):
        plan(Options(from_image=tmp_path / "x.png", num_images=10**7))


def again(path: Path, capsys: Any) -> str:
    assert main(["--from-image", str(path), "--no-cache", "--overwrite"]) == 0
    return capsys.readouterr().err


def test_other_weights_are_remarked_on_when_a_picture_is_drawn_again(capsys: Any) -> None:
    assert main(["a red circle", "--size", "64", "--steps", "1", "--output", "x.png"]) == 0
    capsys.readouterr()
    path, one = Path("x.png"), read_metadata(Path("x.png"))
    assert "other weights" not in again(path, capsys)
    assert np.array_equal(pixels("x-again.png"), pixels("x.png"))
    save(path, replace(one, weights={**one.weights, "vae": "0" * 64}))
    printed = again(path, capsys)
    assert "x.png was drawn with other weights of vae: this is another picture" in printed
    save(path, replace(one, batch=4))
    assert "drawn in a pass of 4 pictures, this one of 1: bits may differ" in again(path, capsys)


def test_other_networks_of_preprocessors_are_remarked_on(capsys: Any) -> None:
    """Their place says nothing of what lies there by now."""
    save_file(hed_tensors(0), "hed.safetensors")
    Image.new("RGB", (64, 64), "red").save("photo.png")
    words = ["a red circle", "--size", "64", "--steps", "1", "--control", "shapes-control"]
    words += ["--control-image", "photo.png", "--preprocessor-weights", "hed=hed.safetensors"]
    assert main([*words, "--control-preprocessor", "hed", "--output", "x.png"]) == 0
    capsys.readouterr()
    path = Path("x.png")
    digest = read_metadata(path).weights["preprocessor hed"]
    assert re.fullmatch("[0-9a-f]{16}", digest)
    assert "other weights" not in again(path, capsys)
    save_file(hed_tensors(1), "hed.safetensors")
    said = "x.png was drawn with other weights of preprocessor hed: this is another picture"
    assert said in again(path, capsys)
    assert read_metadata(Path("x-again.png")).weights["preprocessor hed"] != digest


def test_a_pass_of_several_writes_each_picture_and_says_so(capsys: Any) -> None:
    arguments = ["a red circle", "--size", "64", "--steps", "2", "--no-cache", "--num-images", "3"]
    assert main([*arguments, "--output", "alone"]) == 0
    assert main([*arguments, "--output", "together", "--batch", "2", "--quiet"]) == 0
    names = sorted(path.name for path in Path("together").iterdir())
    assert names == sorted(path.name for path in Path("alone").iterdir()) and len(names) == 3
    batches = [read_metadata(Path("together") / name).batch for name in names]
    assert batches == [2, 2, 1]
    for name in names:
        apart = pixels(Path("together") / name).astype(int) - pixels(Path("alone") / name)
        assert np.abs(apart).max() <= 1
    assert main([*arguments, "--batch", "0"]) == 2
    assert "--batch must be at least 1, got 0" in capsys.readouterr().err
