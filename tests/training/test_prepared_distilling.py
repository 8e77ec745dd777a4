"""Few steps of models of the real layout: what captions and pictures they learn from, what gets a gradient,
and what kinds of data are none."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import folder
from published import build_alpha, build_sigma
from torch import Tensor

from pixart.checkpoint.load import load_transformer, open_transformer
from pixart.data import main as data
from pixart.few_step import FewStep
from pixart.generate import main as generate
from pixart.train import main as train
from pixart.training import execute
from pixart.training.distil_settings import DistilSettings
from pixart.training.recipe import load_recipe
from pixart.training.run import Run
from pixart.training.stage import Batch, Data, LoRA, Stage
from pixart.training.tasks import prepared_distilling, task_of

CPU = torch.device("cpu")
STAGE = Stage(
    "distil",
    trains="tdm",
    precision="fp32",
    resolution=64,
    min_snr=5.0,
    batch=Batch(images=2),
    distil=DistilSettings(steps=4, guidance=4.5, fake_first=0),
)
QUICK = [
    "--device", "cpu", "--quiet", "--resolution", "64", "--batch.images", "2", "--steps", "1",
    "--precision", "fp32", "--optimizer.warmup-steps", "0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "measure_peak", lambda *_: 1e12)  # which takes seconds


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alpha and sigma: pipelines, α's with sizes as conditions; prompts and pictures: encoded by them."""
    place = tmp_path_factory.mktemp("place")
    small = {"vae_channels": (8, 8, 8, 8)}
    build_alpha(place / "alpha", **small)
    build_sigma(place / "sigma", sample_size=8, **small)
    words = " ".join(["many words"] * 200)
    (place / "p.txt").write_text(f"a red circle\na blue star on white\na cat\n{words}\n")
    raw = folder(place / "raw", 3, height=64, width=64)
    (raw / "0.txt").write_text(words)
    for name in ("alpha", "sigma"):
        model = ["--model", str(place / name), "--device", "cpu"]
        assert data(["prompts", str(place / "p.txt"), str(place / f"prompts-{name}"), *model]) == 0
        into = ["--resolution", "64", "--square", *model]
        assert data(["prepare", str(raw), str(place / f"pictures-{name}"), *into]) == 0
    return place


def build(place: Path, out: Path, kind: str, name: str, **changes: Any) -> Any:
    """The task of a stage on prompts or pictures of a pipeline."""
    source = Data(source=str(place / f"{kind}-{name}"), caption_dropout=0.0)
    model = str(place / name)
    stage = replace(STAGE, start=model, pipeline=model, data=source, **changes)
    run = Run(out, [stage], CPU)
    resolved = run.resolved(stage)
    module = task_of(stage)
    assert module is prepared_distilling
    assert list(module.check(stage)) + list(module.check_files(resolved, run)) == []
    return module.build(resolved, run)


def started_from(model: Path) -> list[str]:
    return ["--start", str(model), "--pipeline", str(model)]


def with_gradient(task: Any, number: int) -> set[str]:
    """Names of the weights that a step moves."""
    (part,) = task.load(number, 1)
    losses = task.losses(task.model, part)
    assert all(value.isfinite() for value in losses.values())
    losses["loss"].backward()
    return {
        name for name, p in task.model.named_parameters() if p.grad is not None and p.grad.any()
    }


@pytest.mark.parametrize(
    ("kind", "name", "rank"),
    [
        ("prompts", "alpha", 0),
        ("prompts", "alpha", 2),
        ("prompts", "sigma", 0),
        ("prompts", "sigma", 2),
        ("pictures", "sigma", 0),  # whose captions alone are read
    ],
)
def test_matching_moves_student_and_fake_and_nothing_else(
    place: Path, tmp_path: Path, kind: str, name: str, rank: int
) -> None:
    task = build(place, tmp_path, kind, name, lora=LoRA(rank=rank))
    model = task.model
    assert model.student.config.pred_sigma
    assert model.student.config.micro_condition == (name == "alpha")
    moved = with_gradient(task, 3)
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    if rank:  # B starts at zero: nothing reaches A yet
        assert {n for n in expected if "lora_B" in n} >= moved and moved
        assert all("lora_" in n for n in expected)
    else:
        # The last layer's rows of the variance, which nothing here learns, are part of whole tensors.
        assert expected - moved <= {n for n in expected if "y_embedding" in n or "pos_embed" in n}
        half = model.student.final_layer.linear.weight.grad.view(4, 8, -1)
        assert half[:, :4].any() and not half[:, 4:].any()
    assert {n.split(".")[0] for n in moved} == {"student", "fake"}
    assert all(p.grad is None for p in model.teacher.parameters())


def test_the_teacher_sees_the_null_caption_under_the_prompts_own_mask(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build(place, tmp_path, "prompts", "alpha")
    teacher, seen = task.model.teacher, list[tuple[Tensor, ...]]()
    forward = teacher.forward

    def watched(*arguments: Tensor, **others: Any) -> Tensor:
        seen.append(arguments[2:])
        return forward(*arguments, **others)

    monkeypatch.setattr(teacher, "forward", watched)
    (part,) = task.load(0, 1)
    task.losses(task.model, part)
    (features, mask, size, ratio), (null, null_mask, *_) = seen
    assert torch.equal(mask, null_mask) and torch.equal(mask, part.sample.mask)
    table = teacher.y_embedder.y_embedding[: null.shape[1]]
    assert torch.equal(null, table.expand_as(null)) and not torch.equal(null, features)
    assert size.tolist() == [[64.0, 64.0]] * 2 and ratio.tolist() == [[1.0]] * 2


def test_captions_are_as_long_as_the_model_reads_and_what_a_step_sees_has_its_number(
    place: Path, tmp_path: Path
) -> None:
    for name, length in {"alpha": 120, "sigma": 300}.items():
        task = build(place, tmp_path, "prompts", name, aspect=True, resolution=256)
        steps = [task.load(number, 2) for number in range(30)]
        again = build(place, tmp_path, "prompts", name, aspect=True, resolution=256)
        for number in (0, 17):
            for part, other in zip(steps[number], again.load(number, 2), strict=True):
                assert torch.equal(part.sample.noise, other.sample.noise)
                assert torch.equal(part.sample.features, other.sample.features)
        assert max(part.sample.mask.sum(1).max() for one in steps for part in one) == length
        shapes = {part.sample.noise.shape[2:] for one in steps for part in one}
        assert len(shapes) > 8 and all(
            one[0].sample.noise.shape == one[1].sample.noise.shape for one in steps
        )
        assert {part.place for one in steps for part in one} == {0, 1, 2, 3}


@pytest.mark.parametrize("rank", [0, 2])
def test_consistency_learns_from_pictures(place: Path, tmp_path: Path, rank: int) -> None:
    distil = DistilSettings(steps=4, guidance=5.5)
    changes = {"trains": "lcm", "min_snr": None, "distil": distil, "lora": LoRA(rank=rank)}
    task = build(place, tmp_path, "pictures", "alpha", **changes)
    moved = with_gradient(task, 0)
    assert moved and {name.split(".")[0] for name in moved} == {"student"}
    assert all(p.grad is None for p in task.model.teacher.parameters())
    assert task.model.student.config.few_step == FewStep("lcm", (999, 759, 499, 259))


def test_what_comes_of_it_is_drawn_without_an_option(place: Path, tmp_path: Path) -> None:
    """Adapters of one step, on their base; and all weights, compressed as they are distilled."""
    start = started_from(place / "sigma")
    command = ["tdm", *start, "--data.source", str(place / "prompts-sigma"), *QUICK]
    lora = [*command, "--lora.rank", "2", "--output", str(tmp_path / "lora")]
    assert train([*lora, "--distil.guidance", "1"]) == 0
    drawn = ["a star", "--device", "cpu", "--size", "64x64", "--json"]
    state = tmp_path / "lora" / "distil" / "step-00000001"
    model = ["--model", str(place / "sigma"), "--lora", str(state / "lora")]
    assert generate([*drawn, *model, "--output", str(tmp_path / "a.png")]) == 0
    kv = [*command, "--kv-compress", "1:2", "--distil.steps", "2", "--output", str(tmp_path / "kv")]
    looked_at = ["--validation.every", "1", "--validation.images", "2"]
    assert train([*kv, *looked_at, "--validation.prompts", "a star"]) == 0
    assert (tmp_path / "kv" / "distil" / "pictures" / "step-00000001" / "00.png").exists()
    state = tmp_path / "kv" / "distil" / "step-00000001"
    config = open_transformer(state / "transformer").config
    assert config.kv_compression is not None and config.few_step == FewStep("ddim", (999, 499))
    teacher = load_transformer(place / "sigma")
    assert teacher.config.kv_compression is None
    assert generate([*drawn, "--model", str(state), "--output", str(tmp_path / "b.png")]) == 0


@pytest.mark.parametrize(
    ("recipe", "kind", "options", "reason"),
    [
        ("lcm", "prompts", [], "data.source must hold pictures where trains is lcm"),
        ("lora", "prompts", [], "data.source must hold pictures where trains is transformer"),
        ("controlnet", "prompts", [], "data.source must hold pictures where trains is controlnet"),
        ("tdm", "absent", [], "absent-alpha is none"),
        ("tdm", "raw", [], "raw must be prepared at 64 px"),
        ("tdm", "prompts", ["--data.prior", "x"], "data.prior is"),
        ("tdm", "prompts", ["--data.captions", "long", "1"], "must name captions of the data (prompt)"),
        ("tdm", "prompts", ["--data.short", "0.5"], 'data.short is for the source "shapes" only'),
        ("tdm", "prompts", ["--kv-compress", "1:2", "--kv-start", "calibrated"], "no pictures to"),
        ("tdm", "prompts", ["--start", "shapes", "--pipeline", "shapes"], "data must have 128 ca"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_one_line(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    kind: str,
    options: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(place / "prompts-alpha")  # no data of anyone who does not name it
    named = "raw" if kind == "raw" else f"{kind}-alpha"
    command = [recipe, *started_from(place / "alpha"), "--data.source", str(place / named)]
    code = train([*command, *QUICK, *options, "--output", str(tmp_path / "o")])
    lines = [one for one in capsys.readouterr().err.splitlines() if "pixart.train: " in one]
    assert code == 2 and len(lines) == 1 and reason in lines[0], lines
    assert not (tmp_path / "o").exists()


def test_other_prompts_are_another_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a red circle\nanother\n")
    model = ["--model", str(place / "sigma"), "--device", "cpu"]
    assert data(["prompts", str(tmp_path / "p.txt"), str(tmp_path / "other"), *model]) == 0
    command = ["tdm", *started_from(place / "sigma"), *QUICK, "--output", str(tmp_path / "run")]
    assert train([*command, "--data.source", str(place / "prompts-sigma")]) == 0
    capsys.readouterr()
    further = [*command, "--steps", "2", "--data.source", str(tmp_path / "other")]
    assert train(further) == 2
    assert "data.source must be as" in capsys.readouterr().err
    assert train([*further, "--accept-changes", "data,steps"]) == 0


def test_dmd_is_another_name_of_tdm() -> None:
    assert load_recipe("dmd") == load_recipe("tdm")
    (stage,) = load_recipe("dmd", {"distil": {"steps": 1}})
    assert stage.distil.walk == (999,) and stage.trains == "tdm"


def test_recipes_say_what_the_papers_do() -> None:
    (tdm,), (lcm,) = load_recipe("tdm"), load_recipe("lcm")
    assert tdm.distil.walk == (999, 749, 499, 249) and (tdm.steps, tdm.ema) == (500, 0.95)
    assert lcm.distil.guidance == 5.5 and lcm.optimizer.learning_rate == 2e-5
    assert json.dumps(lcm.distil.huber) == "0.001" and lcm.optimizer.clip_norm == 0.01
