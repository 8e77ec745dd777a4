"""Where the command line draws in tests, and with what where no real model is wanted."""

from pathlib import Path

import pytest
from stub_pipeline import StubPipeline, opened


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names lie in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> StubPipeline:
    """A pipeline that draws at once, which every command opens."""
    return opened(monkeypatch)
