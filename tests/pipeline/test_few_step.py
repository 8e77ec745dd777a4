"""Few-step models: opened in their published layouts and drawn as they say, beside diffusers' own pipelines."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import CHANNELS
from published import SCHEDULER, build_alpha, build_sigma
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json
from torch import Tensor

from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.convert import main as convert
from pixart.few_step import FewStep, agreed
from pixart.files import CheckpointError, read_json, write_json
from pixart.generate import main as generate
from pixart.lora.adapters import add_lora, load_lora, save_lora
from pixart.pipeline.export import add_parts
from pixart.pipeline.pictures import read_picture
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.sampler.loop import initial_noise, seed_generators

SIDE, PROMPT, SEED = 64, "a small cactus", 3
TDM = FewStep("ddim", (999, 749, 499, 249))
LCM = FewStep("lcm", (999, 759, 499, 259))
LCM_CONFIG = {
    "_class_name": "LCMScheduler", "_diffusers_version": "0.22.0.dev0", "beta_end": 0.02,
    "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": False, "original_inference_steps": 50,
    "prediction_type": "epsilon", "set_alpha_to_one": True, "steps_offset": 0, "timestep_scaling": 10.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """α-1024, told its picture's size."""
    return build_alpha(tmp_path_factory.mktemp("alpha-1024"), vae_channels=CHANNELS, num_layers=1)


@pytest.fixture(scope="module")
def sigma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sigma(tmp_path_factory.mktemp("sigma-1024"), vae_channels=CHANNELS, num_layers=1)


def opened(source: Path, **options: Any) -> Pipeline:
    options = {"dtype": torch.float32, "device": "cpu", "cache_dir": None, **options}
    return Pipeline.from_pretrained(source, **options)


def latents_of(pipe: Pipeline, **settings: Any) -> Tensor:
    """What a picture of 64 px comes to, before it is decoded."""
    states: list[Tensor] = []
    request = Request(PROMPT, seed=SEED, height=SIDE, width=SIDE, **settings)
    pipe.draw(request, callback=lambda one: states.append(one.latents))
    return states[-1]


def of_diffusers(pipe: Any, **options: Any) -> Tensor:
    """The same by a pipeline of diffusers', from the same noise."""
    generators = seed_generators([SEED])
    side = SIDE // 8
    noise = initial_noise((4, side, side), generators)
    pipe.set_progress_bar_config(disable=True)
    taken: Tensor = pipe(
        PROMPT, height=SIDE, width=SIDE, latents=noise, generator=generators, output_type="latent",
        use_resolution_binning=False, clean_caption=False, **options,
    ).images  # fmt: skip
    return taken


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a part of the largest number: undistilled, random weights come to hundreds."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def settings_of(pipe: Pipeline, **given: Any) -> tuple[Any, ...]:
    one = pipe.resolve(Request(PROMPT, height=SIDE, width=SIDE, **given))
    return one.scheduler, one.timesteps, one.steps, one.guidance


def named(folder: Path, place: Path) -> Path:
    return shutil.copytree(folder, place)


def with_scheduler(pipeline: Path, **config: Any) -> Path:
    write_json(pipeline / "scheduler" / "scheduler_config.json", config)
    edit_json(pipeline / "model_index.json", scheduler=["diffusers", config["_class_name"]])
    return pipeline


def published_lora(base: Path, place: Path, seed: int, targets: tuple[str, ...]) -> Path:
    """A LoRA on diffusers' transformer, as peft saves it."""
    from diffusers import PixArtTransformer2DModel
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    plain = PixArtTransformer2DModel.from_pretrained(base / "transformer")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False)
    get_peft_model(plain, config).save_pretrained(place)
    return place


def test_lcm_is_a_whole_pipeline_with_its_scheduler(alpha: Path, tmp_path: Path) -> None:
    from diffusers import PixArtAlphaPipeline

    folder = with_scheduler(named(alpha, tmp_path / "PixArt-LCM-XL-2-1024-MS"), **LCM_CONFIG)
    pipe = opened(folder)
    assert pipe.few_step == LCM and settings_of(pipe) == ("lcm", LCM.timesteps, 4, 1.0)
    assert settings_of(pipe, steps=8) == ("lcm", None, 8, 1.0), "others are LCM's own"
    theirs = of_diffusers(
        PixArtAlphaPipeline.from_pretrained(folder), num_inference_steps=4, guidance_scale=0.0
    )
    assert apart(latents_of(pipe), theirs) < 1e-5
    assert opened(folder.rename(tmp_path / "mine")).few_step is None, "the name told"
    assert settings_of(opened(tmp_path / "mine")) == ("lcm", None, 4, 1.0), (
        "the scheduler tells, too"
    )
    assert torch.equal(latents_of(opened(tmp_path / "mine")), latents_of(pipe))


@pytest.mark.parametrize("name", ["PixArt-LCM-LoRA-XL-2-1024-MS", "flash-pixart"])
def test_a_distilled_lora_makes_its_base_drawn_in_few_steps(
    name: str, alpha: Path, tmp_path: Path
) -> None:
    from diffusers import LCMScheduler, PixArtAlphaPipeline
    from peft import PeftModel

    targets = ("to_q", "to_k", "to_v", "to_out.0", "proj_out", "linear_1", "proj")
    lora = published_lora(alpha, tmp_path / name, 1, targets)
    pipe = opened(alpha, lora=[(lora, 1.0)])
    assert settings_of(pipe) == ("lcm", LCM.timesteps, 4, 1.0)
    assert opened(alpha, lora=[(lora, 0.0)]).few_step is None, "it is left out"
    theirs = PixArtAlphaPipeline.from_pretrained(alpha)
    theirs.transformer = PeftModel.from_pretrained(theirs.transformer, lora)
    theirs.scheduler = LCMScheduler.from_pretrained(
        alpha, subfolder="scheduler", timestep_spacing="trailing"
    )
    latents = of_diffusers(theirs, num_inference_steps=4, guidance_scale=0)
    assert apart(latents_of(pipe), latents) < 1e-5


def test_dmd_is_a_transformer_for_the_pipeline_of_alpha_512(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler, PixArtAlphaPipeline

    base = build_alpha(tmp_path / "alpha-512", sample_size=64, vae_channels=CHANNELS, num_layers=1)
    place = tmp_path / "PixArt-Alpha-DMD-XL-2-512x512"
    named(base / "transformer", place / "transformer")
    pipe = opened(base, transformer=place / "transformer")
    assert settings_of(pipe) == ("dmd", (400,), 1, 1.0)
    theirs = PixArtAlphaPipeline.from_pretrained(base)
    theirs.scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler", clip_sample=False)
    one_step = of_diffusers(theirs, timesteps=[400], num_inference_steps=1, guidance_scale=1)
    assert apart(latents_of(pipe), one_step) < 1e-5
    plain = opened(base)
    for scheduler in ("dmd", "ddim", "dpm-solver++"):
        same = latents_of(plain, scheduler=scheduler, timesteps=(400,), guidance=1.0)
        assert apart(same, one_step) < 1e-5, scheduler
    assert torch.equal(latents_of(plain, scheduler="dmd"), latents_of(pipe))


def test_nitro_is_one_file_of_a_sigma_transformer(sigma: Path, tmp_path: Path) -> None:
    from diffusers import PixArtSigmaPipeline

    place = tmp_path / "models--amd--Nitro-1-PixArt" / "snapshots" / "0f"
    place.mkdir(parents=True)
    weights = load_file(sigma / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({name: 1.01 * one for name, one in weights.items()}, place / "some-name.safetensors")
    pipe = opened(sigma, transformer=place)
    assert settings_of(pipe) == ("dmd", (400,), 1, 1.0)
    theirs = PixArtSigmaPipeline.from_pretrained(sigma)
    theirs.transformer.load_state_dict(load_file(place / "some-name.safetensors"))
    latents = of_diffusers(theirs, timesteps=[400], num_inference_steps=1, guidance_scale=0)
    assert apart(latents_of(pipe), latents) < 1e-5
    alone = shutil.copy(place / "some-name.safetensors", tmp_path / "nitro.safetensors")
    assert settings_of(opened(sigma, transformer=alone))[1] is None, "nothing says it"
    same = latents_of(opened(sigma, transformer=alone), timesteps=(400,), guidance=1.0)
    assert apart(same, latents) < 1e-5


def test_ddim_at_given_timesteps_is_that_of_diffusers_and_ends_in_the_prediction(
    sigma: Path,
) -> None:
    from diffusers import PixArtSigmaPipeline

    theirs = PixArtSigmaPipeline.from_pretrained(sigma)
    for config, scheduler in ((1, "ddim"), (2, "dpm-solver++")):
        theirs.scheduler.register_to_config(solver_order=config)
        latents = of_diffusers(theirs, timesteps=list(TDM.timesteps), guidance_scale=1.0)
        given = {"timesteps": TDM.timesteps, "guidance": 1.0, "scheduler": scheduler}
        states: list[Any] = []
        request = Request(PROMPT, seed=SEED, height=SIDE, width=SIDE, **given)
        opened(sigma).draw(request, callback=states.append)
        assert apart(states[-1].latents, latents) < 1e-5
        assert apart(states[-1].predicted, states[-1].latents) < 1e-5
        assert [one.timestep for one in states] == list(TDM.timesteps)


def test_two_loras_go_together_in_any_order(alpha: Path, tmp_path: Path) -> None:
    of_lcm = published_lora(alpha, tmp_path / "flash-pixart", 1, ("to_q", "to_v"))
    mine = published_lora(alpha, tmp_path / "mine", 2, ("to_q", "linear_1"))
    first = opened(alpha, lora=[(of_lcm, 1.0), (mine, 0.5)])
    second = opened(alpha, lora=[(mine, 0.5), (of_lcm, 1.0)])
    assert first.few_step == second.few_step == LCM
    assert apart(latents_of(first), latents_of(second)) < 1e-5
    alone = opened(alpha, lora=[(of_lcm, 1.0)])
    assert apart(latents_of(first), latents_of(alone)) > 1e-3, "both are in it"
    into, adapters = (
        tmp_path / "merged.safetensors",
        ["--lora", str(of_lcm), "--lora", f"{mine}:0.5"],
    )
    assert convert([str(alpha / "transformer"), str(into), *adapters]) == 0
    merged = opened(alpha, transformer=into)
    assert merged.few_step == LCM and apart(latents_of(merged), latents_of(first)) < 1e-5


def distilled(source: Path, few_step: FewStep) -> Any:
    model = load_transformer(source / "transformer")
    model.config = replace(model.config, few_step=few_step)
    return model


@pytest.mark.parametrize("file", ["few.safetensors", "few.pth", "few", "comfyui.safetensors"])
def test_every_format_keeps_what_a_model_was_distilled_for(
    file: str, sigma: Path, tmp_path: Path, capsys: Any
) -> None:
    format = "comfyui" if file.startswith("comfyui") else None
    save_transformer(distilled(sigma, TDM), tmp_path / file, format=format)
    assert load_transformer(tmp_path / file).config.few_step == TDM
    again = tmp_path / "again.safetensors"
    assert convert([str(tmp_path / file), str(again)]) == 0, capsys.readouterr().err
    pipe = opened(sigma, transformer=again)
    assert settings_of(pipe) == ("ddim", TDM.timesteps, 4, 1.0)


def test_what_is_asked_for_comes_before_what_a_model_was_distilled_for(
    sigma: Path, tmp_path: Path
) -> None:
    save_transformer(distilled(sigma, TDM), tmp_path / "few.safetensors")
    write_json(sigma / "sampling.json", {"steps": 9, "guidance": 3.0})
    try:
        pipe = opened(sigma, transformer=tmp_path / "few.safetensors")
    finally:
        (sigma / "sampling.json").unlink()
    every = TDM.timesteps
    assert settings_of(pipe) == ("ddim", every, 4, 1.0)
    assert settings_of(pipe, steps=4) == ("ddim", every, 4, 1.0)
    assert settings_of(pipe, steps=2, guidance=3) == ("ddim", None, 2, 3)
    assert settings_of(pipe, timesteps="599") == ("ddim", (599,), 1, 1.0)
    assert settings_of(pipe, scheduler="lcm") == ("lcm", every, 4, 1.0)
    assert settings_of(pipe, scheduler="sa-solver") == ("sa-solver", None, 4, 1.0)
    assert settings_of(pipe, scheduler="dmd") == ("dmd", None, 1, 1.0)
    drawn = pipe.draw(Request(PROMPT, height=SIDE, width=SIDE))
    again = replace(pipe.resolve(drawn.request), batched=None, tile=None)
    assert again == pipe.resolve(Request(PROMPT, height=SIDE, width=SIDE))


def test_a_model_may_have_learned_other_numbers_of_steps(sigma: Path, tmp_path: Path) -> None:
    both = replace(TDM, also=((999,), (999, 499)))
    save_transformer(distilled(sigma, both), tmp_path / "few.safetensors")
    assert load_transformer(tmp_path / "few.safetensors").config.few_step == both
    pipe = opened(sigma, transformer=tmp_path / "few.safetensors")
    assert settings_of(pipe) == ("ddim", TDM.timesteps, 4, 1.0)
    assert settings_of(pipe, steps=2) == ("ddim", (999, 499), 2, 1.0)
    assert remarks(pipe, steps=1) == remarks(pipe, timesteps="999,499") == ""
    said = "for timesteps 999,749,499,249 or 999 or 999,499 and is drawn in"
    assert f"{said} 3 steps" in remarks(pipe, steps=3) and f"{said} 899" in remarks(
        pipe, timesteps="899"
    )
    assert "is drawn in 1 step" in remarks(pipe, steps=1, scheduler="sa-solver")
    for also, message in (
        (((999, 599, 299, 99),), "also must be of other numbers of steps, each once, got .4, 4"),
        (((499, 999),), "few_step.also must fall"),
        (5, "few_step.also must be a list of timesteps"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TDM, also=also)
    with pytest.raises(ValueError, match="few_step.also must be empty for dmd"):
        FewStep("dmd", (400,), also=((999, 499),))


def test_what_was_learned_beside_keeps_nothing_apart() -> None:
    """An adapter that says nothing of other steps goes with one that does; what both have stays."""
    more = replace(TDM, also=((999,), (999, 499)))
    assert agreed([("a", TDM), ("b", more), ("c", None)]) == TDM
    assert agreed([("a", more), ("b", replace(TDM, also=((999,),)))]) == replace(
        TDM, also=((999,),)
    )
    with pytest.raises(
        ValueError, match="b was distilled for ddim at 999,499, guidance 1, and a for"
    ):
        agreed([("a", more), ("b", replace(TDM, timesteps=(999, 499)))])


def remarks(pipe: Pipeline, **given: Any) -> str:
    return " ".join(pipe.remarks(pipe.resolve(Request(PROMPT, height=SIDE, width=SIDE, **given))))


def test_people_are_told_what_can_hardly_be_meant(sigma: Path, tmp_path: Path) -> None:
    save_transformer(distilled(sigma, TDM), tmp_path / "few.safetensors")
    pipe = opened(sigma, transformer=tmp_path / "few.safetensors")
    assert remarks(pipe) == remarks(opened(sigma), negative="x") == ""
    assert "guidance inside: guidance 4.5 on top" in remarks(pipe, guidance=4.5)
    assert "timesteps 999,749,499,249 and is drawn in 8 steps" in remarks(pipe, steps=8)
    assert "a negative prompt changes nothing" in remarks(pipe, negative="a dog")
    assert "its interval changes nothing" in remarks(pipe, guidance_interval=(0, 0.5))
    plain = opened(sigma)
    assert remarks(plain, apg=False, apg_eta=0.3) == "apg is off: apg_eta changes nothing"
    assert remarks(plain, apg=False, apg_eta=0) == "apg is off: apg_eta changes nothing"
    assert remarks(plain, pag=0, pag_blocks="1") == "pag is off: pag_blocks changes nothing"
    assert remarks(plain, apg=True, apg_eta=0.3) == remarks(plain, apg=False) == ""


def test_what_is_hardly_meant_is_logged_once(sigma: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = opened(sigma)
    asked = [Request(PROMPT, height=SIDE, width=SIDE, guidance=1.0, negative=word) for word in "ab"]
    for _ in range(2):
        pipe.draw_many(asked)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a negative prompt changes nothing" in caplog.text and "\n" not in caplog.messages[0]
    caplog.clear()
    pipe = opened(sigma)
    pipe.is_silent = True
    pipe.draw_many(asked)
    assert not caplog.records


def test_a_pipeline_begins_with_a_picture_at_the_noise_that_its_strength_asks_for(
    sigma: Path, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (SIDE, SIDE), "green").save(tmp_path / "green.png")
    pipe, asked = opened(sigma), []

    def timesteps(**given: Any) -> list[float]:
        asked.clear()
        picture = {"image": str(tmp_path / "green.png"), "height": SIDE, "width": SIDE}
        request = Request(PROMPT, **picture, scheduler="lcm", timesteps=TDM.timesteps, **given)
        pipe.draw(request, callback=lambda one: asked.append(one.timestep))
        return list(asked)

    assert timesteps(strength=1.0) == [999, 749, 499, 249]
    assert timesteps(strength=0.749) == [749, 499, 249]
    assert timesteps(strength=0.6) == timesteps() == [499, 249]
    with pytest.raises(ValueError, match="strength must be at least 0.249 to leave one of"):
        timesteps(strength=0.2)


def test_the_command_line_lines_and_pictures_have_timesteps(
    sigma: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    line = {"prompt": PROMPT, "timesteps": [999, 499], "scheduler": "ddim", "guidance": 1}
    Path("lines.jsonl").write_text(json.dumps(line))
    model = ["--model", str(sigma), "--size", str(SIDE), "--no-cache", "--quiet"]

    def drawn(*words: str) -> Request:
        assert generate([*words, "--output", "x.png", "--overwrite"]) == 0, capsys.readouterr().err
        return read_picture(Path("x.png")).metadata.request

    first = drawn("--prompts", "lines.jsonl", "--steps", "7", *model)
    assert (first.timesteps, first.steps) == ((999, 499), 2), "the line's own"
    given = ["--timesteps", "999,499", "--scheduler", "ddim", "--guidance", "1"]
    assert drawn(PROMPT, *given, *model) == first
    Path("x.png").rename("first.png")
    assert drawn("--from-image", "first.png", "--quiet", "--no-cache") == first
    other = drawn("--from-image", "first.png", "--steps", "3", "--quiet", "--no-cache")
    assert (other.timesteps, other.steps) == (None, 3)
    one = drawn("--from-image", "first.png", "--timesteps", "400", "--quiet", "--no-cache")
    assert (one.timesteps, one.steps) == ((400,), 1)
    assert generate([PROMPT, *given, "--steps", "3", *model]) == 2
    assert "timesteps must be as many as steps where both are given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"timesteps": ()}, "timesteps must be one number at least, got none"),
        ({"timesteps": (499, 749)}, "timesteps must fall from noise to picture, got 749 after 499"),
        ({"timesteps": (499, 499)}, "timesteps must have each number once, got 499 twice"),
        ({"timesteps": (1000, 1)}, "timesteps must be whole numbers from 0 to 999, got 1000"),
        ({"timesteps": "400,-1"}, "timesteps must be whole numbers from 0 to 999, got -1"),
        ({"timesteps": (400.0,)}, "timesteps must be whole numbers or none"),
        ({"timesteps": (True,)}, "timesteps must be whole numbers or none"),
        ({"timesteps": "999,,1"}, "timesteps must be such as 999,749,499,249, got '999,,1'"),
        ({"timesteps": ""}, "timesteps must be such as 999,749,499,249, got ''"),
        ({"timesteps": 0}, "timesteps must begin above 0, where no noise is left"),
        ({"timesteps": 400, "steps": 4}, "timesteps must be as many as steps where both are given"),
        ({"timesteps": 400, "scheduler": "unipc"}, "must be left out for UniPCMultistepScheduler"),
        ({"timesteps": 400, "scheduler": "euler-karras"}, "left out for EulerDiscreteScheduler as"),
        ({"timesteps": (9, 4), "scheduler": "dmd"}, "timesteps must be one number for dmd"),
        (
            {"timesteps": (999, 500), "guidance": 3, "guidance_interval": (0.6, 1)},
            "guidance_interval must hold one of the steps, of which 2 begin at 0, 0.5, got 0.6 to 1",
        ),
        (
            {"timesteps": 400, "guidance": 3, "apg": True, "apg_momentum": 0.5},
            "apg_momentum must be 0 or left out where one step is guided",
        ),
    ],
)
def test_timesteps_that_cannot_be_walked_are_refused(
    given: dict[str, Any], reason: str, sigma_pipe: Pipeline
) -> None:
    with pytest.raises(ValueError) as error:
        sigma_pipe.resolve(Request(PROMPT, height=SIDE, width=SIDE, **given))
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_intervals_are_of_the_steps_that_a_picture_leaves_to_make(
    sigma_pipe: Pipeline, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (SIDE, SIDE), "green").save(tmp_path / "green.png")
    begun = {"image": str(tmp_path / "green.png"), "strength": 0.5, "guidance": 3, "steps": 8}

    def resolve(**given: Any) -> Request:
        return sigma_pipe.resolve(Request(PROMPT, height=SIDE, width=SIDE, **given))

    resolve(guidance=3, steps=8, guidance_interval=(0, 0.5))  # the whole walk
    none = "nothing is guided: none of the 4 steps, which begin at 0.5, lies within 0 to 0.5"
    assert sigma_pipe.remarks(resolve(**begun, guidance_interval=(0, 0.5))) == [none]
    assert not sigma_pipe.remarks(resolve(**begun, guidance_interval=(0.4, 0.6)))
    with pytest.raises(ValueError, match="apg_momentum must be 0"):
        resolve(**begun, guidance_interval=(0.4, 0.6), apg=True, apg_momentum=-0.5)
    assert resolve(**begun, guidance_interval=(0.4, 0.6), apg=True).apg_momentum == 0
    # The larger picture is guided too, and begins later.
    larger = {"upscale": "2x", "upscale_guidance": 3, "steps": 8, "guidance": 1}
    assert not sigma_pipe.remarks(resolve(**larger, guidance_interval=(0.8, 1), negative="x"))
    [said] = sigma_pipe.remarks(resolve(**larger, guidance_interval=(0, 0.2)))
    assert said.startswith("nothing is guided: none of the")


def test_a_transformer_of_another_kind_takes_no_scheduler_of_few_steps(
    sigma: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    export_pipeline_of(distilled(sigma, replace(TDM, scheduler="lcm")), few, sigma)
    assert read_json(few / "scheduler" / "scheduler_config.json")["_class_name"] == "LCMScheduler"
    plain = tmp_path / "plain"
    export_pipeline_of(load_transformer(sigma / "transformer"), plain, few)
    assert "few_step" not in read_json(plain / "model_index.json")
    assert settings_of(opened(plain)) == ("dpm-solver++", None, 20, 4.5)


def export_pipeline_of(model: Any, folder: Path, source: Path) -> None:
    save_transformer(model, folder / "transformer", format="diffusers")
    add_parts(folder, source, model.config)


@pytest.fixture(scope="module")
def sigma_pipe(sigma: Path) -> Pipeline:
    return opened(sigma)


HOSTILE: list[tuple[Any, str]] = [
    ("lcm", "few_step must be a mapping"),
    ([], "few_step must be a mapping"),
    ({}, "few_step must have scheduler, got none"),
    ({"scheduler": "lcm"}, "few_step must have timesteps, got none"),
    ({"scheduler": ["lcm"], "timesteps": [9]}, "few_step.scheduler must be one of"),
    ({"scheduler": "unipc", "timesteps": [9]}, "few_step.scheduler must be one of"),
    ({"scheduler": "dmd", "timesteps": [9, 4]}, "few_step.timesteps must be one number for dmd"),
    (
        {"scheduler": "lcm", "timesteps": "999"},
        "few_step.timesteps must be a list of whole numbers",
    ),
    ({"scheduler": "lcm", "timesteps": [9, 1e400]}, "few_step.timesteps must be whole numbers"),
    ({"scheduler": "lcm", "timesteps": [10**400]}, "few_step.timesteps must be whole numbers"),
    ({"scheduler": "lcm", "timesteps": [9], "guidance": "1"}, "few_step.guidance must be a number"),
    ({"scheduler": "lcm", "timesteps": [9], "guidance": -1}, "few_step.guidance must be a number"),
    ({"scheduler": "lcm", "timesteps": [9], "eta\n": 1}, "few_step must have keys among"),
]


@pytest.mark.parametrize(("value", "reason"), HOSTILE)
def test_a_checkpoint_that_says_nonsense_is_refused_in_one_line(
    value: Any, reason: str, sigma: Path, tmp_path: Path
) -> None:
    model = load_transformer(sigma / "transformer")
    config = {**model.config.to_dict(), "few_step": value}
    file = tmp_path / "few.safetensors"
    tensors = {name: one.contiguous() for name, one in model.state_dict().items()}
    save_file(tensors, file, {"format": "pixart", "config": json.dumps(config)})
    folders = {}
    for name, place in (("own", "transformer/config.json"), ("index", "model_index.json")):
        folders[name] = named(sigma, tmp_path / name)
        edit_json(folders[name] / place, few_step=value)
    adapter = tmp_path / "lora"
    save_lora(add_lora(model, 1), adapter)
    edit_json(adapter / "adapter_config.json", few_step=value)
    plain = load_transformer(sigma / "transformer")
    attempts: list[Callable[[], Any]] = [
        lambda: load_transformer(file),
        lambda: load_transformer(folders["own"] / "transformer"),
        lambda: opened(folders["index"]),
        lambda: load_lora(plain, [(adapter, 1.0)]),
    ]
    for attempt in attempts:
        with pytest.raises(CheckpointError) as error:
            attempt()
        assert reason in str(error.value) and "\n" not in str(error.value)


def test_models_and_adapters_that_were_distilled_for_different_things_do_not_go_together(
    sigma: Path, tmp_path: Path
) -> None:
    places = {}
    for name, few_step in (("lcm", LCM), ("tdm", TDM), ("none", None)):
        places[name] = tmp_path / name
        save_lora(
            add_lora(load_transformer(sigma / "transformer"), 1), places[name], few_step=few_step
        )
    assert opened(sigma, lora=[(places["none"], 1), (places["tdm"], 1)]).few_step == TDM
    with pytest.raises(ValueError, match="was distilled for ddim at 999,749.*leave one out"):
        opened(sigma, lora=[(places["lcm"], 1), (places["tdm"], 1)])
    model = load_lora(distilled(sigma, LCM), [(places["lcm"], 1.0)])
    assert model.config.few_step == LCM
    folder = named(sigma, tmp_path / "both")
    edit_json(folder / "model_index.json", few_step=TDM.to_dict())
    assert opened(folder).few_step == TDM
    assert opened(sigma, transformer=sigma / "transformer").few_step is None
    edit_json(folder / "transformer" / "config.json", few_step=LCM.to_dict())
    with pytest.raises(CheckpointError, match="few_step must be the same in model_index.json and"):
        opened(folder)


@pytest.mark.parametrize("few_step", [LCM, TDM, FewStep("dmd", (400,))], ids=str)
def test_a_whole_pipeline_of_a_distilled_model_is_drawn_by_diffusers_too(
    few_step: FewStep, sigma: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import PixArtSigmaPipeline

    model = distilled(sigma, few_step)
    save_transformer(model, tmp_path / "transformer")
    add_parts(tmp_path, sigma, model.config)
    pipe = opened(tmp_path)
    assert pipe.few_step == few_step
    with caplog.at_level(logging.ERROR):
        theirs = PixArtSigmaPipeline.from_pretrained(tmp_path)
    latents = of_diffusers(theirs, timesteps=list(few_step.timesteps), guidance_scale=1.0)
    assert apart(latents_of(pipe), latents) < 1e-5
    own = json.loads((sigma / "scheduler" / "scheduler_config.json").read_text())
    assert own["_class_name"] == SCHEDULER["_class_name"], "what was linked is not written to"
