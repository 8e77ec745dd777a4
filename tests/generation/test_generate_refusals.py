"""What the command line refuses: one line that says why, the right exit code, nothing left behind."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from published import build_sigma
from safetensors.torch import load_file, save_file

from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.config import KVCompression
from pixart.generate import main
from pixart.pipeline.text_to_image import Pipeline


@pytest.fixture(scope="module")
def sigma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sigma(tmp_path_factory.mktemp("s"), sample_size=16, vae_channels=(8, 8, 8, 8))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def refused(sigma: Path, capsys: Any, arguments: list[str], code: int = 2) -> str:
    """Run, and return the one line that was printed; there is no file more or less than before."""
    model = [] if "--model" in arguments else ["--model", str(sigma)]
    steps = [] if "--steps" in arguments else ["--steps", "1"]
    before = snapshot(Path())
    assert main([*arguments, *model, *steps, "--no-cache", "--json"]) == code
    assert snapshot(Path()) == before
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    if code == 2:
        assert printed.out == ""
    else:
        assert json.loads(printed.out)["images"] == [] and json.loads(printed.out)["error"]
    line = printed.err.splitlines()[-1]
    assert line.startswith("pixart.generate: ")
    return line


@pytest.mark.parametrize(
    "arguments, fragment",
    [
        (["a", "--scheduler", "ddpm"], "scheduler must be one of dpm-solver++, sa-solver"),
        (["a", "--size", "1000x1001"], "must be a multiple of 16 on both sides"),
        (["a", "--guidance-interval", "0.5", "2"], "guidance_interval must be 0 <= start"),
        (["a", "--cuda-graph", "on", "--device", "cpu"], "cuda_graph must be False on cpu"),
        (["a", "--steps", "0"], "steps must be an integer from 1 up, got 0"),
        (["a", "--steps", "2000"], "steps must be an integer from 1 to 1000, got 2000"),
        (["a", "--size", "0"], "size must be 64 to 8192 px a side, got 0"),
        (["a", "--size", "100000"], "size must be 64 to 8192 px a side, got 100000"),
        (["a", "--size", "big"], "size must be a side (1024) or WIDTHxHEIGHT"),
        (["a", "--size", "4k"], "got '4k'; give resolution 4k for that"),
        (["a", "--size", "64", "--aspect", "1:1"], "without aspect and resolution"),
        (["a", "--aspect", "9:1"], "aspect must be between 4:1 and 1:4"),
        (["a", "--resolution", "9k"], "resolution must be 256, 512, 1k"),
        (["a", "--guidance", "-1"], "guidance must be a finite number from 0 up, got -1"),
        (["a", "--guidance", "nan"], "guidance must be a finite number"),
        (["a", "--guidance-interval", "0.8", "0.2"], "0 <= start <= end <= 1"),
        (["a", "--seed", "-1"], "seed must be an integer from 0"),
        (["a", "--num-images", "0"], "--num-images must be at least 1, got 0"),
        ([" "], "prompt must not be empty"),
        ([], "give one of: prompts, --prompts FILE, --from-image FILE; got none"),
        (["a", "--prompts", "p.txt"], "--from-image FILE; got several"),
        (["--prompts", "absent.txt"], "absent.txt: cannot be read"),
        (["--prompts", "."], "cannot be read"),
        (["--from-image", "absent.png"], "absent.png: cannot be read"),
        (["a", "--device", "gpu"], "device must be cpu, cuda"),
        (["a", "--model", "absent"], "absent: no such file or directory"),
        (["a", "--transformer", "absent.pth"], "absent.pth: no such file or directory"),
        (["a", "--kv-compress", "all"], "kv_compress must be LAYERS:RATIO"),
        (["a", "--kv-compress", "7:2"], "below depth 2, got 7"),
        (["a", "--text-encoder-dtype", "8bit", "--device", "cpu"], "8bit must run on CUDA"),
        (["a \udcff"], "prompt must be UTF-8 text, got 'a \\udcff'"),
        (["a", "--negative", "\udcff"], "negative must be UTF-8 text"),
        (["a", "--variant", "fp16"], "has no variant 'fp16'; its variants: none"),
        (["a", "--config", "absent.json"], "absent.json: cannot be read"),
        (["a", "--output", "pic.gif"], "--output must end in .png, .jpg or .webp"),
        (
            ["a", "--scheduler", "dmd", "--steps", "2"],
            "steps must be an integer from 1 to 1, got 2",
        ),
        (["a", "--output", "x.png", "--format", "jpg"], "--output must end in .jpg"),
        (["a", "--output", "{who}.png"], "--output knows {name}, {prompt}"),
        (["a", "--output", "/proc/none/x.png"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_cannot_be_honoured_is_bad_input(
    sigma: Path, capsys: Any, arguments: list[str], fragment: str
) -> None:
    assert fragment in refused(sigma, capsys, arguments)


def copied(sigma: Path, folder: str) -> Path:
    """A copy with one folder of its own, to be broken."""
    path = Path("model")
    path.mkdir()
    for entry in sigma.iterdir():
        if entry.name == folder:
            shutil.copytree(entry, path / folder)
        else:
            (path / entry.name).symlink_to(entry)
    return path


def truncated(folder: str) -> Callable[[Path], list[str]]:
    def prepare(sigma: Path) -> list[str]:
        model = copied(sigma, folder)
        file = sorted((model / folder).glob("*.safetensors"))[-1]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return ["a", "--model", str(model)]

    return prepare


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("marker"),)


def pickled_code(sigma: Path) -> list[str]:
    torch.save({"state_dict": {"x_embedder.proj.weight": Exploit()}}, "x.pth")
    return ["a", "--transformer", "x.pth"]


def plain_pickle(sigma: Path) -> list[str]:
    Path("x.pth").write_bytes(pickle.dumps(Exploit()))
    return ["a", "--transformer", "x.pth"]


def compressed_without_a_tensor(sigma: Path) -> list[str]:
    model = load_transformer(sigma, kv_compression=KVCompression([0, 1], 2))
    save_transformer(model, "whole.pth", format="official")
    tensors = torch.load("whole.pth", weights_only=True)["state_dict"]
    del tensors["blocks.1.attn.sr.bias"]
    torch.save({"state_dict": tensors}, "x.pth")
    return ["a", "--transformer", "x.pth"]


def encoder_of_another_width(sigma: Path) -> list[str]:
    other = build_sigma("other", sample_size=16, d_model=16, vae_channels=(8, 8, 8, 8))
    return ["a", "--model", str(other), "--transformer", str(sigma / "transformer")]


def vae_of_other_shapes(sigma: Path) -> list[str]:
    model = copied(sigma, "vae")
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor[:1].clone() for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return ["a", "--model", str(model)]


def without_a_tensor(folder: str, part: str) -> Callable[[Path], list[str]]:
    """One tensor is gone, one is of another name."""

    def prepare(sigma: Path) -> list[str]:
        model = copied(sigma, folder)
        for file in (model / folder).glob("*.safetensors"):
            tensors = load_file(file)
            for name in [name for name in tensors if part in name]:
                tensors["other." + name] = tensors.pop(name)
                break
            save_file(tensors, file, {"format": "pt"})
        index = model / folder / "model.safetensors.index.json"
        if index.is_file():
            values = json.loads(index.read_text())
            weight_map = {}
            for file in (model / folder).glob("*.safetensors"):
                weight_map |= dict.fromkeys(load_file(file), file.name)
            index.write_text(json.dumps(values | {"weight_map": weight_map}))
        return ["a", "--model", str(model)]

    return prepare


def garbage(file: str, content: str = "garbage") -> Callable[[Path], list[str]]:
    def prepare(sigma: Path) -> list[str]:
        model = copied(sigma, file.partition("/")[0])
        (model / file).write_text(content)
        return ["a", "--model", str(model)]

    return prepare


def scheduler_with(**changes: Any) -> Callable[[Path], list[str]]:
    def prepare(sigma: Path) -> list[str]:
        model = copied(sigma, "scheduler")
        file = model / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return ["a", "--model", str(model)]

    return prepare


def written(name: str, content: str | bytes, *arguments: str) -> Callable[[Path], list[str]]:
    def prepare(sigma: Path) -> list[str]:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return list(arguments)

    return prepare


def foreign_picture(sigma: Path) -> list[str]:
    Image.new("RGB", (8, 8)).save("x.png")
    return ["--from-image", "x.png"]


def folder_in_the_way(sigma: Path) -> list[str]:
    Path("x.png").mkdir()
    return ["a", "--output", "x.png"]


@pytest.mark.parametrize(
    "prepare, fragment",
    [
        (truncated("transformer"), "model/transformer"),
        (truncated("text_encoder"), "model-00002-of-00002.safetensors: is truncated or damaged"),
        (
            truncated("vae"),
            "model/vae/diffusion_pytorch_model.safetensors: is truncated or damaged",
        ),
        (vae_of_other_shapes, "model/vae: cannot be used (config.json must describe 3,143 weights"),
        (
            without_a_tensor("vae", "decoder.conv_in.bias"),
            "model/vae: cannot be used (missing decoder.conv_in.bias; unexpected "
            "other.decoder.conv_in.bias)",
        ),
        (
            without_a_tensor("text_encoder", "block.1.layer.0.SelfAttention.k.weight"),
            "model/text_encoder: cannot be used "
            "(missing encoder.block.1.layer.0.SelfAttention.k.weight; unexpected other.encoder",
        ),
        (garbage("tokenizer/tokenizer.json"), "model/tokenizer/tokenizer.json: is damaged ("),
        (garbage("tokenizer/spiece.model"), "model/tokenizer/spiece.model: is damaged ("),
        (garbage("vae/config.json", "[]"), "vae/config.json: must hold a JSON object"),
        (garbage("vae/config.json", '{"block_out_channels": "x"}'), "model/vae: cannot be used ("),
        (scheduler_with(beta_start="x"), "scheduler/scheduler_config.json: cannot be used ("),
        (scheduler_with(num_train_timesteps=None), "scheduler_config.json: cannot be used ("),
        (written("x.pth", b"x" * 99, "a", "--transformer", "x.pth"), "x.pth: "),
        (pickled_code, "x.pth: "),
        (plain_pickle, "x.pth: "),
        (compressed_without_a_tensor, "blocks.1.attn.sr.bias"),
        (encoder_of_another_width, "is made for 32 caption channels"),
        (written("p.txt", "\n \n", "--prompts", "p.txt"), "p.txt: holds no prompt"),
        (written("p.jsonl", '{"promt": "a"}', "--prompts", "p.jsonl"), 'object with a "prompt"'),
        (
            written("p.jsonl", '{"prompt": "a", "sede": 1}', "--prompts", "p.jsonl"),
            "p.jsonl, line 1: unknown setting 'sede'; did you mean 'seed'?",
        ),
        (
            written("p.jsonl", '{"prompt": "a", "size": "65x64"}', "--prompts", "p.jsonl"),
            "size must be a multiple of 16",
        ),
        (foreign_picture, "x.png: carries no request of pixart.generate"),
        (written("x.png", "text", "--from-image", "x.png"), "x.png: is not a picture"),
        (written("file", "", "a", "--output", "file/below"), "file/below: cannot be written"),
        (folder_in_the_way, "x.png: cannot be written"),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else value[:30],
)
def test_a_file_that_cannot_be_used_is_bad_input(
    sigma: Path, capsys: Any, prepare: Callable[[Path], list[str]], fragment: str
) -> None:
    arguments = prepare(sigma)
    assert fragment in refused(sigma, capsys, arguments)
    assert not Path("marker").exists()


def test_the_pickles_of_these_tests_would_have_run() -> None:
    pickle.loads(pickle.dumps(Exploit()))
    assert Path("marker").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_bad_input(sigma: Path, capsys: Any) -> None:
    line = refused(sigma, capsys, ["a", "--device", "cuda"])
    assert "PyTorch finds no CUDA device; use --device cpu" in line


def test_a_picture_of_nan_is_a_failure_and_no_file(sigma: Path, capsys: Any) -> None:
    line = refused(sigma, capsys, ["a cat", "--guidance", "3e38", "--steps", "2"], code=1)
    assert (
        "must be finite, got NaN or infinity for 'a cat' (seed 0, 2 steps, guidance 3e+38)" in line
    )


def test_a_full_disk_is_a_failure_that_keeps_finished_pictures(
    sigma: Path, capsys: Any, monkeypatch: Any
) -> None:
    flush, flushed = os.fsync, []

    def full(descriptor: int) -> None:
        if len(flushed) == 2:  # the first picture and its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        flushed.append(flush(descriptor))

    monkeypatch.setattr(os, "fsync", full)
    arguments = ["a cat", "a dog", "--model", str(sigma), "--steps", "1", "--no-cache"]
    assert main(arguments) == 1
    printed = capsys.readouterr().err
    assert "a-dog-0.png: cannot be written (No space left on device); finished pictures" in printed
    assert "Traceback" not in printed and os.listdir("outputs") == ["a-cat-0.png"]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.cuda.OutOfMemoryError("out of memory"), OSError(5, "I/O error")]
)
def test_what_breaks_on_the_way_is_a_failure(
    sigma: Path, capsys: Any, monkeypatch: Any, error: Exception
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Pipeline, "draw_many", broken)
    line = refused(sigma, capsys, ["a"], code=1)
    assert "out of memory" in line or "I/O error" in line


class NoMoreImports:
    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        raise AssertionError(f"{name} is imported while memory is at its end")


@pytest.mark.parametrize("error, code", [(MemoryError(), 1), (KeyboardInterrupt(), 130)])
def test_a_report_of_what_failed_imports_nothing(
    sigma: Path, capsys: Any, monkeypatch: Any, error: BaseException, code: int
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        monkeypatch.setattr("sys.meta_path", [NoMoreImports])
        raise error

    monkeypatch.setattr(Pipeline, "draw_many", broken)
    line = refused(sigma, capsys, ["a"], code)
    assert "out of memory" in line or "cancelled; finished pictures are kept" in line


def test_an_error_is_printed_even_when_quiet(sigma: Path, capsys: Any) -> None:
    assert main(["a", "--quiet", "--size", "1", "--model", str(sigma)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("pixart.generate: size must be") and printed.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--steps", "many"], ["--no-such-option"]])
def test_an_option_that_cannot_be_read_exits_with_2(arguments: list[str], capsys: Any) -> None:
    assert main(["a", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pixart.generate: ") and arguments[0] in line


def test_what_the_model_cannot_sample_is_refused_before_text_is_encoded(
    sigma: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Pipeline, "prepare", lambda *_: pytest.fail("encoded text"))
    assert "from 1 to 1000, got 2000" in refused(sigma, capsys, ["a", "--steps", "2000"])
    pipe = Pipeline.from_pretrained(sigma, device="cpu", cache_dir=None)
    for options in ({"steps": 2000}, {"guidance": -1.0}, {"height": 1}):
        with pytest.raises(ValueError):
            pipe("a", **options)
