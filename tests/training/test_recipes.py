"""The shipped recipes from their first stage to their last, on small models: what each stage begins
with, trains and hands on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dit_model import dit
from pictures import png, write
from published import build_alpha, build_sigma
from tiny_checkpoints import SIGMA, build

from pixart.checkpoint.load import load_transformer
from pixart.config import KVCompression
from pixart.data import main as data
from pixart.pipeline.text_to_image import Pipeline
from pixart.train import main as train
from pixart.training.recipe import load_recipe
from pixart.training.run import Run
from pixart.training.starts import set_null_caption
from pixart.training.state import latest_state
from pixart.weights import without_downloads

SMALLER = 8  # sides of pictures are the recipe's over this
VAE = (8, 8, 8, 8)
QUICK = ["--device", "cpu", "--quiet", "--precision", "fp32", "--batch.images", "2"]
QUICK += ["--steps", "1", "--no-aspect", "--optimizer.warmup-steps", "1"]
PUBLISHED = {  # divisors of the positions (facts of the published configs)
    "sigma": [0.5, 0.5, 1, 2, 2, 4, 8],
    "alpha": [1, 1, 1, 2],
}


def run(recipe: str, place: Path, pipeline: Path, *start: str) -> list[Path]:
    """Train one step of every stage of a recipe; returns their states. start: of the first."""
    for number in range(3):
        write(place / "raw" / f"{number}.png", png(256, 256, seed=number))
    found = []
    for number, stage in enumerate(load_recipe(recipe)):
        side = str(stage.resolution // SMALLER)
        features, model = str(place / f"data-{side}"), ["--model", str(pipeline)]
        prepare = ["prepare", str(place / "raw"), features, *model, "--resolution", side]
        assert data([*prepare, "--square", "--prompt", "A photo", "--device", "cpu"]) == 0
        command = [recipe, "--output", str(place / "run"), "--stage", stage.name, *QUICK]
        command += ["--resolution", side, "--data.source", features, "--pipeline", str(pipeline)]
        command += ["--data.captions", "prompt", "1"] + (["--start", *start] if number == 0 else [])
        assert train(command) == 0
        state = latest_state(place / "run" / stage.name)
        assert state is not None
        found.append(state)
    return found


@pytest.mark.parametrize("recipe", ["sigma", "alpha"])
def test_every_stage_plans_the_published_positions(recipe: str) -> None:
    stages = load_recipe(recipe)
    run = Run(Path("absent"), stages, torch.device("cpu"))
    run.to_come = frozenset(stage.name for stage in stages)
    with without_downloads():
        planned = [run.planned(run.resolved(stage)).config for stage in stages]
    assert [config.pe_interpolation for config in planned] == PUBLISHED[recipe]
    assert [8 * config.input_size for config in planned] == [one.resolution for one in stages]


def test_sigma_goes_from_alpha_to_a_compressed_model_for_large_pictures(tmp_path: Path) -> None:
    """Its pipeline has T5 and VAE, and no transformer, as published."""
    pipeline = build_sigma(tmp_path / "sigma", with_transformer=False, vae_channels=VAE)
    alpha = build_alpha(tmp_path / "alpha", sample_size=4, num_layers=28, vae_channels=VAE)
    found = run("sigma", tmp_path, pipeline, str(alpha))
    configs = [load_transformer(one / "model.safetensors").config for one in found]
    assert [config.pe_interpolation for config in configs] == PUBLISHED["sigma"]
    assert {config.model_max_length for config in configs} == {300}
    merged = [config.kv_compression for config in configs]
    assert merged == [None] * 4 + [KVCompression(tuple(range(14, 28)))] * 3


def test_alpha_goes_from_a_dit_to_sizes_as_conditions(tmp_path: Path) -> None:
    pipeline = build_alpha(tmp_path / "alpha", vae_channels=VAE)
    torch.save(dit(), tmp_path / "dit.pt")
    start = f"dit:{tmp_path / 'dit.pt'}"
    found = run("alpha", tmp_path, pipeline, start, "--size.caption-channels", "32")
    configs = [load_transformer(one / "model.safetensors").config for one in found]
    assert [config.pe_interpolation for config in configs] == PUBLISHED["alpha"]
    assert [config.micro_condition for config in configs] == [False, False, False, True]


def test_kv_convert_merges_the_deeper_half(tmp_path: Path) -> None:
    pipeline = build_sigma(tmp_path / "sigma", num_layers=28, vae_channels=VAE)
    (state,) = run("kv-convert", tmp_path, pipeline, str(pipeline))
    config = load_transformer(state / "model.safetensors").config
    assert config.kv_compression == KVCompression(tuple(range(14, 28)))
    assert config.pe_interpolation == 2 / SMALLER  # the range of the start's coordinates


def test_sigma_takes_the_null_caption_of_its_t5_in_the_place_of_alphas(tmp_path: Path) -> None:
    from dataclasses import replace

    model = build(replace(SIGMA, caption_channels=32, model_max_length=300))
    model.null_caption_stored = True  # type: ignore[assignment]
    random = model.y_embedder.y_embedding.clone()
    for family, same in ((build_alpha, True), (build_sigma, False)):
        folder = family(tmp_path / family.__name__, vae_channels=VAE)
        pipe = Pipeline.from_pretrained(folder, transformer=model, device="cpu", cache_dir=None)
        set_null_caption(model, pipe)
        assert torch.equal(model.y_embedder.y_embedding, random) == same
    expected = pipe.text_encoder.encode([""], keep_padding=True).features[0]
    assert torch.equal(model.y_embedder.y_embedding, expected)


def test_a_model_takes_no_options_of_a_checkpoint(tmp_path: Path) -> None:
    model: Any = build(SIGMA)
    with pytest.raises(ValueError, match="kv_compression must be left out beside a model, got"):
        Pipeline.from_pretrained(transformer=model, kv_compression=KVCompression((0,)))
