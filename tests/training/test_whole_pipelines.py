"""What training leaves: a checkpoint that is a whole pipeline, and a command that draws with it."""

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import folder
from published import build_sigma
from safetensors.torch import load_file, save_file

import pixart
from pixart.checkpoint.load import open_transformer
from pixart.data import main as data
from pixart.files import read_json
from pixart.generate import main as generate
from pixart.pipeline import export
from pixart.pipeline.text_to_image import Pipeline
from pixart.train import main as train
from pixart.training import execute
from pixart.training.checkpoints import complete, last_words, other_parts
from pixart.training.run import Run
from pixart.training.stage import Data, Stage, Validation

SHAPES = Path(pixart.__file__).parent / "assets" / "shapes"
OTHERS = ("tokenizer", "text_encoder", "vae", "scheduler")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sigma(tmp_path_factory.mktemp("p"), sample_size=8, vae_channels=(8, 8, 8, 8))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    place = tmp_path_factory.mktemp("data")
    folder(place / "raw", 2, height=64, width=64)
    prepare = ["prepare", str(place / "raw"), str(place / "out"), "--model", str(pipeline)]
    assert data([*prepare, "--resolution", "64", "--square", "--device", "cpu"]) == 0
    return place / "out"


def stage(name: str, features: Path, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "resolution": 64,
        "data": {"source": str(features), "caption_dropout": 0.0},
        "batch": {"images": 2},
        "steps": 1,
        "precision": "fp32",
        "optimizer": {"warmup_steps": 1},
        **fields,
    }


def run(place: Path, *stages: dict[str, Any], options: tuple[str, ...] = ()) -> list[Path]:
    """Train stages; returns their states."""
    place.mkdir(exist_ok=True)
    (place / "r.yaml").write_text(json.dumps({"stages": stages}))
    command = [str(place / "r.yaml"), "--output", str(place / "run"), "--device", "cpu", *options]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(execute, "measure_peak", lambda *_: 1e12)  # which takes seconds
        assert train(command) == 0
    return [place / "run" / one["name"] / "step-00000001" for one in stages]


def is_whole(state: Path) -> bool:
    return (
        all((state / name).is_dir() for name in (*OTHERS, "transformer"))
        and (state / "model_index.json").is_file()
    )


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, pipeline: Path, features: Path
) -> tuple[list[Path], list[str]]:
    """The states of two stages, the second of which goes on from the first, and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        first = stage("first one", features, start=str(pipeline))
        states = run(tmp_path_factory.mktemp("t"), first, stage("second", features))
    return states, printed.getvalue().splitlines()


def test_what_starts_from_a_pipeline_becomes_one_that_the_printed_command_draws_with(
    trained: tuple[list[Path], list[str]], tmp_path: Path, pipeline: Path, monkeypatch: Any
) -> None:
    """Also a stage after it, and both without space for what they have not trained."""
    states, (checkpoint, drawing) = trained
    assert all(map(is_whole, states))
    for name in OTHERS:
        for file in (pipeline / name).iterdir():
            assert all(os.path.samefile(file, state / name / file.name) for state in states)
    # Nor is T5 read at every save, or a state lost when somebody improves it.
    sums = read_json(states[1] / "checksums.json")["files"]
    assert {name.split("/")[0] for name in sums}.isdisjoint(OTHERS) and "model.safetensors" in sums
    assert checkpoint == f"checkpoint: {states[1]}"
    command = shlex.split(drawing.removeprefix("draw with it: "))
    assert Path(command[0]).name.startswith("python") and command[1:3] == ["-m", "pixart.generate"]
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "1", "--device", "cpu", "--no-cache", "--quiet", "--output", "a.png"]
    assert generate([*command[3:], *small]) == 0 and Path("a.png").exists()


def test_diffusers_opens_a_checkpoint(
    trained: tuple[list[Path], list[str]], pipeline: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    state = trained[0][0]
    assert diffusers.PixArtSigmaPipeline.from_pretrained(state).transformer.config.num_layers == 2
    index, published = (read_json(one / "model_index.json") for one in (state, pipeline))
    assert index == published | {"transformer": ["diffusers", "PixArtTransformer2DModel"]}


def test_adapters_leave_a_whole_pipeline_with_them_merged_and_quiet_says_nothing(
    tmp_path: Path, pipeline: Path, features: Path, capfd: Any
) -> None:
    pytest.importorskip("peft")
    tuned = stage("tuned", features, start=str(pipeline), pipeline=str(pipeline), lora={"rank": 2})
    (state,) = run(tmp_path, tuned, options=("--quiet",))
    assert capfd.readouterr() == ("", "")
    assert is_whole(state) and (state / "lora").is_dir()
    opened = Pipeline.from_pretrained(state, device="cpu", cache_dir=None).transformer
    assert not hasattr(opened, "peft_config")


def test_parts_of_another_kind_are_not_taken(tmp_path: Path, pipeline: Path, caplog: Any) -> None:
    caplog.set_level("INFO", "pixart")
    other = shutil.copytree(pipeline, tmp_path / "other")
    values = read_json(other / "vae" / "config.json") | {"scaling_factor": 0.5}
    (other / "vae" / "config.json").write_text(json.dumps(values))
    config = open_transformer(pipeline).config
    for start, scale, said in (
        (pipeline, 0.13025, None),
        (other, 0.13025, "its VAE has the scale 0.5, the data 0.13025"),
        (pipeline / "transformer", 0.13025, "has no "),
    ):
        one = Stage("a", start=str(start), vae_scale=scale).resolved()
        found = other_parts(one, Run(tmp_path, [one], torch.device("cpu")), config)
        assert found == (start if said is None else None)
        assert (
            said is None or f"no whole pipelines ({start}: " in caplog.text and said in caplog.text
        )


@pytest.mark.parametrize("lacking", [("link",), ("link", "symlink")])
def test_where_a_disk_has_no_links_parts_are_copied(
    tmp_path: Path, pipeline: Path, monkeypatch: Any, lacking: tuple[str, ...]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    for name in lacking:
        monkeypatch.setattr(export.os, name, refuse)
    config = open_transformer(pipeline).config
    export.add_parts(tmp_path, pipeline, config)
    copied = [file for name in OTHERS for file in (tmp_path / name).iterdir()]
    assert {file.is_symlink() for file in copied} == {len(lacking) == 1}
    assert all(f.read_bytes() == (pipeline / f.parent.name / f.name).read_bytes() for f in copied)


def test_parts_that_are_taken_away_cost_no_training(
    tmp_path: Path, pipeline: Path, caplog: Any
) -> None:
    complete(tmp_path, pipeline / "away", open_transformer(pipeline).config)
    assert not list(tmp_path.iterdir())
    assert "is gone; from here on checkpoints are transformers" in caplog.text


@pytest.mark.parametrize(
    ("called", "words"),
    [("/somewhere/else/pixart", ["/somewhere/else/pixart", "generate"]), ("train.py", ["-m"])],
)
def test_the_last_words_are_what_a_shell_takes(
    tmp_path: Path, monkeypatch: Any, called: str, words: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    state = tmp_path / "it's mine" / "step-00000001"
    (state / "pipeline").mkdir(parents=True)
    assert last_words(state, Stage("a")) == [f"checkpoint: {state}"]
    (state / "pipeline" / "model_index.json").write_text("{}")
    (state / "lora").mkdir()
    for one, prompt in (
        (Stage("a", data=Data(source="shapes")), "a large red circle on a white background"),
        (Stage("a", validation=Validation(every=1, prompts=("it's $HOME",))), "it's $HOME"),
    ):
        _, drawing, adapters = last_words(state, one)
        assert adapters == f"adapters: {state / 'lora'}, for pixart generate --lora"
        line = shlex.split(drawing.removeprefix("draw with it: "))
        assert line[-3:] == [prompt, "--model", str(state / "pipeline")]
        assert set(words) <= set(line)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_start_that_lacks_a_tensor_is_refused_by_its_name(
    tmp_path: Path, part: str, capsys: Any
) -> None:
    """Left to the libraries it would be random numbers, and a remark that --quiet silences."""
    folder = tmp_path / "model"
    shutil.copytree(SHAPES, folder)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(iter(sorted(tensors)))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    stage = {"name": "more", "start": str(folder), "resolution": 64, "data": {"source": "shapes"}}
    stage |= {"batch": {"images": 1}, "steps": 1}
    if part == "vae":
        stage |= {"trains": "decoder"}
    else:
        stage |= {"pipeline": "shapes", "max_length": 40, "prediction": "v_prediction"}
        stage |= {"vae_scale": 1.0}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"stages": [stage]}))
    command = [str(recipe), "--output", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    assert train(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pixart.train: {folder / part}: ") and f"missing {name}" in line
