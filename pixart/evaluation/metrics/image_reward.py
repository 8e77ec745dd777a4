"""ImageReward (arXiv:2304.05977): what people would think of a picture for its prompt, as a standard score."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixart.evaluation.metric import Context, Estimate, PictureMetric, Score
from pixart.evaluation.metrics.cosine import cut_note
from pixart.evaluation.needs import Need, find_file, find_snapshot, open_file, snapshot
from pixart.evaluation.networks.image_reward import MEAN, STD, TOKENS, Reward
from pixart.evaluation.networks.preparing import centre_cropped, normalised
from pixart.evaluation.networks.weighing import weights_digest
from pixart.evaluation.statistics.intervals import mean_over_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

WEIGHTS = Need(
    "ImageReward.pt",
    "huggingface.co/THUDM/ImageReward, as safetensors also in huggingface.co/DiffSynth-Studio/ImageMetrics",
    repository="THUDM/ImageReward",
)
TOKENIZERS = ("google-bert/bert-base-uncased", "bert-base-uncased")  # the same, renamed
SIDE = 224
_VOCABULARY = "vocab.txt"


class ImageReward(PictureMetric):
    """Unbounded, about 0 on average over its training pictures; means of other prompts do not compare."""

    source = "ImageReward (arXiv:2304.05977); github.com/THUDM/ImageReward"

    def __init__(self, name: str, context: Context) -> None:
        self.name, self._context = name, context
        self._network: Reward | None = None

    @property
    def constants(self) -> Mapping[str, Any]:
        path = find_file(WEIGHTS, self._context)
        return {
            "tokens": TOKENS,
            "mean": MEAN,
            "std": STD,
            "weights": weights_digest("1", [path]) if path else "missing",
        }

    def needs(self) -> Sequence[Need]:
        missing = [] if find_file(WEIGHTS, self._context) else [WEIGHTS]
        return missing if self._tokenizer() else [*missing, snapshot(TOKENIZERS[0])]

    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: "np.ndarray | None",
    ) -> list[Score]:
        """Scores, with "cut": whether the prompt is longer than the 35 tokens that are read."""
        assert images is not None
        network = self._opened()
        texts = [entry.prompt.prompt for entry in entries]
        pixels = np.stack([normalised(centre_cropped(image, SIDE, SIDE, SIDE)) for image in images])
        values, tokens = network(pixels, texts), network.tokens(texts)
        return [
            Score(float(value), {"tokens": length, "cut": float(length > TOKENS)})
            for value, length in zip(values, tokens, strict=True)
        ]

    def reduce(self, entries: "Sequence[Entry]", scores: Sequence[Score]) -> Mapping[str, Estimate]:
        """The mean over prompts, with a note on those that were cut."""
        estimate = mean_over_prompts(entries, [one.value for one in scores])
        notes = (*estimate.notes, *cut_note(entries, scores))
        return {self.name: replace(estimate, notes=notes)}

    def release(self) -> None:
        self._network = None

    def _opened(self) -> Reward:
        if self._network is None:
            path = open_file(self.name, WEIGHTS, self._context)
            folder = self._tokenizer()
            assert folder is not None  # or `needs` would have told
            self._network = Reward(path, folder, self._context.device)
        return self._network

    def _tokenizer(self) -> Path | None:
        found = (find_snapshot(name, self._context, [_VOCABULARY]) for name in TOKENIZERS)
        return next((folder for folder in found if folder), None)
