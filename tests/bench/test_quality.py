"""bench.quality: how alike pictures are, against formulas and by hand; pairs of folders and of plans."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from bench import quality
from pixart.shapes.purity import purity
from pixart.shapes.scene import BACKGROUNDS, COLOURS
from pixart.similarity import psnr, ssim

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "pixart" / "assets" / "shapes"


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. (2004), equation 13, with one 2-D window and sums about the mean: another way to the same."""
    at = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-at.square() / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    means = []
    for channel in range(a.shape[2]):
        patches = [
            F.unfold(torch.from_numpy(one[None, None, :, :, channel].astype(np.float64)), 11)[0]
            for one in (a, b)
        ]
        w = window.reshape(-1, 1)
        mean = [(w * one).sum(0) for one in patches]
        away = [one - middle for one, middle in zip(patches, mean, strict=True)]
        var = [(w * one.square()).sum(0) for one in away]
        both = (w * away[0] * away[1]).sum(0)
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        top = (2 * mean[0] * mean[1] + c1) * (2 * both + c2)
        below = (mean[0] ** 2 + mean[1] ** 2 + c1) * (var[0] + var[1] + c2)
        means.append(float((top / below).mean()))
    return sum(means) / len(means)


def test_ssim_is_that_of_the_formula() -> None:
    smooth = np.asarray(Image.fromarray(noise(0, 40, 30, 3)).filter(ImageFilter.GaussianBlur(3)))
    for other in (
        noise(1, 40, 30, 3),
        np.clip(smooth.astype(int) + 9, 0, 255).astype(np.uint8),
        255 - smooth,
    ):
        assert ssim(smooth, other) == pytest.approx(reference_ssim(smooth, other), abs=1e-9)
        assert ssim(smooth, other) == pytest.approx(ssim(other, smooth), abs=1e-12)
    assert ssim(smooth, smooth) == pytest.approx(1)
    flat = np.full((12, 12), 100, np.uint8)  # by hand: no variance, so that the means alone decide
    c1 = 2.55**2
    assert ssim(flat, flat + 50) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))


def test_psnr_is_that_of_the_formula() -> None:
    flat = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(flat, flat + 5) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(flat, flat) == math.inf
    assert psnr(np.uint8([[0]]), np.uint8([[255]])) == 0  # not by differences of uint8
    for bad in (flat[:3], flat.astype(np.float32)):
        with pytest.raises(ValueError, match="uint8 and of one shape"):
            psnr(flat, bad)
    with pytest.raises(ValueError, match="11 pixels a side"):
        ssim(flat, flat)


def test_purity_is_the_share_of_pixels_near_a_colour_of_the_world() -> None:
    red, white = COLOURS["red"], BACKGROUNDS["white"]
    picture = np.empty((10, 10, 3), np.uint8)
    picture[:], picture[:4] = white, red
    assert purity(picture) == 1
    picture[0] = (np.array(red, int) + np.array(white)) // 2
    assert purity(picture) == pytest.approx(0.9)
    picture[1] = np.clip(np.array(red, int) + np.array([0, 19, 0]), 0, 255)
    assert purity(picture) == pytest.approx(0.9)


def test_a_folder_beside_itself_and_one_that_was_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pixart.generate import main as generate

    words = ["--steps", "9", "--size", "64", "--num-images", "2", "--device", "cpu", "--quiet"]
    assert (
        generate(["a red circle on a white background", *words, "--output", f"{tmp_path}/a"]) == 0
    )
    (tmp_path / "b").mkdir()
    files = sorted((tmp_path / "a").glob("*.png"))
    for file in files:
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    with Image.open(files[0]) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b" / files[0].name)
    assert quality.main([f"{tmp_path}/a", f"{tmp_path}/b", "--write", f"{tmp_path}/q.json"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 pictures are the same to the bit" in out and "right" in out.splitlines()[0]
    found = json.loads((tmp_path / "q.json").read_text())
    assert (
        found["count"] == 2
        and found["error"] is None
        and found["pairs"][1]["ssim"] == pytest.approx(1)
    )
    assert found["a"]["interval"][0] <= found["a"]["right"] / 2 <= found["a"]["interval"][1]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "b", "q.json"]
    assert generate(["a blue square", *words, "--output", f"{tmp_path}/c"]) == 0
    for new, old in zip(sorted((tmp_path / "c").glob("*.png")), files, strict=True):
        new.rename(tmp_path / "c" / old.name)
    with pytest.raises(ValueError, match="pictures of the same prompts, got .*blue square"):
        quality.main([f"{tmp_path}/a", f"{tmp_path}/c"])
    (tmp_path / "b" / files[1].name).unlink()
    with pytest.raises(ValueError, match="pictures of the same names, got 2 and 1"):
        quality.main([f"{tmp_path}/a", f"{tmp_path}/b"])


@pytest.mark.slow
def test_settings_beside_others_say_what_they_cost(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = '{"steps": 10}', '{"steps": 10, "guidance_interval": [0, 0.5]}'
    assert quality.main([a, b, "--count", "1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"FLOPs 7[56]\.\d%", out)  # unconditional halves are a little cheaper
    assert "relative error of the latents" in out


@pytest.mark.parametrize("bad", ['{"stepps": 1}', '{"steps": ', "quick.json"])
def test_what_cannot_be_drawn_with_is_refused(bad: str) -> None:
    options: Any = quality._parse(["off", bad])
    from pixart.pipeline.text_to_image import Pipeline

    with pytest.raises(ValueError, match="unknown setting|is not JSON|fast must be"):
        quality._side(bad, Pipeline.from_pretrained(device="cpu"), options)


def test_balanced_loses_two_points_at_most_and_saves_two_fifths_of_the_flops() -> None:
    """What was measured, of the plan that is there now; the guide says the same numbers."""
    found = json.loads((ROOT / "bench" / "studies" / "quality-balanced.json").read_text("utf-8"))
    plan = json.loads((SHAPES / "plans" / "balanced.json").read_text("utf-8"))
    off, balanced = found["a"], found["b"]
    assert (off["what"], balanced["what"], found["model"]) == ("off", "balanced", "shapes")
    for name in ("scheduler", "steps", "guidance", "guidance_interval", "kv_schedule"):
        assert balanced[name] == plan[name], "measure it again: the plan has changed"
    right = [sum(pair[f"{side}/right"] for pair in found["pairs"]) for side in "ab"]
    assert right == [off["right"], balanced["right"]] and len(found["pairs"]) == found["count"]
    assert found["count"] >= 300 and right[0] - right[1] <= 0.02 * found["count"]
    share = balanced["flops"] / off["flops"]
    assert share <= 0.6 and share == pytest.approx(plan["measured"]["cost"], abs=0.005)
    guide = " ".join((ROOT / "pixart" / "README.md").read_text("utf-8").split())
    told = f"{right[1]:.0f} are true with `balanced` and {right[0]:.0f} without it, for {share:.1%}"
    assert told.replace("%", " %") in guide and f"Of {found['count']} captions" in guide


def _figures(name: str) -> dict[str, Any]:
    found = json.loads((ROOT / "bench" / "studies" / f"quality-{name}.json").read_text("utf-8"))
    right = [sum(pair[f"{side}/right"] for pair in found["pairs"]) for side in "ab"]
    assert right == [found["a"]["right"], found["b"]["right"]]
    assert len(found["pairs"]) == found["count"] and found["a"]["what"] == "off"
    return found


def _guide() -> str:
    return " ".join((ROOT / "pixart" / "README.md").read_text("utf-8").split())


def test_the_plan_of_any_model_loses_two_points_at_most_where_it_can_be_told() -> None:
    from pixart.plans.plan import OF_ANY_MODEL

    found, plan = _figures("any-model"), OF_ANY_MODEL["balanced"]
    off, planned = found["a"], found["b"]
    assert (planned["steps"], tuple(planned["guidance_interval"])) == (
        plan.steps,
        plan.guidance_interval,
    ), "measure it again: the plan has changed"
    assert found["count"] >= 300 and off["right"] - planned["right"] <= 0.02 * found["count"]
    assert planned["flops"] <= off["flops"] / 2
    assert f"{planned['right']} are true with it, and {off['right']} without" in _guide()


@pytest.mark.parametrize("name, words", [("reuse", "takes"), ("13-steps", "13 steps take")])
def test_the_guide_tells_what_reusing_blocks_gains_beside_fewer_steps(
    name: str, words: str
) -> None:
    found = _figures(name)
    share = f"{found['b']['flops'] / found['a']['flops']:.1%}".replace("%", " %")
    assert f"{words} {share}" in _guide() and f"at {found['psnr']:.1f} dB" in _guide()
    assert found["b"]["right"] == found["count"] and f"of {found['count']} captions" in _guide()
