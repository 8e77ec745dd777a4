"""Controls: what trains and what stays, what is left behind, and what a further stage begins with."""

import json
import os
import random
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import folder
from PIL import Image
from published import build_sigma
from safetensors.torch import load_file

from pixart.checkpoint.control import open_control
from pixart.checkpoint.load import OpenedTransformer, load_transformer
from pixart.data import main as data
from pixart.dataset.batches import FeatureDataset
from pixart.generate import main as generate
from pixart.model.control import Control
from pixart.shapes.caption import parse
from pixart.train import main as train
from pixart.training import execute
from pixart.training.checkpoints import last_words
from pixart.training.recipe import load_recipe
from pixart.training.run import Run
from pixart.training.scenes import draw_sample
from pixart.training.stage import Batch, ControlSettings, Data, LoRA, Stage
from pixart.training.starts import control_blocks
from pixart.training.tasks.controlnet import ControlTask, begin_control
from pixart.training.tasks.transformer import DenoisingTask

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
STAGE = Stage(
    "steer",
    trains="controlnet",
    start="the base",
    resolution=64,
    vae_scale=0.13025,
    batch=Batch(images=2),
    precision="fp32",
    data=Data(caption_dropout=0.5),
).resolved()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sigma(tmp_path_factory.mktemp("p"), sample_size=8, vae_channels=(8, 8, 8, 8))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    place = tmp_path_factory.mktemp("data")
    folder(place / "raw", 4, height=64, width=64)
    folder(place / "lines", 4, height=64, width=64)
    prepare(place / "raw", place / "out", pipeline, "--control", str(place / "lines"))
    return place / "out"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "measure_peak", lambda *_: 1e12)  # which takes seconds


def prepare(source: Path, out: Path, pipeline: Path, *options: str) -> None:
    command = ["prepare", str(source), str(out), "--model", str(pipeline), *options]
    assert data([*command, "--resolution", "64", "--square", "--device", "cpu"]) == 0


def task_of(pipeline: Path, features: Path, place: Path, **changes: Any) -> ControlTask:
    stage = replace(STAGE, **changes)
    base = load_transformer(pipeline, dtype=torch.float32)
    network = begin_control(stage, Run(place, [stage], CPU), base)
    return ControlTask(network, base, stage, FeatureDataset(features, 64), CPU)


def stage(pipeline: Path, features: Path, **fields: Any) -> dict[str, Any]:
    return {
        "name": "steer",
        "trains": "controlnet",
        "start": str(pipeline),
        "resolution": 64,
        "data": {"source": str(features), "caption_dropout": 0.0},
        "batch": {"images": 2},
        "steps": 2,
        "precision": "fp32",
        "optimizer": {"warmup_steps": 1, "learning_rate": 1e-2},
        **fields,
    }


def run(place: Path, *stages: dict[str, Any], options: tuple[str, ...] = ()) -> int:
    place.mkdir(exist_ok=True)
    (place / "r.yaml").write_text(json.dumps({"stages": stages}))
    return train(
        [str(place / "r.yaml"), "--output", str(place / "run"), "--device", "cpu", *options]
    )


def test_a_new_control_has_the_loss_of_its_base(
    pipeline: Path, features: Path, tmp_path: Path
) -> None:
    task = task_of(pipeline, features, tmp_path)
    (part,) = task.load(0, 1)
    assert part.control is not None and part.control.shape == part.latents.shape
    plain = DenoisingTask(task.transformer, task.stage, task.dataset, CPU)
    expected = plain.losses(task.transformer, part)
    found = task.losses(task.model, part)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("rank", [0, 2])
def test_copies_or_their_adapters_learn_and_the_base_stays(
    pipeline: Path, features: Path, tmp_path: Path, rank: int
) -> None:
    task = task_of(pipeline, features, tmp_path, lora=LoRA(rank=rank))
    (part,) = task.load(0, 1)
    for block in task.network.control_blocks:
        torch.nn.init.normal_(block.after_proj.weight, std=0.1)
    task.losses(task.model, part)["loss"].backward()
    assert all(not p.requires_grad and p.grad is None for p in task.transformer.parameters())
    learns = {name for name, p in task.model.named_parameters() if p.grad is not None}
    assert learns == {name for name, p in task.model.named_parameters() if p.requires_grad}
    others = {name for name in learns if "lora_" not in name and "_proj." not in name}
    assert bool(others) != bool(rank)
    assert sum("_proj." in name for name in learns) == 2 * (task.network.copies + 1)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_exported_steers_as_what_was_trained(
    pipeline: Path, features: Path, tmp_path: Path, rank: int
) -> None:
    task = task_of(pipeline, features, tmp_path, lora=LoRA(rank=rank))
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    (part,) = task.load(0, 1)
    inputs = (part.latents, part.timesteps, part.features.float(), part.mask)
    task.export(tmp_path)
    with torch.no_grad():
        expected = task.model(part.control, *inputs)
        for name in ("control", "control.safetensors"):
            network = open_control(tmp_path / name, OpenedTransformer.of(task.transformer)).load()
            found = task.transformer(*inputs, controls=[Control(network, part.control)])
            assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(task.transformer(*inputs), expected, atol=1e-3)


def test_training_goes_on_to_the_bit_and_a_further_stage_from_there(
    pipeline: Path, features: Path, tmp_path: Path
) -> None:
    first = stage(pipeline, features)
    second = stage(pipeline, features, name="adapt", start="previous", lora={"rank": 2}, steps=1)
    assert run(tmp_path / "whole", first, second) == 0
    assert run(tmp_path / "parts", first, second, options=("--stop-after", "1")) == 0
    assert run(tmp_path / "parts", first, second) == 0
    for name in ("steer/step-00000002", "adapt/step-00000001"):
        one, other = (
            load_file(tmp_path / place / "run" / name / "control.safetensors")
            for place in ("whole", "parts")
        )
        assert all(torch.equal(one[key], value) for key, value in other.items())
    state = tmp_path / "whole" / "run" / "steer" / "step-00000002"
    # The base is in no state: it is where it was.
    held = sum(path.stat().st_size for path in (state / "state").glob("*.safetensors"))
    base = sum(path.stat().st_size for path in (pipeline / "transformer").glob("*.safetensors"))
    assert held < 8 * base


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": "random"}, "start must be a trained PixArt"),
        ({"kv_compress": "0:2"}, "kv_compress must be empty where trains is controlnet"),
        ({"micro_condition": True}, "micro_condition must be false where trains is controlnet"),
        ({"control": {"blocks": 99}}, "control.blocks must be below the base's"),
        ({"data": {"source": "shapes", "nameless": 0.5}, "trains": "transformer"}, "data.nameless"),
        ({"trains": "transformer", "control": {"blocks": 1}}, "control is read where trains is"),
        ({"lora": {"rank": 2, "targets": ["x"]}}, "targets must be among attn.qkv"),
    ],
)
def test_what_cannot_be_is_said(
    pipeline: Path,
    features: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    message: str,
) -> None:
    assert run(tmp_path, stage(pipeline, features, **fields), options=("--dry-run",)) == 2
    assert message in capsys.readouterr().err


def test_data_without_pictures_that_steer_are_refused(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "raw", 2, height=64, width=64)
    prepare(tmp_path / "raw", tmp_path / "out", pipeline)
    assert run(tmp_path, stage(pipeline, tmp_path / "out"), options=("--dry-run",)) == 2
    assert "must have a control picture of every sample" in capsys.readouterr().err


@pytest.mark.parametrize(("depth", "copies"), [(28, 13), (6, 3), (2, 1)])
def test_about_half_of_the_blocks_are_copied_as_published(
    pipeline: Path, depth: int, copies: int
) -> None:
    config = replace(load_transformer(pipeline).config, depth=depth)
    assert control_blocks(STAGE, config) == copies
    stage = replace(STAGE, control=ControlSettings(blocks=1))
    assert control_blocks(stage, config) == 1


def test_drawn_outlines_come_with_captions_that_leave_them_to_tell() -> None:
    (recipe,) = load_recipe("shapes-control")
    drawn = replace(recipe, data=replace(recipe.data, nameless=1.0, caption_dropout=0.0)).resolved()
    texts: list[str] = []

    class Tokenizer:
        def encode(self, text: str) -> list[int]:
            texts.append(text)
            return [1]

    samples = [draw_sample(random.Random(k), Tokenizer(), 64, drawn) for k in range(32)]
    for sample in samples:
        assert sample.control is not None and sample.control.shape == sample.latents.shape == (
            1,
            4,
            8,
            8,
        )
    kinds = {statement.kind for text in texts for statement in parse(text)}
    assert kinds == {"background", "count", "colour", "size"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(
    pipeline: Path, features: Path, tmp_path: Path, how: str
) -> None:
    one = stage(pipeline, features, parallel=how, optimizer={"name": "adamw", "warmup_steps": 1})
    assert run(tmp_path, one) == 0
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = [str(tmp_path / "r.yaml"), "--device", "cpu", "--output", str(tmp_path / "two")]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "--", "pixart.train", *arguments]
    subprocess.run([*command, "--quiet"], env=env, check=True, timeout=300)
    found, expected = (
        load_file(tmp_path / name / "steer" / "step-00000002" / "control.safetensors")
        for name in ("two", "run")
    )
    assert all(torch.allclose(found[key], value, atol=1e-5) for key, value in expected.items())


def test_a_compressed_base_is_steered_and_what_is_said_last_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    small = ["--steps", "1", "--batch.images", "2", "--validation.images", "2"]
    assert train(["shapes-control", "--stage", "outline", *arguments, *small]) == 0
    state = tmp_path / "run" / "outline" / "step-00000001"
    assert {"control", "control.safetensors"} <= {path.name for path in state.iterdir()}
    lines = tmp_path / "lines.png"
    Image.new("RGB", (128, 128)).save(lines)
    said = last_words(state, load_recipe("shapes-control")[0])
    command = next(line for line in said if line.startswith("draw with it: "))
    words = shlex.split(command.split(" generate ")[-1].split("pixart.generate ")[-1])
    words[words.index("PICTURE")] = str(lines)
    assert (
        generate([*words, "--output", str(tmp_path / "drawn"), "--device", "cpu", "--steps", "2"])
        == 0
    )
    capsys.readouterr()


def test_metrics_score_what_outlines_alone_can_have_told(tmp_path: Path) -> None:
    validation = [
        "--validation.every", "1", "--validation.images", "2", "--validation.metrics", "shapes",
        "--validation.metric-count", "2", "--validation.best", "shapes",
        "--validation.sampling-steps", "2",
    ]  # fmt: skip
    arguments = ["--output", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    small = ["--steps", "1", "--batch.images", "2"]
    assert train(["shapes-control", "--stage", "outline", *arguments, *small, *validation]) == 0
    log = (tmp_path / "run" / "outline" / "log.jsonl").read_text()
    assert '"validation/shapes"' in log and (tmp_path / "run" / "outline" / "best").exists()
    assert len(list((tmp_path / "run/outline/pictures/step-00000001/metrics").iterdir())) == 2
