"""What is measured of pictures and captions, against formulas written out."""

from typing import Any

import numpy as np
import pytest
from pictures import encoded
from PIL import Image
from scenery import scenery

from pixart.dataset import measurements


def test_measurements_are_what_their_formulas_say() -> None:
    image = scenery(3, 300, 700)  # more than one strip of rows
    found = measurements.measure(image)
    light = np.asarray(image.convert("L")).astype(float)
    laplacian = -4 * light[1:-1, 1:-1] + light[:-2, 1:-1] + light[2:, 1:-1]
    laplacian += light[1:-1, :-2] + light[1:-1, 2:]
    assert found["sharpness"] == pytest.approx(laplacian.var(), abs=0.01)
    share = np.unique(light, return_counts=True)[1] / light.size
    assert found["entropy"] == pytest.approx(-(share * np.log2(share)).sum(), abs=0.001)
    assert (found["megapixels"], found["aspect"]) == (0.21, 0.4286)
    framed = Image.new("RGB", (200, 200))
    framed.paste(scenery(1, 200, 100), (0, 50))
    assert measurements.border(framed) == pytest.approx(0.5)
    assert measurements.border(Image.new("RGB", (9, 9), "red")) == 1


@pytest.mark.parametrize("quality", [5, 30, 50, 75, 95, 100])
def test_the_quality_of_a_jpeg_is_found(quality: int) -> None:
    content = encoded(scenery(0, 64, 64), "JPEG", quality=quality)
    assert measurements.open_measured(content)[1]["jpeg_quality"] == quality


def test_captions_are_measured() -> None:
    def of(text: str) -> dict[str, Any]:
        return measurements.measure_captions({"prompt": text})

    assert of("A cat's well-known tail, 3 m")["words"] == 6
    assert of("\u4e00\u53ea\u732b on a mat")["words"] == 6
    assert of("1234 ab")["letters"] == pytest.approx(2 / 6, abs=0.001)
    assert measurements.measure_captions({}) == {
        "captions": 0, "words": 0, "letters": 0.0, "url": False, "html": False, "boilerplate": False,
    }  # fmt: skip
    assert measurements.measure_captions({"long": "one two"})["words"] == 2
    for text, flags in {
        "see https://a.b/c": "url",
        "from shop.com today": "url",
        "a <b>bold</b> cat": "html",
        "cats &amp; dogs": "html",
        "IMG_1234": "boilerplate",
        "Click here to see": "boilerplate",
        "a cat. a dog": "",
        "a < b > c": "",
    }.items():
        assert [name for name in ("url", "html", "boilerplate") if of(text)[name]] == [
            *filter(None, [flags])
        ]
