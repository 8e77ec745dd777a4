"""What is seen of a run: lines where nobody watches, a log that survives damage, and plots of it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixart import progress as mechanism
from pixart.files import publish
from pixart.train import main as train
from pixart.training import execute
from pixart.training.progress import Progress

DAMAGE = "\n".join(
    [
        *('{"step": 2, "loss": 0.5}', "[1]", "7", '"step"', '{"loss": 1}', '{"step": "1"}', "{"),
        *('{"step": 1e9, "loss": 1}', '{"step": null}', "[" * 100_000, '{"step": true, "loss": 1}'),
        *('{"step": 3, "loss": "x"}', '{"step": 4, "loss": NaN}', '{"step": 5, "loss": null}'),
        f'{{"step": {"9" * 60}, "loss": 1}}',
    ]
)


def steps(progress: Progress, numbers: range, loss: float = 1.0) -> None:
    for number in numbers:
        progress.step(number, {"loss": loss}, 0.1, 0.0, 1, 1, 0.0)


def logged(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_where_nobody_watches_training_says_a_line_now_and_then(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    now = [100.0]
    monkeypatch.setattr(mechanism.time, "monotonic", lambda: now[0])
    for quiet in (False, True):
        progress = Progress(tmp_path, "base", quiet=quiet)
        progress.start(0, 600)
        with progress:
            for number in range(1, 601):
                now[0] += 1
                steps(progress, range(number, number + 1))
        lines = capsys.readouterr().err.splitlines()
        assert not lines if quiet else 8 < len(lines) < 16 and "\r" not in "".join(lines)
        assert quiet or lines[0] == (
            "base: 5 of 600, 10 min left, loss=1.0000 img/s=10.0 tok/s=10 wait=0% "
            f"{lines[0].split()[-1]}"
        )


@pytest.mark.parametrize(
    ("every", "expected"), [(20, [1, 20, 40, 45]), (7, [1, 7, 14, 21, 28, 35, 42, 45])]
)
def test_the_first_and_the_last_step_are_logged_and_every_so_many(
    tmp_path: Path, every: int, expected: list[int]
) -> None:
    progress = Progress(tmp_path, "base", every=every, quiet=True)
    progress.start(0, 45)
    with progress:
        steps(progress, range(1, 46))
    assert [line["step"] for line in logged(tmp_path)] == expected


def test_log_every_is_an_option(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(execute, "measure_peak", lambda *_: 1e12)  # which takes seconds
    command = ["shapes", "--stage", "vae-crops", "--output", str(tmp_path), "--batch.images", "1"]
    command += ["--steps", "5", "--log-every", "2", "--quiet", "--device", "cpu", "--data.crop"]
    assert train([*command, "16", "--resolution", "16"]) == 0
    assert [line["step"] for line in logged(tmp_path / "vae-crops")] == [1, 2, 4, 5]


def test_quiet_also_silences_the_libraries(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """Stages that open and save a VAE, a transformer and a text encoder, and draw."""
    monkeypatch.setattr(execute, "measure_peak", lambda *_: 1e12)
    common = {"start": "shapes", "resolution": 64, "data": {"source": "shapes"}}
    common |= {"batch": {"images": 1}, "steps": 1, "validation": {"every": 1, "images": 1}}
    decoder = {**common, "name": "decode", "trains": "decoder"}
    pair = {**common, "name": "pair", "pipeline": "shapes", "max_length": 40}
    pair |= {"prediction": "v_prediction", "vae_scale": 1.0}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"stages": [decoder, pair]}))
    command = [str(path), "--output", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    assert train(command) == 0
    assert len(list((tmp_path / "run").glob("*/step-00000001/**/vae"))) == 2
    assert capfd.readouterr() == ("", "")


def test_what_is_not_finite_is_null_in_the_log(tmp_path: Path) -> None:
    progress = Progress(tmp_path, "base", quiet=True)
    progress.start(0, 1)
    with progress:
        steps(progress, range(1, 2), math.nan)
    (line,) = logged(tmp_path)
    assert line["loss"] is None and line["images_per_s"] == 10.0


def test_a_damaged_log_is_taken_up_where_it_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe\n" + DAMAGE.encode() + b"\n\x80half")
    Progress(tmp_path, "base", quiet=True).start(4, 10)
    assert [line["step"] for line in logged(tmp_path)] == [2, 3, 4]


def test_a_full_disk_names_the_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    progress = Progress(tmp_path, "base", quiet=True)
    progress._total, progress._step = 1, 0
    with progress, pytest.raises(OSError, match="No space left on device.*log.jsonl"):
        steps(progress, range(1, 2))


# Plots.


def plotted(folder: Path, *lines: Any) -> Any:
    """The pixels of a plot of a log."""
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert train(["plot", str(folder / "run"), "--output", str(folder / "loss.png")]) == 0
    with Image.open(folder / "loss.png") as image:
        return np.asarray(image.convert("RGB")).astype(int)


def places(pixels: Any) -> int:
    """How many spans of columns have matplotlib's first colour, (31, 119, 180): the legend is one."""
    columns = np.flatnonzero((np.abs(pixels - [31, 119, 180]).max(-1) < 25).any(0))
    return 1 + int((np.diff(columns) > 1).sum())


@pytest.mark.parametrize("loss", [0.5, 0.0, -1.0])
def test_a_plot_of_one_point_shows_it(tmp_path: Path, loss: float) -> None:
    pytest.importorskip("matplotlib")
    assert places(plotted(tmp_path, {"step": 1, "loss": loss})) == 2


def test_the_first_point_does_not_look_like_a_validation(tmp_path: Path) -> None:
    """A disc and a ring: in the column of its middle, a ring has two stretches of colour."""
    pytest.importorskip("matplotlib")
    trained = plotted(tmp_path, {"step": 1, "loss": 0.5})
    validated = plotted(tmp_path, {"step": 1, "validation/loss": 0.5})
    heights = []
    for pixels in (trained, validated):
        column = (np.abs(pixels - [31, 119, 180]).max(-1) < 25)[:, : pixels.shape[1] * 3 // 4]
        heights.append(
            int((np.diff(np.flatnonzero(column[:, column.any(0).argmax() + 5])) > 1).sum())
        )
    assert heights == [0, 1]


def test_the_help_of_plot_names_runs(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        train(["plot", "--help"])
    assert "Folders of runs" in capsys.readouterr().out


def refused(capsys: Any, *arguments: str) -> str:
    assert train(["plot", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


def test_what_cannot_be_plotted_is_one_line(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    run, picture = str(tmp_path), str(tmp_path / "loss.png")
    (tmp_path / "log.jsonl").write_bytes(b"\xff\n" + DAMAGE.encode())
    assert train(["plot", run, "--output", picture]) == 0
    capsys.readouterr()
    assert "--output must be a file ending in " in refused(capsys, run, "--output", f"{run}/a.xyz")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert "--output must be a file" in refused(capsys, run, "--output", f"{run}/mine")
    assert (tmp_path / "mine" / "file").exists()
    (tmp_path / "log.jsonl").write_text("{")
    assert "RUN must hold losses, got none" in refused(capsys, run, "--output", picture)


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "new").write_text("new")
    with pytest.raises(IsADirectoryError):
        publish(tmp_path / "new", tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
