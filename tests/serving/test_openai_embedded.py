"""OpenAI's client against the embedded model: its pictures are those of the library."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from serving import running_service

from pixart import Pipeline
from pixart.pipeline.pictures import KEY
from pixart.serving.drawing.painter import PipelinePainter
from pixart.serving.options import Options

pytestmark = pytest.mark.slow
PROMPT = "a small green star above a large yellow cross on a black background"
SETTINGS = {"seed": 5, "steps": 4, "guidance": 2}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    painter = PipelinePainter.open(Options(device="cpu"), {}, {})
    with running_service(painter) as running:
        key, url = "any", f"{running.url}/v1"
        yield openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=300)


def opened(picture: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.b64_json)))


def test_a_generated_picture_is_the_librarys_to_the_bit(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt=PROMPT, extra_body=SETTINGS)
    [picture] = answer.data or []
    [own] = Pipeline.from_pretrained("shapes", device="cpu")(PROMPT, **SETTINGS)  # type: ignore[arg-type]
    assert np.array_equal(opened(picture), own)
    assert json.loads(opened(picture).info[KEY])["request"]["prompt"] == PROMPT
    assert answer.usage is not None and answer.usage.input_tokens_details.text_tokens > 5


def test_an_edit_keeps_what_the_mask_hides(client: openai.OpenAI) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8))
    mask = Image.new("RGBA", image.size, "black")
    mask.paste((0, 0, 0, 0), (64, 0, 128, 128))
    files = []
    for one in (image, mask):
        file = io.BytesIO()
        one.save(file, "PNG")
        files.append(file.getvalue())
    answer = client.images.edit(
        image=files[0], mask=files[1], prompt=PROMPT, size="128x128", extra_body=SETTINGS
    )
    [picture] = answer.data or []
    before, after = np.asarray(image), np.asarray(opened(picture).convert("RGB"))
    assert np.array_equal(before[:, :64], after[:, :64])
    assert not np.array_equal(before[:, 64:], after[:, 64:])


def test_a_stream_shows_the_picture_as_it_becomes(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=1, extra_body={"seed": 5, "steps": 12}
    )
    *partial, last = stream
    assert [one.type for one in partial] in ([], ["image_generation.partial_image"])
    assert last.type == "image_generation.completed" and opened(last).size == (128, 128)
    for one in partial:
        assert opened(one).size == (128, 128)


def test_what_the_model_cannot_draw_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.generate(prompt=PROMPT, extra_body={"scheduler": "none-such"})
    assert raised.value.param == "scheduler"
