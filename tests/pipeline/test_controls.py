"""Pictures that are steered by others, from files of ControlNets to pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pixart.checkpoint.control import open_control_alone
from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save_control import save_control
from pixart.files import CheckpointError
from pixart.model.control import Control, ControlNet
from pixart.pipeline.controls import Controls
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline

SMALL: dict[str, Any] = {"height": 64, "width": 96, "steps": 2, "guidance": 3.0}
OWN_SIZE: dict[str, Any] = {"height": None, "width": None}


def outline(width: int = 96, height: int = 64) -> Image.Image:
    picture = Image.new("RGB", (width, height))
    ImageDraw.Draw(picture).ellipse(
        (width // 4, height // 4, width // 2, height // 2), outline="white"
    )
    return picture


def opened(*controls: Path | str, **options: Any) -> Pipeline:
    return Pipeline.from_pretrained(device="cpu", cache_dir=None, control=controls, **options)


def trained(pipe: Pipeline, seed: int = 1) -> ControlNet:
    """Not at all, but it steers."""
    network = pipe.transformer.new_control(2).eval()
    generator = torch.Generator().manual_seed(seed)
    for block in network.control_blocks:
        for layer in (block.before_proj, block.after_proj):
            if layer is not None:
                numbers = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.data.copy_(numbers / 30)
    return network


@pytest.fixture(scope="module")
def plain() -> Pipeline:
    return opened()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, plain: Pipeline) -> list[Path]:
    folder = tmp_path_factory.mktemp("controls")
    save_control(plain.transformer.new_control(2), folder / "new.safetensors")
    save_control(trained(plain), folder / "one.pth", base=plain.transformer)
    save_control(trained(plain, 2), folder / "two")
    return [folder / "new.safetensors", folder / "one.pth", folder / "two"]


@pytest.fixture(scope="module")
def pipe(files: list[Path]) -> Pipeline:
    """With a control that steers."""
    return opened(files[1])


def draw(pipe: Pipeline, *pictures: Image.Image, **settings: Any) -> np.ndarray:
    given = list(pictures) or None
    [image] = pipe("a red circle", control_image=given, **SMALL | settings)
    return np.asarray(image).astype(int)


def test_a_new_control_draws_what_is_drawn_without_it(files: list[Path], plain: Pipeline) -> None:
    assert (draw(opened(files[0]), outline()) == draw(plain)).all()


def test_a_control_follows_its_picture_scale_and_interval(pipe: Pipeline) -> None:
    without, steered = draw(pipe), draw(pipe, outline())
    assert (steered != without).any()
    assert (draw(pipe, outline()) == steered).all(), "nothing is drawn by chance"
    assert (draw(pipe, Image.new("RGB", (96, 64), "white")) != steered).any()
    assert (draw(pipe, outline(), control_scale=0.0) == without).all()
    with pytest.raises(ValueError, match="control_interval must hold one of the steps"):
        draw(pipe, outline(), control_interval=(0.0, 0.0))
    half = draw(pipe, outline(), control_interval=(0.0, 0.5))
    assert (half != without).any() and (half != steered).any()
    unbatched = draw(pipe, outline(), batched=False)
    assert abs(unbatched - draw(pipe, outline(), batched=True)).max() <= 2


def test_what_a_picture_is_steered_by_is_the_mean_of_its_posterior(pipe: Pipeline) -> None:
    seen: list[Any] = []
    model = pipe.transformer
    hook = model.register_forward_pre_hook(
        lambda _, given, named: seen.append(named["controls"]), with_kwargs=True
    )
    draw(pipe, outline(), steps=1)
    hook.remove()
    [control] = seen[0]
    assert isinstance(control, Control)
    image = torch.tensor(np.asarray(outline())).permute(2, 0, 1)[None].float() / 127.5 - 1
    hint = pipe.vae.encode(image, sample=False)
    assert torch.equal(control.hint, model.encode_hint(control.network, hint))


def test_several_controls_take_a_picture_each(files: list[Path], pipe: Pipeline) -> None:
    two = opened(*files[1:])
    both = draw(two, outline(), outline())
    first = draw(two, outline(), outline(), control_scale=(1.0, 0.0))
    assert (first == draw(pipe, outline())).all()
    assert (draw(two, outline(), outline(), control_scale=(1.0, 0.5)) != both).any()
    resolved = two.resolve(
        Request("x", control_image=("a", "b"), control_scale=(0.5,)),
        pictures={"a": outline(), "b": outline()},
    )
    assert resolved.control_scale == (0.5, 0.5)
    assert resolved.control_interval == ((0.0, 1.0), (0.0, 1.0))
    assert resolved.control_preprocessor == ("none", "none")


@pytest.mark.parametrize(
    "settings",
    [
        {"image": outline(200, 100), "strength": 0.6},
        {"image": outline(90, 65), "fit": "exact", **OWN_SIZE},
        {"image": outline(64, 64), "outpaint": "16,0,16,0", **OWN_SIZE},
        {"upscale": "1.5x", "width": 64},
        {"upscale": "1.5x", "width": 64, "tiles": 64},
    ],
)
def test_a_control_steers_every_kind_of_picture(pipe: Pipeline, settings: dict[str, Any]) -> None:
    steered = draw(pipe, outline(), **settings)
    assert (steered != draw(pipe, outline(), control_scale=0.0, **settings)).any()


def test_a_picture_is_cut_to_what_is_drawn_about_its_middle() -> None:
    picture = Controls().picture(outline(192, 96), "none", 64, 64)
    assert picture.size == (64, 64) and picture.mode == "RGB"
    clear = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    assert np.asarray(Controls().picture(clear, "none", 64, 64)).max() == 0


def test_the_base_is_taken_from_an_official_file(files: list[Path], pipe: Pipeline) -> None:
    """Which holds both: named twice, it is the transformer and the control."""
    other = opened(files[1], transformer=files[1])
    assert (draw(other, outline()) == draw(pipe, outline())).all()


def test_a_control_counts_among_the_weights(
    files: list[Path], plain: Pipeline, pipe: Pipeline
) -> None:
    assert pipe.weights["control"] != opened(files[2]).weights["control"]
    assert pipe.weights["transformer"] == plain.weights["transformer"]
    assert "control" not in plain.weights


def test_what_does_not_fit_is_refused_before_anything_is_drawn(
    files: list[Path], pipe: Pipeline, plain: Pipeline, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="one picture for each ControlNet, got 2 for 1"):
        draw(pipe, outline(), outline())
    with pytest.raises(ValueError, match="got 1 for none: give control files"):
        draw(plain, outline())
    with pytest.raises(ValueError, match="control-1: must be at least 16 px a side .* got 3x3"):
        draw(pipe, outline(3, 3))
    with pytest.raises(ValueError, match="preprocessor"):
        draw(pipe, outline(), control_preprocessor="sketch")
    with pytest.raises(ValueError, match="missing.png"):
        pipe.resolve(Request("x", control_image=(str(tmp_path / "missing.png"),)))
    with pytest.raises(CheckpointError, match="no such file"):
        opened(tmp_path / "missing.pth")
    alone, _ = open_control_alone(files[0])
    assert alone.copies == 2 and load_transformer(files[1]).config.depth > 2
