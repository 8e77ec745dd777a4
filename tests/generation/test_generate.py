"""The command line, on small random pipelines in the published layouts: what it draws and says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from published import build_alpha, build_sigma

from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.config import KVCompression, PixArtConfig
from pixart.generate import main
from pixart.model.transformer import PixArt
from pixart.pipeline.pictures import read_metadata
from pixart.pipeline.request import VERSION
from pixart.pipeline.text_to_image import Pipeline

CHANNELS = (8, 8, 8, 8)


@pytest.fixture(scope="module")
def sigma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As PixArt-Sigma-XL-2-1024-MS, for 128 px."""
    return build_sigma(tmp_path_factory.mktemp("s"), sample_size=16, vae_channels=CHANNELS)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pixart_sigma_sdxlvae_T5_diffusers, which has no transformer."""
    path = tmp_path_factory.mktemp("bare")
    return build_sigma(path, with_transformer=False, vae_channels=CHANNELS)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(model: Path, *arguments: str, steps: int = 2) -> int:
    fixed = ["--model", str(model), "--device", "cpu", "--steps", str(steps)]
    return main([*arguments, *fixed, *([] if "--cache" in arguments else ["--no-cache"])])


def report(capsys: Any) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def files(folder: Path = Path()) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def official(pipeline: Path, path: Path, compression: KVCompression | None = None) -> Path:
    """A .pth as published: the tensors under "state_dict", and no word on their configuration."""
    model = load_transformer(pipeline, kv_compression=compression)
    save_transformer(model, path, format="official")
    content = torch.load(path, weights_only=True)
    torch.save({"state_dict": content["state_dict"], "epoch": 1}, path)
    return path


def test_a_sigma_directory_draws_its_native_size(sigma: Path) -> None:
    assert draw(sigma, "a small cactus") == 0
    assert pixels("outputs/a-small-cactus-0.png").shape == (128, 128, 3)
    assert pixels("outputs/a-small-cactus-0.png").std() > 10


def test_an_official_pth_draws_in_the_directory_without_a_transformer_what_the_whole_one_draws(
    sigma: Path, bare: Path
) -> None:
    pth = official(sigma, Path("PixArt-Sigma-XL-2-128-MS.pth"))
    assert draw(bare, "a cat", "--transformer", str(pth), "--output", "pth.png") == 0
    assert draw(sigma, "a cat", "--output", "whole.png") == 0
    assert np.array_equal(pixels("pth.png"), pixels("whole.png"))


def test_a_compressed_pth_and_a_dense_one_opened_compressed_draw_the_same(
    sigma: Path, bare: Path
) -> None:
    dense = official(sigma, Path("dense.pth"))
    compressed = official(sigma, Path("compressed.pth"), KVCompression([1], 2))
    assert draw(bare, "a cat", "--transformer", str(compressed), "--output", "a.png") == 0
    opened = ("--transformer", str(dense), "--kv-compress", "1:2")
    assert draw(bare, "a cat", *opened, "--output", "b.png") == 0
    assert draw(bare, "a cat", "--transformer", str(dense), "--output", "c.png") == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


def test_alpha_1024_draws_what_the_pipeline_draws_at_any_size(tmp_path: Path) -> None:
    alpha = build_alpha(tmp_path / "alpha", vae_channels=CHANNELS)
    assert draw(alpha, "A Cat", "--size", "192x128", "--output", "x.png") == 0
    pipe = Pipeline.from_pretrained(alpha, device="cpu", cache_dir=None)
    assert pipe.transformer.config.micro_condition
    [image] = pipe("a cat", height=128, width=192, steps=2)
    assert np.array_equal(pixels("x.png"), np.asarray(image))


def test_options_reach_the_picture(sigma: Path) -> None:
    options = {
        "seed": "3", "guidance": "2", "negative": "a dog", "scheduler": "euler", "size": "64x128",
        "null-caption": "prompt-mask", "dtype": "bf16", "text-encoder-dtype": "bf16",
    }  # fmt: skip
    assert draw(sigma, "a cat", "--output", "plain.png") == 0
    for name, value in options.items():
        assert draw(sigma, "a cat", "--output", f"{name}.png", f"--{name}", value) == 0
        assert not np.array_equal(pixels(f"{name}.png"), pixels("plain.png")), name
    interval = ("--guidance-interval", "0.5", "1")
    assert draw(sigma, "a cat", "--output", "interval.png", *interval) == 0
    assert not np.array_equal(pixels("interval.png"), pixels("plain.png"))


def test_several_prompts_and_seeds_give_pictures_in_order(sigma: Path, capsys: Any) -> None:
    assert draw(sigma, "a cat", "a dog", "--num-images", "2", "--seed", "4", "--json") == 0
    result = report(capsys)
    assert [(i["prompt"], i["seed"]) for i in result["images"]] == [
        ("a cat", 4), ("a cat", 5), ("a dog", 4), ("a dog", 5),
    ]  # fmt: skip
    assert sorted(i["file"] for i in result["images"]) == [
        f"outputs/{name}" for name in files(Path("outputs"))
    ]
    assert draw(sigma, "a dog", "--seed", "5", "--output", "alone.png") == 0
    assert np.array_equal(pixels("alone.png"), pixels("outputs/a-dog-5.png"))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_a_picture_of_any_format_is_drawn_again_from_itself(sigma: Path, kind: str) -> None:
    request = ("--seed", "5", "--size", "64x128", "--guidance", "3", "--negative", "fog")
    assert draw(sigma, "a cat", *request, "--format", kind) == 0
    again = ["--from-image", f"outputs/a-cat-5.{kind}", "--no-cache"]
    assert main([*again, "--output", f"again.{kind}"]) == 0
    assert np.array_equal(pixels(f"again.{kind}"), pixels(f"outputs/a-cat-5.{kind}"))
    assert main([*again, "--output", f"other.{kind}", "--steps", "3"]) == 0
    assert read_metadata(Path(f"other.{kind}")).request.steps == 3
    assert not np.array_equal(pixels(f"other.{kind}"), pixels(f"again.{kind}"))


def test_a_list_of_prompts_is_taken_up_where_it_stopped(sigma: Path, capsys: Any) -> None:
    Path("p.txt").write_text("a cat\na dog\n")
    taken = {}
    assert draw(sigma, "--prompts", "p.txt", "--json") == 0
    assert report(capsys)["drawn"] == 2
    for name in ("a-cat-0.png", "a-dog-0.png"):
        taken[name] = Path("outputs", name).stat().st_mtime_ns
    Path("p.txt").write_text("a moon\na cat\na dog\n")
    os.remove("outputs/a-dog-0.png")
    assert draw(sigma, "--prompts", "p.txt", "--json") == 0
    result = capsys.readouterr()
    assert json.loads(result.out)["drawn"] == 2 and len(json.loads(result.out)["images"]) == 3
    assert "1 of 3 pictures are there already" in result.err
    assert Path("outputs/a-cat-0.png").stat().st_mtime_ns == taken["a-cat-0.png"]
    assert files(Path("outputs")) == ["a-cat-0.png", "a-dog-0.png", "a-moon-0.png"]


def test_a_list_that_is_done_opens_no_model_and_another_request_draws_anew(
    sigma: Path, capsys: Any, monkeypatch: Any
) -> None:
    lines = [{"prompt": "a cat", "name": "one"}, {"prompt": "a dog", "name": "two", "seed": 3}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert draw(sigma, "--prompts", "p.jsonl", "--json") == 0
    assert files(Path("outputs")) == ["one.png", "two.png"]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "from_pretrained", None)
        assert draw(sigma, "--prompts", "p.jsonl", "--json") == 0
    assert report(capsys)["drawn"] == 0
    lines[1]["guidance"] = 2
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert draw(sigma, "--prompts", "p.jsonl", "--json") == 0
    assert report(capsys)["drawn"] == 1
    guidance = {
        name: read_metadata(Path("outputs", name)).request.guidance
        for name in files(Path("outputs"))
    }
    assert guidance == {"one.png": 4.5, "two.png": 4.5, "two-2.png": 2}


def test_json_goes_to_standard_output_alone_and_progress_beside_it(
    sigma: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("pixart.progress.FIRST_SECONDS", 0.0)
    assert draw(sigma, "a cat", "--json") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    [image] = result["images"]
    drawn = read_metadata(Path(image["file"]))
    settings, model, seconds = (image.pop(name) for name in ("settings", "model", "seconds"))
    assert settings | {"version": VERSION} == drawn.request.to_dict() and model == drawn.model
    assert seconds.keys() == result["seconds"].keys()
    assert image == {
        "file": "outputs/a-cat-0.png",
        "prompt": "a cat",
        "seed": 0,
        "width": 128,
        "height": 128,
        "note": "128x128, the model's own size",
        "inputs": {},
    }
    assert set(result["seconds"]) == {"load", "text", "denoise", "decode", "write"}
    assert all(spent > 0 for spent in result["seconds"].values())
    assert result["peak_memory_bytes"] > 10**8
    assert "128x128" in printed.err and "outputs/a-cat-0.png" in printed.err
    for shown in ("load: ", "text: ", "load transformer", "denoise 1/2", "decode 1/1", "write"):
        assert shown in printed.err, "every stage is shown"


def test_hostile_prompts_stay_in_the_folder(sigma: Path, tmp_path: Path) -> None:
    prompts = ["../../etc/passwd", "🐈", "/", "cactus " * 71]
    before = files(tmp_path.parent)
    assert draw(sigma, *prompts, "--output", "a/b", "--quiet", steps=1) == 0
    assert len(files(tmp_path / "a/b")) == 4
    assert files(tmp_path) == ["a"] and files(tmp_path.parent) == before
    assert read_metadata(next(Path("a/b").glob("etc-passwd*"))).request.prompt == prompts[0]


def test_tiles_and_batches_that_memory_chose_are_chosen_again_when_it_is_drawn_again(
    sigma: Path, monkeypatch: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pixart.vae.autoencoder.free_memory", lambda _: 0)
        patch.setattr("pixart.pipeline.drawing.free_memory", lambda _: 0)
        assert draw(sigma, "a cat", "--size", "256", "--output", "x.png") == 0
    request = read_metadata(Path("x.png")).request
    assert (request.tile, request.batched) == (128, False)
    assert draw(sigma, "a cat", "--size", "256", "--output", "roomy.png") == 0
    assert read_metadata(Path("roomy.png")).request.tile is False
    assert main(["--from-image", "x.png", "--no-cache"]) == 0
    again = read_metadata(Path("x-again.png")).request
    assert (again.tile, again.batched) == (128, False)
    assert np.array_equal(pixels("x-again.png"), pixels("x.png"))


def test_an_official_pth_of_unusual_width_draws_as_the_directory_that_tells_its_heads(
    sigma: Path, tmp_path: Path
) -> None:
    config = PixArtConfig(
        input_size=16, hidden_size=144, depth=2, num_heads=9, caption_channels=32,
        pe_interpolation=0.25,
    )  # fmt: skip
    model = build_like(sigma, tmp_path / "nine", config)
    pth = official(model, Path("nine.pth"))
    content = torch.load(pth, weights_only=True)["state_dict"]
    del content["pos_embed"]
    torch.save({"state_dict": content}, pth)
    assert draw(model, "a cat", "--output", "whole.png") == 0
    assert draw(model, "a cat", "--transformer", str(pth), "--output", "pth.png") == 0
    assert np.array_equal(pixels("pth.png"), pixels("whole.png"))
    Path("c.json").write_text(json.dumps(config.to_dict()))
    given = ("--transformer", str(pth), "--config", "c.json")
    assert draw(sigma, "a cat", *given, "--output", "given.png") == 0
    assert np.array_equal(pixels("given.png"), pixels("whole.png"))


def build_like(pipeline: Path, path: Path, config: PixArtConfig) -> Path:
    """The pipeline with a random transformer of another configuration."""
    path.mkdir()
    for entry in pipeline.iterdir():
        if entry.name != "transformer":
            (path / entry.name).symlink_to(entry)
    torch.manual_seed(0)
    model = PixArt(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_transformer(model, path / "transformer")
    return path


def test_the_averaged_weights_of_a_pth_are_drawn_with_when_asked_for(
    sigma: Path, bare: Path
) -> None:
    pth = official(sigma, Path("x.pth"))
    tensors = torch.load(pth, weights_only=True)["state_dict"]
    average = {name: tensor * 1.1 for name, tensor in tensors.items()}
    torch.save(
        {"state_dict": tensors, "state_dict_ema": average | {"pos_embed": tensors["pos_embed"]}},
        pth,
    )
    assert draw(bare, "a cat", "--transformer", str(pth), "--output", "a.png") == 0
    assert draw(bare, "a cat", "--transformer", str(pth), "--ema", "--output", "b.png") == 0
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))
    assert read_metadata(Path("b.png")).model["ema"] is True


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_a_prompt_that_is_cut_is_drawn_with_a_warning_of_one_line(sigma: Path, capsys: Any) -> None:
    words = " ".join(f"cat{n}" for n in range(2000))
    assert draw(sigma, words, steps=1) == 0
    printed = lines_of(capsys.readouterr().err)
    [warning] = [line for line in printed if "warning" in line.lower()]
    assert warning.startswith("warning: the prompt is longer than 300 tokens; cut off: ")
    assert warning.endswith("cat1999'") and "cat0 " not in warning
    assert draw(sigma, words, "--quiet", steps=1) == 0
    assert capsys.readouterr().err == ""


def test_cached_prompts_need_no_encoder(sigma: Path, capsys: Any, monkeypatch: Any) -> None:
    assert draw(sigma, "a cat", "--cache", "--output", "first.png") == 0
    monkeypatch.setattr("pixart.text.encoder.load_network", None)
    assert draw(sigma, "a cat", "--cache", "--output", "second.png") == 0
    assert np.array_equal(pixels("first.png"), pixels("second.png"))


def test_ctrl_c_keeps_finished_pictures_and_leaves_nothing_half_written(
    sigma: Path, capsys: Any, monkeypatch: Any
) -> None:
    flush, flushed = os.fsync, []

    def interrupted(descriptor: int) -> None:
        if len(flushed) == 2:  # the first picture and its folder
            raise KeyboardInterrupt
        flushed.append(flush(descriptor))

    monkeypatch.setattr(os, "fsync", interrupted)
    assert draw(sigma, "a cat", "a dog", "--json") == 130
    out, printed = capsys.readouterr()
    assert "pixart.generate: cancelled; finished pictures are kept" in printed
    assert "Traceback" not in printed
    result = json.loads(out)
    assert [one["file"] for one in result["images"]] == ["outputs/a-cat-0.png"]
    assert result["drawn"] == 1 and result["error"].startswith("cancelled")
    assert files(Path("outputs")) == ["a-cat-0.png"]
    Image.open("outputs/a-cat-0.png").load()


def run_apart(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pixart.generate", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_ctrl_c_in_the_first_moments_is_one_line_and_130() -> None:
    code = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
import runpy
runpy.run_module("pixart.generate", run_name="__main__")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for module in ("tyro", "torch", "pixart.pipeline", "diffusers"):
        # Euler is of diffusers, which the default scheduler does without.
        options = ["--device", "cpu", "--scheduler", "euler"]
        command = [sys.executable, "-c", code, module, *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        printed = "pixart.generate: cancelled; finished pictures are kept"
        assert (done.returncode, done.stderr.splitlines()[-1]) == (130, printed), done.stderr
        assert "Traceback" not in done.stderr


def test_quiet_says_nothing_at_all(sigma: Path) -> None:
    # In a process of its own: libraries speak when they are imported.
    arguments = ["--steps", "1", "--device", "cpu", "--output", "x.png", "--quiet"]
    done = run_apart("a cat", "--model", str(sigma), *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Path("x.png").is_file()


def test_quiet_silences_what_libraries_log_as_they_are_imported() -> None:
    code = """
import logging, sys, warnings
class Loud:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "diffusers"):
            logging.getLogger(name).warning("%s warns", name)
            logging.getLogger(f"{name}.ops").error("%s cannot load its extensions", name)
            own = logging.getLogger("own")
            own.addHandler(logging.StreamHandler())
            own.warning("%s has a handler of its own", name)
            warnings.warn(f"{name} is old")
sys.meta_path.insert(0, Loud())
import runpy
runpy.run_module("pixart.generate", run_name="__main__")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    drawn = ["a red circle", "--steps", "2", "--scheduler", "euler"]  # which is of diffusers
    arguments = [*drawn, "--device", "cpu", "--output", "x.png"]
    command = [sys.executable, "-c", code, *arguments]
    loud, quiet = (
        subprocess.run([*command, *more], capture_output=True, text=True, env=environment)
        for more in ([], ["--quiet"])
    )
    for line in ("warns", "cannot load", "has a handler", "is old"):
        assert f"torch {line}" in loud.stderr and f"diffusers {line}" in loud.stderr
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_help_names_every_option_and_loads_no_torch(elsewhere: Path) -> None:
    done = run_apart("--help")
    assert done.returncode == 0
    for option in ("--from-image", "--kv-compress", "--null-caption", "--text-encoder-dtype"):
        assert option in done.stdout
    code = "import sys, pixart.generate; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
