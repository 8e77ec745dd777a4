"""T5 in the formats that people have: each opens to the values of its reference reader; what is wrong is named."""

import json
import re
import shutil
import struct
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from t5_files import (
    is_matrix,
    random_t5,
    save_folder,
    save_fp8,
    save_gguf,
    save_scaled,
    save_with_metadata,
    scaled,
)
from torch import Tensor

from pixart.convert import main as convert
from pixart.files import CheckpointError
from pixart.text import convert as text_convert
from pixart.text import stored as stored_module
from pixart.text.ggml import TYPES, dequantise
from pixart.text.gguf import read_gguf
from pixart.text.networks import open_t5
from pixart.text.stored import read_weights
from pixart.text.stream import computed_in
from pixart.weights import NotFiniteError

CPU = torch.device("cpu")
EMBEDDED = Path(stored_module.__file__).parents[1] / "assets" / "shapes" / "text_encoder"
WEIGHTS = random_t5()
PACKED = [one for one in TYPES.values() if one.unpack is not None]
ASKED = [([5, 9, 200, 1], 0), ([1], 0), ([7, 8, 1, 0, 0], 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("t5") / "text_encoder", WEIGHTS)


def random_blocks(kind: Any, shape: tuple[int, ...]) -> Any:
    """Packed rows with scales of a size that keeps T5's numbers small."""
    import numpy as np

    rng = np.random.default_rng(kind.size)
    rows = rng.integers(0, 256, (shape[0], shape[1] // kind.numbers, kind.size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind.name, (0, 2))
    for place in places if kind.name not in ("Q4_0", "Q5_0", "Q8_0") else (0,):
        rows[..., place : place + 2] = scale
    return rows.reshape(shape[0], -1)


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_packed_numbers_are_those_of_ggufs_own_reader(kind: Any) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy as np

    number = next(number for number, one in TYPES.items() if one is kind)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (kind.numbers, kind.size)
    blocks = np.random.default_rng(1).integers(0, 256, (300, kind.size), dtype=np.uint8)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType(number))
    got = dequantise(torch.from_numpy(blocks), kind.name)
    assert np.array_equal(got.numpy(), expected, equal_nan=True)


def in_gguf(path: Path, kinds: list[Any]) -> dict[str, Tensor]:
    """Write matrices in these types in turn; returns what the package reads."""
    import gguf
    import numpy as np

    packed, expected = {}, {}
    matrices = [name for name, one in WEIGHTS.items() if is_matrix(name, one) or "shared" in name]
    for place, (name, one) in enumerate(WEIGHTS.items()):
        kind = kinds[place % len(kinds)] if name in matrices else TYPES[0]
        number = next(number for number, other in TYPES.items() if other is kind)
        form = gguf.GGMLQuantizationType(number)
        if kind.unpack is not None:
            content = random_blocks(kind, tuple(one.shape))
        elif kind.name == "BF16":
            content = gguf.quantize(one.numpy(), form)
        else:
            content = one.numpy().astype({"F32": np.float32, "F16": np.float16}[kind.name])
        packed[name] = (content, form)
        expected[name] = torch.from_numpy(gguf.dequantize(content, form)).view(one.shape)
    save_gguf(path, packed)
    return expected


def dense_of(path: Path) -> dict[str, Tensor]:
    return {name: one.dense(torch.float32) for name, one in read_weights([path]).tensors.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(found[name].equal(one) for name, one in expected.items())


def written(format: str, path: Path) -> dict[str, Tensor]:
    """Write a file; returns the numbers that it holds, by PyTorch's own casts or the package gguf."""
    if format == "gguf":
        pytest.importorskip("gguf")
        return in_gguf(path, list(TYPES.values()))
    if format == "fp16":
        save_file({name: one.half() for name, one in WEIGHTS.items()}, path)
        return {name: one.half().float() for name, one in WEIGHTS.items()}
    if format == "fp8":
        save_fp8(path, WEIGHTS)
        return {name: one.to(torch.float8_e4m3fn).float() for name, one in WEIGHTS.items()}
    (save_scaled if format == "scaled" else save_with_metadata)(path, WEIGHTS)
    held = scaled(WEIGHTS, ".s")
    return {
        name: held[name].float() * held.get(name.removesuffix(".weight") + ".s", torch.ones(()))
        for name in WEIGHTS
    }


@pytest.mark.parametrize("format", ["fp16", "fp8", "scaled", "metadata", "gguf"])
def test_a_file_opens_to_its_reference_and_gives_the_same_bits_streamed_and_packed(
    format: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "t5xxl"
    expected = written(format, path)
    assert same(dense_of(path), expected)
    save_folder(tmp_path / "dense", expected)
    for dtype in (torch.float32, torch.bfloat16) if format == "gguf" else (torch.bfloat16,):
        plain = open_t5(tmp_path / "dense", None).load(dtype, CPU, "resident")(ASKED)
        for memory in ("resident", "stream"):
            opened = open_t5(folder, None, path)
            network = opened.load(dtype, CPU, memory)
            assert network.has_passes or format == "fp16"
            assert all(map(torch.equal, network(ASKED), plain))
    if format != "fp16":
        # With a block of the numbers that it is computed in, which is fp32 on some CPUs.
        bytes_each = computed_in(dtype, CPU).itemsize
        dense = bytes_each * sum(x.numel() for x in WEIGHTS.values())
        assert opened.footprint(dtype, CPU).resident < dense


def test_another_model_in_the_file_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "t5.safetensors"
    clip = {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}
    decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(4, 4)}
    lost = "encoder.block.2.layer.1.DenseReluDense.wo.weight"
    block = {name: one for name, one in WEIGHTS.items() if ".block.3." not in name}
    scale = {"encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(())}
    faults: list[tuple[dict[str, Tensor], str]] = [
        (clip, "must hold the encoder of T5, got text_model.encoder"),
        (
            WEIGHTS | decoder,
            "got a decoder too; write the encoder .* pixart.convert --text-encoder",
        ),
        (
            random_t5(d_model=128),
            "T5 of width 128 and 4 blocks; the pipeline's .* of width 256 and 4",
        ),
        (block, "T5 of width 256 and 3 blocks; "),
        ({name: one for name, one in WEIGHTS.items() if name != lost}, f"lacks {lost}"),
        (WEIGHTS | {"lora.up": torch.ones(2)}, "and nothing else, got lora.up"),
        (WEIGHTS | {lost: torch.ones(256, 128)}, f"has in other sizes {lost}"),
        (WEIGHTS | {lost: torch.ones(256, 256, dtype=torch.int8)}, "wo.weight must be of floats"),
        (WEIGHTS | {"shared.scale_weight": torch.tensor(float("nan"))}, "one finite number"),
        (WEIGHTS | {"other.scale_weight": torch.ones(())}, "scales of no weight: other"),
        ({}, "must hold the encoder of T5, got no tensors"),
        (WEIGHTS | {"shared.comfy_quant": torch.zeros(2, 2, dtype=torch.uint8)}, r"shape \(2, 2\)"),
    ]
    for tensors, reason in faults:
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=reason) as caught:
            open_t5(folder, None, path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    save_with_metadata(path, WEIGHTS, "nvfp4")
    with pytest.raises(CheckpointError, match="quantised as float8_e4m3fn or .*, got 'nvfp4'"):
        open_t5(folder, None, path)
    save_file(WEIGHTS | {"shared.weight": WEIGHTS["shared.weight"] * float("nan")}, path)
    with pytest.raises(NotFiniteError, match=r"must be finite, .* in shared.weight"):
        open_t5(folder, None, path).load(torch.float32, CPU, "stream")
    save_file(WEIGHTS | scale, path)  # a scale that is 1
    assert same(dense_of(path), WEIGHTS)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int = 1, keys: bytes = b"", count: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + keys


def info(name: str = "a", sizes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


ARRAY = text("k") + struct.pack("<I", 9)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "too short": (b"GGUF\3\0", "its header ends too early"),
    "version 1": (header(version=1), "of version 2 or 3, little-endian, got version 1"),
    "big-endian": (header(version=3 << 24), "little-endian, got version 50331648"),
    "tensors without end": (header(2**63), "says that there are .* tensors"),
    "keys without end": (header(0, b"", 2**40), "says that there are .* keys"),
    "a text of 16 EiB": (header(0, struct.pack("<Q", 2**64 - 1), 1), "bytes of a text"),
    "no text": (header(0, struct.pack("<Q", 2) + b"\xff\xfe", 1), "not UTF-8"),
    "a key twice": (header(0, (text("k") + struct.pack("<II", 4, 1)) * 2, 2), "'k' twice"),
    "an unknown value": (header(0, text("k") + struct.pack("<I", 99), 1), "of the type 99"),
    "an array without end": (
        header(0, ARRAY + struct.pack("<IQ", 10, 2**60), 1), "items of an array"),
    "arrays in arrays": (
        header(0, ARRAY + struct.pack("<IQ", 9, 1) * 30, 1), "of the type 9, 4 deep"),
    "an empty array in each item": (
        header(0, ARRAY + struct.pack("<IQ", 9, 2**21) + struct.pack("<IQ", 0, 0) * 9, 1), "too early"),
    "no dimensions": (header() + info(sizes=()), "has 0 dimensions"),
    "many dimensions": (header() + info(sizes=(1,) * 5), "has 5 dimensions"),
    "a size of 0": (header() + info(sizes=(0,)), r"has the sizes \[0\]"),
    "sizes that overflow": (header() + info(sizes=(2**32, 2**32)), "has the sizes"),
    "a row of half blocks": (header() + info(sizes=(48,), kind=8), "rows of 48, no multiple of 32"),
    "an unknown type": (header() + info(kind=77), "of a type that is read .* ggml's type 77"),
    "a type that was removed": (header() + info(kind=4), "got ggml's type 4"),
    "a name twice": (header(2) + info() * 2 + bytes(400), "two tensors of one name"),
    "an odd offset": (header() + info(offset=5) + bytes(400), "begins at 5, no place in it"),
    "an offset beyond": (header() + info(offset=2**62) + bytes(400), "no place in it"),
    "overlapping": (header(2) + info() + info("b", offset=64) + bytes(400), "within another"),
    "cut off": (header() + info() + bytes(60), "the file at"),
    "an alignment of 0": (
        header(1, text("general.alignment") + struct.pack("<II", 4, 0), 1) + info() + bytes(400),
        "its alignment is 0"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_gguf_file_that_lies_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[fault]
    path = tmp_path / "t5.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_gguf_file_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "llama.gguf"
    key = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    content = header(1, key, 1) + info("token_embd.weight", (32, 1))
    path.write_bytes(content + bytes(-len(content) % 32) + bytes(128))
    with pytest.raises(CheckpointError, match=r"architecture t5encoder\), got 'llama'"):
        read_weights([path])


def run_convert(*words: object) -> int:
    return convert(["--text-encoder", *map(str, words)])


def test_convert_writes_a_folder_that_opens_from_every_format(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "whole.safetensors"
    save_file(WEIGHTS | {"decoder.final_layer_norm.weight": torch.ones(256)}, source)
    assert run_convert(source, tmp_path / "same", "--to", "fp32") == 0
    assert same(dense_of(tmp_path / "same" / "model.safetensors"), WEIGHTS), "without the decoder"
    assert run_convert(tmp_path / "same", tmp_path / "half.safetensors", "--to", "bf16") == 0
    halves = {name: one.bfloat16() for name, one in WEIGHTS.items()}
    assert same(load_file(tmp_path / "half.safetensors"), halves)
    # The configuration of a folder and the sizes seen in a file agree.
    expected = open_t5(folder, None).load(torch.float32, CPU, "stream")(ASKED)
    assert all(
        map(
            torch.equal,
            open_t5(tmp_path / "same", None).load(torch.float32, CPU, "stream")(ASKED),
            expected,
        )
    )
    assert run_convert(folder, tmp_path / "eight", "--to", "fp8") == 0
    assert "fp8" in capsys.readouterr().out
    stored = load_file(tmp_path / "eight" / "model.safetensors")
    assert stored["scaled_fp8"].dtype == torch.float8_e4m3fn
    opened = dense_of(tmp_path / "eight" / "model.safetensors")
    for name, one in WEIGHTS.items():
        if is_matrix(name, one):
            assert stored[name].dtype == torch.float8_e4m3fn
            assert stored[name.removesuffix(".weight") + ".scale_weight"].shape == ()
            # Three bits behind the point; below 2^-6 of 448 the steps are even.
            least = one.abs().max() * 2**-10 / 448
            assert ((opened[name] - one).abs() <= one.abs() * 2**-4 + least).all()
        else:
            assert opened[name].equal(one.bfloat16().float())
    assert run_convert(tmp_path / "eight", tmp_path / "again", "--to", "fp32") == 0
    assert same(dense_of(tmp_path / "again" / "model.safetensors"), opened)


def test_fp8_changes_the_embedded_features_by_a_few_hundredths(tmp_path: Path) -> None:
    assert run_convert("shapes", tmp_path / "eight", "--to", "fp8") == 0
    whole, eight = (
        open_t5(folder, None).load(torch.float32, CPU, "resident")(ASKED)
        for folder in (EMBEDDED, tmp_path / "eight")
    )
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(eight, whole, strict=True))
    assert 1e-3 < error < 0.06, error


def test_convert_refuses_what_it_cannot_write_and_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = tmp_path / "bad.safetensors"
    save_file(WEIGHTS | {"shared.weight": WEIGHTS["shared.weight"] * float("inf")}, bad)
    short = tmp_path / "short.safetensors"
    save_file(
        {
            name: one
            for name, one in WEIGHTS.items()
            if not name.endswith("3.layer.1.layer_norm.weight")
        },
        short,
    )
    out = tmp_path / "out"
    faults: list[tuple[list[object], int, str]] = [
        ([bad, out, "--to", "fp8"], 1, "must be finite, got NaN or infinity in shared.weight"),
        (
            [short, out, "--to", "bf16"],
            2,
            "4 whole blocks .* encoder.block.3.layer.1.layer_norm.weight",
        ),
        ([folder, out], 2, "--to must be fp32, bf16, fp8 with --text-encoder, got None"),
        ([folder, out, "--to", "official"], 2, "--to must be fp32, bf16, fp8"),
        ([folder, out, "--to", "bf16", "--dtype", "bf16"], 2, "--dtype must be left out"),
        ([folder, folder, "--to", "bf16"], 2, "DST must not be SRC"),
        (
            [folder / "model.safetensors", folder, "--to", "bf16"],
            2,
            "DST must not be SRC, nor hold it",
        ),
        ([folder, bad, "--to", "bf16"], 2, "is there already"),
        ([folder, tmp_path, "--to", "bf16", "--overwrite"], 2, "must hold a text encoder alone"),
    ]
    # A piece of a tensor at a time, of which none but the last has what is not finite.
    monkeypatch.setattr(text_convert, "_AT_A_TIME", 64)
    late = WEIGHTS["encoder.block.0.layer.1.DenseReluDense.wo.weight"].clone()
    late[-1, -1] = float("nan")
    save_file(
        {**WEIGHTS, "encoder.block.0.layer.1.DenseReluDense.wo.weight": late},
        tmp_path / "late.safetensors",
    )
    faults += [
        (
            [tmp_path / "late.safetensors", out, "--to", to],
            1,
            "must be finite, got NaN or .*wo.weight",
        )
        for to in ("fp8", "bf16")
    ]
    empty = tmp_path / "empty.safetensors"
    save_file(WEIGHTS | {"shared.weight": torch.ones(0, 256)}, empty)
    faults.append(
        ([empty, out, "--to", "fp8"], 2, r"must hold the encoder of T5, but has .* \(0, 256\)")
    )
    inside = folder / "model.safetensors"
    faults.append(([folder, inside, "--to", "fp8", "--overwrite"], 2, "DST must not be SRC, nor"))
    before = sorted(tmp_path.iterdir())
    for words, code, reason in faults:
        assert run_convert(*words) == code, words
        said = capsys.readouterr().err
        assert re.search(reason, said) and said.count("\n") == 1, said
    assert sorted(tmp_path.iterdir()) == before
    assert convert([str(folder), str(out), "--to", "fp8"]) == 2
    assert "must be given with --text-encoder" in capsys.readouterr().err
    assert json.loads((folder / "config.json").read_text())["d_model"] == 256


def test_a_pipeline_is_opened_without_its_own_weights_of_t5_and_fetched_without_them(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixart.dataset.encoding import open_encoders
    from pixart.pipeline import directory

    whole = open_encoders(pipeline)
    path = tmp_path / "t5.safetensors"
    save_file(read_folder(pipeline / "text_encoder"), path)
    bare = Path(shutil.copytree(pipeline, tmp_path / "bare"))
    for file in (bare / "text_encoder").glob("model*"):
        file.unlink()
    for memory in ("resident", "stream"):
        encoders = open_encoders(bare, text_encoder=path, text_memory=memory)  # type: ignore[arg-type]
        expected = whole.text.encode(["a cat", "two dogs and a boat"])
        assert encoders.text.encode(["a cat", "two dogs and a boat"]).features.equal(
            expected.features
        )
    assert encoders.text_identity != whole.text_identity
    patterns: list[str] = []
    monkeypatch.setattr(
        directory, "resolve", lambda _, allow_patterns: patterns.extend(allow_patterns) or bare
    )
    for is_wanted in (True, False):
        patterns.clear()
        directory.open_directory("a/b", with_transformer=False, with_text_encoder=is_wanted)
        shard = "text_encoder/model-00001-of-00002.safetensors"
        assert any(fnmatch(shard, one) for one in patterns) == is_wanted
        assert any(fnmatch("text_encoder/config.json", one) for one in patterns)


def read_folder(folder: Path) -> dict[str, Tensor]:
    return {
        name: one.dense(torch.float32)
        for name, one in open_t5(folder, None).weights.tensors.items()
    }
