"""Metrics of a validation: what they score, what they need, and the best state that one of them finds."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_trainer import QUICK, Toy

from pixart.evaluation import metrics
from pixart.evaluation.metric import (
    Context,
    Estimate,
    Extractor,
    Features,
    Moments,
    PictureMetric,
    Score,
    SetMetric,
)
from pixart.evaluation.needs import Need
from pixart.evaluation.store.entries import Entry
from pixart.shapes.caption import parse
from pixart.shapes.checker import check
from pixart.shapes.scene import draw
from pixart.train import main as train
from pixart.training.checkpoints import last_words
from pixart.training.measuring import Measuring, check_metrics, metric_problems
from pixart.training.plot import read_metrics
from pixart.training.progress import Progress
from pixart.training.stage import Data, Stage, Validation
from pixart.training.state import latest_state, read_progress
from pixart.training.trainer import Trainer, TrainingFailed

CPU = torch.device("cpu")


class Brightness(PictureMetric):
    """The mean level of a picture."""

    def __init__(self, name: str, context: Context) -> None:
        self.name = name
        self.gain = float(context.options.get("gain", 1))

    def score(self, entries: Sequence[Entry], images: Any, features: Any) -> list[Score]:
        return [Score(self.gain * float(np.asarray(image).mean())) for image in images]


class Corner(Extractor):
    """The levels of the first pixel."""

    name, width, digest = "corner", 3, "0"
    calls = 0

    def prepare(self, image: Any, entry: Entry) -> Any:
        return np.asarray(image)[0, 0].astype(np.float32)

    def __call__(self, prepared: Sequence[Any]) -> Any:
        Corner.calls += 1
        return np.stack(prepared)


class Gap(SetMetric):
    """How far the mean corner of the pictures is from that of the reference."""

    def __init__(self, name: str, context: Context) -> None:
        self.name, self.extractor = name, Corner()

    def compare(self, ours: Features, reference: Features | Moments) -> dict[str, Estimate]:
        assert isinstance(reference, Features)
        gap = float(np.abs(ours.values.mean(0) - reference.values.mean(0)).mean())
        return {self.name: Estimate(gap, gap - 1, gap + 1, len(ours.keys), "made up")}


class Absent(Brightness):
    def needs(self) -> Sequence[Need]:
        return [Need("judge.pth", "somewhere.org", size=5_000_000)]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    named = {"brightness": Brightness, "gap": Gap, "absent": Absent}
    for name, kind in named.items():
        monkeypatch.setitem(metrics.METRICS, name, kind)
    yield


def drawn_stage(**validation: Any) -> Stage:
    return Stage(
        "tune",
        start="shapes",
        pipeline="shapes",
        data=Data("shapes"),
        validation=Validation(every=1, images=2, **validation),
    )


# What is wrong with settings.


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"metrics": ("a",), "every": 0}, "validation.every must be positive to score by"),
        ({"metrics": ("a", "a")}, "validation.metrics must differ, got a, a"),
        (
            {"metrics": ("a", "b"), "best": "c"},
            r"validation.best must be one of validation.metrics \(a, b\), got 'c'",
        ),
        ({"best": "loss"}, r"must be one of validation.metrics \(none\), got 'loss'"),
        ({"metric_options": ("clip",)}, "metric_options must be NAME=VALUE each, got 'clip'"),
        ({"metric_count": 1}, "validation.metric_count must be at least 2, got 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Validation(**{"every": 1, **given})


def test_what_metrics_cannot_score_is_said(tmp_path: Path) -> None:
    drawn = drawn_stage(metrics=("brightness", "gap"))
    assert not list(metric_problems(drawn, CPU))
    assert not list(metric_problems(drawn_stage(), CPU))
    unknown = replace(drawn, validation=Validation(every=1, metrics=("beauty",)))
    (line,) = metric_problems(unknown, CPU)
    assert line.startswith("metric must be one of ") and line.endswith("got 'beauty'")
    part = replace(drawn, trains="text_encoder", start="random")
    (line,) = metric_problems(part, CPU)
    assert line == (
        "validation.metrics must be empty where trains is text_encoder, which draws nothing"
    )
    prepared = replace(drawn, data=Data("somewhere"))
    without, reference = metric_problems(prepared, CPU)
    assert without == (
        "validation.prompts must be given for validation.metrics (brightness, gap) to score, got none"
    )
    assert reference == (
        "validation.metric_reference must be a folder of pictures for gap, got none"
    )
    asked = replace(
        drawn.validation, prompts=("a cat",), metric_reference=str(tmp_path), metrics=("gap",)
    )
    (line,) = metric_problems(replace(prepared, validation=asked), CPU)
    assert line.endswith(f"must be a folder of pictures, got {tmp_path}")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert not list(metric_problems(replace(prepared, validation=asked), CPU))
    (line,) = metric_problems(replace(drawn, validation=replace(asked, metrics=("gap",))), CPU)
    assert line.startswith("validation.metric_reference must be empty for drawn data")


def recipe(place: Path, stage: dict[str, Any]) -> str:
    common = {
        "name": "tune", "start": "shapes", "pipeline": "shapes", "resolution": 64, "steps": 2,
        "data": {"source": "shapes"}, "batch": {"images": 2}, "precision": "fp32",
    }  # fmt: skip
    path = place / "recipe.yaml"
    path.write_text(json.dumps({"stages": [common | stage]}))
    return str(path)


def test_weights_that_are_missing_end_a_run_before_it_begins(tmp_path: Path, capsys: Any) -> None:
    stage = drawn_stage(metrics=("absent", "brightness"))
    with pytest.raises(ValueError, match=r"stage tune: absent needs judge.pth \(from somewhere"):
        check_metrics(stage, CPU)
    path = recipe(tmp_path, {"validation": {"every": 1, "metrics": ["absent"]}})
    for more in (["--dry-run"], []):
        command = [path, "--output", str(tmp_path / "run"), "--device", "cpu", "--quiet", *more]
        assert train(command) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("pixart.train: stage tune: absent needs judge.pth (from somewhere")
    assert not (tmp_path / "run" / "tune").exists()
    wrong = ["--validation.sampling-steps", "2", "--data.sizes", "3", "--dry-run"]
    assert train([path, "--device", "cpu", *wrong]) == 2  # what else is wrong has to be mended too
    assert len(capsys.readouterr().err.splitlines()) == 2


# What is scored.


def test_drawn_captions_are_whole_and_the_same_every_time() -> None:
    stage = drawn_stage(metrics=("brightness",), metric_count=5).resolved(resolution=64)
    one, other = Measuring(stage, CPU), Measuring(stage, CPU)
    assert one.captions == other.captions and len(set(one.captions)) == 5
    for text in one.captions:
        kinds = {statement.kind for statement in parse(text)}
        assert {"background", "count", "shape", "colour", "size"} <= kinds
    assert Measuring(drawn_stage().resolved(resolution=64), CPU).captions == []


def test_scores_have_their_intervals_and_sets_their_reference() -> None:
    stage = drawn_stage(metrics=("brightness", "gap"), metric_options=("gain=2",), metric_count=3)
    measuring = Measuring(stage.resolved(resolution=32), CPU)
    images = [Image.new("RGB", (32, 32), (level,) * 3) for level in (10, 20, 60)]
    Corner.calls = 0
    values = measuring(measuring.captions, images)
    assert values["brightness"] == pytest.approx(60.0)  # twice the mean of the levels
    assert values["brightness/low"] < 60 < values["brightness/high"]
    scenes = measuring._scenes("reference", 64)
    grounds = np.stack([draw(scene, 32)[0, 0] for scene, _ in scenes]).astype(float)
    assert values["gap"] == pytest.approx(abs(30 - grounds.mean(0)).mean(), rel=1e-5)
    assert (values["gap/low"], values["gap/high"]) == (values["gap"] - 1, values["gap"] + 1)
    asked = Corner.calls
    measuring(measuring.captions, images)
    assert Corner.calls == asked + 1  # the reference's features are kept
    assert measuring(measuring.captions, images[:2]) == {}  # one came to NaN


def test_a_run_logs_what_metrics_say_and_keeps_the_best(tmp_path: Path, capsys: Any) -> None:
    """By what comes with the library: nothing has to be named or fetched."""
    validation = {
        "every": 1, "images": 2, "metrics": ["shapes", "clip", "kid"], "metric_count": 3,
        "sampling_steps": 3, "best": "kid",
    }  # fmt: skip
    path, output = recipe(tmp_path, {"validation": validation}), tmp_path / "run"
    command = [path, "--output", str(output), "--device", "cpu", "--keep", "1"]
    assert train(command) == 0
    lines = [json.loads(line) for line in (output / "tune" / "log.jsonl").read_text().splitlines()]
    found = [line for line in lines if "validation/kid" in line]
    assert [line["step"] for line in found] == [1, 2]
    for line in found:
        for name in ("shapes", "clip", "kid"):
            values = [line[f"validation/{name}{end}"] for end in ("/low", "", "/high")]
            assert values == sorted(values) and values[0] < values[2]
    names = {path.name for path in (output / "tune" / "pictures" / "step-00000002").iterdir()}
    assert names == {"metrics"}
    best = min(found, key=lambda line: line["validation/kid"])
    assert (output / "tune" / "best").readlink() == Path(f"step-{best['step']:08d}")
    words = capsys.readouterr().out.splitlines()
    assert words[-1].startswith(f"best by kid, {best['validation/kid']:.4g} at step {best['step']}")
    assert f"--model {output / 'tune' / 'best' / 'pipeline'}" in words[-1]


# The best state.


class Scripted(Toy):
    """A task whose validation says what it is told to."""

    def __init__(self, values: dict[int, float]) -> None:
        super().__init__()
        self.values = values

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        return {"brightness": self.values[step]} if step in self.values else {}


VALUES = {1: 0.2, 2: 0.9, 3: float("nan"), 4: 0.5, 5: 0.9, 6: 0.1}


def trainer(
    folder: Path, metric: str = "brightness", values: dict[int, float] = VALUES, **options: Any
) -> Trainer:
    validation = Validation(every=1, metrics=("brightness", "gap"), best=metric)
    stage = replace(QUICK, validation=validation)
    return Trainer(Scripted(values), stage, folder, CPU, save_every=100, **options)


def advance(one: Trainer, stop_after: int | None = None, start: Path | None = None) -> None:
    one.run(Progress(one.directory, one.stage.name, quiet=True), stop_after, start)


def test_the_best_state_is_kept_whatever_keep_says(tmp_path: Path) -> None:
    advance(trainer(tmp_path, keep=1))
    assert (tmp_path / "best").readlink() == Path("step-00000002")
    assert (tmp_path / "best" / "exported.pt").is_file()
    states = sorted(path.name for path in tmp_path.glob("step-*"))
    assert states == ["step-00000002", "step-00000006"]  # and what was best before is gone
    said = read_progress(tmp_path / "step-00000006")["best"]
    assert said == {"metric": "brightness", "step": 2, "value": 0.9, "worse": 0}
    state = latest_state(tmp_path)
    assert state is not None and state.name == "step-00000006"
    stage = trainer(tmp_path).stage
    assert last_words(state, stage)[-1] == f"best by brightness, 0.9 at step 2: {tmp_path / 'best'}"


def test_less_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    one = trainer(tmp_path, "gap")
    for step, value in ((1, 3.0), (2, 5.0), (3, 2.0), (4, 2.0)):
        one.best.note({"gap": value, "brightness": 9.0}, step)
    assert one.best.is_at(3) and one.best.said()["best"]["value"] == 2.0


@pytest.mark.parametrize("stops", [[1, 1, 1, 1, 1, 1], [2, 4], [3, 3]])
def test_a_run_that_was_stopped_knows_the_best_of_all(tmp_path: Path, stops: list[int]) -> None:
    for stop in stops:
        advance(trainer(tmp_path), stop)
    advance(trainer(tmp_path / "whole"))
    saids = [
        read_progress(place / "step-00000006")["best"] for place in (tmp_path, tmp_path / "whole")
    ]
    assert saids[0] == saids[1]
    assert (tmp_path / "best").readlink() == Path("step-00000002")


def test_a_run_that_goes_back_knows_what_was_best_then(tmp_path: Path, caplog: Any) -> None:
    advance(trainer(tmp_path, keep=9), 4)
    older = tmp_path / "step-00000001"
    again = trainer(tmp_path, values={2: 0.1, 3: 0.15}, keep=9)
    advance(again, 2, older)
    assert again.best.is_at(1) and (tmp_path / "best").readlink() == Path("step-00000001")
    lost = trainer(tmp_path, values={})
    lost.best.resume({"best": {"metric": "brightness", "step": 77, "value": 0.3}})
    assert lost.best.found is None
    assert "step-00000077: is gone, which was the best by brightness" in caplog.text


def test_another_metric_looks_for_the_best_anew(tmp_path: Path) -> None:
    advance(trainer(tmp_path), 4)
    other = trainer(tmp_path, "gap")
    assert other.resume() and other.best.found is None


def test_killed_between_the_state_and_the_link_the_link_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixart.training.best import Best

    with monkeypatch.context() as patched:
        patched.setattr(Best, "link", lambda self: None)
        advance(trainer(tmp_path), 3)
    assert not (tmp_path / "best").exists()
    trainer(tmp_path).resume()
    assert (tmp_path / "best").readlink() == Path("step-00000002")


@pytest.mark.parametrize(
    "said", [{}, {"metric": "a", "step": 1.5, "value": 1}, {"metric": "a", "step": 1, "value": "x"}]
)
def test_a_state_that_says_no_best_is_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="best must hold"):
        trainer(tmp_path).best.resume({"best": said})


def test_plots_show_each_metric_with_its_interval(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines: list[dict[str, Any]] = [
        {"step": 1, "loss": 1.0},
        {
            "step": 2,
            "validation/clip": 0.2,
            "validation/clip/low": 0.1,
            "validation/clip/high": 0.4,
        },
        {
            "step": 4,
            "validation/clip": 0.3,
            "validation/clip/low": None,
            "validation/clip/high": None,
        },
        {"step": 4, "validation/shapes/colour": 1.0, "validation/loss": 0.5},
    ]
    assert read_metrics(lines) == {"clip": [(2, 0.2, 0.1, 0.4), (4, 0.3, 0.3, 0.3)]}
    place = tmp_path / "run"
    place.mkdir()
    heights = []
    for count in (1, 3):
        (place / "log.jsonl").write_text("\n".join(map(json.dumps, lines[:count])))
        assert train(["plot", str(place), "--output", str(tmp_path / "loss.png")]) == 0
        with Image.open(tmp_path / "loss.png") as image:
            heights.append(image.height)
    assert heights[1] > heights[0]


def test_a_checker_scores_what_it_is_shown() -> None:
    """The captions that are drawn state what holds in a picture of their scene."""
    stage = drawn_stage(metrics=("brightness",), metric_count=4).resolved(resolution=128)
    for scene, text in Measuring(stage, CPU)._scenes("caption", 4):
        assert all(check(draw(scene, 128), parse(text)))


def test_a_run_that_runs_away_is_given_up_and_its_best_kept(tmp_path: Path) -> None:
    """After two in a row that are worse by more than the interval; also where it is killed between."""
    edges = {1: (0.9, 0.95), 2: (0.5, 0.6), 3: (0.8, 0.91), 4: (0.5, 0.6), 5: (0.4, 0.5)}

    class Falling(Toy):
        def validate(self, step: int, folder: Path) -> dict[str, float]:
            value, high = edges[step]
            return {"brightness": value, "brightness/high": high}

    validation = Validation(every=1, metrics=("brightness",), best="brightness", patience=2)
    stage = replace(QUICK, validation=validation)
    advance(Trainer(Falling(), stage, tmp_path, CPU), stop_after=4)
    with pytest.raises(
        TrainingFailed, match="given up at step 5: 2 validations in a row .* 0.9 at step 1,"
    ):
        advance(Trainer(Falling(), stage, tmp_path, CPU))
    assert (tmp_path / "best").readlink() == Path("step-00000001")
    assert (tmp_path / "best" / "exported.pt").is_file()
