"""`python -m pixart.scaling study --tiny`, end to end: what is there is not trained again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart.cost import forward_flops
from pixart.model.transformer import PixArt
from pixart.scalability.options import Study
from pixart.scalability.study.command import guess, next_run, study
from pixart.scalability.study.denoisers import CAPTION_TOKENS, build, cost
from pixart.scalability.study.plan import (
    BASE,
    FULL,
    RUNS,
    SIZES,
    TINY,
    TINY_RUNS,
    UNETS,
    Run,
    identity,
    mark_steps,
)
from pixart.scalability.study.store import KEYS, Store
from pixart.scalability.study.training import Bench, OutOfTimeError, train
from pixart.scalability.study.world import make_world

COMMAND = [sys.executable, "-m", "pixart.scaling", "study", "--tiny", "--processes", "1"]
TIMES = ("seconds", "cpu_seconds")


@cache
def bench() -> Bench:
    return Bench(make_world(TINY), TINY)


def without_times(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in TIMES}


def test_a_run_measures_what_it_is_to_and_again_the_same(tmp_path: Path) -> None:
    run = TINY_RUNS[0]
    found, again = (train(run, bench(), tmp_path / name, time.time() + 600) for name in "ab")
    assert without_times(found) == without_times(again) and found.keys() > KEYS
    assert [mark["step"] for mark in found["marks"]] == mark_steps(
        run, TINY, 48 * found["forward_flops"]
    )
    pictures = [(tmp_path / name / "72x2.png").read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]
    losses = found["marks"][-1]["losses"].split()
    assert len(losses) == TINY.scenes
    assert found["marks"][-1]["loss"] == pytest.approx(sum(map(float, losses)) / 8, rel=1e-3)


def test_the_loss_is_that_of_the_formula(tmp_path: Path) -> None:
    """A new transformer predicts 0: what is left is the mean square of v = √ᾱ ε - √(1 - ᾱ) x."""
    run = replace(TINY_RUNS[0], compute=1e-9)
    world = bench().world
    found = train(run, bench(), tmp_path, time.time() + 600)
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    level = (1 - betas).cumprod(0)[world.held_timesteps][:, None, None, None]
    v = level.sqrt() * world.held_noise - (1 - level).sqrt() * world.held_latents
    # After one step of a rate of 1e-3 / 50.
    assert found["marks"][0]["loss"] == pytest.approx(float(v.square().mean()), rel=1e-2)


def test_a_run_ends_when_the_time_is_over(tmp_path: Path) -> None:
    with pytest.raises(OutOfTimeError):
        train(TINY_RUNS[0], bench(), tmp_path, time.time() - 1)
    assert not list(tmp_path.iterdir())


def test_costs_are_those_of_the_models() -> None:
    for run in (SIZES[0], UNETS[0]):
        parameters, flops = cost(run)
        model = build(run)
        assert parameters == sum(weight.numel() for weight in model.parameters())
        if isinstance(model, PixArt):
            assert flops == forward_flops(model.config, 64, CAPTION_TOKENS)
    ours, theirs = cost(Run(BASE)), cost(UNETS[0])
    assert 0.8 < theirs[0] / ours[0] < 1.25 and 0.7 < theirs[1] / ours[1] < 1.4


def test_the_unet_reads_captions_and_their_mask() -> None:
    torch.manual_seed(0)
    model = build(UNETS[0]).eval()
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), torch.randn(2, 6, 128)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    with torch.no_grad():
        out = model(x, t, text, mask)
        text[0, 4:] += 1
        assert torch.allclose(out, model(x, t, text, mask), atol=1e-5)
        text[0, :4] += 1
        assert not torch.allclose(out[0], model(x, t, text, mask)[0], atol=1e-5)
    assert out.shape == x.shape


def test_depth_against_width_is_of_nearly_as_many_parameters() -> None:
    count = {run.name: cost(run)[0] for run in RUNS if run.denoiser == "transformer"}
    assert count["72x10"] == pytest.approx(count["144x2"], rel=0.03)
    assert count["216x2"] / count["144x6"] == pytest.approx(0.88, abs=0.005)
    assert count["216x3"] / count["144x6"] == pytest.approx(1.22, abs=0.005)


def test_the_longest_run_that_ends_in_time_is_next() -> None:
    runs = sorted(RUNS, key=lambda run: -guess(run, FULL))
    now = time.time()
    assert next_run(runs, FULL, 1.0, now + 1e6) == runs[0]
    assert next_run(runs, FULL, 1.0, now + guess(runs[-1], FULL) + 5) != runs[0]
    assert next_run(runs, FULL, 1.0, now + 1) is None
    assert sum(guess(run, FULL) for run in RUNS) / 2 < 55 * 60


def test_another_study_s_results_are_refused(tmp_path: Path) -> None:
    Store(tmp_path, TINY, TINY_RUNS).write()
    with pytest.raises(
        ValueError, match=r"results\.json is of another study; name another --output"
    ):
        Store(tmp_path, FULL, RUNS)
    (tmp_path / "results.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="of another study"):
        Store(tmp_path, TINY, TINY_RUNS)
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        Store(tmp_path, TINY, TINY_RUNS)


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda run: run | {"identity": "another"}, False),
        (lambda run: run, True),
        (lambda run: {"name": run["name"]}, None),
        (lambda run: 3, None),
    ],
)
def test_only_runs_of_these_settings_are_taken_up(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any], kept: bool | None
) -> None:
    run = next(run for run in TINY_RUNS if run.scenes)  # has no pictures
    whole: dict[str, Any] = dict.fromkeys(KEYS, 1) | {
        "name": run.name,
        "identity": identity(run, TINY),
    }
    whole |= {"marks": [], "accuracy": []}
    Store(tmp_path, TINY, TINY_RUNS).write()
    told = json.loads((tmp_path / "results.json").read_text())
    told["runs"] = [damage(whole)]
    (tmp_path / "results.json").write_text(json.dumps(told))
    if kept is None:
        with pytest.raises(ValueError, match="is not what a study wrote"):
            Store(tmp_path, TINY, TINY_RUNS)
        return
    assert (run not in Store(tmp_path, TINY, TINY_RUNS).missing) is kept


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Study(minutes=0), "minutes must be positive, got 0"),
        (Study(minutes=float("nan")), "minutes must be positive, got nan"),
        (Study(processes=0), "processes must be from 1 to 64, got 0"),
    ],
)
def test_what_cannot_be_run_is_refused(options: Study, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        study(replace(options, output=tmp_path))


def test_without_time_nothing_is_trained_and_all_is_named(tmp_path: Path) -> None:
    said = study(Study(output=tmp_path, minutes=1e-6, tiny=True, processes=1))
    assert "not run in 1e-06 minutes: 72x2, 144x4" in said and "goes on" in said
    assert "**Not whole**" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_start_that_trains_nothing_says_so_and_changes_nothing(tmp_path: Path) -> None:
    """The report is of the machine that trained, whoever looks at it."""
    run = replace(TINY_RUNS[0], name="72x2")
    store = Store(tmp_path, TINY, [run])
    store.add(train(run, bench(), store.pictures, time.time() + 600), 3.0)
    results = json.loads((tmp_path / "results.json").read_text())
    results |= {"date": "2025-01-02", "machine": {**results["machine"], "cores": 64}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    said = study(Study(output=tmp_path, minutes=1e-6, tiny=True, processes=1))
    assert f"1 of {len(TINY_RUNS)} runs were there; another --output trains them again" in said
    assert "64 cores" in (tmp_path / "README.md").read_text(encoding="utf-8")
    again = json.loads((tmp_path / "results.json").read_text())
    assert (again["date"], again["machine"]) == (results["date"], results["machine"])
    store = Store(tmp_path, TINY, TINY_RUNS)
    store.add(again["runs"][0], 1.0)  # a run that was trained now
    assert json.loads((tmp_path / "results.json").read_text())["date"] != "2025-01-02"


@pytest.mark.slow
def test_a_study_that_is_ended_goes_on_and_finds_the_same(tmp_path: Path) -> None:
    """Ended by Ctrl-C after its first run, it keeps that; killed then, too."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = subprocess.run(
        [*COMMAND, "--output", whole], capture_output=True, text=True, check=True, timeout=900
    )
    assert done.stdout == f"{whole / 'README.md'}\n"
    for number, end in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = len(_runs(cut))
        begun = subprocess.Popen([*COMMAND, "--output", cut], stderr=subprocess.PIPE, text=True)
        while len(_runs(cut)) == before and begun.poll() is None:
            time.sleep(0.05)
        os.kill(begun.pid, number)
        errors = begun.communicate(timeout=120)[1]
        assert begun.returncode == end
        assert number != signal.SIGINT or "the runs that ended are kept" in errors
        assert len(_runs(cut)) > before
    subprocess.run([*COMMAND, "--output", cut], check=True, timeout=900)
    first, second = ([without_times(run) for run in _runs(folder)] for folder in (whole, cut))
    assert first == second and len(first) == len(TINY_RUNS)
    for picture in (whole / "pictures").iterdir():
        assert picture.read_bytes() == (cut / "pictures" / picture.name).read_bytes()
    # What SIGKILL cut off in the middle of a writing lies hidden aside.
    assert {path.name for path in cut.iterdir() if not path.name.startswith(".results.json.")} == {
        "README.md", "results.json", "pictures", "plots",
    }  # fmt: skip


def _runs(folder: Path) -> list[dict[str, Any]]:
    file = folder / "results.json"
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else []


ORPHAN = """
import os, signal
from pixart.workers import pool
if __name__ == "__main__":
    with pool(1) as workers:
        print(workers.submit(os.getpid).result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_waits_for_work_ends_with_the_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "orphan.py").write_text(ORPHAN)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    # Its output ends when all who hold it have ended.
    done = subprocess.run(
        [sys.executable, tmp_path / "orphan.py"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL and done.stdout.strip().isdigit()
