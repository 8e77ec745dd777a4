"""How clean outlines are: measured on ideal drawings and on ones that were spoilt by known amounts."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pixart.shapes.edges import CLEAN, Edges, measure
from pixart.shapes.scene import SHAPES, Scene, Thing, draw, sample_scene


def scene_of(shape: str, size: str = "large") -> Scene:
    return Scene("one", "white", (Thing(shape, "blue", size, 0.48, 0.53),), "center")


def spoilt(picture: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> Edges:
    return measure(np.asarray(change(Image.fromarray(picture))))


@pytest.mark.parametrize("size", [128, 256])
def test_ideal_drawings_are_clean_whatever_they_show(size: int) -> None:
    rng = random.Random(0)
    for kind in ("one", "pair", "group"):
        scene = sample_scene(rng, kind)
        edges = measure(draw(scene, size))
        assert len(edges.overlaps) == len(scene.things)
        assert min(edges.overlaps) > 0.97 and edges.stray == 0 and edges.are_clean


@pytest.mark.parametrize("shape", SHAPES)
def test_place_and_size_do_not_count_and_shape_does(shape: str) -> None:
    (whole,) = measure(draw(scene_of(shape), 128)).overlaps
    (small,) = measure(draw(scene_of(shape, "small"), 128)).overlaps
    assert min(whole, small) > 0.96
    # Its left half is cut off: no circle, star ... of any size has that outline.
    picture = draw(scene_of(shape), 128).copy()
    picture[:, : round(128 * 0.48)] = picture[0, 0]
    assert measure(picture).overlaps[0] < CLEAN


def test_the_more_an_outline_frays_the_less_it_overlaps() -> None:
    rng = np.random.default_rng(0)
    picture, found = draw(scene_of("circle"), 128), []
    for reach in (0, 1, 2, 4):
        rows = np.arange(128)[:, None] + np.zeros((128, 128), int)
        columns = np.arange(128)[None] + rng.integers(-reach, reach + 1, (128, 1))
        (overlap,) = measure(picture[rows, columns % 128]).overlaps
        found.append(overlap)
    assert found == sorted(found, reverse=True) and found[0] > 0.98 and found[-1] < CLEAN


def test_a_blur_of_an_outline_counts_in_parts_of_a_pixel() -> None:
    picture = draw(scene_of("star"), 128)
    (sharp,) = measure(picture).overlaps
    (soft,) = spoilt(picture, lambda one: one.filter(ImageFilter.GaussianBlur(1.5))).overlaps
    assert soft < sharp - 0.02


def test_a_blob_that_lies_about_is_not_clean_however_small() -> None:
    picture = draw(scene_of("square"), 128).copy()
    picture[4:9, 4:9] = (40, 75, 215)  # too small to be a thing to the checker
    edges = measure(picture)
    assert len(edges.overlaps) == 1 and edges.overlaps[0] >= CLEAN
    assert edges.stray == pytest.approx(25 / 128**2) and not edges.are_clean


@pytest.mark.parametrize("fill", [0, 128, "noise"])
def test_a_picture_of_nothing_has_no_clean_outline(fill: int | str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = noise if fill == "noise" else np.full((64, 64, 3), fill, np.uint8)
    assert not measure(picture).are_clean
