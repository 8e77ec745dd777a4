"""Checkpoint files: bad ones refused in one line, good ones written whole or not at all."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import CONV, FORMATS, assert_same, build, edit_json, official, save_official

from pixart.checkpoint import names, write
from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.files import CheckpointError, CheckpointWriteError


class Payload:
    """What an attacker's pickle does when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle", "pickle 2", "bin"])
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path: Path, container: str) -> None:
    ran, path = tmp_path / "ran", tmp_path / "m.pth"
    content = {"state_dict": official(), "x": Payload(ran)}
    if container.startswith("pickle"):
        path.write_bytes(pickle.dumps(Payload(ran), protocol=2 if "2" in container else 4))
    elif container == "bin":
        save_transformer(build(), tmp_path / "m")
        (tmp_path / "m" / "diffusion_pytorch_model.safetensors").unlink()
        path = tmp_path / "m"
        torch.save(content, path / "diffusion_pytorch_model.bin")
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(CheckpointError, match=r"contains code \((posix|nt)\.system\), refused"):
        load_transformer(path)
    assert not ran.exists()


def _cut(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        save_transformer(build(), path / name)
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: len(data) // 2])
        return path / name

    return make


def _bytes(data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path / "m.pth").write_bytes(data)
        return path / "m.pth"

    return make


def _damaged_zip(path: Path) -> Path:
    save_transformer(build(), path / "m.pth")
    data = bytearray((path / "m.pth").read_bytes())
    data[-200:-100] = bytes(100)
    (path / "m.pth").write_bytes(data)
    return path / "m.pth"


def _other_zip(path: Path) -> Path:
    with zipfile.ZipFile(path / "m.pth", "w") as archive:
        archive.writestr("word/document.xml", "<p/>")
    return path / "m.pth"


def _state(**state: Any) -> Callable[[Path], Path]:
    return lambda path: save_official(
        path / "m.pth", {k.replace("__", "."): v for k, v in state.items()}
    )


def _saved(value: Any) -> Callable[[Path], Path]:
    return lambda path: save_official(path / "m.pth", value, key=None)


def _own(metadata: dict[str, str]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        save_file(build().state_dict(), path / "m.safetensors", metadata)
        return path / "m.safetensors"

    return make


def _directory(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        save_transformer(build(), path / "m")
        change(path / "m")
        return path / "m"

    return make


def _other_files(path: Path) -> Path:
    save_official(path / "PixArt-XL-2.pth", {})
    return path


def _pipeline_without_transformer(path: Path) -> Path:
    (path / "model_index.json").write_text("{}")
    return path


ZERO = torch.zeros(2)
WEIGHTS = "diffusion_pytorch_model.safetensors"
BAD = {
    "missing": (lambda path: path / "m.pth", r"m\.pth: no such file or directory"),
    "empty": (_bytes(b""), "is empty; download"),
    "web page": (_bytes(b"\n<!DOCTYPE html><html>"), "is a web page"),
    "LFS pointer": (_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "text": (_bytes(b"hello, world\n"), "neither a safetensors nor a PyTorch file"),
    "pickle noise": (_bytes(b"\x80\x04\x95noise"), "truncated or damaged"),
    "a list": (_bytes(pickle.dumps([1])), "torch.save did not write"),
    "old pickle noise": (_bytes(b"\x80\x02noise"), "truncated or damaged"),
    "cut .pth": (_cut("m.pth"), "is truncated"),
    "cut .safetensors": (_cut("m.safetensors"), "is truncated or damaged"),
    "damaged .pth": (_damaged_zip, "is truncated or damaged"),
    "another zip": (_other_zip, "is truncated or damaged"),
    "a tensor": (_saved(ZERO), "holds a Tensor, not a state dict"),
    "a number inside": (_state(x=ZERO, y=1), "'y' is a int, not a tensor"),
    "integers": (_state(x=torch.zeros(2, dtype=torch.int8)), "x must be float64.*got torch.int8"),
    "meta": (_state(x=torch.zeros(2, device="meta")), "x must be a dense tensor with data"),
    "sparse": (_state(x=ZERO.to_sparse()), "x must be a dense tensor with data"),
    "LoRA": (
        _state(transformer__blocks__lora_A__weight=ZERO),
        r"holds a LoRA \(transformer\.blocks\.lora_A",
    ),
    "ControlNet": (
        _state(controlnet__0__copied_block=ZERO, base_model__x=ZERO),
        r"holds a ControlNet \(controlnet\.0",
    ),
    "another model": (_state(conv1__weight=ZERO), r"no PixArt transformer.*conv1\.weight"),
    "nothing": (_state(), "no PixArt transformer, its tensors are none"),
    "odd table": (
        lambda path: save_official(
            path / "m.pth", official() | {"pos_embed": torch.zeros(1, 15, 72)}
        ),
        "pos_embed must be a table of a square grid, got 15 tokens",
    ),
    "stacked sizes": (
        lambda path: save_official(
            path / "m.pth",
            names.to_diffusers(official()) | {"transformer_blocks.0.attn1.to_q.bias": ZERO},
        ),
        r"to_q\.bias, .*must have one shape",
    ),
    "metadata": (
        _own({"format": "pixart", "config": "{"}),
        "metadata holds no valid configuration",
    ),
    "metadata list": (_own({"format": "pixart", "config": "[]"}), "must be a mapping, got a list"),
    "newer metadata": (_own({"format": "pixart", "config": '{"rope": true}'}), "got rope"),
    "no config.json": (
        _directory(lambda p: (p / "config.json").unlink()),
        "config.json: cannot be read",
    ),
    "config.json": (
        _directory(lambda p: (p / "config.json").write_text("{")),
        "config.json: is not JSON",
    ),
    "another class": (
        _directory(lambda p: edit_json(p / "config.json", _class_name="SD3Transformer2DModel")),
        "is of a SD3Transformer2DModel",
    ),
    "another network": (
        _directory(lambda p: edit_json(p / "config.json", norm_type="ada_norm_zero")),
        "norm_type must be 'ada_norm_single', got 'ada_norm_zero'",
    ),
    "half a config.json": (
        _directory(lambda p: edit_json(p / "config.json", num_layers=...)),
        "config.json has no num_layers",
    ),
    "no weights": (_directory(lambda p: (p / WEIGHTS).unlink()), f"without {WEIGHTS}"),
    "a hub of .pth": (_other_files, r"name one of its files: PixArt-XL-2\.pth"),
    "no transformer": (
        _pipeline_without_transformer,
        "a pipeline without a transformer/ directory",
    ),
}


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], Path], reason: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_transformer(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 600


# Writing


def assert_only(directory: Path, *names: str) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted(names)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, error: BaseException
) -> None:
    path, old = tmp_path / FORMATS[format], build()
    save_transformer(old, path)

    def fail(*arguments: Any) -> None:
        if not isinstance(arguments[1], Path):
            arguments[1].write(b"half")
        raise error

    monkeypatch.setattr(write, "save_file", fail)
    monkeypatch.setattr(write.torch, "save", fail)
    expected = CheckpointWriteError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_transformer(build(CONV), path)
    if isinstance(error, OSError):
        message = f"{path}: cannot be written (No space left on device); nothing was changed"
        assert str(caught.value) == message
    assert_only(tmp_path, FORMATS[format])
    assert_same(load_transformer(path), old)


def test_a_directory_that_cannot_be_moved_into_place_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_transformer(build(), tmp_path / "m")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointWriteError, match=r"m: cannot be written \(Permission denied\)"):
        save_transformer(build(CONV), tmp_path / "m")
    assert_only(tmp_path, "m")
    assert_same(load_transformer(tmp_path / "m"), build())


def test_a_destination_below_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointWriteError, match=r"m\.pth: cannot be written \((Not a|File exists)"
    ):
        save_transformer(build(), tmp_path / "file" / "m.pth")


@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_is_replaced_through_links_and_into_new_folders(
    tmp_path: Path, format: str
) -> None:
    path = tmp_path / "new" / "folder" / FORMATS[format]
    save_transformer(build(), path)
    link = tmp_path / f"link{path.suffix}"
    link.symlink_to(path)
    save_transformer(build(CONV), link)
    assert link.is_symlink()
    assert_same(load_transformer(path), build(CONV))
    assert_only(path.parent, path.name)
    mode = (path / "config.json" if path.is_dir() else path).stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o666 & ~umask  # others may read it, as with any file


@pytest.mark.parametrize("format", FORMATS)
def test_a_parameter_that_is_part_of_something_larger_is_written_alone(
    tmp_path: Path, format: str
) -> None:
    model = build()
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.t_block[1].bias.data = torch.zeros(2_000_000)[:432]
    save_transformer(model, tmp_path / FORMATS[format])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.2 * size
    assert_same(load_transformer(tmp_path / FORMATS[format]), model)


def test_only_a_checkpoint_of_the_same_format_is_replaced_unasked(tmp_path: Path) -> None:
    model = build()
    save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    save_official(tmp_path / "optimizer.pth", {"step": torch.zeros(1)})
    (tmp_path / "notes.pth").write_text("precious")
    for name in ("theirs.safetensors", "optimizer.pth", "notes.pth"):
        with pytest.raises(CheckpointError, match="exists and is no .* checkpoint"):
            save_transformer(model, tmp_path / name)
        save_transformer(model, tmp_path / name, overwrite=True)
        assert_same(load_transformer(tmp_path / name), model)
    (tmp_path / "empty.pth").touch()
    save_transformer(model, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="is a file, and the diffusers format is a directory"):
        save_transformer(model, tmp_path / "empty.pth", format="diffusers")


def test_a_directory_with_anything_else_in_it_is_never_replaced(tmp_path: Path) -> None:
    path, model = tmp_path / "m", build()
    path.mkdir()
    save_transformer(model, path)  # an empty one is taken
    (path / "README.md").write_text("precious")
    with pytest.raises(CheckpointError, match=r"holds other files \(README\.md\)"):
        save_transformer(model, path)
    save_transformer(model, path, overwrite=True)
    (path / "photos").mkdir()
    with pytest.raises(CheckpointError, match=r"holds other files \(photos\)"):
        save_transformer(model, path, overwrite=True)
    with pytest.raises(CheckpointError, match="is a directory, and the pixart format is one file"):
        save_transformer(model, path, format="pixart")
    (path / "photos").rmdir()
    save_file({"decoder.conv_in.bias": ZERO}, path / WEIGHTS)  # somebody's VAE
    with pytest.raises(CheckpointError, match="holds no PixArt transformer"):
        save_transformer(model, path)
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a whole pipeline; write to .*transformer"):
        save_transformer(model, tmp_path / "pipe", overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"path": "m.bin"}, r"format must be .*, got '\.bin'"),
        ({"path": "m.pth", "format": "onnx"}, "format must be .*, got 'onnx'"),
        ({"path": "m.pth", "max_shard_size": 5}, "max_shard_size is for diffusers directories"),
        ({"path": "m", "max_shard_size": "5 apples"}, "like \"5GB\", got '5 apples'"),
        ({"path": "m", "max_shard_size": 0}, 'like "5GB", got 0'),
        ({"path": "m", "max_shard_size": "0.0GB"}, "like \"5GB\", got '0.0GB'"),
        ({"path": "m", "max_shard_size": "-5GB"}, "like \"5GB\", got '-5GB'"),
        ({"path": "m", "max_shard_size": "nanGB"}, "like \"5GB\", got 'nanGB'"),
    ],
)
def test_what_cannot_be_saved_is_said_and_leaves_nothing(
    tmp_path: Path, arguments: dict[str, Any], reason: str
) -> None:
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(ValueError, match=reason):
        save_transformer(build(), **arguments)
    assert_only(tmp_path)
