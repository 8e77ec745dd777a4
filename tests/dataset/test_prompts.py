"""Features of prompts alone: what of a file is encoded and what is told of the rest, what survives kills, and
what such a folder is not."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from pipelines import link_all_but
from test_prepare import FakeText

from pixart import data
from pixart.config import EMBEDDED
from pixart.dataset import prompts
from pixart.dataset.batches import FeatureDataset, open_captions
from pixart.dataset.encoding import Texts
from pixart.dataset.prompts import PromptFile, PromptPreparation
from pixart.dataset.samples import Prompt
from pixart.pipeline.directory import open_directory


class SlowText(FakeText):
    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds

    def encode_each(self, texts: list[str]) -> Any:
        time.sleep(self.seconds)
        return super().encode_each(texts)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def encode(file: Path, output: Path, text: FakeText | None = None) -> dict[str, Any]:
    texts = Texts(text or FakeText(), "sigma", "t")  # type: ignore[arg-type]
    preparation = PromptPreparation(output, texts, PromptFile(file))
    return preparation.run(lambda: preparation.file)


def said(file: Path) -> dict[str, str]:
    """Prompts and reasons by their lines."""
    return {
        item.path: "|".join(item.captions.values()) if isinstance(item, Prompt) else item.reason
        for item in PromptFile(file)
    }


def test_lines_of_text_are_prompts_once_each(tmp_path: Path) -> None:
    content = (
        "\ufeffa  cat \r\n\r\n# a comment\r\n\\# a sign\r\na  cat\r\n\u2028\r\na dog\u2028a bone"
    )
    file = written(tmp_path / "p.txt", content)
    assert said(file) == {"line 1": "a  cat", "line 4": "# a sign", "line 7": "a dog\u2028a bone"}
    report = encode(file, tmp_path / "out")
    assert report["prompts"] == 3 and report["empty"] == 3
    assert report["duplicates"] == {"count": 1, "first": ["line 5"]}


def test_lines_that_are_none_are_told_and_the_others_go_on(tmp_path: Path) -> None:
    long = b"x" * (prompts.MAX_CAPTION + 5)
    file = written(tmp_path / "p.txt", b"caf\xe9\n" + long + b"\nlast\n" + b"y" * 40)
    found = said(file)
    assert "must be UTF-8, byte 3 is not" in found["line 1"] and "longer" in found["line 2"]
    assert found["line 3"] == "last" and len(found) == 4
    report = encode(file, tmp_path / "out")
    assert [line["path"] for line in report["rejected"]] == ["line 1", "line 2"]
    assert report["notes"] == [{"path": "line 4", "note": "cut off: 'yyyyyyyyyy'"}]


def test_objects_have_captions_by_name(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a cat", "captions": {"long": "a cat that sleeps"}},
        {"path": "x.png", "captions": {"synth": ["one", "two"]}},  # as `caption` writes them
        {"prompt": 3},
        {"prompt": " "},
        ["a list"],
    ]
    file = written(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)) + '\n{"prompt": "\n')
    found = said(file)
    assert found["line 1"] == "a cat|a cat that sleeps" and found["line 2"] == "one|two"
    for number, reason in {3: "must be text", 4: "not empty", 5: "an object"}.items():
        assert reason in found[f"line {number}"]
    assert len(found) == 6
    encode(file, tmp_path / "out")
    captions = open_captions(tmp_path / "out")
    assert captions.caption_names == ["long", "prompt", "synth.1", "synth.2"]
    drawn = captions.caption(1, random.Random(0), {"synth": 1.0})
    assert drawn[:, 0].tolist() in [[float(ord(c)) for c in text] for text in ("one", "two")]


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("p.txt", b"", "must hold at least one prompt, it holds none"),
        ("p.txt", b"\xef\xbb\xbf\r\n\r\n# only a comment\n", "must hold at least one prompt"),
        ("p.txt", "a cat\n".encode("utf-16"), "it holds none: line 1: caption must be UTF-8"),
        ("p.jsonl", b"a cat\n", "it holds none: line 1"),
        ("p.csv", b"a cat\n", "must be .txt, a prompt a line, or .jsonl"),
        ("absent.txt", None, "there is none"),
    ],
)
def test_what_holds_no_prompt_is_refused_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, reason: str
) -> None:
    file = tmp_path / name
    if content is not None:
        written(file, content)
    assert data.main(["prompts", str(file), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.parts[-2:])
    }


def _slowly(file: Path, output: Path) -> None:
    encode(file, output, SlowText(0.15))


def test_what_was_killed_goes_on_to_the_same_bytes_and_processes_share_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "CHUNK", 4)
    file = written(tmp_path / "p.txt", "\n".join(f"prompt {n % 38}" for n in range(40)))
    encode(file, tmp_path / "whole")
    out = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    killed = context.Process(target=_slowly, args=(file, out))
    killed.start()
    over = time.monotonic() + 30
    while len(list((out / "work").glob("*.json"))) < 3 and time.monotonic() < over:
        time.sleep(0.01)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    done = len(list((out / "work").glob("*.json")))
    assert 3 <= done < 10 and not (out / "prompts.json").exists()
    other = context.Process(target=_slowly, args=(file, out))
    other.start()
    text = SlowText(0.15)
    encode(file, out, text)
    other.join(30)
    assert other.exitcode == 0
    assert 0 < len(text.encoded) < 38 - 4 * done + 4  # of what was left the other did a part
    found = content_of(out)
    locks = {name for name in found if name.endswith(".lock")}
    assert {name: found[name] for name in found.keys() - locks} == content_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the embedded T5, by the command."""
    place = tmp_path_factory.mktemp("encoded")
    file = written(place / "p.txt", "a red circle\na blue star on white\n" + "word " * 400)
    assert data.main(["prompts", str(file), str(place / "out")]) == 0
    return place / "out"


def test_features_are_those_that_prepare_makes(encoded: Path, tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "s", 1)
    (source / "0.txt").write_text("a blue star on white")
    assert data.main(["prepare", str(source), str(tmp_path / "d"), "--resolution", "64"]) == 0
    prepared = FeatureDataset(tmp_path / "d")
    one = prepared.caption(0, random.Random(0))
    other = open_captions(encoded).caption(1, random.Random(0))
    assert (
        torch.equal(one, other) and len(open_captions(encoded).caption(2, random.Random(0))) == 300
    )


def test_a_dry_run_tells_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "p.txt", "a red circle\na red circle\na star\n\xff".encode("latin-1"))
    command = ["prompts", str(file), str(tmp_path / "out"), "--dry-run", "--json"]
    assert data.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["left"], found["chunks"]) == (3, 2, 1)
    assert found["measured"] == 2 and found["seconds_a_prompt"] > 0 and found["rejected"]
    assert not (tmp_path / "out").exists()
    written(file, "\n".join(f"a star, {number}" for number in range(20)))
    for memory, measured in {"resident": 8, "stream": 20}.items():  # streamed all at once
        assert data.main([*command, "--text-encoder-memory", memory]) == 0
        assert json.loads(capsys.readouterr().out)["measured"] == measured


def test_the_folder_says_what_it_is_and_other_commands_what_they_cannot_do(
    encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads((encoded / "prompts.json").read_text())["holds"] == "prompts only"
    with pytest.raises(ValueError, match="holds prompts only .*`pixart data prepare` encodes"):
        FeatureDataset(encoded)
    refused = [
        ["prepare", encoded, tmp_path / "o", "--resolution", "64"],
        ["prepare", pictures.folder(tmp_path / "s", 1), encoded, "--resolution", "64"],
        ["filter", encoded, tmp_path / "f.jsonl", "--scorer", "os:getcwd"],
        ["clean", encoded, "--output", tmp_path / "c.jsonl"],
        ["statistics", encoded],
    ]
    for command in refused:
        assert data.main([str(word) for word in command]) == 2
        error = capsys.readouterr().err
        assert "holds prompts only" in error and error.count("\n") == 1, command


def test_prompts_do_not_go_among_pictures_nor_without_their_text_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "p.txt", "a red circle\n")
    written(tmp_path / "index-64.json", "{}")
    assert data.main(["prompts", str(file), str(tmp_path)]) == 2
    assert "OUTPUT must be a folder of its own" in capsys.readouterr().err
    model = link_all_but(open_directory(EMBEDDED, True), tmp_path / "model", "text_encoder")
    assert data.main(["prompts", str(file), str(tmp_path / "o"), "--model", str(model)]) == 2
    error = capsys.readouterr().err
    assert "has no text_encoder folder" in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_damage_is_found_and_mended_by_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "p.txt", "a red circle\na star\n")
    out = tmp_path / "out"
    assert data.main(["prompts", str(file), str(out)]) == 0
    (shard,) = (out / "features").glob("*.safetensors")
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert data.main(["verify", str(out)]) == 1
    assert "delete them and run `pixart data prompts` again" in capsys.readouterr().err
    shard.unlink()
    assert data.main(["prompts", str(file), str(out)]) == 0
    assert shard.read_bytes() == good and data.main(["verify", str(out)]) == 0
    index = out / "prompts.json"
    index.write_text(index.read_text().replace(shard.name, "../../x.safetensors"))
    with pytest.raises(ValueError, match="is damaged .*run `pixart data prompts` again"):
        open_captions(out)
