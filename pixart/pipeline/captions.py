"""The captions of a pipeline's pictures: cleaned as the family was trained, encoded once, and paired
with the empty or negative caption that guidance compares them with.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from pixart.checkpoint.load import OpenedTransformer
from pixart.config import Family
from pixart.text.encoder import PromptEmbeddings, TextEncoder
from pixart.weights import errors_naming

NullCaption = Literal["own-mask", "prompt-mask"]


def as_trained(text: str, family: Family) -> str:
    """A caption as T5 read it when the family was trained: α's in lower case, Σ's as they are.

    Drawing and `prepare` share it, so that a model is asked in the tokens that it learns from.
    """
    return (text.lower() if family == "alpha" else text).strip()


@dataclass(eq=False)
class CaptionStore:
    """Features by text: in host memory what the disk cache does not hold.

    make_room: called before T5 needs memory.
    """

    encoder: TextEncoder
    opened: OpenedTransformer
    family: Family
    null_caption: NullCaption | None
    make_room: Callable[[], object]
    held: dict[tuple[str, bool], PromptEmbeddings] = field(default_factory=dict)

    def ensure(self, text: str) -> None:
        """See to it that a text, and the null caption if it is blank, need T5 no more."""
        for words, padded in self._keys(text):
            self._ensure(words, padded)

    def is_ready(self, text: str) -> bool:
        """Whether a text, and the null caption if it is blank, need T5 no more."""
        return all(self._is_ready(*key) for key in self._keys(text))

    def tokens_of(self, text: str) -> int:
        """How many T5 reads of a text, or of the null caption if it is blank."""
        return max(
            self.encoder.count_tokens(words, keep_padding=padded)
            for words, padded in self._keys(text)
        )

    def ensure_all(
        self, texts: Sequence[str], before: Callable[[], object] = lambda: None
    ) -> Iterator[str]:
        """`ensure` each text, and yield it when it is encoded. Those that the encoder reads in one pass are
        encoded together. before: called before each pass and each text that needs none; what is encoded by
        then stays if it raises."""
        missing: dict[str, list[str]] = {}
        for text in dict.fromkeys(texts):
            if self.is_ready(text):
                before()
                yield text
            else:
                missing.setdefault(as_trained(text, self.family), []).append(text)
        if not missing:
            return
        before()
        self.make_room()
        with errors_naming(self.encoder.place):
            passes = self.encoder.passes(list(missing))
        for place, group in enumerate(passes):
            if place:
                before()
            self._keep(group, False)
            for words in group:
                for text in missing[words]:
                    for key in self._keys(text)[1:]:
                        self._ensure(*key)
                    yield text

    def encoded(self, text: str) -> dict[tuple[str, bool], PromptEmbeddings]:
        """What `ensure` sees to, as `held` has it: for processes that have no T5."""
        return {key: self.features(*key) for key in self._keys(text)}

    def pair(self, prompt: str, negative: str) -> tuple[PromptEmbeddings, PromptEmbeddings]:
        """(conditional, unconditional); a blank negative is the null caption."""
        conditional = self.features(as_trained(prompt, self.family))
        negative = as_trained(negative, self.family)
        return conditional, self.features(negative) if negative else self.null(conditional)

    def features(self, text: str, padded: bool = False) -> PromptEmbeddings:
        held = self.held.get((text, padded))
        return self._encode(text, padded) if held is None else held

    def null(self, prompt: PromptEmbeddings) -> PromptEmbeddings:
        """The empty caption as this family's guidance sees it (see Pipeline.from_pretrained)."""
        if self.mask == "own-mask":
            return self.features("")
        if self._shows_padded_null:
            whole = self.features("", padded=True)
        else:
            table = self.opened.load().y_embedder.y_embedding[None]
            whole = PromptEmbeddings(table, torch.ones(table.shape[:2], dtype=torch.bool))
        return whole.to(prompt.features.device, prompt.features.dtype).with_mask_of(prompt)

    def _keys(self, text: str) -> list[tuple[str, bool]]:
        text = as_trained(text, self.family)
        is_padded_too = not text and self._shows_padded_null
        return [(text, False), (text, True)] if is_padded_too else [(text, False)]

    @property
    def _has_table(self) -> bool:
        return self.family == "alpha" and self.opened.null_caption_stored

    @property
    def mask(self) -> NullCaption:
        """Which mask the null caption is seen through."""
        return self.null_caption or ("prompt-mask" if self._has_table else "own-mask")

    @property
    def _shows_padded_null(self) -> bool:
        """Whether the prompt's mask decides what is seen of T5's empty caption at full length."""
        return self.mask == "prompt-mask" and not self._has_table

    def _is_ready(self, text: str, padded: bool) -> bool:
        return (text, padded) in self.held or self.encoder.is_cached(text, keep_padding=padded)

    def _ensure(self, text: str, padded: bool) -> None:
        if not self._is_ready(text, padded):
            self.make_room()
            self._keep([text], padded)

    def _keep(self, texts: Sequence[str], padded: bool) -> None:
        """Encode texts together, for the disk cache or `held`."""
        whole = self._encoded(texts, padded)
        for row, text in enumerate(texts):
            if not self.encoder.is_cached(text, keep_padding=padded):
                # As it is alone: in a pass the longest text decides the length.
                length = whole.features.shape[1] if padded else int(whole.mask[row].sum())
                features, mask = whole.features[[row], :length], whole.mask[[row], :length]
                self.held[text, padded] = PromptEmbeddings(features.clone(), mask.clone())

    def _encode(self, text: str, padded: bool) -> PromptEmbeddings:
        return self._encoded([text], padded)

    def _encoded(self, texts: Sequence[str], padded: bool) -> PromptEmbeddings:
        with errors_naming(self.encoder.place):
            # In host memory: a file may hold 30,000 prompts.
            return self.encoder.encode(list(texts), keep_padding=padded).to("cpu")
