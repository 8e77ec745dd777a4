"""A run that goes on does so as it was begun, or says in what it does not; and it does so alone."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_dry_run import Line, lines, recipe

from pixart.dataset.features import Entry
from pixart.locks import occupied
from pixart.train import main as train
from pixart.training import execute, tasks
from pixart.training.changes import check_accepted, check_changes, record
from pixart.training.optimizers import OptimizerSettings
from pixart.training.problems import Problems
from pixart.training.run import Run
from pixart.training.stage import Batch, Data, Stage, Validation
from pixart.training.state import save_state

CPU = torch.device("cpu")
STAGE = Stage("fit", start="random", resolution=64, max_length=8, steps=10)
LINEAR = replace(STAGE, optimizer=OptimizerSettings(schedule="linear"))


def begin(place: Path, stage: Stage, **options: Any) -> Run:
    run = Run(place, [stage], CPU, **options)
    values = {"stage": stage.name, "seconds": 0.0, "begun": record(run, run.resolved(stage))}
    save_state(place / stage.name, 3, {}, values)
    return run


def problems(place: Path, stage: Stage, *accepted: str, **options: Any) -> list[str]:
    run = Run(place, [stage], CPU, accepted=accepted, **options)
    return list(check_changes(run, run.resolved(run.stage(stage.name))))


def with_rate(rate: float) -> Stage:
    return replace(STAGE, optimizer=OptimizerSettings(learning_rate=rate))


MEANT = {
    "seed": replace(STAGE, seed=1),
    "batch.images": replace(STAGE, batch=Batch(images=32)),
    "batch.tokens": replace(STAGE, batch=Batch(tokens=4096)),
    "timesteps": replace(STAGE, timesteps="logit-normal:0.0"),
    "min_snr": replace(STAGE, min_snr=5.0),
    "precision": replace(STAGE, precision="fp32"),
    "ema": replace(STAGE, ema=0.5),
    "data.caption_dropout": replace(STAGE, data=Data(caption_dropout=0.5)),
    "data.captions": replace(STAGE, data=Data(captions=(("a", 1.0),))),
    "optimizer.learning_rate": with_rate(1.0),
    "optimizer.schedule": LINEAR,
    "validation.images": replace(STAGE, validation=Validation(images=3)),
    "aspect": replace(STAGE, aspect=True),
    "pipeline": replace(STAGE, pipeline="elsewhere"),
}
NEVER = {
    "trains": replace(STAGE, trains="line"),
    "resolution": replace(STAGE, resolution=128),
    "max_length": replace(STAGE, max_length=9),
    "vae_scale": replace(STAGE, vae_scale=0.5),
    "prediction": replace(STAGE, prediction="v_prediction"),
    "kv_compress": replace(STAGE, kv_compress="0:2"),
    "size.depth": replace(STAGE, size=replace(STAGE.size, depth=2)),
    "optimizer.name": replace(STAGE, optimizer=OptimizerSettings(name="adamw")),
    "ema": replace(STAGE, ema=None),
    "micro_condition": replace(STAGE, micro_condition=True),
}
FREE = {
    "steps": replace(STAGE, steps=20),
    "hours": replace(STAGE, hours=1.0),
    "checkpoint_blocks": replace(STAGE, checkpoint_blocks=0),
    "batch.accumulate": replace(STAGE, batch=Batch(accumulate=2)),
    "parallel": replace(STAGE, parallel="fsdp"),
    "sequence": replace(STAGE, sequence=2),
    "validation.every": replace(STAGE, validation=Validation(every=2)),
    "validation.metric_count": replace(STAGE, validation=Validation(metric_count=3)),
}


@pytest.mark.parametrize("field", MEANT)
def test_another_run_needs_to_be_meant(tmp_path: Path, field: str, caplog: Any) -> None:
    begin(tmp_path, STAGE)
    changed, state = MEANT[field], tmp_path / "fit" / "step-00000003"
    option = field.split(".")[-1].replace("_", "-")
    found = problems(tmp_path, changed)
    line = next(line for line in found if line.startswith(field))
    assert line.startswith(f"{field} must be as {state} was trained, ") and "\n" not in line
    assert line.endswith(f"; if it is meant, --accept-changes {option}, else another --output")
    caplog.set_level(logging.INFO, logger="pixart")
    for name in (option, field, field.split(".")[0]):
        caplog.clear()
        assert not any(line.startswith(field) for line in problems(tmp_path, changed, name))
        assert any(f"{field} " in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("field", NEVER)
def test_what_a_model_cannot_go_on_with_is_refused_whatever_is_accepted(
    tmp_path: Path, field: str
) -> None:
    begin(tmp_path, STAGE)
    (line,) = problems(tmp_path, NEVER[field], field, field.split(".")[-1])
    assert line.startswith(f"{field} must be as {tmp_path}")
    assert line.endswith("; give another --output for another run")


@pytest.mark.parametrize("field", FREE)
def test_what_changes_nothing_that_is_learned_is_said(
    tmp_path: Path, field: str, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, logger="pixart")
    begin(tmp_path, STAGE)
    assert problems(tmp_path, FREE[field]) == []
    (line,) = [record.getMessage() for record in caplog.records if "goes on" in record.getMessage()]
    assert line.startswith(f"stage fit: goes on with {field} ") and " instead of " in line


def test_a_rate_that_decays_towards_the_last_step_needs_the_same_steps(tmp_path: Path) -> None:
    begin(tmp_path, LINEAR)
    (line,) = problems(tmp_path, replace(LINEAR, steps=20))
    assert (
        "steps must be as" in line and "10, got 20; if it is meant, --accept-changes steps" in line
    )
    assert problems(tmp_path, LINEAR) == []


def test_a_multiple_that_a_run_began_with_is_no_change(tmp_path: Path) -> None:
    stage = replace(STAGE, batch=Batch(tokens=4096))
    begin(tmp_path, stage)
    assert problems(tmp_path, stage) == []
    (line,) = problems(tmp_path, replace(stage, batch=Batch(tokens=4096, multiple=2)))
    assert line.startswith("batch.multiple must be as")


def test_settings_of_the_run_itself_are_said(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="pixart")
    begin(tmp_path, STAGE, save_every=5)
    assert problems(tmp_path, STAGE, save_every=7, trackers=("wandb",)) == []
    assert 'goes on with save_every 7 instead of 5, track ["wandb"] instead of []' in caplog.text


def data(*names: str, folder: str = "a") -> Any:
    places = [("shard of " + folder, name) for name in names]
    entries = [
        Entry(f"{folder}/{name}.png", {"prompt": [shard, "c"]}, (64, 64), (64, 64), [shard, name])
        for shard, name in places
    ]
    return SimpleNamespace(entries=entries, scaling_factor=None)


def test_other_samples_are_noticed_and_moved_ones_are_not(tmp_path: Path) -> None:
    def look(source: str, samples: Any, begun: bool = False) -> list[str]:
        stage = replace(STAGE, data=Data(source))
        run = Run(tmp_path, [stage], CPU)
        run._datasets[source, 64] = samples
        if begun:
            values = {"stage": "fit", "begun": record(run, run.resolved(stage))}
            save_state(tmp_path / "fit", 3, {}, values)
        return list(check_changes(run, run.resolved(stage)))

    assert look("here", data("x", "y"), begun=True) == []
    assert look("there", data("x", "y", folder="b")) == []
    for samples in (data("x"), data("y", "x"), data("x", "z")):
        (line,) = look("here", samples)
        assert line.startswith("data.source must be as") and "got others in here; if it" in line
        assert "--accept-changes data," in line


ACCEPTED = [
    ("learning-rate", None),
    ("optimizer.learning_rate", None),
    ("data", None),
    ("optimizer", None),
    ("resolution", "--accept-changes: resolution can never be accepted; leave it out"),
    ("size", "--accept-changes: size can never be accepted; leave it out"),
    ("hours", "--accept-changes: hours need not be accepted; leave it out"),
    ("lerning-rate", "got 'lerning-rate'; did you mean learning-rate"),
    ("", "got ''; such as learning-rate or data"),
    ("lora", "got 'lora'"),
]


@pytest.mark.parametrize(("name", "message"), ACCEPTED)
def test_names_that_can_be_accepted(name: str, message: str | None) -> None:
    found = list(check_accepted([name]))
    assert found == [] if message is None else len(found) == 1 and message in found[0]


def test_states_that_do_not_say_how_they_were_begun_are_gone_on_from(tmp_path: Path) -> None:
    save_state(tmp_path / "fit", 3, {}, {"stage": "fit"})
    assert problems(tmp_path, replace(STAGE, seed=3)) == []
    save_state(tmp_path / "fit", 4, {}, {"stage": "fit", "begun": {"fields": 3}})
    with pytest.raises(ValueError, match="begun must hold fields and data"):
        problems(tmp_path, STAGE)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: Any) -> Iterator[list[str]]:
    """Trains a line of two steps."""
    monkeypatch.setitem(tasks.TASKS, ("line", tasks.PREPARED), Line)  # type: ignore[arg-type]
    stage = {"name": "fit", "trains": "line", "start": "random", "steps": 2, "seed": 1}
    batch = {"batch": {"images": 1}, "optimizer": {"schedule": "linear"}, "precision": "fp32"}
    file = recipe(tmp_path, stage | batch)
    yield [file, "--output", str(tmp_path / "run"), "--device", "cpu", "--quiet"]


def test_a_command_accepts_changes_and_the_next_states_hold_them(
    tmp_path: Path, capsys: Any, caplog: Any, command: list[str]
) -> None:
    assert train([*command, "--stop-after", "1"]) == 0
    capsys.readouterr()
    (line,) = lines(capsys, *command, "--seed", "2")
    assert line.startswith("seed must be as") and "1, got 2; if it is meant" in line
    more = ["--seed", "2", "--optimizer.learning-rate", "0.1"]
    for dry in ([], ["--dry-run"]):
        assert len(lines(capsys, *command, *more, *dry)) == 2
    accept = ["--accept-changes", "seed,learning-rate"]
    assert train([*command, *more, *accept, "--stop-after", "0"]) == 0
    capsys.readouterr()
    assert len(lines(capsys, *command, *more)) == 2  # nothing was saved anew
    assert train([*command, *more, *accept]) == 0
    progress = json.loads(
        (tmp_path / "run" / "fit" / "step-00000002" / "progress.json").read_text()
    )
    assert progress["begun"]["fields"]["seed"] == 2
    # Finished: nothing is left to refuse, but that it would do nothing is said.
    assert train([one for one in command if one != "--quiet"]) == 0
    assert "stage fit is finished; it was trained with " in caplog.text
    assert "seed 2, not 1" in caplog.text


def test_a_second_trainer_is_refused_and_touches_nothing(
    tmp_path: Path, capsys: Any, command: list[str]
) -> None:
    assert train([*command, "--stop-after", "1"]) == 0
    capsys.readouterr()
    before = sorted((tmp_path / "run").rglob("*"))
    with occupied(tmp_path / "run", "training"):
        (line,) = lines(capsys, *command)
    assert f"{tmp_path / 'run'}: is held by pid {os.getpid()} on {socket.gethostname()}" in line
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert train(command) == 0


def test_what_cannot_be_trained_leaves_no_folder(
    tmp_path: Path, capsys: Any, command: list[str]
) -> None:
    command[2] = str(tmp_path / "a" / "b" / "run")
    assert lines(capsys, *command, "--aspect") == ["aspect must be false for a line"]
    assert not (tmp_path / "a").exists()


def test_the_first_of_many_processes_holds_the_folder_for_all(
    tmp_path: Path, monkeypatch: Any
) -> None:
    with execute.alone(tmp_path):
        claims = list((tmp_path / ".held").glob("*.json"))
        monkeypatch.setattr(execute, "rank", lambda: 1)
        with execute.alone(tmp_path):  # one of the same run
            assert list((tmp_path / ".held").glob("*.json")) == claims
        monkeypatch.setattr(execute, "said_by_first", lambda _: "it is held")
        with pytest.raises(Problems, match="^it is held$"), execute.alone(tmp_path):
            pass
