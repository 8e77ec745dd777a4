"""The files of the text encoder: its weights and their variants, its tokenizer, its cache."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_encoders import encoder

from pixart.files import CheckpointError, written_aside
from pixart.text import cache as text_cache
from pixart.text.cache import Encoded, PromptCache
from pixart.text.tokenizer import load_tokenizer
from pixart.weights import NotFiniteError


def renamed(pipeline: Path, path: Path, name: str, **changes: torch.Tensor | None) -> Path:
    """A copy whose T5 is one file of that name, with other tensors (None: without it)."""
    shutil.copytree(pipeline, path)
    folder = path / "text_encoder"
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    for key, tensor in changes.items():
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name, {"format": "pt"})
    return path


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.fp16.bin"])
def test_a_variant_is_taken_when_named_or_alone_and_nothing_is_said(
    pipeline: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = renamed(pipeline, tmp_path / "m", name)
    expected = encoder(pipeline).encode(["a cat"]).features
    for variant in (None, "fp16"):
        assert encoder(path, variant=variant).encode(["a cat"]).features.equal(expected)
    with pytest.raises(CheckpointError, match="has no variant 'bf16'; .* its variants: fp16"):
        encoder(path, variant="bf16").encode(["a cat"])
    assert capfd.readouterr().err == ""


def test_incomplete_weights_give_no_features_and_leave_none_in_the_cache(
    pipeline: Path, tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lost = "encoder.block.0.layer.0.SelfAttention.q.weight"
    wide = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    changes = {lost: None, wide: torch.zeros(3, 3), "extra": torch.zeros(1)}
    path = renamed(pipeline, tmp_path / "m", "model.safetensors", **changes)
    with pytest.raises(CheckpointError) as caught:
        encoder(path, cache).encode(["a cat"])
    assert f"(missing {lost}; mismatched {wide}; unexpected extra)" in str(caught.value)
    assert not cache.exists() and capfd.readouterr().err == ""


def test_the_parts_of_a_whole_t5_that_encode_nothing_do_no_harm(
    pipeline: Path, tmp_path: Path
) -> None:
    whole = {"decoder.final_layer_norm.weight": torch.ones(32), "lm_head.weight": torch.ones(5, 32)}
    path = renamed(pipeline, tmp_path / "m", "model.safetensors", **whole)
    expected = encoder(pipeline).encode(["a cat"]).features
    assert encoder(path).encode(["a cat"]).features.equal(expected)


def test_a_prompt_that_is_no_text_is_refused(pipeline: Path) -> None:
    with pytest.raises(ValueError, match="prompt must be UTF-8 text, got 'a .udcff'"):
        encoder(pipeline).encode(["a \udcff"])


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    for name in ("spiece.model", "tokenizer.json"):  # the second is taken before the first
        (tmp_path / name).write_text("garbage")
        with pytest.raises(CheckpointError, match=f"{name}: is damaged .*; download or copy"):
            load_tokenizer(tmp_path)


def test_whether_a_prompt_is_cached_is_known_without_the_encoder(
    pipeline: Path, cache: Path
) -> None:
    model = encoder(pipeline, cache)
    assert not model.is_cached("a cat") and not encoder(pipeline).is_cached("a cat")
    model.encode(["a cat"])
    assert encoder(pipeline, cache).is_cached(" a cat")
    assert not model.is_cached("a cat", keep_padding=True)
    assert not encoder(pipeline, cache, dtype=torch.bfloat16).is_cached("a cat")
    [entry] = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-9])
    assert not model.is_cached("a cat")


def test_a_full_disk_leaves_no_half_entry(
    pipeline: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="cannot cache prompts in .*No space left"):
        encoder(pipeline, cache).encode(["a cat"])
    assert list(cache.iterdir()) == []


def test_what_was_not_used_for_longest_leaves_a_cache_that_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry = Encoded(torch.zeros(4, 8), 4, "")
    old = PromptCache(tmp_path, {})
    for age, text in enumerate(("new", "old", "older", "oldest")):
        old.write(text, False, entry)
        os.utime(old.path(text, False), (1e9 - age, 1e9 - age))
    size = old.path("new", False).stat().st_size
    monkeypatch.setattr(text_cache, "LIMIT", 3 * size)
    cache = PromptCache(tmp_path, {})
    assert cache.holds("oldest", False, torch.float32), "used, and so the newest of all"
    with caplog.at_level("INFO", "pixart"):
        cache.write("another", False, entry)
        cache.write("one more", False, entry)  # what this run needs it keeps, whatever its size
    kept = [
        text
        for text in ("new", "old", "older", "oldest", "another", "one more")
        if cache.path(text, False).is_file()
    ]
    assert kept == ["new", "old", "oldest", "another", "one more"]
    assert "removed the 1 prompts that were not used for longest" in caplog.text


def test_what_a_killed_process_was_writing_leaves_a_full_cache_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PromptCache(tmp_path, {})
    writing = written_aside(cache.path("a dog", False))
    aside = writing.__enter__()  # and never left
    aside.write_bytes(bytes(1000))
    os.utime(aside, (1e9, 1e9))
    monkeypatch.setattr(text_cache, "LIMIT", 500)
    cache.write("a cat", False, Encoded(torch.zeros(4, 8), 4, ""))
    assert [path.name for path in tmp_path.iterdir()] == [cache.path("a cat", False).name]
    empty = tmp_path / f".{'0' * 40}.abcdefgh"
    empty.mkdir()  # killed before the first byte
    os.utime(empty, (1e9, 1e9))
    PromptCache(tmp_path, {}).write("a dog", False, Encoded(torch.zeros(4, 8), 4, ""))
    assert not empty.exists()


def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_taken(
    pipeline: Path, tmp_path: Path
) -> None:
    for number, (name, value, reason) in enumerate((
        ("num_layers", 10**9, "num_layers must be a whole number that fits"),
        ("d_ff", 10**400, "d_ff must be a whole number that fits .*, got inf"),
        ("d_model", 0, "d_model must be"),
        ("num_heads", "2", "num_heads must be"),
        *[
            ("layer_norm_epsilon", value, "layer_norm_epsilon must be a number above 0")
            for value in (math.inf, math.nan, 0.0, "x", None, True)
        ],
        ("d_kv", 9000, "config.json: must describe the .* weights there are"),
    )):  # fmt: skip
        path = shutil.copytree(pipeline, tmp_path / str(number))
        file = path / "text_encoder" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
        with pytest.raises(CheckpointError, match=reason) as caught:
            encoder(path).encode(["a cat"])
        assert str(caught.value).startswith(str(file))


def test_weights_that_are_not_finite_give_no_features(pipeline: Path, tmp_path: Path) -> None:
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    size = load_t5(pipeline)[name].shape
    path = renamed(
        pipeline, tmp_path / "m", "model.safetensors", **{name: torch.full(size, math.nan)}
    )
    with pytest.raises(NotFiniteError, match=rf"text_encoder: must be finite, .* in {name};"):
        encoder(path).encode(["a cat"])


def load_t5(pipeline: Path) -> dict[str, torch.Tensor]:
    files = (pipeline / "text_encoder").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
