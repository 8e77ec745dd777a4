"""The embedded pipeline, for tests that change what it draws by."""

from collections.abc import Iterator

import pytest

from pixart.pipeline.text_to_image import Pipeline


@pytest.fixture(scope="module")
def opened() -> Pipeline:
    """The embedded model, once for a file of tests."""
    return Pipeline.from_pretrained(device="cpu")


@pytest.fixture
def pipe(opened: Pipeline) -> Iterator[Pipeline]:
    """The same without a plan, whatever the test before has set."""
    yield opened
    opened.plan = None
