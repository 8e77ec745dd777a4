"""Data on a Ray cluster: the files that one process writes, also where a worker is killed in the middle."""

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import own_ray
import pictures
import pytest
from caption_server import Server
from caption_server import server as server  # a fixture

from pixart import data
from pixart.dataset import prepare, prompts

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SCORERS = (
    "def width(image):\n    return image.width\ndef length(image, text):\n    return len(text)\n"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a source, beside a Ray of its own with two CPUs."""
    place = tmp_path_factory.mktemp("ray")
    logs = Path(tempfile.mkdtemp(prefix="ray-"))  # short, as names of sockets are
    pictures.write(place / "modules" / "scorers_of_workers.py", SCORERS)
    source = pictures.folder(place / "source", 40)
    for number in range(0, 40, 3):  # chunks share captions
        pictures.write(source / f"{number}.txt", f"a caption of many, {number % 4}")
    for number in range(20, 40, 9):  # and pictures
        pictures.write(source / f"{number}.png", (source / "5.png").read_bytes())
    pictures.write(source / "bad.png", pictures.corrupt_png())
    pictures.write(source / "bad.txt", "bad")
    pictures.write(source / "absent.txt", "of no picture")
    with pytest.MonkeyPatch.context() as patched:
        paths = [str(place / "modules"), *filter(None, [os.environ.get("PYTHONPATH")])]
        patched.setenv("PYTHONPATH", os.pathsep.join([*paths, *pythonpath()]))
        patched.setenv("RAY_worker_niceness", "0")
        patched.syspath_prepend(place / "modules")
        patched.chdir(place)
        own_ray.start(_temp_dir=str(logs))
        yield place
        ray.shutdown()
    shutil.rmtree(logs, ignore_errors=True)


def pythonpath() -> list[str]:
    root = Path(__file__).parent.parent.parent
    return [str(root), str(root / "kernels")]


def run(*arguments: object) -> int:
    return data.main([str(argument) for argument in arguments])


def on_ray(*arguments: object) -> int:
    return run(*arguments, "--engine", "ray", "--workers", 2)


def content(folder: Path) -> dict[str, bytes]:
    """All files but locks, and what the killed leave aside."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.parts[-2:])
    }


def holders(locks: set[str]) -> list[int]:
    """Processes that have one of these files open."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            opened = {os.readlink(file) for file in (entry / "fd").iterdir()}
        except OSError:  # another's, no process, or gone
            continue
        if opened & locks:
            found.append(int(entry.name))
    return found


def test_prepared_on_ray_is_prepared_without_also_if_a_worker_is_killed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 8)  # workers are given chunks as they are
    command = ("--resolution", 64, "--device", "cpu")
    assert run("prepare", "source", "alone", *command) == 0
    out, is_over = place / "out", threading.Event()
    killed: list[int] = []
    done: dict[Path, int] = {}

    def kill() -> None:
        """One that is at a chunk."""
        while not killed and not is_over.wait(0.01):
            locks = {str(file) for file in (out / "work").glob("*.lock")}
            for pid in holders(locks)[:1] if locks else []:
                done.update({f: f.stat().st_mtime_ns for f in (out / "work").glob("*.json")})
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert on_ray("prepare", "source", "out", *command) == 0
    is_over.set()
    killer.join()
    assert killed
    found, expected = content(out), content(place / "alone")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert {file: file.stat().st_mtime_ns for file in done} == done
    said = [line for line in capsys.readouterr().out.splitlines() if "prepared" in line]
    assert len(said) == 2 and said[0].replace("alone", "out") == said[1]
    # Again there is nothing to do, and no worker that would do it.
    assert on_ray("prepare", "source", "out", *command) == 0
    assert content(out) == expected


def test_prompts_on_ray_are_those_without(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "CHUNK", 8)
    lines = [
        json.dumps({"prompt": f"a star, {n % 30}", "captions": {"s": f"{n % 3}"}})
        for n in range(40)
    ]
    pictures.write(place / "p.jsonl", "\n".join(lines))
    assert run("prompts", "p.jsonl", "prompts-alone", "--device", "cpu") == 0
    assert on_ray("prompts", "p.jsonl", "prompts-shared", "--device", "cpu") == 0
    assert content(place / "prompts-shared") == content(place / "prompts-alone")


def test_scores_captions_and_measurements_on_ray_are_those_without(
    place: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda body: (
        200,
        server.completion(f"{len(body['messages'][0]['content'][1]['image_url']['url'])} letters"),
    )
    asked = ("--endpoint", server.address, "--model", "vlm")
    keep = ("--keep", "words >= 3 and not duplicate")
    scorers = ("--scorer", "scorers_of_workers:length", "--scorer", "w=scorers_of_workers:width")
    for name, here in (("alone", run), ("shared", on_ray)):
        folder = place / name / "lines"
        score = ("--scorer", "scorers_of_workers:width")
        assert here("filter", "source", folder / "scores.jsonl", *score) == 0
        assert here("caption", "source", folder / "captions.jsonl", *asked) == 0
        assert here("clean", "source", "--output", folder / "clean.jsonl", *scorers, *keep) == 0
    found, expected = (content(place / name / "lines") for name in ("shared", "alone"))
    assert len(expected) > 6 and found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    lines = [line for line in capsys.readouterr().out.splitlines() if "(raylet)" not in line]
    alone = [line.replace("alone", "shared") for line in lines[: len(lines) // 2]]
    assert alone == lines[len(lines) // 2 :]


def test_what_workers_cannot_import_is_refused_in_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.jsonl"
    assert on_ray("filter", "source", output, "--scorer", "of_this_process:score") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pixart.data: scorer must be importable, got 'of_this_process:score'")
    assert " (on " in line and not output.exists()
