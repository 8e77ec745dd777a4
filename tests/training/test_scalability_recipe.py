"""The recipe of the scalability study: sizes by name, and a small model of it that reads a CLIP and draws."""

import json
from pathlib import Path
from typing import Any

import pytest
from clip_pipeline import BARE, WIDTH, build_clip_pipeline
from pictures import folder, write
from PIL import Image
from safetensors import safe_open

from pixart.checkpoint.load import load_transformer
from pixart.data import main as data
from pixart.dataset.batches import FeatureDataset
from pixart.generate import main as generate
from pixart.model import PixArt
from pixart.pipeline.text_to_image import Pipeline
from pixart.train import main as train
from pixart.train import read_command
from pixart.training.problems import Problems
from pixart.training.recipe import load_recipe
from pixart.training.stage import Size
from pixart.training.starts import transformer_config
from pixart.variants import VARIANTS

SMALL = {"hidden-size": WIDTH, "depth": 2, "num-heads": 1, "caption-channels": WIDTH}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenCLIP-H's text in the layout of Stable Diffusion 2, small, and no transformer."""
    return build_clip_pipeline(tmp_path_factory.mktemp("p"), with_transformer=False)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    place = tmp_path_factory.mktemp("data")
    folder(place / "raw", 6, height=64, width=64)
    lines = [{"path": f"{n}.png", "captions": {"synth": f"a cat {n} and a dog"}} for n in range(6)]
    write(place / "synth.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    prepare = ["prepare", str(place / "raw"), str(place / "out"), "--model", str(pipeline)]
    prepare += ["--captions", str(place / "synth.jsonl"), "--resolution", "64", "--square"]
    assert data([*prepare, "--device", "cpu"]) == 0
    return place / "out"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, pipeline: Path, features: Path) -> Path:
    """Of three steps of the recipe at 64 px."""
    output = tmp_path_factory.mktemp("run")
    sizes = [word for name, n in SMALL.items() for word in (f"--size.{name}", str(n))]
    command = ["scalability", "--size", "pixart-h1024-d56", *sizes, "--resolution", "64"]
    command += ["--pipeline", str(pipeline), "--data.source", str(features), "--batch.images", "4"]
    command += ["--steps", "3", "--precision", "fp32", "--device", "cpu", "--quiet"]
    assert train([*command, "--output", str(output)]) == 0
    return output / "256px" / "step-00000003"


def test_it_is_the_papers() -> None:
    (stage,) = load_recipe("scalability")
    assert transformer_config(stage.resolved()).hidden_size == 1024
    assert (stage.batch.images, stage.steps, stage.resolution, stage.ema) == (
        2048,
        600_000,
        256,
        None,
    )
    optimizer = stage.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.warmup_steps) == (
        "adamw",
        8e-5,
        10_000,
    )
    assert optimizer.rate(9_999, 600_000, 2048) == optimizer.rate(599_999, 600_000, 2048) == 8e-5
    assert (stage.precision, stage.parallel) == ("bf16", "fsdp")
    assert dict(stage.data.captions) == {"prompt": 50, "synth": 50}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_trained_in_its_own_shape(name: str) -> None:
    length = str(VARIANTS[name].model_max_length)
    command = ["scalability", "--size", name, "--max-length", length]
    (stage,) = read_command(command)[1]
    config = transformer_config(stage.resolved())
    same: tuple[str, ...] = (
        "hidden_size",
        "depth",
        "num_heads",
        "caption_channels",
        "caption_embedding",
    )
    same += ("model_max_length", "input_size")
    for field in same:
        assert getattr(config, field) == getattr(VARIANTS[name], field), field


@pytest.mark.parametrize("order", [1, -1])
def test_fields_beside_a_name_change_it_in_any_order(order: int) -> None:
    options = [["--size", "pixart-h1536-d28"], ["--size.depth", "2"]][::order]
    _, (stage,) = read_command(["scalability", *options[0], *options[1]])
    assert (stage.size.hidden_size, stage.size.depth) == (1536, 2)
    _, (stage,) = read_command(["scalability", "--size.depth", "3"])  # of the recipe's own
    assert (stage.size.hidden_size, stage.size.depth, stage.size.caption_embedding) == (
        1024,
        3,
        False,
    )


def test_a_recipe_names_a_variant_with_or_without_fields(tmp_path: Path) -> None:
    stages = [
        {"name": "a", "start": "random", "size": "pixart-h1024-d28"},
        {"name": "b", "start": "random", "size": {"variant": "pixart-h1024-d28", "depth": 4}},
    ]
    path = write(tmp_path / "r.yaml", {"stages": stages})
    one, two = load_recipe(path)
    assert one.size == Size.of(VARIANTS["pixart-h1024-d28"])
    assert (two.size.hidden_size, two.size.depth) == (1024, 4)


def problems(tmp_path: Path, size: Any) -> list[str]:
    stages = [{"name": "a", "start": "random", "size": size}]
    with pytest.raises(Problems) as caught:
        load_recipe(write(tmp_path / "r.yaml", {"stages": stages}))
    return list(caught.value.lines)


def test_what_is_no_variant_and_features_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = problems(tmp_path, "pixart-h1024-d57")
    assert "a.size must be fields or one of pixart-h1024-d28, " in line
    assert line.endswith("got 'pixart-h1024-d57'; did you mean pixart-h1024-d56")
    (line,) = problems(tmp_path, {"variant": "x", "depth": 3})
    assert "a.size.variant must be fields or one of" in line
    assert train(["scalability", "--size", "pixart", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("pixart.train: size must be fields or one of")
    start = ["scalability", "--start", "shapes", "--dry-run"]
    assert train(start) == 2
    assert "size must be left out with --start shapes" in capsys.readouterr().err
    assert train(["scalability", "--size.hidden-size", "1152", "--dry-run"]) == 2
    reason = "caption_channels must be hidden_size 1152 without caption_embedding, got 1024"
    assert reason in capsys.readouterr().err


def test_a_dry_run_says_what_the_model_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["scalability", "--dry-run", "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("256px: 948.3 M parameters, 600000 steps, about ")
    assert "256×256       256        2048" in printed.out
    assert "data/256 is none; `python -m pixart.data prepare` makes one" in printed.err


def test_features_are_of_77_tokens_and_their_own_width(features: Path) -> None:
    import random

    batch = FeatureDataset(features, 64).batch([0, 1], random.Random(0))
    assert batch.features.shape == (2, 77, WIDTH) and bool(batch.mask.all())


def test_a_small_one_trains_saves_and_opens(state: Path, pipeline: Path) -> None:
    from pixart.text import TextEncoder

    model = load_transformer(state / "model.safetensors")
    assert not model.config.caption_embedding and model.config.model_max_length == 77
    with safe_open(state / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "y_proj" in name]  # noqa: SIM118
    null = TextEncoder.from_pretrained(pipeline, cache_dir=None).encode([""]).features[0]
    assert model.y_embedder.y_embedding.allclose(null.float(), atol=0.05)
    assert model.config.depth == BARE.depth and isinstance(model, PixArt)


def test_what_it_saved_is_a_pipeline_that_names_a_clip_and_draws(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.loads((state / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert (state / "tokenizer" / "merges.txt").is_file()
    monkeypatch.chdir(tmp_path)
    command = ["a cat and a dog", "--model", str(state), "--device", "cpu"]
    sampling = ["--scheduler", "ddim", "--steps", "3", "--guidance", "7.5", "--no-cache"]
    assert generate([*command, *sampling, "--output", "a.png"]) == 0
    assert Image.open("a.png").size == (64, 64)


def test_a_pipeline_with_a_clip_draws_with_any_mask_of_the_null_caption(tmp_path: Path) -> None:
    whole = build_clip_pipeline(tmp_path / "whole")
    drawn = []
    for mask in ("own-mask", "prompt-mask"):
        pipe = Pipeline.from_pretrained(
            whole,
            device="cpu",
            cache_dir=None,
            null_caption=mask,  # type: ignore[arg-type]
        )
        (image,) = pipe("a cat", steps=2)
        drawn.append(image.tobytes())
    assert drawn[0] == drawn[1]  # both are all 77 tokens
