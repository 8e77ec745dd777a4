"""Adapters in recipes and on the command lines: from pictures of a subject to pictures with it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import png, write
from PIL import Image
from published import build_sigma
from safetensors.torch import load_file

from pixart.checkpoint.load import load_transformer
from pixart.convert import main as convert
from pixart.data import main as data
from pixart.dataset.annotations import with_prompt
from pixart.dataset.batches import FeatureDataset
from pixart.dataset.sources import open_source
from pixart.generate import main as generate
from pixart.lora.adapters import load_lora, merge_lora
from pixart.model.transformer import PixArt
from pixart.pipeline.directory import open_directory
from pixart.pipeline.pictures import read_metadata
from pixart.pipeline.text_to_image import Pipeline
from pixart.train import main as train
from pixart.training.recipe import load_recipe
from pixart.training.stage import Batch, Data, LoRA, Stage
from pixart.training.tasks.transformer import DenoisingTask
from pixart.training.trainer import Trainer

pytest.importorskip("peft")
CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--quiet", "--precision", "fp32", "--batch.images", "2"]
QUICK += ["--optimizer.learning-rate", "1e-2", "--optimizer.warmup-steps", "1", "--lora.rank", "2"]
EMBEDDED = ["--prediction", "v_prediction", "--vae-scale", "1.0", "--max-length", "40"]


def prepare(place: Path, name: str, prompt: str, pipeline: str, size: int, count: int) -> Path:
    """Features of pictures that have no captions of their own."""
    for number in range(count):
        write(place / f"{name}-raw" / f"{number}.png", png(size, size, seed=number))
    command = ["prepare", str(place / f"{name}-raw"), str(place / name), "--model", pipeline]
    command += ["--resolution", str(size), "--square", "--prompt", prompt, "--device", "cpu"]
    assert data(command) == 0
    return place / name


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sigma(tmp_path_factory.mktemp("p"), sample_size=16, vae_channels=(8, 8, 8, 8))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    place = tmp_path_factory.mktemp("data")
    return prepare(place, "subject", "a photo of sks dog", str(pipeline), 128, 3)


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    place = tmp_path_factory.mktemp("data")
    return prepare(place, "class", "a photo of a dog", str(pipeline), 128, 4)


@pytest.fixture
def command(pipeline: Path, subject: Path, prior: Path) -> list[str]:
    """The shipped recipe on a small pipeline, three steps."""
    places = ["--start", str(pipeline), "--pipeline", str(pipeline), "--data.source", str(subject)]
    places += ["--data.prior", str(prior), "--resolution", "128", "--no-aspect"]
    return ["lora", *places, *QUICK, "--steps", "3"]


def newest(run: Path, stage: str = "adapt") -> Path:
    (state,) = (run / stage).glob("step-00000003")
    return state


def tensors(model: PixArt) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def test_the_recipe_trains_adapters_and_exports_them_beside_the_merged_model(
    tmp_path: Path, command: list[str], pipeline: Path
) -> None:
    assert train([*command, "--output", str(tmp_path)]) == 0
    folder = newest(tmp_path)
    exported = tensors(load_transformer(folder / "model.safetensors"))
    base = load_transformer(pipeline, dtype=torch.float32)
    before = tensors(base)
    adapted = ("qkv.weight", "attn.proj.weight", "linear.weight", "fc1.weight", "fc2.weight")
    for name, tensor in exported.items():
        if name == "y_embedder.y_embedding":
            continue  # the null caption comes from the pipeline
        changed = name.startswith("blocks.") and name.endswith(adapted)
        assert torch.equal(tensor, before[name]) != changed, name
    merged = tensors(merge_lora(load_lora(base, [(folder / "lora", 1.0)])))
    for name in set(merged) - {"y_embedder.y_embedding"}:
        assert torch.allclose(merged[name], exported[name], atol=1e-6), name


class Killed(BaseException):
    """As SIGKILL: nothing is saved any more."""


def test_a_killed_run_ends_with_the_adapters_of_one_that_was_not(
    tmp_path: Path, command: list[str], monkeypatch: Any
) -> None:
    assert train([*command, "--output", str(tmp_path / "whole")]) == 0
    advance = Trainer.advance

    def die(self: Trainer, parts: Any) -> Any:
        if self.step == 2:
            raise Killed
        return advance(self, parts)

    monkeypatch.setattr(Trainer, "advance", die)
    with pytest.raises(Killed):
        train([*command, "--output", str(tmp_path / "parts"), "--save-every", "1"])
    monkeypatch.undo()
    assert train([*command, "--output", str(tmp_path / "parts")]) == 0
    for file in ("lora/adapter_model.safetensors", "model.safetensors"):
        whole, parts = (load_file(newest(tmp_path / run) / file) for run in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
        assert all(tensor.any() for name, tensor in parts.items() if "lora_B" in name)


def test_a_stage_after_it_starts_from_the_merged_model(
    tmp_path: Path, pipeline: Path, subject: Path
) -> None:
    shared = {
        "resolution": 128, "data": {"source": str(subject)}, "batch": {"images": 2}, "steps": 3,
        "precision": "fp32", "pipeline": str(pipeline), "optimizer": {"warmup_steps": 1},
    }  # fmt: skip
    adapt = {"name": "adapt", "start": str(pipeline), "lora": {"rank": 2, "targets": ["attn.qkv"]}}
    after = {"name": "after", "optimizer": {"learning_rate": 1e-30}}
    (tmp_path / "two.yaml").write_text(json.dumps({"defaults": shared, "stages": [adapt, after]}))
    run = tmp_path / "run"
    command = [str(tmp_path / "two.yaml"), "--output", str(run), "--device", "cpu", "--quiet"]
    assert train(command) == 0
    one, two = (
        load_transformer(newest(run, name) / "model.safetensors") for name in ("adapt", "after")
    )
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not (newest(run, "after") / "lora").exists()


STAGE = Stage(
    "any",
    start="a model",
    resolution=128,
    batch=Batch(images=2),
    precision="fp32",
    data=Data(caption_dropout=0.0),
    lora=LoRA(rank=2),
).resolved()


@pytest.fixture
def task(pipeline: Path, subject: Path, prior: Path) -> DenoisingTask:
    model = load_transformer(pipeline, dtype=torch.float32)
    one, other = (FeatureDataset(place, 128) for place in (subject, prior))
    return DenoisingTask(model, STAGE, one, CPU, prior=other)


def test_as_many_pictures_of_the_class_join_a_step_with_their_own_weight(
    task: DenoisingTask,
) -> None:
    task.stage = replace(STAGE, data=replace(STAGE.data, prior="class", prior_weight=0.25))
    (part,) = task.load(0, 1)
    assert part.weight.tolist() == [1, 1, 0.25, 0.25]
    lengths = part.mask.sum(1).tolist()  # "a photo of a dog" and "a photo of sks dog"
    assert lengths[0] == lengths[1] != lengths[2] == lengths[3]
    each = []
    for k in range(4):
        row = replace(
            part,
            **{
                name: value[k : k + 1]
                for name in part.__dataclass_fields__
                if name != "weight" and (value := getattr(part, name)) is not None
            },
        )
        each.append(task.losses(task.model, replace(row, weight=torch.ones(1)))["loss"])
    whole = task.losses(task.model, part)["loss"]
    wanted = (each[0] + each[1] + 0.25 * (each[2] + each[3])) / 4
    assert torch.allclose(whole, wanted, rtol=1e-5)


def test_a_prior_that_does_not_fit_is_refused_before_training(
    tmp_path: Path, task: DenoisingTask, prior: Path
) -> None:
    small = FeatureDataset(prior, 128)
    small.entries = [replace(entry, bucket=(64, 64)) for entry in small.entries]
    scaled = FeatureDataset(prior, 128)
    scaled.scaling_factor = 0.5
    for data_, reason in (
        (small, "data.prior must have a picture in every bucket of the data, got none of 128×128"),
        (scaled, "vae_scale must be that of the VAE that made the data, 0.5"),
    ):
        with pytest.raises(ValueError, match=reason):
            DenoisingTask(task.transformer, STAGE, task.dataset, CPU, prior=data_)


def test_one_prompt_may_stand_for_all_pictures(tmp_path: Path) -> None:
    write(tmp_path / "0.png", png())
    write(tmp_path / "1.png", png())
    write(tmp_path / "1.txt", "another")
    write(tmp_path / "1.long.txt", "a long one")
    items: Iterator[Any] = iter(with_prompt(open_source(tmp_path), "a photo of sks dog"))
    assert next(items).captions == {"prompt": "a photo of sks dog"}
    assert next(items).captions == {"prompt": "a photo of sks dog", "long": "a long one"}
    with pytest.raises(ValueError, match="prompt must not be empty"):
        with_prompt(open_source(tmp_path), " ")


REFUSED = {
    "unknown targets": (["--lora.targets", "to_q"], "targets must be among x_embedder.proj, "),
    "rank 0 with more": (["--lora.rank", "0", "--lora.alpha", "2"], "lora.rank must be positive"),
    "from random": (["--start", "random"], "start must be a trained model with lora.rank 2"),
    "with compression": (["--kv-compress", "0-1:2"], "kv_compress must be empty"),
    "drawn data": (["--data.source", "shapes"], "data.source must be prepared data"),
    "new conditions": (["--micro-condition"], "micro_condition must be known to the start"),
    "alpha below": (["--lora.alpha", "-1"], "lora.alpha must be positive, got -1.0"),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_adapters_cannot_train_is_refused_in_one_line(
    tmp_path: Path, command: list[str], capsys: Any, options: list[str], reason: str
) -> None:
    assert train([*command, *options, "--output", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("pixart.train: ") and reason in line and "\n" not in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changed", [("--lora.rank", "3"), ("--lora.alpha", "64")])
def test_a_run_is_not_taken_up_with_other_adapters(
    tmp_path: Path, command: list[str], changed: tuple[str, str], capsys: Any
) -> None:
    assert train([*command, "--output", str(tmp_path)]) == 0
    capsys.readouterr()
    assert train([*command, "--output", str(tmp_path), *changed, "--steps", "4"]) == 2
    assert "lora must be as" in capsys.readouterr().err


def test_the_plan_counts_what_is_trained(capsys: Any) -> None:
    assert train(["lora", "--dry-run", "--device", "cpu", "--lora.rank", "8"]) == 2  # no data
    assert "adapt: 610.9 M parameters and 5.9 M of adapters, 1000 steps" in capsys.readouterr().out
    (stage,) = load_recipe("lora")
    assert stage.lora.rank == 16 and stage.lora.alpha is None


@pytest.fixture(scope="module")
def embedded_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("embedded")
    source = prepare(place, "subject", "a large red star on black", "shapes", 128, 2)
    places = ["--start", "shapes", "--pipeline", "shapes", "--data.source", str(source)]
    places += ["--resolution", "128", "--no-aspect", "--output", str(place / "run"), "--steps", "3"]
    assert train(["lora", *places, *QUICK, *EMBEDDED]) == 0
    return newest(place / "run") / "lora"


def draw(name: str, *options: str) -> np.ndarray:
    fixed = ["--size", "64", "--steps", "2", "--device", "cpu", "--no-cache", "--quiet"]
    assert generate(["a red star", *fixed, "--output", name, *options]) == 0
    return np.asarray(Image.open(name))


def test_the_embedded_model_draws_with_adapters_and_again_from_the_picture(
    tmp_path: Path, monkeypatch: Any, embedded_lora: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.chdir(embedded_lora.parent)
    plain, out = draw(str(tmp_path / "plain.png")), str(tmp_path / "a.png")
    drawn = draw(out, "--lora", "lora:0.5", "--lora", "lora")
    assert not np.array_equal(drawn, plain)
    assert np.array_equal(draw(str(tmp_path / "0.png"), "--lora", "lora:0"), plain)
    kept = read_metadata(Path(out)).model["lora"]
    assert kept == [f"{embedded_lora}:0.5", f"{embedded_lora}:1.0"]
    monkeypatch.chdir(tmp_path)
    assert generate(["--from-image", "a.png", "--no-cache", "--quiet"]) == 0
    assert np.array_equal(np.asarray(Image.open("a-again.png")), drawn)
    pipe = Pipeline.from_pretrained(
        lora=[(embedded_lora, 0.5), (embedded_lora, 1.0)], device="cpu", cache_dir=None
    )
    (image,) = pipe("a red star", height=64, width=64, steps=2)
    assert np.array_equal(np.asarray(image), drawn)


def test_merged_into_a_checkpoint_it_draws_the_same(tmp_path: Path, embedded_lora: Path) -> None:
    source, merged = str(open_directory("shapes", True)), str(tmp_path / "merged.safetensors")
    assert convert([source, merged, "--dtype", "fp32", "--lora", str(embedded_lora)]) == 0
    drawn = draw(str(tmp_path / "a.png"), "--lora", str(embedded_lora))
    assert np.array_equal(draw(str(tmp_path / "b.png"), "--transformer", merged), drawn)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ("absent:0.5", "absent: no such file or directory"),
        ("{lora}:much", "--lora must be PATH or PATH:WEIGHT, a finite number"),
        ("{lora}/adapter_config.json", "is neither a safetensors nor a PyTorch file"),
    ],
)
def test_commands_refuse_what_is_no_lora_and_write_nothing(
    tmp_path: Path, capsys: Any, embedded_lora: Path, lora: str, reason: str
) -> None:
    value, out = lora.format(lora=embedded_lora), str(tmp_path / "new" / "out.safetensors")
    assert generate(["a star", "--lora", value, "--output", f"{out}.png", "--quiet"]) == 2
    assert convert([str(open_directory("shapes", True)), out, "--lora", value]) == 2
    for line in capsys.readouterr().err.strip().splitlines():
        assert reason in line
    assert not (tmp_path / "new").exists()
