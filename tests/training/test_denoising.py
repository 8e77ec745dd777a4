"""Recipes on prepared data: from pictures and captions to states that draw."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import folder
from published import build_sigma
from small_model import build

from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.data import main as data
from pixart.dataset.batches import FeatureDataset
from pixart.diffusion import training_loss
from pixart.pipeline.text_to_image import Pipeline
from pixart.train import main as train
from pixart.training.stage import Batch, Data, Stage
from pixart.training.tasks.transformer import DenoisingTask

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
STAGE = Stage(
    "one",
    resolution=128,
    vae_scale=0.13025,
    batch=Batch(images=4),
    precision="fp32",
    data=Data(caption_dropout=0.0),
).resolved()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sigma(tmp_path_factory.mktemp("p"), sample_size=16, vae_channels=(8, 8, 8, 8))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    place = tmp_path_factory.mktemp("data")
    folder(place / "raw", 10, height=128, width=128)
    prepare = ["prepare", str(place / "raw"), str(place / "out"), "--model", str(pipeline)]
    assert data([*prepare, "--resolution", "128", "--square", "--device", "cpu"]) == 0
    return place / "out"


@pytest.fixture
def task(features: Path, pipeline: Path) -> DenoisingTask:
    model = load_transformer(pipeline, dtype=torch.float32)
    return DenoisingTask(model, STAGE, FeatureDataset(features, 128), CPU)


def recipe(place: Path, start: Path, features: Path, **stage: Any) -> Path:
    """A one-stage recipe as a user would write it."""
    fields = {
        "name": "tune",
        "start": str(start),
        "resolution": 128,
        "data": {"source": str(features)},
        "batch": {"images": 4},
        "steps": 3,
        "precision": "fp32",
        "optimizer": {"warmup_steps": 1},
        "pipeline": str(start),
    }
    path = place / "recipe.yaml"
    path.write_text(json.dumps({"stages": [fields | stage]}))
    return path


def test_the_loss_is_the_published_one(task: DenoisingTask) -> None:
    (part,) = task.load(0, 1)
    model = task.transformer

    def denoise(x_t: Any, t: Any) -> Any:
        return model(x_t, t, part.features, part.mask)

    expected = training_loss(denoise, part.latents, part.timesteps, part.noise)
    losses = task.losses(model, part)
    assert torch.allclose(losses["loss"], expected.loss.mean())
    assert torch.allclose(losses["vb"], expected.vb.mean()) and losses["vb"] > 0


def test_latents_are_drawn_anew_from_the_posterior_and_scaled(task: DenoisingTask) -> None:
    draws = [task._draw(task.dataset, 0, f"place {k}", 1.0).latents for k in range(64)]
    one = task.dataset.batch([0], random.Random(0))
    mean = torch.cat(draws).mean(0)
    assert torch.allclose(mean, one.mean[0] * 0.13025, atol=0.13025 * one.std.max().item())
    assert not torch.equal(draws[0], draws[1])


def test_a_dropped_caption_is_the_null_caption_under_its_own_mask(features: Path) -> None:
    stage = replace(STAGE, data=Data(caption_dropout=1.0))
    dataset = FeatureDataset(features, 128)
    model = build(caption_channels=dataset.batch([0], random.Random(0)).features.shape[2])
    task = DenoisingTask(model, stage, dataset, CPU)
    (part,) = task.load(0, 1)
    length = int(part.mask[0].sum())
    null = model.y_embedder.y_embedding[:length]
    assert torch.allclose(part.features[0, :length].float(), null, atol=1e-2)
    assert model.y_embedder.dropout_prob == 0


def test_a_step_is_the_same_however_many_parts_share_it(task: DenoisingTask) -> None:
    (whole,) = task.load(5, 1)
    parts = task.load(5, 2)
    joined = torch.cat([part.latents for part in parts])
    assert torch.equal(joined, whole.latents)
    assert torch.equal(torch.cat([part.timesteps for part in parts]), whole.timesteps)


def test_every_image_is_seen_in_an_epoch_but_for_those_held_out(features: Path) -> None:
    stage = replace(STAGE, validation=replace(STAGE.validation, every=1, images=2))
    dataset = FeatureDataset(features, 128)
    model = build(caption_channels=dataset.batch([0], random.Random(0)).features.shape[2])
    task = DenoisingTask(model, stage, dataset, CPU)
    seen = {index for batch in task._plan(0) for index in batch}
    assert len(task.held_out) == 2 and seen == set(range(10)) - set(task.held_out)
    values = task.validate(0, Path())
    assert values == task.validate(1, Path()) and values["loss"] > 0
    assert set(values) == {"loss", *(f"mse@{t}" for t in (100, 300, 500, 700, 900))}


def validation_loss(output: Path) -> float:
    lines = map(json.loads, (output / "tune" / "log.jsonl").read_text().splitlines())
    return next(line["validation/loss"] for line in lines if "validation/loss" in line)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_an_odd_image_held_out_counts_once_on_two_processes(
    tmp_path: Path, pipeline: Path, features: Path, how: str
) -> None:
    validation = {"every": 1, "images": 3, "timesteps": [100, 900]}
    path = recipe(tmp_path, pipeline, features, steps=1, parallel=how, validation=validation)
    arguments = [str(path), "--device", "cpu", "--quiet", "--output"]
    assert train([*arguments, str(tmp_path / "one")]) == 0
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "--", "pixart.train", *arguments]
    # Processes that run unequal numbers of forwards would wait for each other for ever.
    subprocess.run([*command, str(tmp_path / "two")], env=env, check=True, timeout=300)
    one, two = (validation_loss(tmp_path / run) for run in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


def test_one_picture_is_trained_on_and_validation_says_that_it_has_no_loss(
    tmp_path: Path, pipeline: Path, caplog: Any
) -> None:
    folder(tmp_path / "raw", 1, height=128, width=128)
    prepare = ["prepare", str(tmp_path / "raw"), str(tmp_path / "one"), "--model", str(pipeline)]
    assert data([*prepare, "--resolution", "128", "--square", "--device", "cpu"]) == 0
    validation = {"every": 1, "images": 4, "prompts": ["a cat"], "sampling_steps": 1}
    path = recipe(tmp_path, pipeline, tmp_path / "one", steps=2, validation=validation)
    assert train([str(path), "--output", str(tmp_path / "run"), "--device", "cpu", "--quiet"]) == 0
    printed = [record.getMessage() for record in caplog.records if record.name == "pixart"]
    assert printed == ["stage tune: validation tells no loss, of one image none can be held out"]
    assert "validation" not in (tmp_path / "run" / "tune" / "log.jsonl").read_text()
    assert (tmp_path / "run" / "tune" / "pictures" / "step-00000002" / "00.png").exists()


def test_data_of_another_vae_are_refused(features: Path, pipeline: Path) -> None:
    model = load_transformer(pipeline)
    with pytest.raises(ValueError, match="vae_scale must be that of the VAE that made the data"):
        DenoisingTask(model, replace(STAGE, vae_scale=0.5), FeatureDataset(features, 128), CPU)
    with pytest.raises(ValueError, match="caption channels for this model"):
        DenoisingTask(build(caption_channels=7), STAGE, FeatureDataset(features, 128), CPU)


@pytest.mark.parametrize("how", ["calibrated", "mean"])
def test_a_dense_checkpoint_becomes_a_compressed_one_that_draws(
    tmp_path: Path, pipeline: Path, features: Path, how: str
) -> None:
    validation = {"every": 3, "images": 2, "prompts": ["a cat"], "sampling_steps": 2}
    path = recipe(
        tmp_path, pipeline, features, kv_compress="0-1:2", kv_start=how, validation=validation
    )
    assert train([str(path), "--output", str(tmp_path / "run"), "--device", "cpu", "--quiet"]) == 0
    state = tmp_path / "run" / "tune" / "step-00000003"
    pictures = tmp_path / "run" / "tune" / "pictures" / "step-00000003"
    assert [path.name for path in pictures.iterdir()] == ["00.png"]
    for place in (state / "model.safetensors", state / "transformer"):
        model = load_transformer(place)
        assert model.config.kv_compression is not None
        pipe = Pipeline.from_pretrained(pipeline, transformer=place, device="cpu", cache_dir=None)
        (image,) = pipe("a cat", height=64, width=64, steps=2)
        assert image.size == (64, 64)


def test_a_stage_takes_up_the_averages_of_the_one_before_at_its_own_size(
    tmp_path: Path, pipeline: Path, features: Path
) -> None:
    path = recipe(tmp_path, pipeline, features)
    stages = json.loads(path.read_text())["stages"]
    second = stages[0] | {"name": "next", "start": "previous", "steps": 1}
    second |= {"optimizer": {"learning_rate": 1e-30}, "max_length": 350}
    path.write_text(json.dumps({"stages": [stages[0], second]}))
    assert train([str(path), "--output", str(tmp_path / "run"), "--device", "cpu", "--quiet"]) == 0
    one, two = (
        load_transformer(tmp_path / "run" / name / f"step-0000000{step}" / "model.safetensors")
        for name, step in (("tune", 3), ("next", 1))
    )
    assert two.config.model_max_length == 350
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_published_checkpoint_may_be_the_start_in_any_format(
    tmp_path: Path, pipeline: Path, features: Path
) -> None:
    model = load_transformer(pipeline)
    save_transformer(model, tmp_path / "m.pth")
    path = recipe(tmp_path, tmp_path / "m.pth", features, steps=1, pipeline="")
    command = [str(path), "--output", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    assert train([*command, "--data.caption-dropout", "0"]) == 0


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--start", "absent.pth"], "absent.pth"),
        (["--data.source", "absent"], "absent"),
        (["--data.captions", "poem", "1"], "caption_weights must name captions"),
        (["--kv-compress", "0-99:2"], "layers must be below depth"),
        (["--start", "previous"], "is the first and cannot start from the previous"),
        (["--resolution", "100"], "must be prepared at 100 px"),
        (["--pipeline", ""], "data.caption_dropout must be 0 for a checkpoint without"),
        (
            [
                *("--pipeline", "", "--data.caption-dropout", "0"),
                *("--validation.prompts", "a cat", "--validation.every", "1"),
            ],
            "pipeline must be named to draw",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_begins(
    tmp_path: Path, pipeline: Path, features: Path, capsys: Any, arguments: list[str], rule: str
) -> None:
    path = recipe(tmp_path, pipeline, features)
    command = [str(path), "--output", str(tmp_path / "run"), "--device", "cpu", *arguments]
    assert train(command) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("pixart.train: ") and rule in line
    assert not any((tmp_path / "run").rglob("step-*"))
