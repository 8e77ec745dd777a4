"""The weak-to-strong study: its experiments at a tiny scale, its report from its numbers."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bench.studies.weak_to_strong
from bench.studies.weak_to_strong import __main__ as command
from bench.studies.weak_to_strong.claims import Claim, judge
from bench.studies.weak_to_strong.experiments import (
    EXPERIMENTS,
    TINY,
    Experiment,
    open_dense,
    recover,
    run,
)
from bench.studies.weak_to_strong.report import compose, modulation_costs

FOLDER = Path(bench.studies.weak_to_strong.__file__).parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "dense.safetensors"
    recover(file, TINY)
    return file


def test_recovery_trains_a_dense_model(weights: Path) -> None:
    recovered, before = load_file(weights), open_dense().transformer.state_dict()
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


@pytest.mark.parametrize("output", [None, FOLDER])
def test_a_trial_does_not_overwrite_the_committed_study(output: Path | None) -> None:
    with pytest.raises(ValueError, match="--output must be given with --tiny"):
        command.main(output, tiny=True)


def verdict(low: list[float], high: list[float]) -> str:
    """Of losses of the same scenes."""
    experiments = [
        {"name": name, "marks": [{"step": 0, "losses": losses}]}
        for name, losses in (("a", low), ("b", high))
    ]
    return judge(Claim("a", "b", "claim"), {"experiments": experiments})


def test_a_claim_is_judged_by_paired_scenes() -> None:
    low, high = [1.0, 2.0, 3.0], [1.1, 2.2, 3.15]
    assert verdict(low, high).startswith("**Agrees**: claim.")
    assert verdict(high, low).startswith("**Does not agree**")
    assert verdict(low, [1.1, 1.9, 3.0]).startswith("**Not decided here**")


# What the papers have found, by the names of the experiments that stand for it: FID of PixArt-Σ's
# table 3a and 3b; the other numbers only have the order.
PUBLISHED = {
    "interpolated": 1.0,
    "extrapolated": 2.0,
    "conv deep half, random": 9.9,
    "conv deep half, mean": 8.505,
    "conv deep half, calibrated": 8.4,
    "discard deep half": 8.918,
    "average deep half": 9.415,
    "conv deep third": 8.532,
    "conv middle third": 9.063,
    "conv shallow third": 9.278,
    "dense": 8.244,
}
RANKED = {
    ("conv deep third", "conv middle third", "3a: FID 8.532 against 9.063"),
    ("conv deep third", "conv shallow third", "3a: FID 8.532 against 9.278"),
    ("conv middle third", "conv shallow third", "3a: FID 9.063 against 9.278"),
    ("conv deep half, mean", "discard deep half", "3b: FID 8.505 against 8.918"),
    ("conv deep half, mean", "average deep half", "3b: FID 8.505 against 9.415"),
    ("discard deep half", "average deep half", "3b: FID 8.918 against 9.415"),
}


def study(levels: Mapping[str, float]) -> dict[str, Any]:
    """The results of a study whose losses lie at these levels, at the start and at the end."""
    experiments = [
        {
            "name": name,
            "marks": [
                {"step": step, "losses": [level, level + 1], "right": 0, "of": 1}
                for step in (0, 500)
            ],
        }
        for name, level in levels.items()
    ]
    machine = {"cores": 2, "processor": "p", "libraries": {"torch": "2"}, "source_sha256": "0" * 64}
    return {
        "experiments": experiments,
        "machine": machine,
        "scale": {"images": 32, "recovery": 500},
        "command": "make weak-to-strong",
        "seconds": 60,
        "date": "2026-01-01",
        "modulation": modulation_costs(),
    }


def test_the_published_order_agrees_with_every_claim_and_its_opposite_with_none() -> None:
    assert set(PUBLISHED) == {one.name for one in EXPERIMENTS}
    report = compose(study(PUBLISHED))
    ranked = re.findall(r"\*\*: “(.+?)” ends lower than “(.+?)” \(table (.+?)\)\.", report)
    assert set(ranked) == RANKED and len(ranked) == len(RANKED)
    verdict = r"^\*\*(.+?)\*\*:"
    assert re.findall(verdict, report, re.M) == ["Agrees"] * (3 + len(RANKED))
    opposite = compose(study({name: -level for name, level in PUBLISHED.items()}))
    assert re.findall(verdict, opposite, re.M) == ["Does not agree"] * (3 + len(RANKED))


def test_the_depths_and_samplings_are_judged_at_the_end() -> None:
    results = study(PUBLISHED)
    for one in results["experiments"]:
        one["marks"][0]["losses"] = [-loss for loss in one["marks"][0]["losses"]]
    verdicts = re.findall(r"^\*\*(.+?)\*\*:", compose(results), re.M)
    assert verdicts == ["Does not agree"] * 3 + ["Agrees"] * len(RANKED)


def test_modulation_is_counted_as_published() -> None:
    """The paper's 833 M parameters are those of adaLN and of the layer that adaLN-single shares."""
    single, whole, with_shared = modulation_costs()
    width = 1152
    assert single["parameters"] == 610_856_096
    per_block = 6 * width**2 + 6 * width
    assert whole["parameters"] == 610_856_096 + 28 * (per_block - 6 * width) - per_block
    assert with_shared["parameters"] == whole["parameters"] + per_block
    assert with_shared["parameters"] // 10**6 == 833 and whole["parameters"] // 10**6 == 825
    table = compose(study(PUBLISHED)).split("## (d)")[1]
    assert "| adaLN | 825.8 M | 13.2 GB | 26.0 % |" in table
    assert "| adaLN, the shared layer left in | 833.8 M | 13.3 GB | 26.7 % |" in table


@pytest.mark.skipif(not (FOLDER / "results.json").exists(), reason="the study was not run")
def test_the_report_is_made_of_the_results() -> None:
    results = json.loads((FOLDER / "results.json").read_text())
    assert (FOLDER / "README.md").read_text() == compose(results)
