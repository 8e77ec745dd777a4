"""What --dry-run says of a run, and that it does nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pixart.generate import main
from pixart.generation import dry_run
from pixart.generation.team import Team
from pixart.model.exchange import layer_bytes
from pixart.pipeline.inputs import Inputs
from pixart.pipeline.parallel import Layout, choose_layout, step_bytes
from pixart.pipeline.rehearsal import PassCost, rehearse
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.sampler.denoiser import PictureDenoiser

SMALL = ["--steps", "2", "--size", "64"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands run, and keep what they keep."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIXART_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    pipe = Pipeline.from_pretrained(device="cpu", cache_dir=None, control=["shapes-control"])
    pipe.prepare(["a red circle", ""])
    return pipe


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["--dry-run", "--json", "--quiet", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_counts_what_is_there_and_what_is_left_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["a red circle", *SMALL, "--output", "out", "--guidance", "3"]
    assert main([*one, "--quiet", "--no-cache"]) == 0
    before = sorted(here.rglob("*"))
    found = told(capsys, *one, "--num-images", "6", "--batch", "2", "--processes", "2")
    assert sorted(here.rglob("*")) == before
    assert found["pictures"] == {"all": 6, "there": 1, "left": 5}
    assert (found["processes"], found["parallel"]) == (2, "pictures")
    assert found["passes_of_each_process"] == [2, 1] and found["prompts"] == 2
    assert not found["is_measured"]  # there is but one
    [kind] = found["kinds"]
    assert (kind["pictures"], kind["passes"], kind["steps_of_a_pass"]) == (5, 3, 2)
    assert kind["width"] == kind["height"] == 64 and kind["bytes_received_in_a_step"] == 0
    # The first process has two passes: of two pictures and of one.
    of_one, hours = kind["seconds_of_a_picture"], found["hours_of_a_card"]
    assert hours["denoise"] * 3600 == pytest.approx(3 * of_one["denoise"])
    assert of_one["denoise"] == pytest.approx(kind["seconds_of_a_step"] * 2 / 2)
    parts = [spent for stage, spent in hours.items() if stage != "all"]
    assert hours["all"] == pytest.approx(sum(parts)) and min(parts) >= 0


def test_pictures_that_take_the_same_time_are_measured_once(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["a red circle", *SMALL, "--sweep", "guidance=1,3,4", "--processes", "2"]
    found = told(capsys, *words, "--parallel", "sequence")
    assert [kind["pictures"] for kind in found["kinds"]] == [1, 2]
    assert found["parallel"] == "sequence" and found["passes_of_each_process"] == [3, 3]
    alone, both = (kind["bytes_received_in_a_step"] for kind in found["kinds"])
    assert both == 2 * alone > 0
    assert found["kv_compression"] == "3-5:2:conv"  # of the embedded model


def test_tars_are_counted_for_each_process(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("list.txt").write_text("".join(f"{color} circle\n" for color in ("red", "blue", "green")))
    words = ["--prompts", "list.txt", *SMALL, "--num-images", "3", "--output", "tars/{shard}.tar"]
    words += ["--shard-size", "2", "--batch", "2", "--no-cache"]
    assert main([*words, "--quiet", "--shard", "4/5"]) == 0
    before = sorted(here.rglob("*"))
    found = told(capsys, *words, "--processes", "2")
    assert sorted(here.rglob("*")) == before
    assert found["pictures"] == {"all": 9, "there": 1, "left": 8}
    tars = {"all": 5, "there": 1, "left": 4, "pictures_of_each": 2, "of_each_process": [2, 2]}
    assert found["tars"] == tars and found["passes_of_each_process"] == [2, 2]
    [kind] = found["kinds"]
    assert (kind["pictures"], kind["passes"]) == (8, 4)
    # Of the process that has most, in two tars; each has the empty one again.
    assert found["prompts"] == 5
    on_ray = told(capsys, *words, "--engine", "ray", "--address", "127.0.0.1:1", "--workers", "2")
    assert (on_ray["processes"], on_ray["tars"]) == (2, tars) and not on_ray["is_measured"]
    alone = told(capsys, *words, "--shard", "1/2")
    assert alone["tars"]["left"] == 2 and alone["pictures"]["left"] == 4


def test_t5_is_read_again_for_each_tar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 seconds for a prompt where it must be read, and of 1 where it is there."""
    clock = {"now": 0.0, "next": 5.0}

    def ensure(_: str) -> None:
        clock.update(now=clock["now"] + clock["next"], next=1.0)

    pipe: Any = SimpleNamespace(
        forget_prompts=lambda: None,
        captions=SimpleNamespace(ensure=ensure),
        text_encoder=SimpleNamespace(release=lambda: clock.update(next=5.0)),
    )
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    for blocks, load in ((1, 4.0), (3, 12.0)):
        found = dry_run._text_seconds(pipe, "", 10, blocks, Team())
        assert found == {"load T5": load, "text": 10.0}


def test_nothing_is_left_to_forecast(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["a red circle", *SMALL, "--output", "out.png", "--quiet"]
    assert main([*words, "--no-cache"]) == 0
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "1 picture: 1 there already, 0 left" in said and "nothing is left to draw" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--processes", "2"], "--processes must be given with --dry-run"),
        (["--dry-run", "--processes", "0"], "--processes must be at least 1, got 0"),
        (
            ["--dry-run", "--processes", "3", "--parallel", "guidance"],
            "halves of guidance are for 2 processes",
        ),
        (["--dry-run", "--parallel", "sequence"], "--parallel must be left out of a single"),
    ],
)
def test_what_cannot_be_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    assert main(["a red circle", *SMALL, "--quiet", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert reason in line


@pytest.mark.parametrize(
    "settings",
    [
        {"batched": False, "guidance": 3.0, "guidance_interval": (0.2, 0.6)},
        {"pag": 2.0, "guidance": 3.0, "scheduler": "heun", "apg": True},
        {"image": "in", "strength": 0.5, "guidance": 1.0},
        {"control_image": ("in",), "control_interval": ((0.0, 0.5),), "guidance": 1.0},
        {"upscale": "96x96", "tiles": 64, "guidance": 3.0, "batched": True},
        {"kv_schedule": "0-2:2@1000-500; 3-5:4", "guidance": 1.0},
    ],
    ids=["interval", "heun", "picture", "control", "upscaled", "schedule"],
)
def test_evaluations_are_those_of_drawing(
    pipe: Pipeline, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = {"in": Image.radial_gradient("L").resize((64, 64)).convert("RGB")}
    request = Request("a red circle", steps=4, height=64, width=64, **settings)
    resolved = pipe.resolve(request, pictures=pictures)
    cost = rehearse(pipe, [resolved, replace(resolved, seed=1)], Inputs(pictures))
    steps, calls = [], []
    evaluate = PictureDenoiser.__call__

    def counted(self: PictureDenoiser, *call: Any) -> Any:
        calls.append(call)
        return evaluate(self, *call)

    monkeypatch.setattr(PictureDenoiser, "__call__", counted)
    drawn = pipe.draw(request, pictures=pictures, callback=steps.append)
    windows = 4 if "tiles" in settings else 1  # of the larger stage
    first = sum(call[0].shape[-1] == 8 for call in calls) if windows == 1 else 4
    assert cost.steps == len(steps) and cost.pictures == 2
    assert cost.evaluations == first + (len(calls) - first) / windows
    assert sum(cost.kv_ratios.values()) == cost.evaluations
    assert len(cost.kv_ratios) == (2 if "kv_schedule" in settings else 1)
    assert cost.seconds.keys() == drawn.seconds.keys() - {"text", "load"}
    is_guided = settings.get("guidance", 4.5) > 1
    assert (0 < cost.of_second < cost.seconds["denoise"]) if is_guided else cost.of_second == 0


def test_bytes_are_those_of_the_way_that_each_layer_takes(pipe: Pipeline) -> None:
    guided = pipe.resolve(Request("a red circle", height=96, width=64, guidance=3.0))
    config, grid = pipe.opened.config, (6, 4)
    of_model = sum(min(layer_bytes(config, n, grid, 3, 4)) for n in range(config.depth))
    prediction = 12 * 8 * config.out_channels * 4  # of latents in fp32
    assert step_bytes(pipe, guided, Layout(), 2) == 0
    assert step_bytes(pipe, guided, Layout(2, 1), 2) == 2 * prediction
    together = step_bytes(pipe, guided, Layout(1, 3), 2)
    assert together == pytest.approx(4 * (of_model + prediction * 2 / 3))
    both = step_bytes(pipe, guided, Layout(2, 3), 2)
    assert both == pytest.approx(together / 2 + 2 * prediction)
    merged = tuple(4 for _ in range(config.depth))
    own, less = (step_bytes(pipe, guided, Layout(1, 3), 2, {how: 1}) for how in ((), merged))
    half = step_bytes(pipe, guided, Layout(1, 3), 2, {(): 3, merged: 3})
    assert less < own == together and half == pytest.approx((less + own) / 2)
    steered = pipe.resolve(replace(guided, control_image=("in",)), pictures={"in": _grey()})
    assert step_bytes(pipe, steered, Layout(1, 3), 2) > together


def test_halves_of_guidance_share_guided_steps_alone() -> None:
    cost = PassCost(1, 20, 20, {"denoise": 30.0, "decode": 5.0}, of_second=10.0, kv_ratios={})
    layouts = {Layout(2, 1): 20.0, Layout(1, 3): 10.0, Layout(2, 2): 10.0}
    for layout, denoise in layouts.items():
        assert dry_run._shared(cost, layout).seconds == {"denoise": denoise, "decode": 5.0}


def test_layouts_are_called_as_they_are_chosen(pipe: Pipeline) -> None:
    request = pipe.resolve(Request("a red circle", guidance=3.0))
    for name, count in (("guidance", 2), ("sequence", 3), ("guidance+sequence", 4)):
        assert choose_layout(name, count, 1, pipe, [request]).name == name
    assert choose_layout("auto", 2, 2, pipe, [request]).name == "pictures"


def _grey() -> Image.Image:
    return Image.new("RGB", (64, 96), "grey")
