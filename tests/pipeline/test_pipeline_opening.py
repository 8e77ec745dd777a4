"""What a pipeline opens and when: variants, the family, T5 before the transformer."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import CHANNELS, SMALL, drawn, levels_apart, link_all_but, open_pipeline
from published import build_alpha, build_sigma
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json

from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.few_step import FewStep
from pixart.files import CheckpointError, write_json
from pixart.model.transformer import PixArt
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.sampler.loop import Cancelled


@pytest.fixture(scope="module")
def sigma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sigma")
    return build_sigma(path, sample_size=16, vae_channels=CHANNELS)


@pytest.fixture(scope="module")
def alpha_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_alpha(tmp_path_factory.mktemp("alpha"), vae_channels=CHANNELS)


@pytest.fixture(scope="module")
def sigma(sigma_dir: Path) -> Pipeline:
    return open_pipeline(sigma_dir)


def test_the_transformer_is_read_when_t5_is_done(sigma_dir: Path, monkeypatch: Any) -> None:
    pipe = open_pipeline(sigma_dir)
    encode, loaded = pipe.text_encoder._run, []
    monkeypatch.setattr(
        pipe.text_encoder,
        "_run",
        lambda *args: loaded.append(pipe.opened.is_loaded) or encode(*args),
    )
    pipe("a cat", **SMALL)
    assert loaded == [False, False] and pipe.opened.is_loaded
    assert not pipe.text_encoder.is_loaded


def test_a_prompt_without_preparation_lets_go_of_t5_too(sigma_dir: Path) -> None:
    pipe, held = open_pipeline(sigma_dir), list[bool]()
    drawn(pipe, "a cat", callback=lambda _: held.append(pipe.text_encoder.is_loaded))
    assert held == [False] * 3


def test_on_a_gpu_everything_else_waits_on_the_host_while_t5_encodes(
    sigma_dir: Path, monkeypatch: Any
) -> None:
    pipe = open_pipeline(sigma_dir)
    drawn(pipe, "a cat")
    moves: list[str] = []
    monkeypatch.setattr(pipe, "device", torch.device("cuda"))  # nothing is moved there
    monkeypatch.setattr(
        type(pipe.transformer), "to", lambda _, place: moves.append(f"transformer {place}")
    )
    monkeypatch.setattr(pipe.vae, "to", lambda place: moves.append(f"vae {place}"))
    monkeypatch.setattr(pipe.graphs, "clear", lambda: moves.append("recordings"))
    pipe.prepare(["a cat"])
    assert moves == [], "what is known needs no room"
    encode = pipe.text_encoder._run
    monkeypatch.setattr(
        pipe.text_encoder, "_run", lambda *args: moves.append("T5") or encode(*args)
    )
    pipe.prepare(["a cat", "a new prompt"])
    assert sorted(moves[:3]) == ["recordings", "transformer cpu", "vae cpu"] and moves[3:] == ["T5"]


def test_a_model_of_the_callers_takes_the_place_of_the_one_that_was_opened(
    sigma_dir: Path, sigma: Pipeline
) -> None:
    pipe = open_pipeline(sigma_dir)
    model = load_transformer(sigma_dir)
    model.final_layer.linear.weight.data *= 2
    pipe.transformer = model
    assert pipe.transformer is model
    assert levels_apart(drawn(pipe, "a cat"), drawn(sigma, "a cat")) > 0


def test_the_tokens_of_a_caption_are_counted_with_its_end(sigma: Pipeline) -> None:
    encode = sigma.text_encoder.encode
    words = int(encode(["a cat"]).mask.sum()), int(encode(["fog and rain"]).mask.sum())
    assert sigma.caption_tokens("a cat", "fog and rain") == words and words[0] < words[1]
    assert sigma.caption_tokens("a cat") == (words[0], 1), "the end of an empty caption"


def test_cancelling_keeps_what_is_encoded_and_lets_go_of_t5(sigma_dir: Path) -> None:
    pipe = open_pipeline(sigma_dir)
    seen: list[str] = []
    with pytest.raises(Cancelled):
        pipe.prepare(["a cat", "a dog"], seen.append, cancel=lambda: len(seen) == 1)
    assert seen == ["a cat"] and not pipe.text_encoder.is_loaded
    assert list(pipe.captions.held) == [("a cat", False)]


def test_features_that_the_disk_holds_are_not_held_in_memory(
    sigma_dir: Path, sigma: Pipeline, tmp_path: Path
) -> None:
    pipe = Pipeline.from_pretrained(sigma_dir, device="cpu", cache_dir=tmp_path)
    pipe.prepare(["a cat", "a dog", ""])
    assert pipe.captions.held == {} and len(list(tmp_path.iterdir())) == 3
    assert levels_apart(drawn(pipe, "a cat"), drawn(sigma, "a cat")) == 0


def variant_only(source: Path, path: Path, *folders: str) -> Path:
    """A copy in which those folders hold weights named fp16 and no others."""
    shutil.copytree(source, path)
    for folder in folders:
        for file in (path / folder).iterdir():
            if file.name.endswith(".index.json"):
                file.rename(file.with_name("model.safetensors.index.fp16.json"))
            elif file.suffix == ".safetensors" and "-of-" not in file.name:
                file.rename(file.with_suffix(".fp16.safetensors"))
    return path


def test_a_pipeline_of_variants_opens_whether_named_or_not(
    sigma_dir: Path, sigma: Pipeline, tmp_path: Path, capfd: Any
) -> None:
    folders = ("text_encoder", "vae", "transformer")
    whole = variant_only(sigma_dir, tmp_path / "whole", *folders)
    mixed = variant_only(sigma_dir, tmp_path / "mixed", "vae")
    for path, variant in ((whole, None), (whole, "fp16"), (mixed, None), (mixed, "fp16")):
        pipe = open_pipeline(path, variant=variant)
        assert levels_apart(drawn(pipe, "a cat"), drawn(sigma, "a cat")) == 0
    printed = capfd.readouterr().err
    assert "Defaulting to unsafe" not in printed and "Error no file" not in printed
    with pytest.raises(CheckpointError, match="has no variant 'bf16'; its variants: fp16"):
        open_pipeline(whole, variant="bf16")


def test_the_pipeline_decides_the_family_of_a_transformer_that_does_not_say(
    alpha_dir: Path, sigma_dir: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "PixArt-XL-2-512x512"
    shutil.copytree(alpha_dir / "transformer", alone)
    edit_json(alone / "config.json", sample_size=16)
    for name in ("csize_embedder", "ar_embedder", "resolution", "aspect"):
        drop_tensors(alone, name)
    edit_json(alone / "config.json", use_additional_conditions=False)
    pipe = open_pipeline(alpha_dir, transformer=alone)
    assert (pipe.family, pipe.text_encoder.max_length) == ("alpha", 120)
    assert open_pipeline(sigma_dir, transformer=alone).family == "sigma"


def drop_tensors(folder: Path, part: str) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if part not in k}, file, {"format": "pt"})


def test_a_sigma_of_120_tokens_stays_a_sigma(sigma_dir: Path, tmp_path: Path) -> None:
    model = load_transformer(sigma_dir)
    short = replace(model.config, model_max_length=120)
    own = link_all_but(sigma_dir, tmp_path / "own", "transformer")
    torch.manual_seed(0)
    save_transformer(PixArt(short), own / "transformer")
    pipe = open_pipeline(own)
    assert (pipe.family, pipe.text_encoder.max_length) == ("sigma", 120)


def test_a_guest_that_says_that_it_is_an_alpha_is_one(
    alpha_dir: Path, sigma_dir: Path, sigma: Pipeline
) -> None:
    guest = open_pipeline(sigma_dir, transformer=alpha_dir)
    assert (guest.family, open_pipeline(alpha_dir).family, sigma.family) == (
        "alpha",
        "alpha",
        "sigma",
    )


def with_sampling(folder: Path, place: Path, **values: Any) -> Path:
    """The pipeline with a sampling.json of its own."""
    copied = shutil.copytree(folder, place / "own")
    write_json(copied / "sampling.json", values)
    return copied


def test_a_pipeline_says_what_it_is_drawn_with_where_a_request_does_not(
    sigma_dir: Path, sigma: Pipeline, tmp_path: Path
) -> None:
    values = {"steps": 3, "guidance": 2.0, "guidance_interval": [0.0, 0.5]}
    folder = with_sampling(sigma_dir, tmp_path, **values)
    pipe = open_pipeline(folder)

    def taken(pipe: Pipeline, **given: Any) -> tuple[Any, ...]:
        one = pipe.resolve(Request("a cat", **given))
        return one.steps, one.guidance, one.guidance_interval

    assert taken(pipe) == (3, 2.0, (0.0, 0.5))
    assert taken(sigma) == (20, 4.5, (0.0, 1.0)), "as ever where nothing is said"
    assert taken(pipe, steps=7, guidance=5, guidance_interval=(0.0, 1.0)) == (7, 5, (0.0, 1.0))
    assert taken(pipe, scheduler="euler") == (3, 2.0, (0.0, 0.5))
    assert taken(pipe, scheduler="sa-solver") == (25, 2.0, (0.0, 0.5)), "25 are its own"
    assert taken(pipe, scheduler="lcm") == (4, 1.0, (0.0, 1.0)), "guidance is inside it"
    guest = Pipeline.from_pretrained(
        folder, transformer=sigma_dir, dtype=torch.float32, device="cpu", cache_dir=None
    )
    assert taken(guest) == (3, 2.0, (0.0, 0.5)), "as with adapters in place of the transformer"
    dmd = FewStep("dmd", (400,))  # as a release that must be drawn so sets it
    guest.opened.config = replace(guest.opened.config, few_step=dmd)
    assert taken(guest) == (1, 1.0, (0.0, 1.0))
    size = {"height": 64, "width": 64}
    asked = sigma("a cat", **size, steps=3, guidance=2.0, guidance_interval=(0.0, 0.5))
    assert levels_apart(pipe("a cat", **size)[0], asked[0]) == 0


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"guidence": 2}, "unknown setting 'guidence'; did you mean 'guidance'"),
        ({"steps": 0}, "steps must be an integer from 1 up, got 0"),
        ({"guidance": float("nan")}, "guidance must be a finite number from 0 up, got nan"),
        ({"guidance_interval": [0.8, 0.2]}, "guidance_interval must be 0 <= start <= end <= 1"),
        ({"guidance": "2"}, "guidance must be a number or none, got '2'"),
    ],
)
def test_what_nothing_could_be_drawn_with_is_refused_with_its_file(
    sigma_dir: Path, tmp_path: Path, values: dict[str, Any], rule: str
) -> None:
    folder = with_sampling(sigma_dir, tmp_path, **values)
    with pytest.raises(CheckpointError, match=rule) as error:
        open_pipeline(folder)
    assert str(error.value).startswith(f"{folder / 'sampling.json'}: ")
