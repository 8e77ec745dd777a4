"""LAION's aesthetic predictors: linear layers on CLIP ViT-L/14's feature of a picture, trained on people's
ratings from 1 to 10. Versions 1 and 2 differ by more than models do, so each has a name of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pixart.evaluation.metric import Context, PictureMetric, Score
from pixart.evaluation.metrics.cosine import digest_of
from pixart.evaluation.needs import Need, find_file, open_file
from pixart.evaluation.networks.clip import MODELS, extractor_of, normalised_rows, shown
from pixart.evaluation.networks.head import head_of
from pixart.evaluation.networks.weighing import read_state, weights_digest

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

WEIGHTS = {
    "aesthetic": Need(
        "sac+logos+ava1-l14-linearMSE.pth",
        "github.com/christophschuhmann/improved-aesthetic-predictor, as safetensors also in "
        "huggingface.co/DiffSynth-Studio/ImageMetrics",
    ),
    "aesthetic-v1": Need("sa_0_4_vit_l_14_linear.pth", "github.com/LAION-AI/aesthetic-predictor"),
}
_PREFIXES = {"aesthetic": "layers.", "aesthetic-v1": ""}


def head_in(name: str, path: Path) -> torch.nn.Sequential:
    """The linear layers in a file of WEIGHTS. CheckpointError for another file."""
    return head_of(read_state(path), path, _PREFIXES[name])


class Aesthetic(PictureMetric):
    """name: "aesthetic" (version 2) or "aesthetic-v1". It does not read the prompt."""

    reads_prompts = False
    source = "github.com/christophschuhmann/improved-aesthetic-predictor; github.com/LAION-AI/aesthetic-predictor"

    def __init__(self, name: str, context: Context) -> None:
        self.name, self._context = name, context
        self.weights = WEIGHTS[name]
        self.model = context.options.get("aesthetic-model", MODELS["clip-l14"])
        self.extractor = extractor_of(self.model, context)
        self._head: torch.nn.Module | None = None

    @property
    def constants(self) -> Mapping[str, Any]:
        assert self.extractor is not None
        path = find_file(self.weights, self._context)
        return {
            "model": shown(self.model),
            "head": weights_digest("1", [path]) if path else "missing",
            "weights": digest_of(self.extractor),
        }

    def needs(self) -> Sequence[Need]:
        assert self.extractor is not None
        missing = [] if find_file(self.weights, self._context) else [self.weights]
        return [*missing, *self.extractor.needs()]

    @torch.inference_mode()
    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: "np.ndarray | None",
    ) -> list[Score]:
        assert features is not None
        if self._head is None:
            path = open_file(self.name, self.weights, self._context)
            self._head = head_in(self.name, path)
        # Of length 1: as they come, scores would be 20 to 30.
        rows = torch.from_numpy(normalised_rows(features, "pictures"))
        return [Score(float(value)) for value in self._head(rows)[:, 0]]

    def release(self) -> None:
        self._head = None
