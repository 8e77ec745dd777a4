"""python -m pixart.calibrate on the embedded model: a plan within its budget, taken up where it was cut off."""

import json
from pathlib import Path
from typing import Any

import pytest

from pixart import calibrate
from pixart.calibration.options import Options
from pixart.calibration.run import relative_square
from pixart.calibration.studio import Call, Scene, Settings, Studio
from pixart.calibration.work import KINDS, check_options
from pixart.evaluation.caption_accuracy import Task, captions
from pixart.pipeline.fast import find_plan, identity_of
from pixart.pipeline.text_to_image import Pipeline
from pixart.plans.plan import Plan

BUDGET = 0.05
SMALL = (
    "--scenes", "2", "--verify", "4", "--images", "1", "--bands", "2", "--ratios", "4", "--steps", "10",
    "--device", "cpu", "--budget", str(BUDGET), "--guidance-interval", "0", "0.7", "--quiet",
    "--reuse-blocks", "1:4,7",
)  # fmt: skip


@pytest.mark.slow
def test_a_plan_keeps_its_budget_on_seeds_that_it_never_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = [*SMALL, "--output", str(tmp_path / "plan.json")]
    whole, calls, probes = Studio.latents, [0], [0]
    again = Call.again

    def cut_off(self: Studio, scene: Scene, settings: Settings) -> Any:
        calls[0] += 1
        if calls[0] > 6:  # in the middle of what follows the probes
            raise KeyboardInterrupt
        return whole(self, scene, settings)

    def counted(self: Call, schedule: Any) -> Any:
        probes[0] += 1
        return again(self, schedule)

    monkeypatch.setattr(Studio, "latents", cut_off)
    monkeypatch.setattr(Call, "again", counted)
    assert calibrate.main(words) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("goes on with what was measured")
    assert not (tmp_path / "plan.json").exists() and (tmp_path / "plan.json.partial").exists()
    monkeypatch.setattr(Studio, "latents", whole)
    done, probes[0] = probes[0], 0
    assert calibrate.main(words) == 0
    assert done == 2 * 2 * 6 and probes[0] == 0  # scenes, bands and blocks; none again
    assert not (tmp_path / "plan.json.partial").exists()
    assert "verified error: 0.0" in capsys.readouterr().out

    pipe = Pipeline.from_pretrained(device="cpu")
    plan = Plan.read(tmp_path / "plan.json")
    assert plan.model == identity_of(pipe) and (plan.steps, plan.guidance_interval) == (
        10,
        (0.0, 0.7),
    )
    assert str(plan.reuse_blocks) == "1:4,7"
    assert plan.kv_schedule is not None and 0 < plan.measured["schedule_error"] <= BUDGET
    assert 0.2 < plan.measured["cost"] < 17 / 40  # of 10 steps, 7 of them guided, and less
    assert find_plan(tmp_path / "plan.json", pipe, tmp_path) == plan
    studio = Studio(pipe, 128, 128)
    settings = Settings(plan.scheduler, 10, 2.0, (0.0, 0.7), reuse=plan.reuse_blocks)
    texts = [text for kind in KINDS for text in captions(Task(kind, 128, count=2), 77)]
    squares = []
    for number, text in enumerate(texts):
        scene = Scene(text, 900 + number)
        plain = studio.latents(scene, settings)
        merged = studio.latents(scene, settings.with_schedule(plan.kv_schedule))
        squares.append(relative_square(merged, plain))
    assert 0 < (sum(squares) / len(squares)) ** 0.5 <= BUDGET
    assert calibrate.main(words) == 2  # what is there is not replaced
    assert "--output must be a new file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budget": 0.0}, "--budget must be above 0"),
        ({"budget": float("nan")}, "--budget must be above 0"),
        ({"verify": 1}, "--verify must be from 2 to 10,000, got 1"),
        ({"bands": 0}, "--bands must be from 1 to 1,000, got 0"),
        ({"ratios": (2, 5)}, "--ratios must be of 2, 3 and 4, got 2, 5"),
        ({"ratios": ()}, "--ratios must be of 2, 3 and 4, got none"),
        ({"model": "sigma-1024"}, "--prompts must be given"),
        ({"threads": 0}, "--threads must be from 1 to 1,024, got 0"),
        ({"seed": -1}, "seed must be an integer from 0 to"),
        ({"seed": 2**64 - 1}, "seed must be an integer from 0 to"),
        ({"threads": 10**8}, "--threads must be from 1 to 1,024, got 100,000,000"),
        ({"scenes": 10**12}, "--scenes must be from 1 to 10,000, got 1,000,000,000,000"),
    ],
)
def test_what_needs_no_model_is_refused_at_once(given: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        check_options(Options(**{"output": tmp_path / "x.json", **given}))


def test_prompts_are_different_ones_and_nothing_else(tmp_path: Path) -> None:
    options = Options(
        output=tmp_path / "x.json", prompts=tmp_path / "p.jsonl", scenes=1, verify=2, images=1
    )
    lines = [{"prompt": f"a cat {n}"} for n in range(3)]
    for more, said in (
        ({"prompt": "a cat 0"}, "--prompts must be a file of 4 different prompts or more.* has 3"),
        ({"prompt": "a dog", "seed": 3}, "p.jsonl, line 4: must have a prompt alone.*got seed"),
        ({"prompt": "a dog", "negative": "blue"}, "line 4: must have a prompt alone.*got negative"),
    ):
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*lines, more])))
        with pytest.raises(ValueError, match=said):
            check_options(options)
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"prompt": "a dog"}])))
    check_options(options)
    with pytest.raises(ValueError, match="--output must be a file, .* is a folder"):
        check_options(Options(output=tmp_path, overwrite=True))


def test_few_steps_leave_nothing_to_leave_out(tmp_path: Path, capsys: Any) -> None:
    words = ["--output", str(tmp_path / "x.json"), "--quiet"]
    for more in (["--steps", "8"], ["--scheduler", "lcm"]):
        assert calibrate.main([*words, *more]) == 2
        assert "--steps must be above 8" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
