"""How captions are measured, on pictures that are known, and the command that does so."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixart.evaluate import main
from pixart.evaluation.caption_accuracy import (
    Accuracy,
    Task,
    captions,
    measure,
    read_report,
    requests,
    table,
)
from pixart.evaluation.options import Accuracy as Options
from pixart.pipeline.request import Drawn, Request
from pixart.shapes.caption import describe, parse
from pixart.shapes.scene import draw, sample_scene


class Draughtsman:
    """Draws what the captions of a task with seed 3 say, or nothing at all."""

    def __init__(self, wrong: bool) -> None:
        self.wrong = wrong
        self.batch = 0

    def draw_many(self, asked: list[Request], batch: int) -> Iterator[Drawn]:
        self.batch = batch
        rng = random.Random(f"3/{'one'}/{False}")
        for request in asked:
            scene = sample_scene(rng, "one")
            describe(scene, rng, omit=0.0)
            side = request.width
            picture = np.full((side, side, 3), 128) if self.wrong else draw(scene, side)
            yield Drawn(Image.fromarray(np.asarray(picture).astype(np.uint8)), request, {})


@pytest.mark.parametrize("wrong", [False, True])
def test_a_perfect_model_is_measured_as_such_and_a_blank_one_is_not(wrong: bool) -> None:
    pipe: Any = Draughtsman(wrong)
    result = measure(pipe, Task("one", 128, count=10), Request("", seed=3, steps=1))
    assert result.of == 10 and result.right == (0 if wrong else 10)
    assert ("**0.0 %**" if wrong else "**100.0 %**") in table([result])
    assert pipe.batch == 25


def test_captions_of_a_task_are_full_and_the_same_every_time() -> None:
    task = Task("pair", 128, count=20)
    texts = captions(task, seed=1)
    assert texts == captions(task, seed=1) != captions(task, seed=2)
    assert all({"relation", "background", "size"} <= {s.kind for s in parse(t)} for t in texts)


def test_each_picture_of_a_task_has_a_seed_of_its_own() -> None:
    task = Task("one", 64, count=3)
    asked = requests(task, Request("", seed=7, steps=5, guidance=2.0, scheduler="ddim"))
    assert [one.prompt for one in asked] == captions(task, 7)
    assert [one.seed for one in asked] == [7, 8, 9]
    settings = {(one.height, one.width, one.steps, one.guidance, one.scheduler) for one in asked}
    assert settings == {(64, 64, 5, 2.0, "ddim")}


def test_the_table_has_a_row_a_task() -> None:
    result = Accuracy(Task("one", 64), right=3, of=4, by_kind={"shape": (3, 4)})
    assert table([result]).splitlines()[-1] == "| 4 × one, 64 px | **75.0 %** | 75.0 |"
    measured = replace(result, clean=1, overlap=0.9512)
    assert table([measured]).splitlines() == [
        "| captions | all right | shape | clean | overlap |",
        "|---|---|---|---|---|",
        "| 4 × one, 64 px | **75.0 %** | 75.0 | 25.0 | 0.951 |",
    ]


def test_the_command_prints_a_table_and_writes_what_can_be_read_again(
    tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "report.json"
    options = ["--count", "2", "--sizes", "64", "--steps", "2", "--device", "cpu"]
    assert main(["accuracy", *options, "--json-file", str(file)]) == 0
    settings, [result] = read_report(file)
    drawn_with = {"steps": 2, "guidance": 2.0, "guidance_interval": [0.0, 1.0]}  # 2.0: its own
    assert settings == {"seed": 1_000_000, "dtype": "fp32", "attention": None, **drawn_with}
    assert result.task == Task("one", 64, count=2) and result.of == 2
    printed = capsys.readouterr().out
    assert table([result]) in printed and "unseen combinations: " in printed


def test_accuracy_draws_with_what_is_given_and_leaves_the_rest_to_the_model() -> None:
    assert Options().like == Request("", seed=1_000_000)
    assert Options(seed=3, steps=2, guidance=1.5).like == Request("", seed=3, steps=2, guidance=1.5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--count", "0"], "--count must be from 1 to 1,000,000, got 0"),
        (["--model", "absent"], "absent: no such file or directory"),
        (["--model", "absent", "--steps", "0"], "steps must be an integer from 1 up, got 0"),
        (["--steps", "many"], "--steps must be a whole number"),
    ],
)
def test_what_cannot_be_measured_is_bad_input(
    arguments: list[str], reason: str, capsys: Any
) -> None:
    assert main(["accuracy", *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("pixart.evaluate: ") and reason in line
