"""Before a stage begins: what it leaves open is taken from its start and data, and all that is wrong
is reported at once, by `--dry-run` as by training."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import folder
from published import build_alpha, build_sigma
from safetensors.torch import load_file

from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.data import main as data
from pixart.train import main as train
from pixart.training import execute, starts, tasks, trackers
from pixart.training.problems import Problems
from pixart.training.recipe import load_recipe
from pixart.training.run import Run
from pixart.training.stage import Batch, Data, ResolvedStage, Stage
from pixart.training.state import save_state

CPU = torch.device("cpu")
FIELDS = ("resolution", "max_length", "vae_scale", "prediction")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sigma(tmp_path_factory.mktemp("p"), sample_size=16, vae_channels=(8, 8, 8, 8))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    place = tmp_path_factory.mktemp("data")
    folder(place / "raw", 4, height=128, width=128)
    prepare = ["prepare", str(place / "raw"), str(place / "out"), "--model", str(pipeline)]
    assert data([*prepare, "--resolution", "128", "--square", "--device", "cpu"]) == 0
    return place / "out"


def recipe(place: Path, *stages: dict[str, Any]) -> str:
    path = place / "recipe.yaml"
    path.write_text(json.dumps({"stages": stages}))
    return str(path)


def lines(capsys: Any, *arguments: str) -> list[str]:
    """The complaints of a command that nothing comes of."""
    assert train(list(arguments)) == 2
    return [line.removeprefix("pixart.train: ") for line in capsys.readouterr().err.splitlines()]


# What a stage leaves open.


def resolved(stage: Stage, place: Path = Path("absent")) -> tuple[Any, ...]:
    known = Run(place, [stage], CPU).resolved(stage)
    return tuple(getattr(known, name) for name in FIELDS)


def test_what_a_stage_leaves_open_is_what_start_and_data_say(
    pipeline: Path, features: Path, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, logger="pixart")
    stage = Stage("a", start=str(pipeline), data=Data(str(features)))
    assert resolved(stage) == (128, 300, 0.13025, "epsilon")
    messages = [record.getMessage() for record in caplog.records]
    assert f"stage a: resolution 128, as {features} says" in messages
    assert f"stage a: vae_scale 0.13025, as {features} says" in messages
    assert "stage a: max_length 300, as the start says" in messages
    assert f"stage a: prediction epsilon, as {pipeline} says" in messages
    alpha = build_alpha(tmp_path / "alpha", vae_channels=(8, 8, 8, 8))
    assert resolved(replace(stage, start=str(alpha), pipeline=str(alpha)))[1] == 120
    file = tmp_path / "bare.pth"  # that does not say how long its captions are
    save_transformer(load_transformer(pipeline), file)
    torch.save({"state_dict": torch.load(file)["state_dict"]}, file)
    for pipe, length in ((str(alpha), 120), (str(pipeline), 300)):
        assert resolved(Stage("a", start=str(file), pipeline=pipe))[1] == length


def test_the_embedded_model_says_all_of_itself() -> None:
    stage = Stage("a", start="shapes", pipeline="shapes", data=Data("shapes"))
    assert resolved(stage) == (128, 40, 1.0, "v_prediction")


def test_what_is_written_is_not_taken_from_elsewhere(pipeline: Path, features: Path) -> None:
    stage = Stage(
        "a", start="shapes", pipeline="shapes", resolution=256, max_length=50, vae_scale=0.5,
        prediction="epsilon", data=Data("shapes"),
    )  # fmt: skip
    assert resolved(stage) == (256, 50, 0.5, "epsilon")
    assert resolved(Stage("a", start="random")) == (1024, 300, 0.13025, "epsilon")


def test_a_stage_goes_on_with_what_the_one_before_had() -> None:
    first, second = Stage("a", start="shapes", data=Data("shapes")), Stage("b", data=Data("shapes"))
    run = Run(Path("absent"), [first, second], CPU, to_come=frozenset({"a"}))
    assert [getattr(run.resolved(second), name) for name in FIELDS] == [
        *(128, 40, 1.0, "v_prediction")
    ]


def test_a_stage_that_leaves_all_open_trains_as_one_that_says_it(
    pipeline: Path, features: Path, tmp_path: Path
) -> None:
    shared = {
        "name": "tune", "start": str(pipeline), "pipeline": str(pipeline), "steps": 1,
        "data": {"source": str(features)}, "batch": {"images": 2}, "precision": "fp32",
    }  # fmt: skip
    spelt = {"resolution": 128, "max_length": 300, "vae_scale": 0.13025, "prediction": "epsilon"}
    weights = []
    for name, stage in (("open", shared), ("spelt", shared | spelt)):
        command = [recipe(tmp_path, stage), "--output", str(tmp_path / name), "--device", "cpu"]
        assert train([*command, "--quiet"]) == 0
        weights.append(load_file(tmp_path / name / "tune" / "step-00000001" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            ("--prediction", "v_prediction"),
            "prediction must be that of {pipeline}, epsilon, got v_",
        ),
        (
            ("--vae-scale", "0.5"),
            "vae_scale must be that of the VAE that made the data, 0.13025, got",
        ),
        (("--resolution", "64"), "{features} must be prepared at 64 px, it holds index-128.json"),
        (("--max-length", "120"), "max_length must be at least that of the start, 300, got 120"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_contradicts_start_or_data_is_refused(
    pipeline: Path, features: Path, tmp_path: Path, capsys: Any, dry: bool,
    option: tuple[str, str], message: str,
) -> None:  # fmt: skip
    stage = {"name": "a", "start": str(pipeline), "pipeline": str(pipeline)}
    path = recipe(tmp_path, stage | {"data": {"source": str(features)}})
    command = [path, "--output", str(tmp_path / "run"), "--device", "cpu", *option]
    (line,) = lines(capsys, *command, *["--dry-run"] * dry)
    assert line.startswith(message.format(pipeline=pipeline, features=features))
    assert not (tmp_path / "run").exists()


# All that is wrong at once.


def everything_wrong(place: Path, pipeline: Path, features: Path) -> str:
    first = {
        "name": "first", "start": "absent.pth", "pipeline": str(place),
        "data": {"source": "nowhere", "prior": "elsewhere", "crop": 8},
        "batch": {"images": 5, "accumulate": 2}, "optimizer": {"name": "adamw-8bit"},
    }  # fmt: skip
    second = {
        "name": "second", "start": str(pipeline), "pipeline": str(pipeline), "max_length": 5,
        "vae_scale": 0.5, "prediction": "v_prediction", "aspect": False,
        "data": {"source": str(features), "captions": {"poem": 1}},
        "kv_compress": "0-99:2", "lora": {"rank": 2},
    }  # fmt: skip
    return recipe(place, first, second, {"name": "third", "trains": "nothing"})


WRONG = (
    "first: batch.images must be a multiple of processes / sequence × batch.accumulate, 2, got 5",
    'first: data.crop is for the source "shapes" only, got 8',
    "first: absent.pth: no such file or directory",
    "has no tokenizer, text_encoder, vae, scheduler folder",
    "first: data.source must be a folder of prepared data, nowhere is none",
    "first: data.prior must be a folder of prepared data, elsewhere is none",
    "second: kv_compress must be empty, in a stage of its own, with lora.rank 2",
    "second: max_length must be at least that of the start, 300, got 5",
    "epsilon, got v_prediction",
    "second: vae_scale must be that of the VAE that made the data, 0.13025, got 0.5",
    "second: caption_weights must name captions of the data (prompt), got poem",
    "third: trains must be one of autoencoder, clip, controlnet, decoder, lcm, tdm, text_encoder, transformer, "
    "got 'nothing'",
    "--keep must be at least 1, got 0",
    "--save-every must be at least 1, got 0",
    "track must name installed libraries, got wandb; pip install wandb",
)


def test_a_dry_run_names_all_that_is_wrong_and_leaves_nothing(
    pipeline: Path, features: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(
        trackers, "_import", lambda name: (_ for _ in ()).throw(trackers._absent(name))
    )
    path = everything_wrong(tmp_path, pipeline, features)
    options = ["--save-every", "0", "--keep", "0", "--track", "wandb", "--device", "cpu"]
    found = lines(capsys, path, "--dry-run", "--output", str(tmp_path / "run"), *options)
    for wanted in WRONG:
        assert any(wanted in line for line in found), (wanted, found)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["recipe.yaml"]


def test_an_output_that_cannot_be_written_and_a_library_that_is_absent(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    (tmp_path / "file").write_text("")
    output = ["--output", str(tmp_path / "file" / "run"), "--stage", "read", "--device", "cpu"]
    for dry in ([], ["--dry-run"]):
        found = lines(capsys, "shapes", *output, "--optimizer.name", "adamw-8bit", *dry)
        assert [line.split(",")[0] for line in found] == [
            "--output must be a folder",
            "optimizer.name must not be adamw-8bit without torchao; pip install 'pixart-fast[train]'",
        ]


def test_a_precision_that_the_device_does_not_have_is_refused(monkeypatch: Any) -> None:
    execute.check_precision(Stage("a", precision="bf16"), CPU)
    execute.check_precision(Stage("a", precision="fp32"), CPU)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # as PyTorch does then
    with pytest.raises(ValueError, match="precision must be fp32 on this cpu device, got bf16"):
        execute.check_precision(Stage("a", precision="bf16"), CPU)


def test_a_state_that_a_stage_cannot_go_on_from_is_found_before(
    tmp_path: Path, capsys: Any
) -> None:
    save_state(tmp_path / "x" / "other", 1, {}, {"stage": "other", "seconds": 0.0})
    state = str(tmp_path / "x" / "other" / "step-00000001")
    command = ["shapes", "--stage", "read", "--resume", state, "--device", "cpu"]
    for dry in ([], ["--dry-run"]):
        (line,) = lines(capsys, *command, "--output", str(tmp_path / "run"), *dry)
        assert line.startswith("--resume must name a state of stage read, got one of other")
    (line,) = lines(capsys, *command[:3], "--resume", str(tmp_path / "y"), "--dry-run")
    assert "must be a saved state" in line


def test_where_nothing_is_wrong_the_plan_is_all_that_is_printed(
    tmp_path: Path, capsys: Any
) -> None:
    assert train(["shapes", "--dry-run", "--output", str(tmp_path / "run"), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    names = [stage.name for stage in load_recipe("shapes")]
    assert [text.split(":")[0] for text in out.split("\n\n")] == names and not err
    assert "vae-crops: 1.6 M parameters of the autoencoder, 2500 steps" in out
    assert not (tmp_path / "run").exists()
    # A stage alone needs what comes before it.
    found = lines(
        capsys, "shapes", "--dry-run", "--stage", "base", "--output", str(tmp_path / "run")
    )
    assert [line.split(",")[0] for line in found] == [
        "stage read must be trained first", "stage vae-last must be trained first"
    ]  # fmt: skip


@pytest.mark.parametrize("given", [{"sizes": (256,)}, {"scenes": (("one", 1.0),)}, {"crop": 32}])
@pytest.mark.parametrize("name", ["vae-crops", "read", "base"])
def test_what_a_task_does_not_read_is_refused(name: str, given: dict[str, Any]) -> None:
    stages = load_recipe("shapes")
    reads = {"vae-crops": {"crop", "sizes"}, "read": {"scenes"}, "base": {"scenes", "sizes"}}
    (stage,) = (stage for stage in stages if stage.name == name)
    found = list(tasks.task_of(stage).check(replace(stage, data=replace(stage.data, **given))))
    (field,) = given
    wanted = [] if field in reads[name] else [f"data.{field} is read where trains is "]
    assert len(found) == len(wanted) and all(map(str.startswith, found, wanted))


def test_rules_of_later_stages_are_known_before_the_first_is_trained(
    tmp_path: Path, capsys: Any
) -> None:
    first = {"name": "a", "trains": "autoencoder", "start": "random", "resolution": 16, "steps": 1}
    first |= {"data": {"source": "shapes"}, "batch": {"images": 1}, "precision": "fp32"}
    second = {**first, "name": "b", "start": "previous", "data": {"source": "shapes", "crop": 9}}
    command = [recipe(tmp_path, first, second), "--output", str(tmp_path / "run"), "--quiet"]
    rule = "data.crop must be a positive multiple of 8, got 9"
    assert lines(capsys, *command, "--device", "cpu") == [f"b: {rule}"]
    assert not (tmp_path / "run").exists()
    # A stage that is finished is asked for nothing.
    assert train([*command, "--device", "cpu", "--stage", "a"]) == 0
    assert lines(capsys, *command, "--device", "cpu", "--batch.images", "2") == [rule]


@pytest.mark.parametrize("dry", [True, False])
def test_a_crop_is_no_larger_than_a_resolution_that_is_left_open(
    tmp_path: Path, capsys: Any, dry: bool
) -> None:
    stage = {"name": "a", "trains": "autoencoder", "start": "random"}
    path = recipe(tmp_path, stage | {"data": {"source": "shapes", "crop": 4096}})
    command = [path, "--output", str(tmp_path / "run"), "--device", "cpu", "--precision", "fp32"]
    assert lines(capsys, *command, *["--dry-run"] * dry) == [
        "data.crop must be at most resolution 1024, got 4096"
    ]


@pytest.mark.parametrize(
    "arguments",
    [[], ["--output", "x"], ["absent"], ["shapes", "--keep", "0"], ["shapes", "--device", "x"],
     ["shapes", "--batch.images", "-1"], ["shapes", "--dry-run", "--stage", "base"]],
)  # fmt: skip
def test_of_processes_on_one_machine_the_first_complains(
    arguments: list[str], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for local_rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert train(arguments) == 2
        assert bool(capsys.readouterr().err) == (local_rank == 0)


def test_a_plan_builds_a_few_models_for_each_stage(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    built: list[Any] = []
    real = starts.empty_model
    monkeypatch.setattr(starts, "empty_model", lambda config: built.append(config) or real(config))
    stages: list[dict[str, Any]] = [
        {"name": f"s{n}", "data": {"source": "absent"}} for n in range(7)
    ]
    stages[0]["start"] = "random"
    stages[0]["size"] = {"depth": 1, "hidden_size": 32, "num_heads": 2}
    lines(capsys, recipe(tmp_path, *stages), "--dry-run", "--device", "cpu", "--resolution", "64")
    assert 7 <= len(built) <= 4 * 7


# One more task: a module, and a line in TASKS.


class Line:
    """What a module of tasks has, to fit one number."""

    class Task:
        def __init__(self, stage: ResolvedStage) -> None:
            self.model = torch.nn.Linear(1, 1)

        def load(self, step: int, parts: int) -> list[torch.Tensor]:
            return [torch.ones(1, 1)] * parts

        def losses(self, model: torch.nn.Module, part: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": model(part).square().mean()}

        def images(self, part: torch.Tensor) -> int:
            return 1

        tokens = flops = images

        def export(self, folder: Path) -> None:
            (folder / "line").touch()

        def validate(self, step: int, folder: Path) -> dict[str, float]:
            return {}

    @staticmethod
    def check(stage: Stage) -> Iterator[str]:
        if stage.aspect:
            yield "aspect must be false for a line"

    @staticmethod
    def check_files(stage: ResolvedStage, run: Run) -> Iterator[str]:
        yield from () if stage.start == "random" else ("start must be random",)

    @staticmethod
    def plan(stage: ResolvedStage, run: Run) -> str:
        return f"{stage.name}: a line"

    @staticmethod
    def build(stage: ResolvedStage, run: Run) -> Any:
        return Line.Task(stage)


def test_another_task_is_a_module_and_a_line(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(tasks.TASKS, ("line", tasks.PREPARED), Line)  # type: ignore[arg-type]
    stage = {"name": "fit", "trains": "line", "start": "random", "steps": 2}
    command = [recipe(tmp_path, stage), "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert lines(capsys, *command, "--aspect", "--start", "x", "--dry-run") == [
        "aspect must be false for a line", "start must be random"
    ]  # fmt: skip
    assert train([*command, "--dry-run"]) == 0 and capsys.readouterr().out == "fit: a line\n"
    assert train([*command, "--batch.images", "1", "--quiet"]) == 0
    assert (tmp_path / "run" / "fit" / "step-00000002" / "line").exists()


def test_training_refuses_with_every_line_that_a_dry_run_has(
    pipeline: Path, tmp_path: Path
) -> None:
    stage = Stage("a", start=str(pipeline), data=Data("absent"), batch=Batch(images=2))
    run = Run(tmp_path, [stage], CPU, save_every=0)
    _, found = execute.dry_run(run, ["a"])
    assert len(found) == 3  # also the null caption, which its start does not hold
    with pytest.raises(Problems) as fields:
        execute.train(run, "a")
    run.save_every = 1
    with pytest.raises(Problems) as files:
        execute.train(run, "a")
    assert [*fields.value.lines, *files.value.lines] == found
