"""Text encoders of the tests' pipelines."""

from pathlib import Path

import torch

from pixart.text.encoder import TextEncoder


def encoder(pipeline: Path, cache: Path | None = None, **options: object) -> TextEncoder:
    """In fp32, and without a cache unless one is given."""
    options = {"dtype": torch.float32} | options
    return TextEncoder.from_pretrained(pipeline, cache_dir=cache, **options)
