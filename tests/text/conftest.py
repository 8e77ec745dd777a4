from pathlib import Path

import published
import pytest


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory as published, with random weights and without a transformer."""
    return published.build_sigma(tmp_path_factory.mktemp("sigma"), with_transformer=False)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "prompts"
