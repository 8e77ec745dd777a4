"""Tars of pictures by the million: what is in them, which of them fall to whom, and what is refused."""

import gc
import io
import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stub_pipeline import StubPipeline

from pixart.dataset.samples import Sample
from pixart.dataset.tar_shards import read_shards
from pixart.generate import main
from pixart.generation.options import Options
from pixart.generation.prompts import Line, read_prompts
from pixart.generation.shards import plan_shards, running
from pixart.generation.shards.archive import Mark
from pixart.generation.shards.part import Part
from pixart.pipeline.metadata import Metadata
from pixart.pipeline.pictures import read_metadata

TARS = "tars/{shard:05d}.tar"
LINES: list[dict[str, Any]] = [
    {"prompt": "a red circle"},
    {"prompt": "a blue square", "seed": 7, "name": "Blue"},
    {"prompt": "“🐈”\u2028on two lines", "steps": 3},
    {"prompt": "a red circle", "negative": "green", "size": "64"},
    {"prompt": "a star", "guidance": 2.5},
]


def write_list(name: str = "p.jsonl", lines: list[dict[str, Any]] = LINES) -> str:
    Path(name).write_text("\n".join(map(json.dumps, lines)) + "\n")
    return name


def run(*words: str, output: str = TARS) -> int:
    return main(["--output", output, "--shard-size", "2", *words])


def members(folder: str = "tars") -> dict[str, dict[str, bytes]]:
    """What each tar holds, in its order."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(Path(folder).iterdir()):
        with tarfile.open(path) as tar:
            found[path.name] = {
                one.name: stream.read() for one in tar if (stream := tar.extractfile(one))
            }
    return found


def contents(folder: str = "tars") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_each_picture_is_in_one_tar_with_its_caption_and_request(stub: StubPipeline) -> None:
    assert run("--prompts", write_list(), "--steps", "4") == 0
    assert main(["--prompts", "p.jsonl", "--steps", "4", "--output", "plain/{index}.png"]) == 0
    found = members()
    assert [len(tar) // 3 for tar in found.values()] == [2, 2, 1]
    assert list(found) == ["00000.tar", "00001.tar", "00002.tar"]
    every = {name: content for tar in found.values() for name, content in tar.items()}
    keys = [f"{index:09d}" for index in range(5)]
    assert list(every) == [f"{key}.{kind}" for key in keys for kind in ("png", "txt", "json")]
    for index, (key, line) in enumerate(zip(keys, LINES, strict=True)):
        plain = Path(f"plain/{index:04d}.png")
        assert every[f"{key}.png"] == plain.read_bytes()
        assert every[f"{key}.txt"].decode() == line["prompt"]
        said = json.loads(every[f"{key}.json"])
        assert said.get("name") == line.get("name")
        metadata = Metadata.from_text(every[f"{key}.json"].decode())
        assert metadata == read_metadata(plain)
        assert metadata.request.steps == line.get("steps", 4)


def test_a_picture_out_of_a_tar_is_drawn_again(stub: StubPipeline) -> None:
    assert run("--prompts", write_list()) == 0
    Path("one.png").write_bytes(members()["00000.tar"]["000000001.png"])
    assert main(["--from-image", "one.png"]) == 0
    assert Path("one-again.png").read_bytes() == Path("one.png").read_bytes()


def test_our_own_reader_and_webdataset_read_them(stub: StubPipeline) -> None:
    assert run("--prompts", write_list(), "--format", "webp", "--quality", "80") == 0
    paths = sorted(map(str, Path("tars").iterdir()))
    samples = list(read_shards(paths))
    assert all(isinstance(one, Sample) for one in samples)
    captions = [one.captions for one in samples if isinstance(one, Sample)]
    prompts = [" ".join(line["prompt"].split()) for line in LINES]
    assert [" ".join(one["prompt"].split()) for one in captions] == prompts
    webdataset = pytest.importorskip("webdataset")
    read = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert [one["__key__"] for one in read] == [f"{index:09d}" for index in range(5)]
    assert [one["txt"].decode() for one in read] == [line["prompt"] for line in LINES]
    assert {kind for one in read for kind in one if kind[0] != "_"} == {"webp", "txt", "json"}


def test_lines_sweeps_and_seeds_go_over_the_ends_of_tars(stub: StubPipeline) -> None:
    words = ["--sweep", "steps=1,2", "--num-images", "3", "--seed", "5"]
    assert main([*words, "a cat", "a dog", "--output", TARS, "--shard-size", "5"]) == 0
    tars = [
        [json.loads(v) for k, v in tar.items() if k.endswith("json")] for tar in members().values()
    ]
    assert [len(tar) for tar in tars] == [5, 5, 2]
    drawn = [(one["request"]["prompt"], one["request"]["steps"], one["request"]["seed"])
             for tar in tars for one in tar]  # fmt: skip
    prompts, steps, seeds = ("a cat", "a dog"), (1, 2), (5, 6, 7)
    assert drawn == [(a, b, c) for a in prompts for b in steps for c in seeds]


def test_parts_make_together_what_one_process_makes(stub: StubPipeline) -> None:
    assert run("--prompts", write_list()) == 0
    for number in (2, 0, 1):
        assert (
            run("--prompts", "p.jsonl", "--shard", f"{number}/3", output="parts/{shard:05d}.tar")
            == 0
        )
        assert f"{number:05d}.tar" in contents("parts")
    assert contents("parts") == contents()
    assert run("--prompts", "p.jsonl", "--shard", "7/9", output="none/{shard:05d}.tar") == 0
    assert not Path("none").exists()


def test_the_same_run_draws_nothing_again(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompts", write_list()) == 0
    before, drawn = contents(), len(stub.drawn)
    Path("tars/00001.tar").unlink()
    capsys.readouterr()
    assert run("--prompts", "p.jsonl", "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert "2 of 3 tars are there already; --overwrite draws them again" in err
    assert contents() == before and len(stub.drawn) == drawn + 2 == 7
    notes = [(one["file"], one["pictures"], one["note"]) for one in report["shards"]]
    assert notes == [
        ("tars/00000.tar", 2, "there already"),
        ("tars/00001.tar", 2, "drawn"),
        ("tars/00002.tar", 1, "there already"),
    ]
    assert report["drawn"] == 2 and report["images"] == []
    assert report["shards"][1]["seconds"]["denoise"] == 2.0 and not report["shards"][0]["seconds"]
    assert run("--prompts", "p.jsonl", "--overwrite") == 0
    assert contents() == before and len(stub.drawn) == 12


def test_what_the_model_remarks_is_said_once(
    stub: StubPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(StubPipeline, "remarks", lambda *_: ["hardly meant so"])
    assert run("--prompts", write_list()) == 0
    assert capsys.readouterr().err.count("hardly meant so") == 1


def test_a_run_that_goes_on_holds_no_line_of_what_is_there(
    stub: StubPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    draw = running._draw

    def counted(*run: Any) -> Any:
        gc.collect()
        held.append(sum(isinstance(one, Line) for one in gc.get_objects()))
        return draw(*run)

    monkeypatch.setattr(running, "_draw", counted)
    write_list(lines=[{"prompt": f"cat {number}"} for number in range(12)])
    assert run("--prompts", "p.jsonl") == run("--prompts", "p.jsonl") == 0
    assert held[1] <= held[0] + 2


def change(path: str, make: Any) -> None:
    Path(path).write_bytes(make(Path(path).read_bytes()))


OTHERS: dict[str, tuple[list[str], Any, str]] = {
    "list": ([], lambda: write_list(lines=[*LINES[:3], {"prompt": "x"}, LINES[4]]), "00001.tar: holds other"),
    "longer list": ([], lambda: write_list(lines=[*LINES, LINES[0]]), "00002.tar: holds other"),
    "size": (["--shard-size", "3"], None, "00002.tar: is none of the 2 tars"),
    "smaller size": (["--shard-size", "1"], None, "00000.tar: holds other"),
    "setting": (["--steps", "9"], None, "00000.tar: holds other"),
    "seeds": (["--num-images", "2"], None, "00000.tar: holds other"),
    "format": (["--format", "jpg"], None, "00000.tar: holds other"),
    "batch": (["--batch", "2"], None, "00000.tar: holds other"),
    "model": (["--ema"], None, "00000.tar: was drawn by another model"),
    "cut": ([], lambda: change("tars/00001.tar", lambda c: c[:-512]), "00001.tar: is not whole"),
    "empty": ([], lambda: change("tars/00001.tar", lambda _: b""), "00001.tar: was not written by"),
    "foreign": ([], lambda: change("tars/00001.tar", lambda c: c[1024:]), "00001.tar: was not written by"),
    "extra": ([], lambda: Path("tars/00007.tar").touch(), "00007.tar: is none of the 3 tars"),
}  # fmt: skip


@pytest.mark.parametrize("words, before, said", OTHERS.values(), ids=OTHERS)
def test_tars_of_another_run_are_refused_before_anything_is_drawn(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str], words: list[str], before: Any, said: str
) -> None:
    assert run("--prompts", write_list()) == 0
    if before is not None:
        before()
    kept, drawn = contents(), len(stub.drawn)
    capsys.readouterr()
    assert run("--prompts", "p.jsonl", *words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line and "another --output" in line and "delete it" in line
    assert contents() == kept and len(stub.drawn) == drawn


def test_other_weights_are_another_model(
    stub: StubPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("a cat") == 0
    monkeypatch.setattr(StubPipeline, "weights", {"transformer": "5" * 64})
    assert run("a cat") == 2
    assert "was drawn by another model" in capsys.readouterr().err


SET_ELSEWHERE: dict[str, tuple[str, Any]] = {
    "plan": ("resolve", lambda _, request: replace(request, steps=9, height=64, width=64)),
    "networks": ("weights_of", lambda *_: {"preprocessor hed": "5" * 64}),
    "scheduler": ("scheduler_config", {"_class_name": "DDIMScheduler"}),
}


@pytest.mark.parametrize("name, value", SET_ELSEWHERE.values(), ids=SET_ELSEWHERE)
def test_what_files_say_that_options_only_name_is_known(
    stub: StubPipeline,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: Any,
) -> None:
    """Of a plan or a model's folder under the same name, with other settings in it than before."""
    assert run("a cat", "--fast", "balanced") == 0
    before, drawn = contents(), len(stub.drawn)
    assert run("a cat", "--fast", "balanced") == 0
    monkeypatch.setattr(StubPipeline, name, value)
    assert run("a cat", "--fast", "balanced") == 2
    assert "00000.tar: " in capsys.readouterr().err
    assert contents() == before and len(stub.drawn) == drawn


def test_a_configuration_is_known_by_what_is_in_it(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.json").write_text('{"depth": 28}')
    assert run("a cat", "--config", "config.json") == 0
    Path("config.json").write_text('{"depth": 28, "pe_interpolation": 2.0}')
    assert run("a cat", "--config", "config.json") == 2
    assert "was drawn by another model" in capsys.readouterr().err


REFUSED: dict[str, tuple[list[str], str]] = {
    "grid": (["--grid"], "--grid must be left out where tars are written"),
    "preview": (["--preview"], "--preview must be left out where tars are written"),
    "from image": (["--from-image", "x.png"], "--from-image must be left out"),
    "together": (["--parallel", "sequence"], "--parallel must be left out where tars are written"),
    "alone": (["--parallel", "pictures"], "--parallel must be left out where tars are written"),
    "lot": (["--seed", "random"], "--seed must be a number where tars are written, got random"),
    "quality of png": (["--quality", "80"], "--quality must be left out for .png"),
    "no size": (["--shard-size", "0"], "--shard-size must be from 1 to"),
    "no field": (["--output", "x.tar"], "--output must name tars by their number alone"),
    "another field": (["--output", "{seed}-{shard}.tar"], "by their number alone"),
    "field in folder": (["--output", "{shard}/x.tar"], "by their number alone"),
    "twice": (["--output", "{shard}-{shard}.tar"], "by their number alone"),
    "another format": (["--output", "{shard:x}.tar"], "by their number alone"),
    "compressed": (["--output", "{shard}.tar.gz"], "by their number alone"),
    "no tar": (["--output", "{shard}.png"], "by their number alone"),
    "long name": (["--output", "a" * 240 + "{shard}.tar"], "must name tars in at most 240 bytes, got 253"),
    "a secret": (["--output", "s3://K:a/b?c@d/{shard:x}.tar"], "number alone, as in tars/{shard:05d}.tar, "
                 "with one {shard} in the file's name and .tar at its end, got s3://***@d/{shard:x}.tar"),
    "pictures in a store": (["--output", "s3://K:secret@d/x.png"], ".tar, got s3://***@d/x.png"),
    "no bucket": (["--output", "s3:///d/{shard}.tar"], "s3:// must be followed by a bucket"),
    "another host": (["--output=file://host/{shard}.tar"], "must be followed by a path of this machine"),
    "part of pictures": (["--output", "x.png", "--shard", "0/2"], "--shard must be given with tars"),
    "size of pictures": (["--output", "x", "--shard-size", "5"], "--shard-size must be given with tars"),
    "part": (["--shard", "2/2"], "--shard must be I/N with I from 0 to N - 1"),
    "empty part": (["--shard", "/2"], "is the variable that it was to come from empty"),
    "no file": (["--prompts", "absent.txt"], "absent.txt: cannot be read"),
    "both": (["--prompts", "p.jsonl"], "give one of: prompts, --prompts FILE"),
}  # fmt: skip


@pytest.mark.parametrize("words, said", REFUSED.values(), ids=REFUSED)
def test_what_tars_cannot_be_drawn_with_is_refused(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    prompt = (
        [] if words[0] in ("--from-image", "--prompts") and words[1] != "p.jsonl" else ["a cat"]
    )
    output = [] if words[0].startswith("--output") else ["--output", TARS]
    assert main([*prompt, *output, *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert not os.listdir() and not stub.drawn


def test_a_file_uri_is_a_folder_of_this_machine(stub: StubPipeline) -> None:
    assert run("a cat", output=f"file://{os.getcwd()}/of%20cats/{{shard}}.tar") == 0
    assert os.listdir("of cats") == ["00000.tar"]


@pytest.mark.parametrize("words", [[], ["--overwrite"]])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_never_a_tar(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str], make: Any, words: list[str]
) -> None:
    os.mkdir("tars")
    make("tars/00000.tar")
    assert run("a cat", *words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "tars/00000.tar: is a folder, a pipe or a device" in line
    assert os.listdir("tars") == ["00000.tar"] and not stub.drawn


BAD: dict[str, tuple[Any, str]] = {
    "no json": ("{", "line 4: is not JSON"),
    "no prompt": ('{"seed": 3}', 'line 4: must be an object with a "prompt"'),
    "blank": ('{"prompt": " "}', "line 4: prompt must not be empty"),
    "key": ('{"prompt": "a", "sede": 1}', "line 4: unknown setting 'sede'; did you mean 'seed'?"),
    "type": ('{"prompt": 5}', "line 4: prompt must be text, got 5"),
    "seed": ('{"prompt": "a", "seed": -1}', "line 4: seed must be an integer from 0"),
    "last seed": ('{"prompt": "a", "seed": 18446744073709551615}', "line 4: seed must be an integer"),
    "no seed": ('{"prompt": "a", "seed": null}', "line 4: seed must be"),
    "negative": ('{"prompt": "a", "negative": 3}', "line 4: negative must be text"),
    "range": ('{"prompt": "a", "steps": 0}', "line 4: steps must be an integer from 1 up, got 0"),
    "scheduler": ('{"prompt": "a", "scheduler": "x"}', "line 4: scheduler must be one of"),
    "of the model": ('{"prompt": "a", "size": "65"}', "line 4: size must be a multiple of 16, got 65"),
    "control": ('{"prompt": "a", "control_image": "p.jsonl"}', "line 4: control_image must be given once"),
    "no picture": ('{"prompt": "a", "image": "no.png"}', "no.png: must be a picture's file, there is none"),
    "name": ('{"prompt": "a", "name": 3}', "line 4: name must be text, got 3"),
    "encoding": (b'{"prompt": "\xff"}', "line 4: is not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("bad, said", BAD.values(), ids=BAD)
def test_a_bad_line_is_found_before_the_first_picture(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str], bad: Any, said: str
) -> None:
    bad = bad if isinstance(bad, bytes) else bad.encode()
    Path("p.jsonl").write_bytes(b'{"prompt": "a"}\n\n{"prompt": "b", "seed": 2}\n' + bad + b"\n")
    assert run("--prompts", "p.jsonl", "--num-images", "2") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pixart.generate: p.jsonl, line 4: ") and said in line
    assert os.listdir() == ["p.jsonl"] and not stub.drawn


def test_text_and_json_are_read_as_they_are_without_tars() -> None:
    content = "\ufeffa cat\r\n# no\n\n\\# yes\n  a \u2028dog  "
    Path("p.txt").write_text(content, newline="")
    plan = plan_shards(
        Options(prompts=Path("p.txt"), output=Path(TARS), shard_size=2, device="cpu")
    )
    lines = [line for task in plan.tasks() for line in task.lines]
    assert lines == read_prompts(Path("p.txt")) and len(plan) == 2 and plan.pictures == 3
    assert [line.place for line in lines] == [f"p.txt, line {n}" for n in (1, 4, 5)]


def test_a_task_is_all_that_its_tar_needs() -> None:
    plan = plan_shards(
        Options(prompts=Path(write_list()), output=Path(TARS), shard_size=2, device="cpu")
    )
    tasks = list(plan.tasks())
    Path("p.jsonl").unlink()
    for task in tasks:
        again = pickle.loads(pickle.dumps(task))
        assert again == task and len(pickle.dumps(task)) < 2000
        assert [job.index for job in again.jobs(plan.drafts)] == list(
            range(task.first, task.first + task.count)
        )


def test_a_list_that_changes_on_the_way_ends_the_run() -> None:
    plan = plan_shards(
        Options(prompts=Path(write_list()), output=Path(TARS), shard_size=2, device="cpu")
    )
    write_list(lines=LINES[::-1][:4])
    with pytest.raises(ValueError, match=r"p\.jsonl: has changed since it was first read"):
        list(plan.tasks())


def test_a_list_must_be_a_file_that_can_be_read_again(capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe.txt")
    for name in ("pipe.txt", "/dev/zero", "."):
        assert run("--prompts", name) == 2
        assert "must be a file where tars are written" in capsys.readouterr().err
    Path("long.txt").write_bytes(b"a" * (2**24 + 1))
    assert run("--prompts", "long.txt") == 2
    assert "long.txt, line 1: must be at most 16,777,216 bytes" in capsys.readouterr().err
    Path("none.txt").write_text("# nothing\n")
    assert run("--prompts", "none.txt") == 2
    assert "none.txt: holds no prompt" in capsys.readouterr().err


def test_a_failure_within_a_tar_names_the_line_and_leaves_whole_tars_alone(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code in (
        (ValueError("x.png: is another picture now"), 2),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
    ):
        stub.stop = {len(stub.drawn) + 3: error}
        assert run("--prompts", write_list(), "--overwrite", "--json") == code
        out, err = capsys.readouterr()
        assert [one["file"] for one in json.loads(out)["shards"]] == ["tars/00000.tar"]
        assert os.listdir("tars") == ["00000.tar"]
        if code == 2:
            assert "p.jsonl, line 4: x.png: is another picture now" in err
    stub.stop = {}
    assert run("--prompts", "p.jsonl") == 0 and len(contents()) == 3


def test_pictures_that_lines_name_are_read_before_the_first_of_their_tar(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("damaged.png").write_bytes(b"no picture")
    lines = [*LINES[:3], {"prompt": "a", "image": "damaged.png"}]
    assert run("--prompts", write_list(lines=lines)) == 2
    assert "p.jsonl, line 4: " in (err := capsys.readouterr().err) and "damaged.png" in err
    assert list(contents()) == ["00000.tar"] and len(stub.drawn) == 2


def test_tars_of_other_pictures_to_begin_with_are_others(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    for colour, code in (("red", 0), ("red", 0), ("blue", 2)):
        Image.new("RGB", (64, 64), colour).save("in.png")
        assert run("a", "--image", "in.png") == code
    assert "tars/00000.tar: holds other pictures" in capsys.readouterr().err
    assert len(stub.drawn) == 1


def test_passes_of_a_batch_stay_within_a_tar(stub: StubPipeline) -> None:
    words = ["a", "b", "c", "d", "e", "--batch", "2", "--output", TARS, "--shard-size", "3"]
    assert main(words) == 0
    every = [
        json.loads(v) for tar in members().values() for k, v in tar.items() if k.endswith("json")
    ]
    assert [one["batch"] for one in every] == [2, 2, 1, 2, 2]


def test_prompts_are_encoded_in_blocks_and_forgotten(
    stub: StubPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr("pixart.generation.shards.painter.ENCODED", 4)
    monkeypatch.setattr(
        StubPipeline, "forget_prompts", lambda self: forgotten.append(len(self.drawn))
    )
    assert main(["a", "--num-images", "10", "--batch", "3", "--output", TARS]) == 0
    assert forgotten == [3, 6, 10]


def test_the_mark_is_in_the_head_and_of_no_time(stub: StubPipeline) -> None:
    assert run("a cat") == 0
    [content] = contents().values()
    mark = Mark.read(content[:4096])
    assert mark is not None and mark.length == len(content) and mark.pictures == 1
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        owners = {(one.mtime, one.uid, one.gid, one.uname, one.gname, one.mode) for one in tar}
    assert owners == {(0, 0, 0, "", "", 0o644)}
    for damaged in (
        b"",
        b"\0" * 4096,
        content[:100],
        content[512:],
        content[:520] + b"x" + content[521:],
    ):
        assert Mark.read(damaged) is None


SLURM = {"ID": "1", "COUNT": "4", "MIN": "0", "MAX": "3", "STEP": "1"}
ARRAYS: dict[str, tuple[dict[str, str], Part | str]] = {
    "none": ({}, Part(0, 1)),
    "plain": (SLURM, Part(1, 4)),
    "by hand": ({"ID": "3", "COUNT": "4"}, Part(3, 4)),
    "from one": ({"ID": "4", "COUNT": "4", "MIN": "1", "MAX": "4", "STEP": "1"}, Part(3, 4)),
    "steps": ({"ID": "24", "COUNT": "4", "MIN": "8", "MAX": "32", "STEP": "8"}, Part(2, 4)),
    "one task": ({"ID": "5", "COUNT": "1", "MIN": "5", "MAX": "5", "STEP": "1"}, Part(0, 1)),
    "empty": ({"ID": "", "COUNT": "4"}, "SLURM_ARRAY_TASK_ID must be a number, it is empty"),
    "no count": ({"ID": "1"}, "SLURM_ARRAY_TASK_COUNT must be a number, it is not set"),
    "no id": ({"COUNT": "4"}, "SLURM_ARRAY_TASK_ID must be a number, it is not set"),
    "words": ({"ID": "one", "COUNT": "4"}, "SLURM_ARRAY_TASK_ID must be a number, got 'one'"),
    "below": ({"ID": "-1", "COUNT": "4"}, "got '-1'"),
    "behind": ({"ID": "4", "COUNT": "4"}, "must be those of an even array"),
    "uneven": ({"ID": "3", "COUNT": "3", "MIN": "1", "MAX": "7", "STEP": "1"}, "must be those of an even"),
    "between": ({"ID": "9", "COUNT": "4", "MIN": "8", "MAX": "32", "STEP": "8"}, "must be those of an even"),
}  # fmt: skip


@pytest.mark.parametrize("variables, expected", ARRAYS.values(), ids=ARRAYS)
def test_the_part_is_that_of_the_task_of_a_slurm_array(
    variables: dict[str, str], expected: Part | str
) -> None:
    environment = {f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()}
    if isinstance(expected, Part):
        assert Part.here(None, environment) == expected
    else:
        with pytest.raises(ValueError) as caught:
            Part.here(None, environment)
        assert expected in str(caught.value) and "--shard I/N" in str(caught.value)
    assert Part.here("2/5", environment) == Part(2, 5)


def test_processes_of_torchrun_share_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        taken += Part.here("1/2", {}).numbers(20)
    assert sorted(taken) == list(range(1, 20, 2))


def test_ranks_that_cannot_meet_are_on_their_own(
    stub: StubPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, tars in (("1", ["00001.tar"]), ("0", ["00000.tar", "00001.tar", "00002.tar"])):
        monkeypatch.setenv("RANK", rank)
        assert run("--prompts", write_list(), "--json") == 0
        assert list(contents()) == tars
        assert json.loads(capsys.readouterr().out)["drawn"] == (2 if rank == "1" else 3)
    monkeypatch.setenv("RANK", "2")
    assert run("--prompts", "p.jsonl") == 2
    assert "RANK must be a number below WORLD_SIZE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "3", "/", "a/b", "-1/2", "0/0", "1/1", "1.0/2", "²/3", "0/2/4"]
)
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--shard must be I/N"):
        Part.parse(text)


def test_the_array_is_taken_from_the_environment(
    stub: StubPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert run("--prompts", write_list()) == 2
    assert "SLURM_ARRAY_TASK_COUNT must be a number, it is not set" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    assert run("--prompts", "p.jsonl") == 0
    assert list(contents()) == ["00001.tar"]
    assert main(["a cat", "--output", "x.png"]) == 0, "pictures of their own know no arrays"
