"""Distilling into few steps: what trains and what stays, states, processes, and what a user opens."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pixart.checkpoint.load import load_transformer, open_transformer
from pixart.diffusion import add_noise
from pixart.few_step import FewStep
from pixart.generate import main as generate
from pixart.lora.files import WEIGHTS
from pixart.train import main as train
from pixart.training import distillation, execute
from pixart.training.checkpoints import last_words
from pixart.training.distil_settings import DistilSettings
from pixart.training.recipe import load_recipe
from pixart.training.run import Run
from pixart.training.stage import Batch, Data, LoRA, Stage
from pixart.training.tasks import distilling, shapes_distilling
from pixart.training.tasks.distilling import Walked

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
TINY = [
    "--device", "cpu", "--quiet", "--batch.images", "2", "--distil.fake-first", "1", "--precision",
    "fp32", "--validation.every", "0", "--validation.metrics", "--validation.best", "",
    "--validation.patience", "None",
]  # fmt: skip
STAGE = Stage(
    "distil",
    trains="tdm",
    start="shapes",
    precision="fp32",
    checkpoint_blocks=0,
    min_snr=5.0,
    batch=Batch(images=2),
    data=Data(source="shapes", short=0.7, caption_dropout=0.0),
    distil=DistilSettings(steps=2, fake_first=1),
).resolved(resolution=128, max_length=40, vae_scale=1.0, prediction="v_prediction")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "measure_peak", lambda *_: 1e12)  # which takes seconds


def task_of(place: Path, **changes: Any) -> shapes_distilling.ShapesDistilling:
    stage = replace(STAGE, **changes)
    return shapes_distilling.build(stage, Run(place, [stage], CPU))


def step(task: shapes_distilling.ShapesDistilling, number: int) -> dict[str, torch.Tensor]:
    (part,) = task.load(number, 1)
    losses = task.losses(task.model, part)
    losses["loss"].backward()
    return losses


def moves(task: shapes_distilling.ShapesDistilling) -> set[str]:
    """Of which parts some weight has a gradient that is not zero."""
    named = task.model.named_parameters()
    return {name.split(".")[0] for name, p in named if p.grad is not None and p.grad.any()}


def test_the_fake_learns_first_and_the_teacher_never(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    losses = step(task, 0)
    assert moves(task) == {"fake"} and torch.equal(losses["loss"], losses["fake"])
    losses = step(task, 1)
    assert moves(task) == {"student", "fake"}
    torch.testing.assert_close(losses["loss"], losses["student"] + losses["fake"])
    still = [*task.distilled.teacher.parameters(), *task.text_encoder.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in still)
    assert not any(name.startswith("_teacher") for name in task.model.state_dict())


def test_adapters_share_the_memory_of_one_base(tmp_path: Path) -> None:
    task = task_of(tmp_path, lora=LoRA(rank=2))
    student, fake, teacher = (
        {n.replace(".base_layer", ""): p for n, p in one.named_parameters() if "lora_" not in n}
        for one in (task.transformer, task.model.fake, task.distilled.teacher)  # type: ignore[union-attr]
    )
    assert student.keys() == fake.keys() == teacher.keys()
    assert all(p is student[n] and p is fake[n] for n, p in teacher.items())
    step(task, 1)
    learn = {n for n, p in task.model.named_parameters() if p.grad is not None}
    assert learn == {n for n, p in task.model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in learn} == {"student", "fake"}
    assert all("lora_" in n for n in learn)
    # The base of the fake is in no state, and comes back into one that is read.
    state = task.model.state_dict()
    assert all("lora_" in name for name in state if name.startswith("fake."))
    task.model.load_state_dict(state)


def test_guidance_is_the_teachers(tmp_path: Path) -> None:
    plain, strong = (task_of(tmp_path, distil=DistilSettings(guidance=g)) for g in (1.0, 3.0))
    (part,) = plain.load(5, 1)
    captions = plain._captions(part.sample)
    x_t, t = part.sample.noise, torch.full((2,), 700)
    with torch.no_grad():
        once, thrice = (task.distilled._taught(x_t, t, captions, None) for task in (plain, strong))
        null = plain.distilled._clean(plain.distilled.teacher, x_t, t, captions.unconditional, None)
    assert captions.null_mask.shape[1] == 1  # the end of the text alone
    torch.testing.assert_close(thrice, null + 3 * (once - null))


def test_what_a_step_sees_depends_on_its_number_alone(tmp_path: Path) -> None:
    distil = DistilSettings(steps=2, also=(1, 4), fake_first=3)
    task = task_of(tmp_path, distil=distil, batch=Batch(images=4))
    seen = set()
    for number in range(24):
        (whole,), halves = task.load(number, 1), task.load(number, 2)
        assert {(one.walk, one.place) for one in halves} == {(whole.walk, whole.place)}
        assert whole.is_student == (number >= 3)
        for name in ("noise", "latents", "timesteps"):
            both = torch.cat([getattr(one.sample, name) for one in halves])
            assert torch.equal(getattr(whole.sample, name), both)
        seen.add((whole.walk, whole.place))
    assert {len(walk) for walk, _ in seen} == {1, 2, 4}


def test_lcm_wants_the_prediction_of_a_step_further(tmp_path: Path) -> None:
    distil = DistilSettings(guidance=2.0, huber=0.01)
    task = task_of(tmp_path, trains="lcm", min_snr=None, distil=distil)
    (part,) = task.load(3, 1)
    captions, model = task._captions(part), task.distilled
    with torch.no_grad():
        found = task.losses(task.model, part)["loss"]
        t, s = distillation.grid_pair(part.timesteps, 50)
        x_t = add_noise(part.latents, part.noise, t)
        x_s = distillation.ddim(model._taught(x_t, t, captions, None), x_t, t, s)
        ends = [
            distillation.consistency(
                model._clean(model.student, x, at, captions.conditional, None), x, at
            )
            for x, at in ((x_t, t), (x_s, s))
        ]
    torch.testing.assert_close(found, distillation.huber(*ends, 0.01).mean())
    step(task, 3)
    assert moves(task) == {"student"}


@pytest.mark.parametrize("rank", [0, 2])
def test_what_was_stopped_goes_on_to_the_bit_and_draws_as_distilled(
    tmp_path: Path, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--steps", "4", "--lora.rank", str(rank)]
    for name, stops in (("whole", [4]), ("parts", [2, 2])):
        for stop in stops:
            arguments = ["--output", str(tmp_path / name), "--stop-after", str(stop), *more]
            assert train(["shapes-tdm", *TINY, *arguments]) == 0
    whole, parts = (tmp_path / name / "distil" / "step-00000004" for name in ("whole", "parts"))
    for file in sorted((whole / "state").glob("*.safetensors")):
        found, expected = load_file(parts / "state" / file.name), load_file(file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    few_step = FewStep("ddim", (999, 399))
    assert open_transformer(whole / "model.safetensors").config.few_step == few_step
    if rank:
        with safe_open(whole / "lora" / WEIGHTS, "pt") as file:
            assert FewStep.from_dict(json.loads(file.metadata()["few_step"])) == few_step
    said = next(
        line for line in last_words(whole, load_recipe("shapes-tdm")[0]) if "draw with it" in line
    )
    words = shlex.split(said.split(" generate ")[-1].split("pixart.generate ")[-1])
    assert generate([*words, "--output", str(tmp_path / "a.png"), "--device", "cpu"]) == 0
    capsys.readouterr()


def test_a_student_is_compressed_as_it_is_distilled(tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--steps", "2", "--kv-compress", "0-5:2"]
    assert train(["shapes-tdm", *TINY, *arguments]) == 0
    student = load_transformer(tmp_path / "distil" / "step-00000002" / "model.safetensors")
    compression = student.config.kv_compression
    assert compression is not None and compression.layers == (0, 1, 2, 3, 4, 5)
    task = task_of(tmp_path, kv_compress="0-5:2")
    kept = task.distilled.teacher.config.kv_compression
    assert kept is not None and kept.layers == (3, 4, 5)
    assert task.transformer.config.kv_compression == compression


def test_a_further_stage_has_the_student_of_the_last_and_the_teacher_of_the_first(
    tmp_path: Path,
) -> None:
    first = json.loads(json.dumps(recipe(steps=1)))
    second = {**first, "name": "less", "start": "previous", "distil": {"steps": 1}}
    third = {**second, "name": "tune", "trains": "transformer", "pipeline": "shapes"}
    del third["distil"], third["min_snr"], third["data"]["short"]  # type: ignore[union-attr]
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps({"stages": [first, second, third]}))
    out = tmp_path / "run"
    assert train([str(file), "--device", "cpu", "--quiet", "--output", str(out)]) == 0
    states = [out / name / "step-00000001" for name in ("distil", "less", "tune")]
    steps = [open_transformer(one / "model.safetensors").config.few_step for one in states[:2]]
    assert steps == [FewStep("ddim", (999, 499)), FewStep("ddim", (999,))]
    drawn = open_transformer(states[2] / "pipeline" / "transformer").config
    assert drawn.few_step is None
    stages = load_recipe(file)
    run = Run(out, stages, CPU)
    task = shapes_distilling.build(run.resolved(stages[1]), run)
    fake = dict(task.model.fake.named_parameters())  # type: ignore[union-attr,operator]
    left = load_file(next((states[0] / "state").glob("*.safetensors")))
    assert all(torch.equal(p, left[f"model.fake.{name}"]) for name, p in fake.items())
    embedded = load_transformer(ROOT / "pixart" / "assets" / "shapes", dtype=torch.float32)
    kept, teacher = embedded.state_dict(), task.distilled.teacher.state_dict()
    assert all(torch.equal(teacher[name], value) for name, value in kept.items())
    student = task.transformer.state_dict()
    assert any(not torch.equal(student[name], value) for name, value in kept.items())


def recipe(**fields: Any) -> dict[str, Any]:
    return {
        "name": "distil",
        "trains": "tdm",
        "start": "shapes",
        "precision": "fp32",
        "checkpoint_blocks": 0,
        "min_snr": 5,
        "batch": {"images": 2},
        "data": {"source": "shapes", "short": 0.5},
        "distil": {"steps": 2, "fake_first": 0},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "warmup_steps": 1},
        **fields,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distil": {"steps": 9}}, "distil.steps must be at most 8, got 9"),
        ({"distil": {"steps": 0}}, "distil.steps must be at least 1, got 0"),
        ({"distil": {"timesteps": [499, 999]}}, "distil.timesteps must fall from noise to"),
        ({"distil": {"steps": 2, "timesteps": [999]}}, "distil.steps must be left out beside"),
        ({"distil": {"steps": 4, "timesteps": [999]}}, "distil.steps must be left out beside"),
        ({"distil": {"steps": 2, "also": [1, 2]}}, "distil.also must be other numbers than"),
        ({"distil": {"guidance": -1}}, "distil.guidance must be at least 1, got -1"),
        ({"distil": {"fake_rate": 0}}, "distil.fake_rate must be positive, got 0"),
        ({"distil": {"ddim_steps": 0}}, "distil.ddim_steps must be from 2 on and divide 1000"),
        ({"distil": {"ddim_steps": 30}}, "distil.ddim_steps must be from 2 on and divide 1000"),
        ({"distil": {"ddim_steps": 20}}, "distil.ddim_steps is read where trains is lcm only"),
        ({"distil": {"teacher": "absent"}}, "distil.teacher: absent: no such file"),
        ({"distil": {"teacher": "random"}}, "distil.teacher must be a trained PixArt, by its path"),
        ({"distil": {"teacher": "previous"}}, "distil.teacher must be a trained PixArt"),
        ({"distil": {"teacher": "dit:DiT-XL-2.pt"}}, "distil.teacher must be a trained PixArt"),
        (
            {"trains": "lcm", "min_snr": None, "distil": {"steps": 4, "ddim_steps": 2}},
            "distil.ddim_steps must be at least distil.steps, 4, got 2",
        ),
        ({"trains": "lcm", "distil": {}}, "min_snr must be None where trains is lcm, got 5"),
        (
            {"trains": "lcm", "min_snr": None, "distil": {"fake_first": 3}},
            "distil.fake_first is read where trains is tdm only, got 3",
        ),
        ({"start": "random"}, "start must be a trained PixArt where trains is tdm, got random"),
        ({"pipeline": "shapes"}, "pipeline must be empty where trains is tdm and data are drawn"),
        (
            {"lora": {"rank": 2}, "kv_compress": "0-5:2"},
            "kv_compress must be empty, in a stage of its own, with lora.rank 2",
        ),
        ({"data": {"source": "shapes", "short": 2}}, "data.short must be from 0 to 1, got 2"),
        (
            {"data": {"source": "shapes", "nameless": 0.5}},
            "data.nameless is read where trains is controlnet only, got 0.5",
        ),
        (
            {"trains": "transformer", "min_snr": None, "pipeline": "shapes", "data": {"source": "shapes"}},
            "distil is read where trains is tdm or lcm only, got trains transformer",
        ),
        (
            {"validation": {"patience": 2}},
            "validation.patience must be None without validation.best, got 2",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    tmp_path: Path, fields: Mapping[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps({"stages": [recipe(**fields)]}))
    assert train([str(file), "--dry-run", "--device", "cpu", "--output", str(tmp_path)]) == 2
    lines = [
        one for one in capsys.readouterr().err.splitlines() if one.startswith("pixart.train: ")
    ]
    assert len(lines) == 1 and message in lines[0]


def test_steps_and_timesteps_stand_in_place_of_either(tmp_path: Path) -> None:
    """Of what a recipe says: who names timesteps cannot take out its steps."""
    for name in ("tdm", "lcm", "shapes-tdm"):
        for given, walk in (
            ({"timesteps": [999, 249]}, (999, 249)),
            ({"steps": 3}, (999, 666, 333)),
        ):
            assert load_recipe(name, {"distil": given})[0].distil.walk == walk
    assert load_recipe("tdm")[0].distil.count == 4
    for name, most in (("tdm", 8), ("dmd", 4)):
        assert load_recipe(name, {"distil": {"steps": most}})[0].distil.count == most
        with pytest.raises(ValueError, match=f"distil.steps must be .*{most}.* got {most + 1}"):
            load_recipe(name, {"distil": {"steps": most + 1}})
    for given, said in (
        (
            {"timesteps": [900, 700, 500, 300, 100]},
            "distil.timesteps must be 1 to 4 steps for dmd, got 5",
        ),
        ({"also": [1, 8]}, "distil.also must be 1 to 4 steps for dmd, got 8"),
    ):
        with pytest.raises(ValueError, match=said):
            load_recipe("dmd", {"distil": given})
    few_step = distilling.few_step_of(load_recipe("tdm", {"distil": {"steps": 2, "also": [1]}})[0])
    assert few_step.also == ((999,),)


def test_a_distilled_model_teaches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task_of(tmp_path).export(tmp_path / "few")
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps({"stages": [recipe(start=str(tmp_path / "few"))]}))
    command = [str(file), "--dry-run", "--device", "cpu", "--output", str(tmp_path / "run")]
    assert train(command) == 2
    assert "distil.teacher must be a model of many steps, got one that was distilled for ddim at 999,499" in (
        capsys.readouterr().err
    )  # fmt: skip
    assert train([*command, "--distil.teacher", "shapes"]) == 0
    plan = capsys.readouterr().out
    assert "14.9 M parameters of a student, a fake and a teacher" in plan


def test_validation_tells_both_losses(tmp_path: Path) -> None:
    validation = replace(STAGE.validation, every=1, images=2)
    found = task_of(tmp_path, validation=validation).validate(1, tmp_path)
    # A fake that is still the teacher says what it says: the student is moved nowhere yet.
    assert found.keys() == {"loss", "student", "fake"} and found["fake"] > 0
    assert found["student"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "ddp",
        pytest.param("fsdp", marks=pytest.mark.exhaustive),
        pytest.param("fsdp+sequence", marks=pytest.mark.exhaustive),
    ],
)
def test_two_processes_distil_what_one_does(tmp_path: Path, how: str) -> None:
    # Beside so large an eps AdamW does not make steps of one size of what is rounding alone.
    options = [*TINY, "--steps", "2", "--optimizer.learning-rate", "1e-3", "--optimizer.eps", "0.1"]
    assert train(["shapes-tdm", *options, "--output", str(tmp_path / "one")]) == 0
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    shares = ["--parallel", how, *(["--sequence", "2"] if "sequence" in how else [])]
    arguments = ["shapes-tdm", *options, "--output", str(tmp_path / "two"), *shares]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "--", "pixart.train", *arguments]
    subprocess.run(command, env=env, check=True, timeout=300)
    found, expected = (
        load_file(tmp_path / name / "distil" / "step-00000002" / "model.safetensors")
        for name in ("two", "one")
    )
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], value, atol=1e-5) for key, value in expected.items())


def test_parts_know_their_number(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    (part,) = task.load(0, 1)
    assert isinstance(part, Walked) and task.images(part) == 2 and task.tokens(part) == 2 * 64
    assert task.flops(part) > 0
