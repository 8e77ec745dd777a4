"""Short names of the published checkpoints, and what they fill in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import CHANNELS, SMALL, levels_apart
from published import build_alpha, build_sigma

from pixart.checkpoint.config import NO_PIPELINE, Surroundings
from pixart.checkpoint.load import _configuration, _known, empty_model
from pixart.checkpoint.read import Contents
from pixart.generation.jobs import plan
from pixart.generation.options import Options
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.releases import RELEASED, RELEASES, place_of, release_named, release_of
from pixart.weights import resolve

SIGMA, ALPHA = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "PixArt-alpha/PixArt-XL-2-512x512"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models in the place of what the hub has."""
    sigma = tmp_path_factory.mktemp("sigma")
    build_sigma(sigma, sample_size=16, vae_channels=CHANNELS)
    alpha = build_alpha(tmp_path_factory.mktemp("alpha"), vae_channels=CHANNELS)
    return {
        SIGMA: sigma,
        "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": sigma / "transformer",
        ALPHA: alpha,
        "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512": alpha / "transformer",
    }


@pytest.fixture
def hub(places: dict[str, Path], monkeypatch: Any) -> list[str]:
    """A hub that gives them, and what it is asked for."""
    asked: list[str] = []

    def snapshot(repository: str, allow_patterns: Any = None) -> str:
        asked.append(repository)
        return str(places[repository])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


def open_named(name: str, **options: Any) -> Pipeline:
    return Pipeline.from_pretrained(name, device="cpu", cache_dir=None, **options)


def test_every_release_has_a_short_name_of_its_own() -> None:
    assert len(RELEASED) == len(RELEASES) == len({one.place for one in RELEASES.values()})
    assert place_of("sigma-2k") == "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS"
    assert place_of("alpha-256") == "PixArt-alpha/PixArt-alpha/PixArt-XL-2-256x256.pth"
    assert place_of("sigma") is place_of("./sigma-2k") is None
    assert {"sigma-256", "sigma-512", "sigma-1024", "sigma-2k", "alpha-256", "alpha-512",
            "alpha-1024", "lcm-1024", "dmd-512"} <= set(RELEASES)  # fmt: skip


def test_a_short_name_stands_for_its_hub_id_and_comes_before_a_folder(
    hub: list[str], places: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sigma-1024").mkdir()
    assert resolve("sigma-1024") == places[SIGMA] and hub == [SIGMA]
    assert resolve("./sigma-1024") == Path("sigma-1024")
    assert resolve(Path("sigma-1024")) == Path("sigma-1024")
    [job], _ = plan(Options(prompt=("a",), model="sigma-1024", transformer="./sigma-1024"))
    assert job.model["model"] == "sigma-1024"
    assert job.model["transformer"] == str(tmp_path / "sigma-1024")


def test_a_whole_pipeline_opens_by_its_short_name(hub: list[str]) -> None:
    pipe = open_named("sigma-1024")
    assert (pipe.source, pipe.family, pipe.scheduler, hub) == ("sigma-1024", "sigma", None, [SIGMA])


@pytest.mark.parametrize("name", ["sigma-512", "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"])
def test_a_transformer_alone_is_drawn_in_the_pipeline_that_it_belongs_to(
    name: str, hub: list[str]
) -> None:
    pipe = open_named(name)
    assert hub == [SIGMA, "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"]
    assert (pipe.source, pipe.family) == (name, "sigma")
    whole = open_named("sigma-1024").draw(Request("a cat", **SMALL))
    assert levels_apart(pipe.draw(Request("a cat", **SMALL)).image, whole.image) == 0


def test_another_transformer_is_taken_into_the_pipeline_of_a_release(
    hub: list[str], places: dict[str, Path]
) -> None:
    pipe = open_named("sigma-512", transformer=places[SIGMA] / "transformer")
    assert hub == [SIGMA] and "with" in pipe.source


def test_a_release_that_must_be_drawn_otherwise_is(hub: list[str]) -> None:
    one = open_named("dmd-512").resolve(Request("a cat", size="64"))
    assert (one.scheduler, one.steps, one.guidance) == ("dmd", 1, 1.0)
    guest = open_named("alpha-512", transformer="dmd-512")
    assert guest.resolve(Request("a cat", size="64")).scheduler == "dmd"
    other = guest.resolve(Request("a cat", size="64", scheduler="ddim"))
    assert (other.timesteps, other.steps, other.guidance) == ((400,), 1, 1.0)
    assert open_named("alpha-512").scheduler is None


def test_a_model_of_the_callers_is_not_drawn_as_the_release_whose_pipeline_it_is_in(
    hub: list[str],
) -> None:
    model = open_named("alpha-512").transformer
    one = open_named("dmd-512", transformer=model).resolve(Request("a cat", size="64"))
    assert (one.scheduler, one.steps, one.guidance) == ("dpm-solver++", 20, 4.5)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("there/PixArt-Sigma-XL-2-512-MS.pth", "PixArt-Sigma-XL-2-512-MS"),
        ("PixArt-XL-2-1024-MS.safetensors", "PixArt-XL-2-1024-MS"),
        ("PixArt-XL-2-512x512/transformer", "PixArt-XL-2-512x512"),
        ("models--PixArt-alpha--PixArt-LCM-XL-2-1024-MS/snapshots/0f", "PixArt-LCM-XL-2-1024-MS"),
        ("my-PixArt-XL-2-512x512.pth", None),
        ("PixArt-XL-2-512x512/mine.pth", None),
        ("PixArt-XL-2-512x512.txt", None),
    ],
)
def test_a_path_may_be_named_after_a_release(path: str, name: str | None) -> None:
    found = release_of(path)
    assert (found.name if found else None) == name


def test_another_repository_of_the_same_name_is_not_taken_for_the_release(tmp_path: Path) -> None:
    assert release_named("somebody/PixArt-Sigma-XL-2-512-MS") is None
    assert release_named(str(tmp_path / "PixArt-Sigma-XL-2-512-MS")) is None
    assert release_named("PixArt-alpha/PixArt-Sigma-XL-2-512-MS") is RELEASES["sigma-512"]


def bare(name: str, depth: int | None = None) -> Contents:
    """Shapes of a release's state dict that tells neither its captions nor its positions."""
    tensors: dict[str, Any] = dict(empty_model(RELEASED[name].config).state_dict())
    tensors = {key: tensor for key, tensor in tensors.items() if "y_embedding" not in key}
    if depth is not None:
        tensors = {k: t for k, t in tensors.items() if f"blocks.{depth}." not in k}
    return Contents(tensors, list(tensors), "official", "official")


@pytest.mark.parametrize("name", RELEASED)
def test_the_name_of_a_pth_says_what_its_tensors_do_not(name: str) -> None:
    contents = bare(name)
    around = _known(Path(f"{name}.pth"), contents, NO_PIPELINE)
    assert _configuration(contents, None, around) == RELEASED[name].config
    assert not any("assumed" in note for note in contents.notes)
    assert any(f"the release {name}, whose name it has" in note for note in contents.notes)


def test_a_name_is_not_believed_of_a_smaller_model_nor_before_what_the_file_says() -> None:
    name = "PixArt-Sigma-XL-2-512-MS"
    pipeline = Surroundings(120)
    small = bare(name, depth=27)
    assert _known(Path(f"{name}.pth"), small, pipeline) is pipeline
    assert _known(Path("mine.pth"), bare(name), pipeline) is pipeline
    contents = bare(name)
    contents.tensors["y_embedder.y_embedding"] = torch.empty(77, 4096, device="meta")
    around = _known(Path(f"{name}.pth"), contents, NO_PIPELINE)
    assert _configuration(contents, None, around).model_max_length == 77
