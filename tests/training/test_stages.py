"""What a stage says, and what it cannot say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import SIGMA, build

from pixart.checkpoint.save import save_transformer
from pixart.few_step import FewStep
from pixart.train import main as train
from pixart.training.run import Run
from pixart.training.stage import Batch, Data, LoRA, Stage, Validation
from pixart.training.starts import adapt, open_start
from pixart.training.state import save_state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batch(accumulate=0), "batch.accumulate must be at least 1, got 0"),
        (lambda: Batch(images=-2), "batch.images must be at least 1, got -2"),
        (lambda: Batch(tokens=0), "batch.tokens must be at least 1, got 0"),
        (lambda: Batch(multiple=4), "batch.multiple is for batch.tokens only, got 4"),
        (lambda: Validation(every=-1), "validation.every must not be negative, got -1"),
        (lambda: Validation(timesteps=()), r"timesteps must be from 0 to 999, got \(\)"),
        (lambda: Validation(timesteps=(1000,)), r"timesteps must be from 0 to 999, got \(1000,\)"),
        (lambda: Validation(prompts=("a",)), "validation.every must be positive to draw"),
        (lambda: Validation(every=1, images=0), "validation.images must be positive without"),
        (lambda: Stage("a", hours=float("nan")), "hours must be positive, got nan"),
        (lambda: Stage("a", min_snr=0.0), "min_snr must be positive, got 0.0"),
        (lambda: Stage("a", pe_interpolation=-1.0), "pe_interpolation must be positive"),
        (
            lambda: Stage("a", start="random", kv_compress="0:2", kv_start="calibrated"),
            "kv_start must be left out with --start random, got calibrated",
        ),
        (
            lambda: Stage("a", data=Data(prior_weight=0.5)),
            "data.prior_weight is for data.prior only, got 0.5",
        ),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_images_of_a_step_are_shared_evenly_by_processes_and_parts() -> None:
    assert Batch(images=12, accumulate=3).of(1024, groups=2) == 12
    with pytest.raises(
        ValueError, match="multiple of processes / sequence × batch.accumulate, 8, got 12"
    ):
        Batch(images=12, accumulate=4).of(1024, groups=2)
    by_tokens = Batch(tokens=10 * 1024, accumulate=2)
    assert [by_tokens.of(1024, world) for world in (1, 2, 4)] == [10, 8, 8]
    assert by_tokens.of(1 << 20, groups=4) == 8  # one each is the least


def test_a_multiple_makes_the_same_batches_for_any_number_of_processes() -> None:
    batch = Batch(tokens=10 * 1024, multiple=4)
    assert {batch.of(1024, world) for world in (1, 2, 4)} == {8}
    with pytest.raises(ValueError, match="batch.multiple must be a multiple of processes"):
        batch.of(1024, groups=3)


def test_a_run_that_goes_on_keeps_the_batches_with_which_it_began(tmp_path: Path) -> None:
    stage = Stage("a", batch=Batch(tokens=10 * 1024))
    run = Run(tmp_path, [stage], torch.device("cpu"))
    assert run.stage("a") == stage
    save_state(tmp_path / "a", 1, {}, {"batch_unit": 4})
    begun = run.stage("a").batch
    assert begun.of(1024, groups=2) == 8
    with pytest.raises(ValueError, match="got 4; --batch.multiple 8 makes it one"):
        begun.of(1024, groups=8)
    given = replace(stage, batch=Batch(tokens=10 * 1024, multiple=2))
    again = Run(tmp_path, [given], torch.device("cpu"))
    assert again.stage("a").batch.of(1024, groups=2) == 10


def test_captions_shorter_than_the_starts_are_no_setting() -> None:
    stage = Stage("a", start="somewhere", resolution=64, max_length=5).resolved()
    with pytest.raises(ValueError, match="max_length must be at least that of the start, 7, got 5"):
        adapt(build(SIGMA), stage)


def test_what_trains_all_weights_is_distilled_no_more() -> None:
    few_step = FewStep("ddim", (999, 499))

    def adapted(**given: Any) -> FewStep | None:
        stage = Stage("a", start="somewhere", resolution=64, max_length=7, **given).resolved()
        return adapt(build(replace(SIGMA, few_step=few_step)), stage).config.few_step

    assert adapted() is None
    assert adapted(lora=LoRA(rank=2)) == adapted(trains="controlnet") == few_step


def test_a_stage_starts_from_a_repository_of_one_file(tmp_path: Path) -> None:
    model = build(SIGMA)
    save_transformer(model, tmp_path / "nitro.safetensors")
    stage = Stage("a", start=str(tmp_path), resolution=64)
    assert open_start(stage, None).config == model.config


def test_drawn_pictures_of_another_size_are_as_many_pixels() -> None:
    stage = Stage("a", resolution=128, batch=Batch(images=64)).resolved()
    assert [stage.drawn_images(side, 2) for side in (64, 128, 256, 2048)] == [256, 64, 16, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x", "lora"], "RECIPE must come first, before all options, got '--output'"),
        (["shapes", "--save-every", "0"], "--save-every must be at least 1, got 0"),
        (["shapes", "--batch.tokens", "4096"], "batch.tokens is for prepared data only, got 4096"),
        (
            ["shapes", "--stage", "base", "--validation.images", "0", "--validation.prompts", "a"],
            "validation.images must be positive for drawn data, got 0",
        ),
    ],
)
def test_a_command_that_cannot_be_honoured_is_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train([*arguments, "--device", "cpu"]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("pixart.train: ") and message in printed and "\n" not in printed
