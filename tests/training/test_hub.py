"""What training asks the hub for: in a dry run nothing, else the files that it reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from published import build_alpha, build_sigma

from pixart.train import main as train
from pixart.training.run import Run
from pixart.training.stage import Data, Stage
from pixart.training.starts import open_start

SIGMA, SMALL = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
COMMIT = "0" * 40
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = build_sigma(tmp_path_factory.mktemp("p"), sample_size=16, vae_channels=(8, 8, 8, 8))
    file = place / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    return place


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: Any) -> Path:
    """The hub's cache, empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def asked(monkeypatch: Any) -> list[Any]:
    """Repositories that are asked for, with the patterns of their files; downloads fail."""
    found: list[Any] = []
    real = huggingface_hub.snapshot_download

    def snapshot(
        repository: str, allow_patterns: Any = None, local_files_only: bool = False
    ) -> str:
        found.append((repository, allow_patterns, local_files_only))
        return real(repository, allow_patterns=allow_patterns, local_files_only=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return found


def put(cache: Path, repository: str, files: Path, *parts: str) -> Path:
    """Put a pipeline, or these folders of it, into the hub's cache."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(COMMIT)
    snapshot = place / "snapshots" / COMMIT
    for part in parts or ("",):
        shutil.copytree(files / part, snapshot / part)
    return snapshot


def dry_run(place: Path, capsys: Any, **fields: Any) -> list[str]:
    """The complaints about a stage on data that is not there."""
    stage = {"name": "a", "data": {"source": "absent", "caption_dropout": 0}, **fields}
    path = place / "recipe.yaml"
    path.write_text(json.dumps({"stages": [stage]}))
    command = [str(path), "--dry-run", "--output", str(place / "run"), "--device", "cpu"]
    assert train(command) == 2
    lines = [line.removeprefix("pixart.train: ") for line in capsys.readouterr().err.splitlines()]
    assert lines.pop().startswith("data.source must be a folder of prepared data, absent is none")
    return lines


@pytest.mark.parametrize(
    ("start", "pipeline_name", "absent"),
    [
        ("sigma-1024", "", ["sigma-1024"]),
        (SIGMA, "sigma-512", [SIGMA, "sigma-512"]),
        ("shapes", SIGMA, [SIGMA]),
        ("alpha-256", "alpha-256", ["alpha-256"]),
    ],
)
def test_a_dry_run_says_once_what_is_not_here_and_downloads_nothing(
    start: str, pipeline_name: str, absent: list[str], cache: Path, asked: list[Any],
    tmp_path: Path, capsys: Any, caplog: Any,
) -> None:  # fmt: skip
    assert dry_run(tmp_path, capsys, start=start, pipeline=pipeline_name) == []
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{name}: not on this machine, not looked at in a dry run" for name in absent
    ]
    assert all(local for _, _, local in asked) and not cache.exists()


def test_what_the_cache_has_is_looked_at(
    pipeline: Path, cache: Path, asked: list[Any], tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    put(cache, SIGMA, pipeline)
    put(cache, SMALL, pipeline / "transformer")
    for name in ("sigma-1024", SIGMA, "sigma-512"):
        fields = {"start": name, "pipeline": name, "max_length": 5, "prediction": "epsilon"}
        *length, prediction = dry_run(tmp_path, capsys, **fields)
        if name != "sigma-512":  # which does not say how long its captions are
            (line,) = length
            assert line.startswith("max_length must be at least that of the start, 300, got 5")
        assert prediction.startswith(f"prediction must be that of {name}, v_prediction, got eps")
    assert not [record for record in caplog.records if "not on this machine" in record.getMessage()]
    assert all(local for _, _, local in asked)


@pytest.mark.parametrize("parts", [("scheduler", "vae"), ("tokenizer", "text_encoder", "vae")])
def test_what_the_cache_has_in_part_is_not_here(
    parts: tuple[str, ...], pipeline: Path, cache: Path, tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    put(cache, SIGMA, pipeline, *parts)
    assert dry_run(tmp_path, capsys, start="sigma-1024", pipeline="shapes") == []
    assert dry_run(tmp_path, capsys, start="shapes", pipeline="sigma-1024") == []
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == ["sigma-1024: not on this machine, not looked at in a dry run"] * 2


def test_a_release_that_is_a_transformer_alone_has_the_settings_of_its_pipeline(
    pipeline: Path, cache: Path, asked: list[Any]
) -> None:
    put(cache, SIGMA, pipeline)
    put(cache, SMALL, pipeline / "transformer")
    stage = Stage("a", start="sigma-512", resolution=512, max_length=300, data=Data("absent"))
    known = Run(Path("absent"), [stage], CPU).resolved(stage)
    assert (known.prediction, known.vae_scale) == ("v_prediction", 0.13025)
    assert asked == [(SIGMA, ["scheduler/*.json", "vae/*.json"], False)]


def test_of_a_start_its_transformer_is_fetched(
    cache: Path, asked: list[Any], tmp_path: Path
) -> None:
    alpha = build_alpha(tmp_path / "alpha", vae_channels=(8, 8, 8, 8))
    put(cache, "some/one", alpha)
    start = open_start(Stage("a", start="some/one"), None)
    assert start.config.model_max_length == 120
    ((_, patterns, _),) = asked
    assert "transformer/*" in patterns and not any("text_encoder" in one for one in patterns)
