import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pixart.config import EMBEDDED, KVCompression
from pixart.diffusion import add_noise
from pixart.generate import main as generate
from pixart.pipeline.text_to_image import Pipeline
from pixart.shapes.caption import WORDS, describe
from pixart.shapes.scene import sample_scene
from pixart.train import main as train
from pixart.training import execute
from pixart.training.batch import TrainingSample, stack
from pixart.training.outlines import outline_blocks, outline_errors
from pixart.training.recipe import load_recipe
from pixart.training.run import Run
from pixart.training.scenes import anchor_latents, draw_sample
from pixart.training.stage import Batch, Data, Stage
from pixart.training.state import latest_state
from pixart.training.tasks import autoencoder
from pixart.training.tasks.shapes import ShapesTask, open_pair, train_tokenizer

ROOT = Path(__file__).parent.parent.parent
ASSETS = ROOT / "pixart" / "assets" / EMBEDDED
TINY = [
    "--steps",
    "2",
    "--batch.images",
    "4",
    "--validation.every",
    "2",
    "--validation.images",
    "2",
    "--quiet",
]


class CharacterTokenizer:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text] + [1]


def test_anchored_latents_are_block_means_and_the_place_of_brightness() -> None:
    pictures = torch.zeros(1, 3, 16, 16)
    pictures[:, 0] = 0.5
    pictures[:, :, 8:, 12:] = 1.0  # the right half of the last block
    latents = anchor_latents(pictures)
    assert latents.shape == (1, 4, 2, 2)
    assert torch.allclose(latents[0, :3, 0, 0], torch.tensor([0.75, 0.0, 0.0]))
    assert torch.allclose(latents[0, :3, 1, 1], torch.tensor([1.125, 0.75, 0.75]))
    assert latents[0, 3, 0, 0].abs() < 1e-6 < latents[0, 3, 1, 1]


def test_every_word_of_the_grammar_is_one_piece(tmp_path: Path) -> None:
    import sentencepiece

    train_tokenizer(tmp_path / "spiece.model", captions=2000)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    rng = random.Random(0)
    printed = {w for k in ("one", "pair", "group") for _ in range(200)
            for w in describe(sample_scene(rng, k), rng).replace(",", "").split()}  # fmt: skip
    assert printed <= WORDS
    assert all(len(processor.encode(word)) == 1 for word in printed)
    assert [processor.pad_id(), processor.eos_id(), processor.unk_id()] == [0, 1, 2]


def test_a_tenth_of_the_captions_are_left_empty_for_guidance() -> None:
    rng, stage = random.Random(0), Stage("any").resolved()
    samples = [draw_sample(rng, CharacterTokenizer(), 64, stage) for _ in range(200)]
    assert 8 < sum(sample.mask.sum() == 1 for sample in samples) < 36
    batch = stack(samples)
    assert batch.latents.shape == (200, 4, 8, 8) and batch.features.shape[:2] == batch.mask.shape
    assert not batch.features[~batch.mask].any()


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of every stage of the embedded model's recipe."""
    output = tmp_path_factory.mktemp("shapes") / "run"
    assert train(["shapes", "--output", str(output), *TINY]) == 0
    return output


def test_one_command_trains_every_stage_into_a_pipeline_that_draws(tiny_run: Path) -> None:
    for stage in load_recipe("shapes"):
        state = latest_state(tiny_run / stage.name)
        assert state is not None and state.name == "step-00000002"
        log = (tiny_run / stage.name / "log.jsonl").read_text().splitlines()
        assert any("validation/loss" in line for line in log)
    pipeline = tiny_run / "sharpen" / "step-00000002" / "pipeline"
    pipe = Pipeline.from_pretrained(pipeline, device="cpu", cache_dir=None)
    assert pipe.transformer.config.kv_compression == KVCompression((3, 4, 5))
    printed = "".join(path.read_text() for path in pipeline.rglob("*.json"))
    assert str(tiny_run) not in printed and "_name_or_path" not in printed
    (image,) = pipe("a red circle", height=64, width=64, steps=2)
    assert image.size == (64, 64)
    from diffusers import AutoencoderKL
    from transformers import T5EncoderModel

    AutoencoderKL.from_pretrained(pipeline / "vae")
    T5EncoderModel.from_pretrained(pipeline / "text_encoder")


def test_pictures_of_fixed_prompts_show_how_the_embedded_model_learns(
    tiny_run: Path, tmp_path: Path
) -> None:
    for name in ("vae-last", "read", "tokenizer"):
        (tmp_path / name).symlink_to(tiny_run / name)
    prompts = ["--validation.prompts", "a red circle", "a blue star"]
    command = ["shapes", "--output", str(tmp_path), "--stage", "base", *TINY, *prompts]
    assert train([*command, "--validation.sampling-steps", "2"]) == 0
    drawn = sorted((tmp_path / "base" / "pictures" / "step-00000002").iterdir())
    assert [picture.name for picture in drawn] == ["00.png", "01.png"]
    with Image.open(drawn[0]) as first, Image.open(drawn[1]) as second:
        assert first.size == second.size == (128, 128) and first.tobytes() != second.tobytes()


def test_a_finished_run_is_not_trained_again(tiny_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    assert train(["shapes", "--output", str(tiny_run), *TINY]) == 0
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


def train_base(start: Path, output: Path, processes: int, *arguments: str) -> list[float]:
    """Train the base stage after the stages of another run; returns its validation losses."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    output.mkdir(exist_ok=True)
    for name in ("vae-last", "read", "tokenizer"):
        if not (output / name).exists():
            (output / name).symlink_to(start / name)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), "-m", "--", "pixart.train", "shapes"),
        *("--stage", "base", "--output", str(output), "--device", "cpu"),
        *("--steps", "4", "--batch.images", "4", "--precision", "fp32", "--quiet"),
        *("--optimizer.name", "came", "--optimizer.betas", "None"),
        *("--validation.every", "1", *arguments),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = map(json.loads, (output / "base" / "log.jsonl").read_text().splitlines())
    return [line["validation/loss"] for line in lines if "validation/loss" in line]


@pytest.fixture(scope="module")
def losses_alone(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    losses = train_base(tiny_run, tmp_path_factory.mktemp("alone"), 1)
    assert len(losses) == 4
    return losses


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_like_one(
    tiny_run: Path, losses_alone: list[float], tmp_path: Path, how: str
) -> None:
    """The published way to run on more than one process, also cut with FSDP2."""
    losses = train_base(tiny_run, tmp_path, 2, "--parallel", how)
    assert losses == pytest.approx(losses_alone, rel=1e-4)


@pytest.mark.slow
def test_a_state_goes_on_with_another_number_of_processes(
    tiny_run: Path, losses_alone: list[float], tmp_path: Path
) -> None:
    """Weights, averages and optimizer states that were cut in two, then whole, then cut in four."""
    for processes, steps in ((2, 1), (1, 1), (4, 2)):
        options = ("--parallel", "fsdp", "--stop-after", str(steps))
        losses = train_base(tiny_run, tmp_path, processes, *options)
    assert losses == pytest.approx(losses_alone, rel=1e-4)


def test_a_transformer_starts_with_the_text_encoder_that_was_trained_before_it(
    tiny_run: Path,
) -> None:
    stages = load_recipe("shapes")
    base = next(stage for stage in stages if stage.name == "base")
    read = latest_state(tiny_run / "read")
    assert read is not None
    from transformers import T5EncoderModel

    trained = T5EncoderModel.from_pretrained(read / "text_encoder").state_dict()
    run = Run(tiny_run, stages, torch.device("cpu"))
    for stage, same in ((base, True), (replace(base, start="random"), False)):
        task = execute.build(run, stage)
        assert isinstance(task, ShapesTask)
        taken = task.text_encoder.state_dict()
        assert all(torch.equal(trained[name], taken[name]) for name in trained) == same


def refused(arguments: list[str], capsys: Any) -> str:
    assert train(arguments) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("pixart.train: ") and "\n" not in line
    return line


def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path: Path, capsys: Any) -> None:
    output = ["--output", str(tmp_path / "new"), "--device", "cpu"]
    assert "stage vae-crops must be trained first" in refused(
        ["shapes", *output, "--stage", "vae-whole"], capsys
    )
    assert "--stage must be one of vae-crops" in refused(
        ["shapes", *output, "--stage", "x"], capsys
    )
    assert (
        "recipe must be one of alpha, controlnet, dmd, kv-convert, lcm, lora, scalability, shapes, "
        "shapes-clip, shapes-control, shapes-kv, shapes-lcm, shapes-tdm, sigma, tdm"
        in refused(["absent", *output], capsys)
    )
    assert "multiple of processes" in refused(
        ["shapes", *output, "--batch.accumulate", "3", "--stage", "vae-crops"], capsys
    )
    assert "start of a text_encoder must be random" in refused(
        ["shapes", *output, "--stage", "read", "--start", "previous"], capsys
    )
    assert 'data.source must be "shapes" where trains is text_encoder' in refused(
        ["shapes", *output, "--stage", "read", "--data.source", "x"], capsys
    )
    (tmp_path / "base").mkdir()
    assert "--output must be new" in refused(
        ["shapes", "--output", str(tmp_path), "--resume", "none"], capsys
    )


def test_an_unknown_option_is_refused(capsys: Any) -> None:
    line = refused(["shapes", "--optimizer.learningrate", "1"], capsys)
    assert (
        "--optimizer.learningrate: unknown option; did you mean --optimizer.learning-rate" in line
    )


def test_the_plan_names_what_every_stage_will_cost(capsys: Any) -> None:
    assert train(["sigma", "--dry-run", "--device", "cpu"]) == 2  # for there are no data
    printed, complaints = capsys.readouterr()
    assert "512px: data.source must be a folder of prepared data, data/512 is none" in complaints
    assert "4096px-kv: 611.0 M parameters, 2000 steps" in printed
    assert "4096×4096    65536" in printed and "1024px: 610.9 M" in printed


def test_the_embedded_model_is_compressed_further_and_draws(tmp_path: Path) -> None:
    """Train, then generate: the recipe that converts the model that ships."""
    small = ["--batch.images", "2", "--validation.images", "2", "--data.sizes", "64"]
    output = tmp_path / "kv"
    assert (
        train(["shapes-kv", "--output", str(output), "--stop-after", "1", "--quiet", *small]) == 0
    )
    pipeline = output / "convert" / "step-00000001" / "pipeline"
    picture = tmp_path / "picture.png"
    drawn = ["a red circle on white", "--model", str(pipeline), "--size", "64", "--steps", "2"]
    assert generate([*drawn, "--output", str(picture)]) == 0 and picture.exists()
    config = Pipeline.from_pretrained(pipeline, cache_dir=None).transformer.config
    assert config.kv_compression == KVCompression((0, 1, 2, 3, 4, 5))


def test_curves_are_drawn_from_logs(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    assert train(["plot", str(tiny_run), "--output", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "must hold log.jsonl" in refused(["plot", str(tmp_path / "absent")], capsys)


def test_outlines_are_the_blocks_of_more_than_one_colour_and_their_error_is_of_x0() -> None:
    pictures = torch.zeros(1, 3, 16, 16)
    pictures[:, :, 4:, 8:] = 1.0  # its upper edge crosses the second block, its left one none
    assert outline_blocks(pictures).tolist() == [[[False, True], [False, False]]]
    latents = anchor_latents(pictures)
    one = TrainingSample(
        latents=latents, noise=torch.randn(latents.shape), timesteps=torch.zeros(1, dtype=torch.long),
        features=torch.zeros(1, 1, 1), mask=torch.ones(1, 1, dtype=torch.bool),
        size=torch.zeros(1, 2), aspect_ratio=torch.ones(1, 1), weight=torch.ones(1),
    )  # fmt: skip

    def exact(off: float, block: tuple[int, int]) -> Callable[[Tensor, Tensor], Tensor]:
        """The noise that makes x_0 wrong by `off` in one block."""

        def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
            wrong = latents.clone()
            wrong[0, :, block[0], block[1]] += off
            signal = add_noise(wrong, torch.zeros_like(latents), timesteps)
            sigma = add_noise(torch.zeros_like(latents), torch.ones_like(latents), timesteps)
            return (x_t - signal) / sigma

        return denoise

    assert max(outline_errors(exact(0.5, (0, 0)), one, [pictures], "epsilon").values()) < 1e-3
    found = outline_errors(exact(0.5, (0, 1)), one, [pictures], "epsilon")
    assert found == pytest.approx({50: 0.5, 100: 0.5, 200: 0.5}, abs=1e-3)


def test_drawn_stages_log_the_error_on_outlines_at_every_size(tiny_run: Path) -> None:
    lines = map(json.loads, (tiny_run / "compress" / "log.jsonl").read_text().splitlines())
    found = {key.removeprefix("validation/") for line in lines for key in line}
    wanted = {f"outline_error_{size}@{t}" for size in (128, 256) for t in (50, 100, 200)}
    assert wanted <= found


def test_a_decoder_trains_alone_and_the_encoder_stays(tmp_path: Path) -> None:
    stage = {"steps": 1, "data": {"source": "shapes", "crop": 16}, "batch": {"images": 2}}
    stage |= {"resolution": 32, "precision": "fp32", "optimizer": {"warmup_steps": 0}}
    whole = {"name": "whole", "trains": "autoencoder", "start": "random", **stage}
    alone = {"name": "alone", "trains": "decoder", **stage}
    again = {"name": "again", "trains": "decoder", **stage}
    recipe = tmp_path / "decoder.json"
    recipe.write_text(json.dumps({"stages": [whole, alone, again]}))
    assert (
        train([str(recipe), "--output", str(tmp_path / "run"), "--quiet", "--device", "cpu"]) == 0
    )

    def weights(stage: str) -> dict[str, Tensor]:
        (file,) = (tmp_path / "run" / stage / "step-00000001" / "vae").glob("*.safetensors")
        return load_file(file)

    before, after = weights("whole"), weights("alone")
    for name, weight in before.items():
        is_same = torch.equal(weight, after[name])
        assert is_same == name.startswith(("encoder.", "quant_conv.")), name


def test_a_decoder_may_start_from_a_pipeline(tmp_path: Path) -> None:
    data = Data(source="shapes", sizes=(256, 128), crop=128)
    stage = Stage("alone", "decoder", "shapes", resolution=128, data=data, batch=Batch(images=8))
    run = Run(tmp_path, [stage], torch.device("cpu"))
    task = autoencoder.build(stage.resolved(), run)
    shipped = load_file(ASSETS / "vae" / "diffusion_pytorch_model.safetensors")
    state = task.model.state_dict()
    assert all(torch.equal(state[f"vae.{name}"], w.float()) for name, w in shipped.items())
    (part,) = task.load(1, 1)
    assert part.pictures.shape == (8, 3, 128, 128), "parts of pictures of 256 px"
    sizes = {noise.std().item() for noise in part.noise}
    assert 0 < min(sizes) < 0.5 * max(sizes) < 0.1, "latents of all degrees of cleanness"


def test_no_lot_beside_the_stages_decides_which_captions_are_dropped() -> None:
    """Among processes, and after a stop, a step is what it would have been."""
    stage = Stage("any", start="shapes", data=Data(source="shapes")).resolved(resolution=32)
    pair, spiece = open_pair(replace(stage, vae_scale=1.0, prediction="v_prediction"))
    task = ShapesTask(pair, stage, spiece, None)
    task.model.train()
    [part] = task.load(0, 1)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        with torch.no_grad():
            return float(task.losses(task.model, part)["loss"])

    assert loss(0) == loss(1)
