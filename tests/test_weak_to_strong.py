"""The weak-to-strong study: its experiments at a tiny scale, its report from its numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.weak_to_strong
from bench.weak_to_strong.__main__ import TINY
from bench.weak_to_strong.experiments import EXPERIMENTS, Experiment, open_dense, recover, run
from bench.weak_to_strong.report import _compare, compose, modulation_costs

FOLDER = Path(bench.weak_to_strong.__file__).parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "dense.pt"
    recover(file, TINY)
    return file


def test_recovery_trains_a_dense_model(weights: Path) -> None:
    recovered, before = torch.load(weights), open_dense().transformer.state_dict()
    assert recovered.keys() == before.keys() and not any(".sr." in name for name in before)
    assert any(not torch.equal(recovered[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "name", ["extrapolated", "conv deep half, calibrated", "discard deep half"]
)
def test_an_experiment_measures_at_every_mark(weights: Path, name: str) -> None:
    experiment = next(one for one in EXPERIMENTS if one.name == name)
    small = Experiment(name, min(experiment.resolution, 256), experiment.positions,
                       experiment.kv, experiment.start)  # fmt: skip
    found = run(small, weights, TINY)
    assert [mark["step"] for mark in found["marks"]] == [0, 1]
    dense = run(Experiment("dense", small.resolution), weights, TINY)
    assert found["marks"][0]["losses"] != dense["marks"][0]["losses"]
    first, last = (mark["losses"] for mark in found["marks"])
    assert len(first) == len(last) == TINY.scenes and first != last
    assert [len(row) for row in found["pictures"]] == [TINY.shown] * 2


def measured(*losses: float) -> dict[str, Any]:
    return {"name": "x", "marks": [{"step": 0, "losses": list(losses), "right": 0, "of": 1}]}


def test_a_claim_is_judged_by_paired_scenes() -> None:
    low, high = measured(1.0, 2.0, 3.0), measured(1.1, 2.2, 3.15)
    assert _compare(low, high, "claim").startswith("**Agrees**: claim.")
    assert _compare(high, low, "claim").startswith("**Does not agree**")
    assert _compare(low, measured(1.1, 1.9, 3.0), "claim").startswith("**Not decided here**")


def test_modulation_is_counted_as_published() -> None:
    single, whole = modulation_costs()
    assert single["parameters"] == 610_856_096
    assert 1 - single["parameters"] / whole["parameters"] == pytest.approx(0.26, abs=0.005)


@pytest.mark.skipif(not (FOLDER / "results.json").exists(), reason="the study was not run")
def test_the_report_is_made_of_the_results() -> None:
    results = json.loads((FOLDER / "results.json").read_text())
    assert (FOLDER / "README.md").read_text() == compose(results)
