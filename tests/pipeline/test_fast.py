"""Plans in a pipeline: what --fast sets, that a picture redraws itself, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixart.calibration.studio import Scene, Settings, Studio
from pixart.generation import drafts
from pixart.pipeline.fast import find_plan, identity_of, note_of, remarks_on
from pixart.pipeline.metadata import MODEL_OPTIONS, Metadata
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.plans.plan import OF_ANY_MODEL, Identity, Plan
from pixart.plans.schedule import KVSchedule

ASSETS = Path(__file__).parents[2] / "pixart" / "assets" / "shapes"
CAPTION = Request("a large red circle at the left on a white background", steps=9)


def plan_of(pipe: Pipeline, **changes: Any) -> Plan:
    schedule = KVSchedule.parse("0-2:2@1000-500")
    plan = Plan(identity_of(pipe), 12, (0.0, 0.7), 3.0, "dpm-solver++", schedule, {})
    return replace(plan, **changes)


def test_a_schedule_of_what_blocks_do_anyway_draws_the_same_bits(pipe: Pipeline) -> None:
    plain = np.asarray(pipe.draw(CAPTION).image)
    for same in ("0-2:1; 3-5:2", "0-2:2@0.5-0"):
        assert np.array_equal(
            np.asarray(pipe.draw(replace(CAPTION, kv_schedule=same)).image), plain
        )
    other = np.asarray(pipe.draw(replace(CAPTION, kv_schedule="0-2:2; 3-5:4")).image)
    assert 0 < np.abs(other.astype(int) - plain).mean() < 30  # another picture, of the same thing


def test_a_request_takes_from_a_plan_what_it_leaves_open(pipe: Pipeline) -> None:
    pipe.plan = plan_of(pipe)
    request = pipe.resolve(Request("a"))
    assert (request.steps, request.guidance, request.guidance_interval) == (12, 3.0, (0.0, 0.7))
    assert (request.scheduler, request.kv_schedule) == ("dpm-solver++", "0-2:2@1000-500")
    own = Request("a", steps=15, guidance=2.5, guidance_interval=(0.1, 1), kv_schedule="1:2")
    resolved = pipe.resolve(own)
    assert (resolved.steps, resolved.guidance) == (15, 2.5)
    assert (resolved.guidance_interval, resolved.kv_schedule) == ((0.1, 1), "1:2")


def test_a_picture_of_a_plan_draws_itself_again_without_it(pipe: Pipeline) -> None:
    pipe.plan = plan_of(pipe, steps=9)
    asked = replace(CAPTION, steps=None)
    drawn = pipe.draw(asked)
    opened: dict[str, Any] = {
        **dict.fromkeys(MODEL_OPTIONS), "model": "shapes", "lora": [], "control": [],
        "preprocessor_weights": [], "ema": False, "cuda_graph": "auto", "fast": "plan.json",
    }  # fmt: skip
    read = Metadata.from_text(Metadata.of(drawn, pipe, asked, opened).to_text())
    assert (read.model["fast"], read.asked_model["fast"]) == (None, "plan.json")
    assert read.asked.steps is None and read.request.kv_schedule == "0-2:2@1000-500"
    pipe.plan = None
    assert np.array_equal(np.asarray(pipe.draw(read.request).image), np.asarray(drawn.image))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"timesteps": (999, 500)}, "fast must be off with 8 steps or fewer, got 2"),
        ({"steps": 8}, "fast must be off with 8 steps or fewer, got 8"),
        ({"scheduler": "lcm"}, "fast must be off for a model or scheduler of 4 steps"),
        (
            {"scheduler": "ddim"},
            "scheduler must be left out with this plan, .* dpm-solver.., got ddim",
        ),
    ],
)
def test_what_a_plan_says_nothing_of_is_refused(asked: Any, said: str, pipe: Pipeline) -> None:
    pipe.plan = plan_of(pipe)
    with pytest.raises(ValueError, match=said):
        pipe.resolve(Request("a", **asked))


def test_a_schedule_that_the_model_cannot_have_is_refused(pipe: Pipeline) -> None:
    for text in ("0-6:2", "3:3", "3:1"):
        with pytest.raises(ValueError, match="kv_schedule must"):
            pipe.resolve(Request("a", kv_schedule=text))


def test_a_plan_of_any_model_takes_no_more_than_the_model_does_by_default(pipe: Pipeline) -> None:
    pipe.plan = OF_ANY_MODEL["balanced"]
    request = pipe.resolve(Request("a"))
    assert (request.steps, request.guidance, request.guidance_interval) == (13, 2.0, (0.0, 0.4))
    assert request.kv_schedule is None and "not measured" in note_of(pipe.plan)
    own = pipe.sampling
    try:
        pipe.sampling = replace(own, steps=10, guidance_interval=(0.1, 0.3))
        request = pipe.resolve(Request("a"))
        assert (request.steps, request.guidance_interval) == (10, (0.1, 0.3))
    finally:
        pipe.sampling = own


def test_a_plan_is_of_a_lora_at_its_weight(pipe: Pipeline) -> None:
    files, config = {"transformer": "00" * 32, "lora": "11" * 32}, pipe.opened.config
    of = {weight: Identity.of(files, config, "m", weight) for weight in [(1.0,), (0.5,), (1, 0.5)]}
    assert of[1.0,].differs(of[0.5,]) == of[1.0,].differs(of[1, 0.5]) == "lora"
    assert not of[1.0,].differs(Identity.of(files, config, "m", [1]))
    pipe.weight_files = {**pipe.weight_files, "lora": pipe.weight_files["vae"]}
    try:
        found = []
        for weight in (0.25, 0.75):
            pipe.__dict__.pop("weights", None)
            pipe.lora_weights = (weight,)
            found.append(identity_of(pipe))
    finally:
        pipe.weight_files = {k: v for k, v in pipe.weight_files.items() if k != "lora"}
        pipe.__dict__.pop("weights", None)
        pipe.lora_weights = ()
    assert found[0].differs(found[1]) == "lora"


def test_a_plan_is_known_by_what_its_file_sets_not_by_its_name(
    pipe: Pipeline, tmp_path: Path
) -> None:
    path, plan = tmp_path / "p.json", plan_of(pipe)
    said = []
    for one in (
        plan,
        replace(plan, measured={"seconds": 2.0}),
        replace(plan, guidance=4.0),
    ):
        one.write(path)
        assert Plan.read(path) == one
        said.append(drafts._lasting("fast", str(path)))
    assert said[0] == said[1] != said[2]
    assert {drafts.plan_file(one) for one in said} == {str(path)}
    assert drafts._lasting("fast", str(tmp_path / "none.json")) == str(tmp_path / "none.json")
    assert [drafts.plan_file(one) for one in ("fast", None)] == ["fast", None]


def test_names_files_and_other_models(pipe: Pipeline, tmp_path: Path) -> None:
    assert find_plan(None, pipe, tmp_path) is find_plan("off", pipe, tmp_path) is None
    assert find_plan("fast", pipe, tmp_path) is OF_ANY_MODEL["fast"]
    plan = plan_of(pipe)
    (tmp_path / "plans").mkdir()
    plan.write(tmp_path / "plans" / "fast.json")
    assert find_plan("fast", pipe, tmp_path) == plan
    assert find_plan(tmp_path / "plans" / "fast.json", pipe, tmp_path) == plan
    with pytest.raises(ValueError, match="fast must be off, balanced, fast or the file of a plan"):
        find_plan("quick", pipe, tmp_path)
    with pytest.raises(ValueError, match="must be a file, got a folder"):
        find_plan(tmp_path, pipe, tmp_path)
    with pytest.raises(ValueError, match="fast must be off"):
        find_plan(tmp_path / "plans" / "fast.json" / "x", pipe, tmp_path)
    with pytest.raises(ValueError, match="or the file of a plan, got 'quick.json'"):
        Pipeline.from_pretrained(tmp_path / "no-model", plan="quick.json")  # before it is opened
    other = Identity({"transformer": "00" * 32}, plan.model.config if plan.model else "", "other")
    replace(plan, model=other).write(tmp_path / "plans" / "fast.json")
    assert find_plan("fast", pipe, tmp_path) is OF_ANY_MODEL["fast"]  # said to be not measured
    with pytest.raises(ValueError, match="fast.json: was measured with another model"):
        find_plan(tmp_path / "plans" / "fast.json", pipe, tmp_path)
    values = plan.to_dict() | {"scheduler": "quick"}
    (tmp_path / "x.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="x.json: scheduler must be one of"):
        find_plan(tmp_path / "x.json", pipe, tmp_path)
    (tmp_path / "x.json").write_text(json.dumps(values | {"scheduler": "lcm"}))
    with pytest.raises(ValueError, match="x.json: plan.scheduler must be of many steps, got lcm"):
        find_plan(tmp_path / "x.json", pipe, tmp_path)
    with pytest.raises(ValueError, match="fast must be off, balanced, fast or the file"):
        find_plan("", pipe, tmp_path)


def test_figures_of_a_plan_are_said_to_be_of_other_settings() -> None:
    planned = Pipeline.from_pretrained(device="cpu", plan="balanced")
    assert planned.plan is not None

    def said(**given: Any) -> list[str]:
        return remarks_on(planned.resolve(Request("a red circle", **given)), planned.plan)

    assert said() == []
    assert said(size="64", steps=10) == [
        "the figures of the plan are not those of size 64x64, steps 10"
    ]
    other = "the figures of the plan are not those of"
    assert said(guidance_interval=(0, 1)) == [f"{other} guidance_interval 0,1"]
    assert said(timesteps="990,930,870,810,750,690,630,570,510") == [
        f"{other} steps 990,930,870,810,750,690,630,570,510"
    ]
    assert said(reuse_blocks="2:4,6") == [f"{other} reuse_blocks 2:4,6"]
    assert planned.remarks(planned.resolve(Request("a red circle", size="64"))) == []


@pytest.mark.parametrize(("name", "most"), [("balanced", 0.6), ("fast", 0.5)])
def test_the_embedded_model_has_plans_of_its_own(name: str, most: float, pipe: Pipeline) -> None:
    """That they keep what is drawn is measured by bench.quality: 300 captions take minutes."""
    plan = find_plan(name, pipe, ASSETS)
    assert plan == Plan.read(ASSETS / "plans" / f"{name}.json") and plan.model is not None
    found = plan.measured
    assert (
        0 < found["schedule_error"] <= found["budget"] and found["accuracy"][1] == found["images"]
    )
    pipe.plan = plan
    request = pipe.resolve(Request("a red circle"))
    studio = Studio(pipe, 128, 128)
    cost, whole = (
        studio.cost(one, Scene("a red circle", 0))
        for one in (Settings.of(request), Settings("dpm-solver++", 20, 2.0, (0.0, 1.0)))
    )
    assert cost / whole == pytest.approx(found["cost"], abs=0.01) and cost / whole <= most


def test_no_other_transformer_comes_under_a_plan_of_this_one(pipe: Pipeline) -> None:
    pipe.plan = plan_of(pipe)
    with pytest.raises(ValueError, match="plan must be None"):
        pipe.transformer = pipe.transformer
