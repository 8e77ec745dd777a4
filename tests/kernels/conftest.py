"""For every test of the kernels."""

from collections.abc import Iterator

import pytest

from pixart_kernels.dispatch import bypass


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    """What operators work out once goes by things that tests change: the architecture, thresholds."""
    bypass.forget()
    yield
    bypass.forget()
