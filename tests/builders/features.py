"""A network without weights, for tests of what is done with features."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from pixart.evaluation.metric import Context, Extractor, Features
from pixart.evaluation.networks import EXTRACTORS
from pixart.evaluation.store.entries import Entry


class MeanColours(Extractor):
    """Mean and deviation of each channel, and the mean of four quarters: 10 numbers."""

    width = 10

    def __init__(self, name: str, context: Context, *, salt: str = "") -> None:
        self.name, self._salt = name, salt
        self.released = 0

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.name}{self._salt}".encode()).hexdigest()[:12]

    def prepare(self, image: Image, entry: Entry) -> Any:
        return np.asarray(image, np.float32) / 255

    def __call__(self, prepared: Sequence[Any]) -> np.ndarray:
        return np.stack([self._row(picture) for picture in prepared]).astype(np.float32)

    def _row(self, picture: np.ndarray) -> np.ndarray:
        halves = (slice(None, len(picture) // 2), slice(len(picture) // 2, None))
        quarters = [picture[a][:, b].mean() for a in halves for b in halves]
        return np.array([*picture.mean((0, 1)), *picture.std((0, 1)), *quarters])

    def release(self) -> None:
        self.released += 1


@contextmanager
def registered(name: str = "mean-colours") -> Iterator[str]:
    """MeanColours under a name, for as long as it lasts."""
    EXTRACTORS[name] = MeanColours
    try:
        yield name
    finally:
        del EXTRACTORS[name]


def context(**options: str) -> Context:
    return Context(torch.device("cpu"), options=options)


def features(values: np.ndarray, samples: int = 1) -> Features:
    """With keys of as many prompts as there are rows over samples."""
    keys = [f"{row // samples:05d}/{row % samples:04d}" for row in range(len(values))]
    return Features(keys, values.astype(np.float32))
