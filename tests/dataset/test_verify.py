"""Checksums of prepared shards: readers notice damage, `verify` finds it and makes it again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pictures
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from pixart import data
from pixart.dataset.batches import FeatureDataset
from pixart.dataset.features import ShardStore
from pixart.dataset.options import Prepare
from pixart.dataset.parts import read_checked, read_part, write_checked
from pixart.dataset.verify import settings_of, write_settings


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of two pictures and what `prepare` made of it, at two sizes."""
    folder = tmp_path_factory.mktemp("verify")
    pictures.folder(folder / "source", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # and verify runs elsewhere
        for size in (64, 48):
            command = ["prepare", "source", "out", "--resolution", str(size)]
            assert data.main([*command, "--device", "cpu", "--min-side", "1"]) == 0
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder, with the source where it was."""
    return Path(shutil.copytree(original / "out", tmp_path / "moved"))


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "features").iterdir())


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def without_checksums(path: Path) -> None:
    save_file(load_file(path), path)


def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """Code, what --json says, and stderr."""
    capsys.readouterr()
    code = data.main(["verify", str(folder), "--json", "--device", "cpu"])
    said, error = capsys.readouterr()
    return code, json.loads(said), error


def samples(folder: Path, size: int) -> Any:
    return json.loads((folder / f"index-{size}.json").read_text())["samples"]


def grafted(path: Path) -> None:
    """The content of another shard."""
    other = next(shard for shard in shards(path.parent.parent) if shard != path)
    path.write_bytes(other.read_bytes())


def poisoned(path: Path) -> None:
    tensors = load_file(path)
    tensors[sorted(tensors)[0]].view(torch.uint8)[..., -1] = 0xFF
    path.write_bytes(save(tensors))


def forged(folder: Path, **options: Any) -> None:
    """Settings with a digest that is right: it is no secret."""
    file = folder / "work" / "prepare-64.json"
    values = read_checked(file)
    assert values is not None
    write_checked(file, values | {"options": values["options"] | options})


@pytest.mark.parametrize(
    "options",
    [
        {"source": 7}, {"resolution": "64"}, {"captions": 5}, {"captions": [5]}, {"scores": 5},
        {"model": 5}, {"vae_dtype": "fp7"}, {"workers": True}, {"prompt": []}, {"other": 1},
        {"output": "/tmp"},
    ],
    ids=str,
)  # fmt: skip
def test_forged_settings_are_refused(original: Path, folder: Path, options: Any) -> None:
    with settings_of(folder, 64, None):
        pass
    forged(folder, **options)
    with (
        pytest.raises(ValueError, match="what prepared it is damaged"),
        settings_of(folder, 64, None),
    ):
        pass


def test_a_prepared_folder_of_a_stranger_runs_no_command(
    original: Path, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("webdataset")
    forged(folder, source=f"pipe:touch {tmp_path}/mark; echo ://a.tar")
    with settings_of(folder, 64, "cpu") as options, pytest.raises(ValueError, match="got 'pipe:"):
        data._items(options)()
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"samples": [], "rejected": [], "notes": [], "more": []},
        {"samples": 1, "rejected": [], "notes": []},
        {
            "samples": [{"path": "a", "image": [1, "a"], "captions": {}}],
            "rejected": [],
            "notes": [],
        },
        {
            "samples": [{"path": "a", "image": ["s", "a"], "captions": []}],
            "rejected": [],
            "notes": [],
        },
        {"samples": [], "rejected": [{"path": "a"}], "notes": []},
        {"samples": [], "rejected": [], "notes": None},
    ],
    ids=str,
)
def test_a_forged_part_is_made_again(tmp_path: Path, values: Any) -> None:
    write_checked(tmp_path / "part.json", values)
    assert read_part(tmp_path / "part.json") is None


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit of a tensor": lambda path: flip(path, -9),
    "a bit of the header": lambda path: flip(path, 20),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "of another": grafted,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", ["a bit of a tensor", "of another", "gone"])
def test_a_damaged_shard_is_found_and_made_again(
    folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in shards(folder)}
    indices = [samples(folder, size) for size in (48, 64)]
    first = shards(folder)[0]
    DAMAGES[damage](first)
    code, found, error = verify(folder, capsys)
    assert (code, list(found["damaged"]), found["remaining"]) == (0, [first.name], []), found
    assert found["remade"] == [first.name] and found["unchecked"] == 0
    assert {path.name: path.read_bytes() for path in shards(folder)} == before
    assert [samples(folder, size) for size in (48, 64)] == indices
    assert verify(folder, capsys)[1]["damaged"] == {}


def test_every_shard_may_be_damaged_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {size: FeatureDataset(folder, size).batch([0], Random(0)) for size in (48, 64)}
    for path in shards(folder):
        flip(path, -1)
    code, found, _ = verify(folder, capsys)
    assert (code, found["remaining"], found["unused"], len(found["remade"])) == (0, [], [], 2)
    for size, batch in before.items():
        again = FeatureDataset(folder, size).batch([0], Random(0))
        assert torch.equal(again.mean, batch.mean) and torch.equal(again.features, batch.features)


@pytest.mark.parametrize("trouble", ["source", "picture", "settings", "older"])
def test_what_cannot_be_made_again_stays_and_is_named(
    original: Path, folder: Path, trouble: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = shards(folder)[0]
    flip(first, -9)
    damaged, source = first.read_bytes(), original / "source"
    indices = [samples(folder, size) for size in (48, 64)]
    settings = sorted((folder / "work").glob("prepare-*.json"))
    for file in settings:
        if trouble == "settings":
            file.write_text('{"folder": ".", "options": {"source": "x"}}')
        elif trouble == "older":
            file.unlink()
    away = {"source": source, "picture": source / "0.png"}.get(trouble)
    if away:
        away.rename(original / "away")
    try:
        code, found, error = verify(folder, capsys)
    finally:
        if away:
            (original / "away").rename(away)
    assert code == 1 and found["remaining"] == [first.name] and found["kept"]
    (line,) = [line for line in error.splitlines() if line.startswith("pixart.data: ")]
    assert f"damaged shards stay: {first.name}; at " in line
    assert first.read_bytes() == damaged and not list(folder.rglob("*.damaged"))
    assert [samples(folder, size) for size in (48, 64)] == indices


def test_a_shard_that_no_index_needs_goes_if_it_is_damaged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ShardStore(folder / "features").add({"a": torch.zeros(2), "b": torch.ones(2)})
    (extra,) = [path for path in shards(folder) if b'"a":' in path.read_bytes()[:200]]
    assert verify(folder, capsys)[1]["damaged"] == {} and extra.exists()
    flip(extra, -1)
    code, found, _ = verify(folder, capsys)
    assert code == 0 and found["unused"] == [extra.name] and not extra.exists()


def test_folders_of_earlier_versions_are_read_and_said_to_be_unchecked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in shards(folder):
        without_checksums(path)
    code, found, _ = verify(folder, capsys)
    assert code == 0 and found["unchecked"] == len(shards(folder)) == found["shards"]
    assert data.main(["verify", str(folder)]) == 0
    assert "have no checksums: only their form was checked" in capsys.readouterr().out
    assert len(FeatureDataset(folder, 64).batch([0, 1], Random(0))) == 2


@pytest.mark.parametrize("damage", [*DAMAGES, "not finite, and without checksums"])
def test_a_reader_names_the_shard_that_is_damaged(folder: Path, damage: str) -> None:
    read = FeatureDataset(folder, 64)
    (shard,) = {entry.image[0] for entry in read.entries}
    DAMAGES.get(damage, poisoned)(folder / "features" / shard)
    with pytest.raises(ValueError, match=r"features/\w+.safetensors .*`pixart data verify "):
        for index in range(len(read)):
            read._features.moments(read.entries[index].image)
            read._features.caption(read.entries[index], "prompt")


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 3}, {"samples": [None]}, {"samples": [{"path": "x"}]}, {"vae": None},
        {"vae": {"scaling_factor": float("inf")}}, {"vae": {"scaling_factor": "1e999"}},
    ],
)  # fmt: skip
def test_a_damaged_index_is_named(
    folder: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "index-64.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=r"index-64\.json.*run prepare again"):
        FeatureDataset(folder, 64)
    assert data.main(["verify", str(folder)]) == 2
    assert "index-64.json" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["../index-64.json", "/etc/x.safetensors", "a/b.safetensors", 3])
def test_an_index_leads_to_no_other_folder(folder: Path, shard: object) -> None:
    file = folder / "index-64.json"
    index = json.loads(file.read_text())
    index["samples"][0]["image"][0] = shard
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index-64\.json is damaged"):
        FeatureDataset(folder, 64)


def test_what_was_never_prepared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert data.main(["verify", str(folder)]) == 2
        assert "must be a folder that `pixart data prepare` filled" in capsys.readouterr().err


def test_settings_are_kept_without_secrets(original: Path, tmp_path: Path) -> None:
    write_settings(Prepare("https://me:pw@host/x.tar?token=abc", tmp_path, 64))
    assert "token" not in (tmp_path / "work" / "prepare-64.json").read_text()
    with (
        pytest.raises(ValueError, match="password or a key, which is not kept: delete the damaged"),
        settings_of(tmp_path, 64, None),
    ):
        pass
