"""The metric "texture": against co-occurrences counted one by one, and pictures whose answer is known."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from features import context
from PIL import Image, ImageFilter

from pixart.evaluation.metric import PictureMetric
from pixart.evaluation.metrics import open_metric
from pixart.evaluation.metrics.texture import (
    compression_ratio,
    glcm_scores,
    spectral_slope,
)
from pixart.evaluation.running.results import block_of
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.shapes.scene import draw, sample_scene

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluation" / "glcm.json"


def metric() -> PictureMetric:
    opened = open_metric("texture", context())
    assert isinstance(opened, PictureMetric)
    return opened


def levels(kind: str, size: int = 128) -> np.ndarray:
    """Grey pictures that any machine makes the same: whole numbers only."""
    rows, columns = np.mgrid[:size, :size]
    made = {
        "ramp": rows + columns // 2,
        "waves": (rows * rows + 3 * columns * rows) // 97,
        "checks": 255 * ((rows // 8 + columns // 8) % 2),
        "noise": np.random.RandomState(3).randint(0, 256, (size, size)),
        "flat": 0 * rows + 77,
    }
    return (made[kind] % 256).astype(np.uint8)


def photo(size: int = 256) -> Image.Image:
    """Shapes with a fine texture on them."""
    scene = draw(sample_scene(random.Random(1), "group"), size).astype(int)
    rows, columns = np.mgrid[:size, :size]
    fine = 12 * np.sin(rows * 0.9) * np.cos(columns * 1.3)
    return Image.fromarray((scene + fine[..., None]).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("kind", ["ramp", "waves", "checks", "noise", "flat"])
def test_the_score_is_that_of_scikit_image(kind: str) -> None:
    golden = json.loads(GOLDEN.read_text())["scores"][kind]
    assert glcm_scores(levels(kind)) == pytest.approx(golden, rel=1e-9, abs=1e-12)


def test_pairs_are_counted() -> None:
    """Of a patch, one by one, for the entropy of co-occurrences."""
    grey = levels("waves", 64)
    total = 0.0
    for distance in (1, 2, 3, 4):
        step = round(distance / math.sqrt(2))
        for down, right in ((0, distance), (step, step), (distance, 0), (step, -step)):
            counts: dict[tuple[int, int], int] = {}
            for r in range(64 - down):
                for c in range(max(0, -right), 64 - max(0, right)):
                    pair = int(grey[r, c]) // 4, int(grey[r + down, c + right]) // 4
                    counts[pair] = counts.get(pair, 0) + 1
            n = sum(counts.values())
            total -= sum(k / n * math.log2(k / n) for k in counts.values())
    assert glcm_scores(grey)[1] == pytest.approx(total / 16, rel=1e-12)


def test_patches_are_whole_and_their_scores_averaged() -> None:
    grey = levels("waves", 150)
    corners = [(0, 0), (0, 64), (64, 0), (64, 64)]
    each = [glcm_scores(grey[r : r + 64, c : c + 64]) for r, c in corners]
    assert glcm_scores(grey) == pytest.approx(np.mean(each, axis=0), rel=1e-12)
    with pytest.raises(ValueError, match=r"texture needs 64 pixels on either side, got \(70, 63\)"):
        glcm_scores(levels("waves")[:63, :70])


def test_blur_lowers_what_noise_raises() -> None:
    sharp = photo()
    rng = np.random.default_rng(0)
    noisy = np.asarray(sharp) + rng.normal(scale=8, size=(256, 256, 3))
    pictures = {
        "blurred": sharp.filter(ImageFilter.GaussianBlur(2)),
        "sharp": sharp,
        "noisy": Image.fromarray(noisy.clip(0, 255).astype(np.uint8)),
    }
    scores = [metric().score([], [picture], None)[0] for picture in pictures.values()]
    for values in (
        [one.value for one in scores],
        [one.parts["entropy"] for one in scores],
        [-one.parts["compression"] for one in scores],
    ):
        assert values == sorted(values) and len(set(values)) == 3
    # The sharp one's texture is of single frequencies; what blur takes and noise adds is the slope.
    slopes = [one.parts["slope"] for one in scores]
    assert slopes[0] < slopes[1] < slopes[2]


@pytest.mark.parametrize("power", [-1.0, -2.0, -3.0])
def test_the_slope_is_that_of_the_spectrum(power: float) -> None:
    """Noise that is filtered to a power law: rings of thousands of coefficients, 16 of them."""
    rng = np.random.default_rng(1)
    radius = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512))
    radius[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(512, 512))) * radius ** (power / 2))
    grey = (127 + 40 * field / field.std()).clip(0, 255).astype(np.uint8)
    assert spectral_slope(grey) == pytest.approx(power, abs=0.15)


def test_a_flat_picture_and_noise_have_no_slope() -> None:
    assert spectral_slope(levels("flat")) == pytest.approx(0, abs=1e-9)
    assert spectral_slope(levels("noise", 512)) == pytest.approx(0, abs=0.15)


def test_compression_is_pixels_to_bytes() -> None:
    flat, noise = (
        Image.fromarray(np.repeat(levels(kind)[..., None], 3, axis=2)) for kind in ("flat", "noise")
    )
    assert compression_ratio(flat) > 30 and 1 < compression_ratio(noise) < 4


def test_a_set_has_four_numbers_that_say_what_noise_does() -> None:
    entries = [Entry(Prompt(f"{k:05d}", ""), 0, Path("x")) for k in range(12)]
    scores = metric().score(entries, [photo(128)] * 12, None)
    found = metric().reduce(entries, scores)
    assert list(found) == ["texture", "texture-entropy", "texture-compression", "texture-slope"]
    assert all("oise" in " ".join(one.notes) for one in found.values())
    assert found["texture"].value == pytest.approx(scores[0].value) and found["texture"].n == 12
    block = block_of(metric(), found, {})
    other = [name for name, one in block["values"].items() if "higher_is_better" in one]
    assert block["higher_is_better"] and other == ["texture-compression"]
    assert block["values"]["texture-compression"]["higher_is_better"] is False
