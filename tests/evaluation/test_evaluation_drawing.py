"""Pictures of a protocol: the same bits whoever draws them, and whole ones alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pixart.evaluate import main
from pixart.evaluation.options import Model
from pixart.evaluation.prompt_sets.making import make_prompts
from pixart.evaluation.protocols.protocol import load_protocol
from pixart.evaluation.running.drawing import Drawing, Shard, is_whole, open_pipeline
from pixart.pipeline.pictures import read_metadata

TINY = ["shapes", "--count", "10", "--size", "64", "--steps", "1", "--device", "cpu"]


def _draw(output: Path, *options: str) -> int:
    return main(["draw", *TINY, "--output", str(output), *options])


def _pictures(output: Path) -> dict[str, bytes]:
    images = output / "images"
    return {str(path.relative_to(images)): path.read_bytes() for path in images.rglob("*.png")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("drawn") / "whole"
    assert _draw(output) == 0
    return output


def test_every_prompt_has_its_picture_and_says_how_it_was_drawn(whole: Path) -> None:
    pictures = _pictures(whole)
    prompts = make_prompts("shapes", count=10, seed=1_000_000).prompts
    assert pictures.keys() == {f"{prompt.id}/0000.png" for prompt in prompts}
    told = read_metadata(whole / "images" / prompts[0].id / "0000.png")
    assert told.request.prompt == prompts[0].prompt and told.request.seed == 1_000_000
    assert (told.request.steps, told.request.size) == (1, None) and told.batch == 8
    assert (told.request.height, told.request.width) == (64, 64)


def test_shards_and_what_is_drawn_again_have_the_same_bits(whole: Path, tmp_path: Path) -> None:
    for shard in ("2/2", "1/2"):
        assert _draw(tmp_path, "--shard", shard) == 0
    assert _pictures(tmp_path) == _pictures(whole)
    lost = tmp_path / "images" / "pair-00001" / "0000.png"
    cut = tmp_path / "images" / "group-00000" / "0000.png"
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-10])
    half = lost.parent / ".0000.png.of-a-killed-process"
    half.mkdir()
    assert _draw(tmp_path) == 0
    assert _pictures(tmp_path) == _pictures(whole) and not half.exists()


def test_what_is_there_is_not_drawn_again(whole: Path, capsys: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.png")}
    assert _draw(whole) == 0
    assert "0 pictures drawn, 10 of 10 are there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.png")} == before
    assert not list((whole / ".locks").glob("draw-*"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--steps", "2"], "with sampling.steps 1, asked is 2; name another --output"),
        (["--guidance", "3"], "with sampling.guidance 2.0, asked is 3.0"),
        (["--count", "5"], "with count 10, asked is 5"),
        (["--dtype", "bf16"], "with model_options.dtype fp32, asked is bf16"),
        (["--attention", "int8"], "with model_options.attention None, asked is int8"),
    ],
)
def test_a_folder_holds_one_evaluation_alone(
    whole: Path, options: list[str], reason: str, capsys: Any
) -> None:
    assert _draw(whole, *options) == 2
    assert reason in capsys.readouterr().err


def test_pictures_of_others_are_not_drawn_among(tmp_path: Path, whole: Path, capsys: Any) -> None:
    other = tmp_path / "images" / "x" / "0000.png"
    other.parent.mkdir(parents=True)
    other.write_bytes(next(whole.rglob("*.png")).read_bytes())
    assert _draw(tmp_path) == 2
    assert "holds pictures that no evaluation drew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [("0/4", "--shard must be K/N"), ("5/4", "K from 1 to N"), ("x", "such as 3/8, got 'x'")],
)
def test_shards_that_are_none_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Shard.parse(text)


def test_processes_of_torchrun_begin_apart_and_help_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Shard.parse(None).order(7) == [1, 4, 0, 2, 3, 5, 6]
    assert Shard.parse("2/3").order(7) == [1, 4]
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="RANK must be a number below WORLD_SIZE"):
        Shard.parse(None)


def test_groups_are_of_one_size_and_no_larger_than_memory_holds() -> None:
    pipe = open_pipeline(Model(device="cpu"))
    prompts = make_prompts("shapes", count=10, seed=0).prompts
    sizes = {"128x128": [8, 2], "512x512": [4, 4, 2], "1024x512": [1] * 10}
    for size, wanted in sizes.items():
        protocol = load_protocol("shapes").changed(count=10, size=size)
        groups = Drawing(pipe, Model(), protocol, prompts, Path("x")).groups
        assert [len(group.entries) for group in groups] == wanted
        assert all(one.batched and one.tile is False for group in groups for one in group.requests)


def test_a_picture_is_whole_when_its_end_is_there(whole: Path, tmp_path: Path) -> None:
    picture = next(whole.rglob("*.png"))
    assert is_whole(picture)
    for length in (0, 5, 200):
        (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:length])
        assert not is_whole(tmp_path / "cut.png")
    assert not is_whole(tmp_path) and not is_whole(tmp_path / "absent")


def _start(output: Path, *options: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "pixart.evaluate", "run", *TINY, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--count", "24", *options], env=environment)


@pytest.mark.slow
def test_results_are_the_same_killed_shared_and_sharded(tmp_path: Path) -> None:
    assert _start(tmp_path / "plain").wait() == 0
    for least in (1, 9):  # pictures that are there when it is killed
        process = _start(tmp_path / "killed")
        while len(list((tmp_path / "killed").rglob("0000.png"))) < least and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _start(tmp_path / "killed").wait() == 0
    together = [_start(tmp_path / "together") for _ in range(3)]
    assert [process.wait() for process in together] == [0, 0, 0]
    for shard in ("1/2", "2/2"):
        assert _start(tmp_path / "sharded", "--shard", shard).wait() == 0
    plain = (tmp_path / "plain" / "results.json").read_bytes()
    for name in ("killed", "together", "sharded"):
        assert (tmp_path / name / "results.json").read_bytes() == plain
