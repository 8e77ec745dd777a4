"""pixart.evaluate from Python."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from shapes_pictures import write_scenes

from pixart.evaluate import Metric, evaluate, frechet_distance, kernel_distance, register
from pixart.evaluation.metric import Context, PictureMetric, Score
from pixart.evaluation.metrics import METRICS
from pixart.evaluation.store.folders import MissingPictures


def test_pictures_are_scored_with_intervals_and_one_by_one(tmp_path: Path) -> None:
    write_scenes(tmp_path, 8)
    result = evaluate(
        str(tmp_path / "images"), metrics=["shapes"], prompts=tmp_path / "prompts.jsonl"
    )
    value = result.values["shapes"]
    assert value.mean == 1.0 and value.low < value.high == 1.0 and value.n == 8
    assert value.per_image == {f"{k:05d}/0000": 1.0 for k in range(8)}
    assert result.values["shapes/colour"].mean == 1.0
    assert sorted(tmp_path.iterdir()) == [tmp_path / "images", tmp_path / "prompts.jsonl"]


def test_two_results_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a", 8)
    write_scenes(tmp_path / "b", 8)
    for path in sorted((tmp_path / "b").rglob("0000.png"))[:6]:
        Image.new("RGB", (64, 64)).save(path)
    a, b = (
        evaluate(
            tmp_path / name / "images",
            metrics=["shapes"],
            prompts=tmp_path / "a" / "prompts.jsonl",
            output=tmp_path / name,
        )
        for name in "ab"
    )
    found = a.compare(b)["shapes"]
    assert found.difference == -0.75 and found.high < 0 and found.n == 8 and found.p < 0.05
    same = a.compare(a)["shapes"]
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    assert (tmp_path / "a" / "results.json").is_file()


def test_a_metric_of_ones_own_is_used_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Width(PictureMetric):
        def __init__(self, name: str, context: Context) -> None:
            self.name = name

        def score(self, entries, images, features):  # type: ignore[no-untyped-def]
            return [Score(float(image.width)) for image in images]

    monkeypatch.setattr("pixart.evaluation.metrics.METRICS", dict(METRICS))
    register("width", Width)
    assert issubclass(Width, Metric)
    write_scenes(tmp_path, 3)
    result = evaluate(
        tmp_path / "images", metrics=["width"], prompts=tmp_path / "prompts.jsonl", device="cpu"
    )
    assert result.values["width"].mean == 64.0
    with pytest.raises(ValueError, match="there is a metric 'width' already"):
        register("width", Width)


def test_what_cannot_be_evaluated_is_an_error(tmp_path: Path) -> None:
    write_scenes(tmp_path, 3)
    prompts = tmp_path / "prompts.jsonl"
    with pytest.raises(ValueError, match="metrics must be named, got none"):
        evaluate(tmp_path / "images", metrics=[], prompts=prompts)
    with pytest.raises(ValueError, match="metric must be one of"):
        evaluate(tmp_path / "images", metrics=["beauty"], prompts=prompts)
    next((tmp_path / "images").rglob("*.png")).unlink()
    with pytest.raises(MissingPictures, match="1 of 3 pictures are missing"):
        evaluate(tmp_path / "images", metrics=["shapes"], prompts=prompts)


def test_distances_are_functions_of_arrays() -> None:
    import numpy as np

    rows = np.random.default_rng(0).normal(size=(50, 4))
    mean, covariance = rows.mean(0), np.cov(rows, rowvar=False)
    assert abs(frechet_distance(mean + 2, covariance, mean, covariance) - 16) < 1e-9
    assert kernel_distance(rows, rows + 3).value > 1


def test_importing_the_command_is_light() -> None:
    code = (
        "import sys, pixart.evaluate; print(sorted({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout == "[]\n"
