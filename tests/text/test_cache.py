"""The prompt cache leaves others' files alone, and gives back what was put in or nothing."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from text_encoders import encoder

from pixart.text import cache as text_cache
from pixart.text.cache import Encoded, PromptCache, default_cache_dir
from pixart.text.encoder import TextEncoder
from pixart.weights import NotFiniteError

HEX = "0123456789abcdef" * 4
LONG_AGO = (1e9, 1e9)


def entry(value: float = 1.0) -> Encoded:
    return Encoded(torch.full((4, 8), value), 3, "cut")


def old_entry(path: Path) -> Path:
    """As the format before wrote them."""
    save_file({"features": torch.ones(4, 8)}, path, {"tokens": "4", "cut": ""})
    return path


def strangers(folder: Path) -> list[Path]:
    """What lies in a folder that somebody chose as cache."""
    (folder / "holiday.mp4").write_bytes(bytes(5000))
    (folder / "model.safetensors").write_bytes(save({"features": torch.ones(4, 8)}))
    (folder / f"{HEX}.mp4").write_bytes(bytes(5000))
    (folder / f"{HEX}.safetensors").write_bytes(b"a video that is called like an entry")
    (folder / f"{HEX[::-1]}.safetensors").mkdir()
    (folder / f"{HEX[::-1]}.safetensors" / "thesis.tex").write_text("words")
    (folder / f"{'a' * 64}.safetensors").symlink_to(folder / "holiday.mp4")
    save_file({"features": torch.ones(4, 8)}, folder / f"{'b' * 64}.safetensors")
    more = {"tokens": "4", "cut": "", "mine": "yes"}
    save_file({"features": torch.ones(4, 8)}, folder / f"{'c' * 64}.safetensors", more)
    save_file({"other": torch.ones(4, 8)}, folder / f"{'d' * 64}.safetensors", {"tokens": "4"})
    old_entry(folder / "old.safetensors")
    (folder / ".config").mkdir()
    (folder / ".config" / "new").write_text("settings")
    (folder / f".{HEX[:40]}.abcdefgh").mkdir()  # named like what a killed process leaves
    (folder / f".{HEX[:40]}.abcdefgh" / "new").write_text("x")
    (folder / f".{HEX[:40]}.abcdefgh" / "notes").write_text("x")
    (folder / f".{HEX[:40]}.hgfedcba").symlink_to(folder / ".config")
    os.mkfifo(folder / f"{'e' * 64}.safetensors")
    for path in folder.iterdir():
        os.utime(path, LONG_AGO, follow_symlinks=False)
    return sorted(path for path in folder.rglob("*"))


def test_making_room_removes_our_entries_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = strangers(tmp_path)
    before = PromptCache(tmp_path, {})
    before.write("a dog", False, entry())
    ours = [before.path("a dog", False), old_entry(tmp_path / f"{'f' * 64}.safetensors")]
    for path in ours:
        os.utime(path, LONG_AGO)
    monkeypatch.setattr(text_cache, "LIMIT", 0)
    cache = PromptCache(tmp_path, {})
    cache.write("a cat", False, entry())
    assert sorted(tmp_path.rglob("*")) == sorted([*theirs, cache.path("a cat", False)])


def test_what_lies_where_an_entry_belongs_is_kept_unless_it_is_a_file(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path / "cache", {})
    (tmp_path / "cache").mkdir()
    (tmp_path / "secret").write_text("mine")
    cache.path("link", False).symlink_to(tmp_path / "secret")
    cache.path("folder", False).mkdir()
    (cache.path("folder", False) / "thesis").touch()
    os.mkfifo(cache.path("pipe", False))
    for text in ("link", "folder", "pipe"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert cache.read(text, False, torch.float32) is None
            assert not cache.holds(text, False, torch.float32)
            cache.write(text, False, entry())
    assert (tmp_path / "secret").read_text() == "mine"
    assert (cache.path("folder", False) / "thesis").exists()
    cache.write("a cat", False, entry())
    assert cache.holds("a cat", False, torch.float32)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, {})
    cache.write("a cat", False, entry())
    path = cache.path("a cat", False)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(
            content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = cache.read("a cat", False, torch.float32)
        except UserWarning as error:
            assert "ignoring the unreadable prompt cache entry" in str(error)
        else:  # space between the fields of a header
            assert found is not None and torch.equal(found.features, entry().features)
            assert (found.tokens, found.cut) == (3, "cut")


def forged(path: Path, key: str, features: torch.Tensor, tokens: int) -> None:
    path.write_bytes(text_cache._content(key, Encoded(features, tokens, "")))


@pytest.mark.parametrize(
    "kind",
    ["renamed", "infinite", "nan", "too few rows", "no tokens", "deep", "long", "other dtype"]
    + ["stranger", "old", "empty", "three sizes", "wrong sizes"],
)
def test_what_an_entry_does_not_say_rightly_is_computed_again(tmp_path: Path, kind: str) -> None:
    cache = PromptCache(tmp_path, {})
    path, ones = cache.path("a cat", False), torch.ones(4, 8)
    if kind == "renamed":
        cache.write("a dog", False, entry())
        cache.path("a dog", False).rename(path)
    elif kind in ("infinite", "nan"):
        forged(path, path.stem, ones * float(kind[:3]), 4)
    elif kind in ("too few rows", "no tokens"):
        forged(path, path.stem, ones, 5 if kind == "too few rows" else 0)
    elif kind == "other dtype":
        forged(path, path.stem, ones.half(), 4)
    elif kind == "stranger":
        save_file({"features": ones}, path, {"tokens": "4", "cut": "", "key": path.stem})
    elif kind == "old":
        old_entry(path)
    elif kind == "three sizes":
        save_file({"features": ones[None]}, path, {"pixart": text_cache._MARK, "key": path.stem})
    else:
        header = {
            "deep": b"[" * 100_000,
            "long": b'{"a": 1}',
            "empty": b"",
            "wrong sizes": json.dumps(
                {"__metadata__": {}, "features": {"dtype": "F32", "shape": [10**9, True]}}
            ).encode(),
        }[kind]
        length = 2**60 if kind == "long" else len(header)
        path.write_bytes(length.to_bytes(8, "little") + header)
    assert not cache.holds("a cat", False, torch.float32)
    with pytest.warns(UserWarning, match="ignoring the unreadable prompt cache entry"):
        assert cache.read("a cat", False, torch.float32) is None
    cache.write("a cat", False, entry())
    assert cache.holds("a cat", False, torch.float32)


def test_a_user_without_a_home_or_a_writable_one_has_no_cache_and_no_error(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_cache_dir() is None
        model = TextEncoder.from_pretrained(pipeline, dtype=torch.float32)
        assert not model.is_cached("a cat") and len(model.encode(["a cat"])) == 1
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        unwritable = TextEncoder.from_pretrained(pipeline, dtype=torch.float32)
        assert unwritable.encode(["a cat"]).features.equal(model.encode(["a cat"]).features)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() is None


def test_a_cache_that_was_asked_for_and_cannot_be_used_is_one_line(
    pipeline: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="cache_dir must be a folder, got 'a.x00b'"):
        encoder(pipeline, Path("a\0b"))
    (tmp_path / "file").touch()
    model = encoder(pipeline, tmp_path / "file" / "prompts")
    with pytest.warns(UserWarning, match="cannot cache prompts in") as caught:
        model.encode(["a cat"])
        model.encode(["a dog"])
    assert len(caught) == 1


def test_features_that_are_not_finite_are_refused_and_not_kept(pipeline: Path, cache: Path) -> None:
    model = encoder(pipeline, cache)
    model.encode(["a dog"])
    weight = model._ready_network()._blocks[0]["layer.1.DenseReluDense.wo.weight"].parts[0]
    weight.data.fill_(3e38)
    with pytest.raises(NotFiniteError, match="finite features, got others for 'a cat'; use bf16"):
        model.encode(["a cat"])
    assert len(list(cache.iterdir())) == 1
