"""Checkpoints whose numbers and depths are meant to hang, to fill the memory or to lead elsewhere: each is
refused within a second, in one line with the file's name."""

import io
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import SIGMA, build, edit_json, official, save_official

from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.files import CheckpointError

Make = Callable[[Path], Path]


def _own(**changes: Any) -> Make:
    """A file of ours whose configuration says something else."""
    config = json.dumps(SIGMA.to_dict() | changes)
    return _described(config)


def _described(config: str) -> Make:
    def make(folder: Path) -> Path:
        metadata = {"format": "pixart", "config": config}
        save_file(build().state_dict(), folder / "m.safetensors", metadata)
        return folder / "m.safetensors"

    return make


def _folder(**changes: Any) -> Make:
    def make(folder: Path) -> Path:
        save_transformer(build(), folder / "m")
        edit_json(folder / "m" / "config.json", **changes)
        return folder / "m"

    return make


def _headed(header: str | bytes, length: int | None = None) -> Make:
    def make(folder: Path) -> Path:
        content = header.encode() if isinstance(header, str) else header
        size = struct.pack("<Q", len(content) if length is None else length)
        (folder / "m.safetensors").write_bytes(size + content + bytes(64))
        return folder / "m.safetensors"

    return make


def _entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _tensors(**entries: dict[str, Any]) -> Make:
    return _headed(json.dumps(entries))


def _official(**changes: Any) -> Make:
    return lambda folder: save_official(
        folder / "m.pth",
        official() | {name.replace("__", "."): value for name, value in changes.items()},
    )


def _rezipped(change: Callable[[zipfile.ZipFile, zipfile.ZipFile], object]) -> Make:
    def make(folder: Path) -> Path:
        path = save_official(folder / "whole.pth", official())
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(folder / "m.pth", "w") as new:
            change(old, new)
        return folder / "m.pth"

    return make


def _compress(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for name in old.namelist():
        new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)


def _bomb(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for name in old.namelist():
        content = old.read(name)
        if name.endswith("data.pkl"):
            new.writestr(name, content + bytes(2**26), zipfile.ZIP_DEFLATED)
        else:
            new.writestr(name, content)


def _long_pickle(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for name in old.namelist():
        new.writestr(name, old.read(name) + bytes(2**24) * name.endswith("data.pkl"))


def _overlap(folder: Path) -> Path:
    """Two entries of the directory for one record."""
    content = bytearray(save_official(folder / "m.pth", official()).read_bytes())
    with zipfile.ZipFile(folder / "m.pth") as archive:
        large = max(archive.infolist(), key=lambda record: record.file_size)
        small = [r for r in archive.infolist() if "/data/" in r.filename and r is not large]
    for record in small[:9]:
        place = content.rindex(record.filename.encode()) - 46
        struct.pack_into("<II", content, place + 20, large.file_size, large.file_size)
    (folder / "m.pth").write_bytes(content)
    return folder / "m.pth"


def _pickled(payload: Any) -> Make:
    def make(folder: Path) -> Path:
        torch.save(payload, folder / "m.pth")
        return folder / "m.pth"

    return make


def _laughs(leaf: Any, levels: int = 40) -> Any:
    """A pickle of a few bytes that unfolds to 2^40 values."""
    for _ in range(levels):
        leaf = [leaf, leaf]
    return leaf


HASHED = b"})" + b"q\x01h\x01\x86" * 40 + b"K\x01s."


def _hashed(folder: Path) -> Path:
    """A dict whose key is ((((), ()), ((), ())), ...), 40 deep: hashing it unfolds it."""
    torch.save({}, folder / "whole.pth")
    with (
        zipfile.ZipFile(folder / "whole.pth") as old,
        zipfile.ZipFile(folder / "m.pth", "w") as new,
    ):
        for name in old.namelist():
            new.writestr(
                name, b"\x80\x02" + HASHED if name.endswith("data.pkl") else old.read(name)
            )
    return folder / "m.pth"


def _hashed_of_old(folder: Path) -> Path:
    state = io.BytesIO()
    torch.save({}, state, _use_new_zipfile_serialization=False)
    (folder / "m.pth").write_bytes(state.getvalue().replace(b"}q\x00.", HASHED, 1))
    return folder / "m.pth"


def _index(weight_map: Any) -> Make:
    def make(folder: Path) -> Path:
        save_transformer(build(), folder / "m", max_shard_size=200_000)
        edit_json(
            folder / "m" / "diffusion_pytorch_model.safetensors.index.json", weight_map=weight_map
        )
        return folder / "m"

    return make


def _piped(folder: Path) -> Path:
    save_transformer(build(), folder / "m")
    file = folder / "m" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    os.mkfifo(file)
    return folder / "m"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "m.pth")
    return folder / "m.pth"


def _twice(folder: Path) -> Path:
    save_transformer(build(), folder / "m", max_shard_size=200_000)
    shards = sorted((folder / "m").glob("*-of-*.safetensors"))
    shards[1].write_bytes(shards[0].read_bytes())
    return folder / "m"


HUGE = 10**60
HOSTILE: dict[str, tuple[Make, str]] = {
    "depth": (_own(depth=10**9), "depth must be at most 1000, got 1000000000"),
    "some depth": (_own(depth=900), r"missing blocks.3, .* and 887 more: .* says 900 blocks"),
    "channels": (_own(in_channels=HUGE), "in_channels must be at most 4096, got 1000"),
    "digits": (
        _described('{"depth": 1' + "0" * 5000 + "}"),
        "depth must be a positive integer, got inf",
    ),
    "width": (_own(hidden_size=65536, num_heads=4096), "wrong shape"),
    "heads": (_own(num_heads=HUGE), "num_heads must be at most 4096"),
    "ratio": (_own(mlp_ratio=1e300), "mlp_ratio must be from 0.015625 to 64, got 1e[+]300"),
    "layers": (
        _own(kv_compression={"layers": [10**50], "ratio": 2}),
        "layers must be below depth 3",
    ),
    "deep": (_described("[" * 90_000), "must be nested at most 64 deep"),
    "deep values": (_described('{"depth":' * 99 + "1" + "}" * 99), "must be nested at most 64"),
    "folder's depth": (
        _folder(num_layers=10**9),
        "num_layers must be at most 65536, got 1000000000",
    ),
    "folder's heads": (
        _folder(num_attention_heads=HUGE),
        "num_attention_heads must be at most 65536",
    ),
    "folder's size": (_folder(sample_size=HUGE), "sample_size must be at most 65536"),
    "folder's scale": (_folder(interpolation_scale=HUGE), "interpolation_scale: pe_interp"),
    "a long shard": (_index({"a": "a" * 9999}), "lacks the shard aaa"),
    "folder's layers": (_folder(num_layers=300), r"missing transformer_blocks.3, .* 300 blocks"),
    "folder's digits": (_folder(in_channels=10**4000), "in_channels must be .* integer, got inf"),
    "long header": (
        _headed("{", 2**40),
        "header of at most 4,194,304 bytes, got 1,099,511,627,776",
    ),
    "deep header": (_headed('{"a":' * 50_000), "must be nested at most 64 deep"),
    "overlapping": (_tensors(a=_entry([16], 0, 64), b=_entry([16], 0, 64)), "truncated or damaged"),
    "beyond the end": (_tensors(a=_entry([2**40], 0, 2**42)), "truncated or damaged"),
    "product": (_tensors(a=_entry([2**33, 2**33], 0, 64)), "truncated or damaged"),
    "empty and wide": (
        _tensors(a=_entry([0, 2**62, 2**62], 0, 0), b=_entry([16], 0, 64)),
        "m.safe",
    ),
    "backwards": (_tensors(a=_entry([16], 64, 0)), "truncated or damaged"),
    "two of a name": (
        _headed('{"a": %s, "a": %s}' % ((json.dumps(_entry([16], 0, 64)),) * 2)),
        "its header: is not JSON .has 'a' twice",
    ),
    "a name of megabytes": (_tensors(**{"x\n" * 999_999: _entry([16], 0, 64)}), "no PixArt"),
    "compressed": (_rezipped(_compress), r"is a compressed archive \("),
    "zip bomb": (_rezipped(_bomb), r"is a compressed archive \(.*data.pkl"),
    "long pickle": (_rezipped(_long_pickle), "data.pkl must have at most 16,777,216 bytes"),
    "overlapping records": (_overlap, "its records overlap"),
    "one number spread": (
        _official(x=torch.zeros(1).expand(2**20, 2**20)),
        r"x must have all its numbers in the file, got shape \(1048576, 1048576\)",
    ),
    "one tensor often": (
        _official(**{f"x{i}": official()["t_block.1.weight"].expand(1, -1, -1) for i in range(3)}),
        "unexpected x0, x1, x2",
    ),
    "laughs": (_pickled({"state_dict": official(), "pixart": _laughs(1)}), "a few plain values"),
    "laughs as a value": (_pickled({"x": _laughs(1)}), "'x' is a list, not a tensor"),
    "hashed": (_hashed, "data.pkl must nest tuples at most 16 deep"),
    "strange configuration": (
        _pickled({"state_dict": official(), "pixart": {1: 2, "x": 3}}),
        "must have keys among .*, got 1, x",
    ),
    "hashed, of old": (_hashed_of_old, "m.pth must nest tuples at most 16 deep"),
    "a path": (_index({"a": "/etc/passwd"}), "must name files beside it, got '/etc/passwd'"),
    "upwards": (_index({"a": "../m/x.safetensors"}), "must name files beside it"),
    "a device": (_index({"a": "\0"}), "lacks the shard"),
    "no names": (_index([1, 2]), "must have a weight_map"),
    "a shard twice": (_twice, "must hold other tensors than the files before it, got .*pos_embed"),
    "a pipe": (_pipe, "must be a file"),
    "a pipe in a folder": (_piped, "must be a file"),
}


@pytest.mark.parametrize(("make", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_meant_to_hang_is_refused_at_once(tmp_path: Path, make: Make, reason: str) -> None:
    path = make(tmp_path)
    began = time.process_time()
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_transformer(path)
    assert time.process_time() - began < 2
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 20_000
