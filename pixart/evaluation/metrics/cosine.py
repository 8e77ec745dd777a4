"""Scores that are the cosine between a picture's feature and its prompt's, times a number."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pixart.evaluation.metric import Estimate, Extractor, PictureMetric, Score
from pixart.evaluation.networks.clip import Clip, normalised_rows
from pixart.evaluation.statistics.intervals import mean_over_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.evaluation.needs import Need
    from pixart.evaluation.store.entries import Entry

CONTEXT = 77  # tokens that published CLIPs read


class TextPictureExtractor(Protocol):
    """An extractor whose network reads texts too."""

    def opened(self) -> Clip: ...


class CosineMetric(PictureMetric):
    """What CLIP score, PickScore and HPSv2 have in common. whole: prompts beyond the limit are read in
    windows, where else they are cut."""

    whole = False
    limit = CONTEXT

    def needs(self) -> "Sequence[Need]":
        assert self.extractor is not None
        return self.extractor.needs()

    def scaled(self, cosine: float, network: Clip) -> float:
        """The score of a cosine."""
        return cosine

    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: "np.ndarray | None",
    ) -> list[Score]:
        """Scores, with "tokens": how long the prompt is, its two ends included, and "cut": whether it is
        longer than the network reads."""
        assert features is not None
        network = self.opened()
        prompts = list(dict.fromkeys(entry.prompt.prompt for entry in entries))
        read = network.texts(prompts, whole=self.whole)
        place = {prompt: k for k, prompt in enumerate(prompts)}
        rows = [place[entry.prompt.prompt] for entry in entries]
        pictures = normalised_rows(features, "pictures").astype(np.float64)
        cosines = (pictures * read.features[rows].astype(np.float64)).sum(1)
        return [
            Score(
                self.scaled(float(cosine), network),
                {"tokens": read.tokens[row], "cut": float(read.tokens[row] > network.limit)},
            )
            for cosine, row in zip(cosines, rows, strict=True)
        ]

    def opened(self) -> Clip:
        """The network that reads prompts."""
        extractor: TextPictureExtractor = self.extractor  # type: ignore[assignment]
        return extractor.opened()

    def reduce(self, entries: "Sequence[Entry]", scores: Sequence[Score]) -> Mapping[str, Estimate]:
        """The mean over prompts, with a note on those that were cut."""
        estimate = mean_over_prompts(entries, [one.value for one in scores])
        notes = [*estimate.notes, *self.notes(), *cut_note(entries, scores, self.whole)]
        return {self.name: replace(estimate, notes=tuple(notes))}

    def notes(self) -> Sequence[str]:
        """What a reader must know of this metric's number."""
        return ()

    def release(self) -> None:
        if self.extractor is not None:
            self.extractor.release()


def cut_note(entries: "Sequence[Entry]", scores: Sequence[Score], whole: bool = False) -> list[str]:
    """How many prompts are longer than the network reads, in a sentence; none where none is."""
    longer = {e.prompt.id for e, s in zip(entries, scores, strict=True) if s.parts.get("cut")}
    prompts = {entry.prompt.id for entry in entries}
    if not longer:
        return []
    share = f"{len(longer)} of {len(prompts)} prompts ({100 * len(longer) / len(prompts):.0f} %)"
    if whole:
        return [
            f"{share} are longer than the text encoder reads: the mean over windows, which is this "
            "library's own way, stands for them."
        ]
    return [
        f"{share} are longer than the text encoder reads and were cut: only their beginning counts."
    ]


def digest_of(extractor: Extractor) -> str:
    """Of the weights, "missing" where they are not there: whoever lists metrics has none."""
    return "missing" if extractor.needs() else extractor.digest
