"""What no model of the options can draw is told before one is opened or fetched."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from stub_pipeline import StubPipeline

from pixart.generate import main
from pixart.generation.early import known_config
from pixart.generation.options import Options
from pixart.pipeline.directory import open_directory

EMBEDDED = open_directory("shapes", with_transformer=True)


def said(capsys: pytest.CaptureFixture[str], stub: StubPipeline, *options: str) -> str:
    """The one line of a refusal for which nothing was opened."""
    assert main(["a circle", "--quiet", *options]) == 2
    assert not stub.opened
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv-schedule", "0-6:2"), "kv_schedule must be of blocks from 0 to 5 for this model, got 6"),
        (("--kv-schedule", "3-5:3"), "kv_schedule"),
        (("--kv-schedule", "28:2", "--model", "sigma-1024"), "from 0 to 27 for this model, got 28"),
        (("--kv-schedule", "28:2", "--transformer", "sigma-2k"), "from 0 to 27"),
        (("--kv-schedule", "14:3", "--model", "sigma-512", "--kv-compress", "14-27:2"), "kv_schedule"),
        (("--reuse-blocks", "6:3"), "reuse_blocks must compute fewer than the 6 blocks of this model"),
        (("--timesteps", "900,400", "--scheduler", "unipc"), "timesteps must be left out for UniPC"),
        (("--timesteps", "900,400", "--scheduler", "dmd"), "timesteps must be one number for dmd"),
        (("--timesteps", "900,400", "--scheduler", "sa-solver", "--model", "sigma-1024"), "left out for"),
    ],
)  # fmt: skip
def test_it_is_refused_before_a_model_is_opened(
    options: tuple[str, ...], message: str, stub: StubPipeline, capsys: Any
) -> None:
    assert message in said(capsys, stub, *options)


def test_a_folder_says_what_it_has(stub: StubPipeline, capsys: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    ignore = shutil.ignore_patterns("*.safetensors", "*.json.gz", "log", "*.png")
    shutil.copytree(EMBEDDED, folder, ignore=ignore)
    config = folder / "transformer" / "config.json"
    values = json.loads(config.read_text()) | {"num_layers": 3, "kv_compression": None}
    config.write_text(json.dumps(values))
    line = said(capsys, stub, "--model", str(folder), "--kv-schedule", "0-3:2")
    assert "from 0 to 2 for this model, got 3" in line
    scheduler = folder / "scheduler" / "scheduler_config.json"
    facts = json.loads(scheduler.read_text()) | {"_class_name": "UniPCMultistepScheduler"}
    scheduler.write_text(json.dumps(facts))
    line = said(capsys, stub, "--model", str(folder), "--timesteps", "900,400")
    assert "timesteps must be left out for UniPC" in line


def test_a_line_of_a_file_is_named(stub: StubPipeline, capsys: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a"}, {"prompt": "b", "kv_schedule": "9:2"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    assert main(["--prompts", str(prompts), "--quiet"]) == 2
    line = capsys.readouterr().err
    assert (
        f"{prompts}, line 2: kv_schedule must be of blocks from 0 to 5" in line and not stub.opened
    )


def test_where_it_takes_more_to_know_opening_tells(tmp_path: Path) -> None:
    for options in (
        Options(model="somebody/some-pipeline"),
        Options(transformer=str(tmp_path / "mine.pth")),
        Options(model=str(tmp_path)),
    ):
        assert known_config(options) is None
    (tmp_path / "config.json").write_text("{")
    assert known_config(Options(model=str(tmp_path))) is None
    known = known_config(Options())
    assert known is not None and known.depth == 6 and known.kv_compression is not None
