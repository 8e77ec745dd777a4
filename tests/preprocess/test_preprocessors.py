"""Preprocessors: which there are, what is refused, and where Canny's edges lie."""

from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pixart.preprocess import (
    PREPROCESSORS,
    open_preprocessor,
    parse_places,
    preprocess,
    preprocessors,
)

needs_opencv = pytest.mark.skipif(
    find_spec("cv2") is None, reason="needs pip install opencv-python-headless"
)


def square(low: int = 0, high: int = 255) -> Image.Image:
    image = Image.new("RGB", (80, 64), (low, low, low))
    ImageDraw.Draw(image).rectangle((20, 16, 59, 47), (high, low, low))
    return image


def test_none_gives_the_picture_itself_as_rgb() -> None:
    image = square()
    assert preprocess("none", image).tobytes() == image.tobytes()
    assert preprocess("none", image.convert("L")).mode == "RGB"


def test_an_unknown_preprocessor_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match="one of none, canny, hed, depth, pose, got 'scribble'"):
        preprocess("scribble", square())


@needs_opencv
def test_cannys_edges_are_thin_lines_where_the_colour_changes() -> None:
    drawn = preprocess("canny", square())
    assert drawn.mode == "RGB" and drawn.size == (80, 64)
    pixels = np.asarray(drawn)
    assert set(np.unique(pixels)) == {0, 255} and (pixels == pixels[..., :1]).all()
    rows, columns = np.nonzero(pixels[..., 0])
    # Every edge pixel lies within one of the outline, and every line across it meets one or two.
    inside = (columns >= 19) & (columns <= 60) & (rows >= 15) & (rows <= 48)
    off = (columns > 21) & (columns < 58) & (rows > 17) & (rows < 46)
    assert inside.all() and not off.any()
    assert ((pixels[20:44, :40, 0] > 0).sum(1) == 1).all()
    assert ((pixels[:32, 24:56, 0] > 0).sum(0) == 1).all()


@needs_opencv
def test_canny_passes_over_what_is_below_its_thresholds() -> None:
    assert not np.asarray(preprocess("canny", square(100, 110))).any()
    assert not np.asarray(preprocess("canny", Image.new("RGB", (3, 1)))).any()


def test_canny_without_opencv_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessors, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install opencv-python-headless"):
        open_preprocessor("canny")


@needs_opencv
def test_identities_tell_preprocessors_apart() -> None:
    assert PREPROCESSORS == ("none", "canny", "hed", "depth", "pose")
    assert open_preprocessor("none").identity != open_preprocessor("canny").identity


def test_places_of_networks_are_given_by_name() -> None:
    assert parse_places(["hed=a/b=c.pth", "person=x/y"]) == {"hed": "a/b=c.pth", "person": "x/y"}
    for text in ("hed", "hed=", "canny=x"):
        with pytest.raises(ValueError, match=f"hed=PLACE, depth=PLACE, .* got '{text}'"):
            parse_places([text])
