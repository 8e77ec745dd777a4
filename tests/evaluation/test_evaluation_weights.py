"""Where weights are looked for, and what is said of those that are missing."""

import hashlib
from pathlib import Path

import pytest
import torch

from pixart.evaluation.metric import Context
from pixart.evaluation.needs import (
    MissingError,
    Need,
    find_file,
    find_snapshot,
    need_snapshot,
    open_file,
    open_snapshot,
)
from pixart.files import CheckpointError

NEED = Need(
    "net-0123abcd.pth", "example.org", size=2_500_000, sha256="0123abcd", repository="them/nets"
)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache and a working folder of the test's own."""
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return cache


def context(weights: Path | None = None) -> Context:
    return Context(torch.device("cpu"), weights)


def written(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "place",
    [
        "net-0123abcd.pth",
        "net-0123abcd.safetensors",
        "nets/net-0123abcd.pth",
        "them--nets/net-0123abcd.pth",
        "them/nets/net-0123abcd.pth",
    ],
)
def test_a_file_is_found_in_the_folder_of_weights(tmp_path: Path, place: str) -> None:
    path = written(tmp_path / "w" / place)
    assert find_file(NEED, context(tmp_path / "w")) == path


def test_the_weights_may_be_the_file_itself_and_no_other(tmp_path: Path) -> None:
    path = written(tmp_path / "w" / NEED.name)
    assert find_file(NEED, context(path)) == path
    assert find_file(NEED, context(written(tmp_path / "w" / "another.pth"))) is None


def test_a_file_is_found_where_one_works_and_in_the_cache(tmp_path: Path) -> None:
    assert find_file(NEED, context()) is None
    snapshot = tmp_path / "cache" / "models--them--nets" / "snapshots" / "c0ffee"
    cached = written(snapshot / NEED.name)
    written(snapshot.parent.parent / "refs" / "main", "c0ffee")
    assert find_file(NEED, context()) == cached
    here = written(tmp_path / "here" / NEED.name)
    found = find_file(NEED, context())
    assert found is not None and found.resolve() == here


@pytest.mark.parametrize("place", ["m", "them--m", "them/m"])
def test_a_snapshot_is_found_in_the_folder_of_weights(tmp_path: Path, place: str) -> None:
    folder = written(tmp_path / "w" / place / "config.json").parent
    assert find_snapshot("them/m", context(tmp_path / "w")) == folder
    assert find_snapshot("them/m", context(folder)) == folder
    assert find_snapshot("them/m", context(tmp_path / "w"), ["tokenizer.json"]) is None


def test_a_snapshot_is_found_by_its_path_and_in_the_cache(tmp_path: Path) -> None:
    assert find_snapshot("them/m", context()) is None
    assert [str(need) for need in need_snapshot("them/m", context())] == [
        "them/m (from huggingface.co/them/m), looked for in --weights, the working folder and the "
        "Hugging Face cache"
    ]
    for cache, weights in ((tmp_path / "cache", None), (tmp_path / "w", tmp_path / "w")):
        snapshot = cache / "models--them--m" / "snapshots" / "c0ffee"
        written(snapshot / "config.json")
        written(snapshot.parent.parent / "refs" / "main", "c0ffee")
        assert find_snapshot("them/m", context(weights)) == snapshot
    folder = written(tmp_path / "elsewhere" / "config.json").parent
    assert find_snapshot(str(folder), context()) == folder
    assert open_snapshot("clip", str(folder), context()) == folder
    assert need_snapshot("them/m", context()) == []


def test_what_is_missing_is_said_with_its_source_size_and_digest() -> None:
    with pytest.raises(MissingError) as caught:
        open_file("fid-clean", NEED, context())
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "fid-clean needs net-0123abcd.pth (from example.org, 2.5 MB, SHA-256 0123abcd), looked for in "
        "--weights, the working folder and the Hugging Face cache"
    )
    with pytest.raises(MissingError, match="clip needs them/m "):
        open_snapshot("clip", "them/m", context())


def test_a_file_of_another_digest_is_refused(tmp_path: Path) -> None:
    right = hashlib.sha256(b"right").hexdigest()
    need = Need(f"net-{right[:8]}.pth", "example.org")
    path = written(tmp_path / need.name, "right")
    assert open_file("fid", need, context(tmp_path)) == path
    written(path, "wrong")
    with pytest.raises(CheckpointError, match=f"must have the SHA-256 {right[:8]}..., got "):
        open_file("fid", need, context(tmp_path))
