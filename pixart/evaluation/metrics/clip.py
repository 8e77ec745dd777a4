"""CLIP score: how near a picture is to its prompt (arXiv:2104.08718), in any of the ways that papers mean by
the word."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pixart.evaluation.metric import Context
from pixart.evaluation.metrics.cosine import CosineMetric, digest_of
from pixart.evaluation.networks.clip import MODELS, Clip, extractor_of, shown

VARIANTS: dict[str, tuple[str, Callable[[float], float]]] = {
    "cosine": ("the cosine", lambda cosine: cosine),
    "x100": ("100 times the cosine", lambda cosine: 100 * cosine),
    "x100-clamped": ("max(100 cosine, 0), as torchmetrics has it", lambda c: max(100 * c, 0.0)),
    "clipscore": ("2.5 max(cosine, 0), as CLIPScore has it", lambda c: 2.5 * max(c, 0.0)),
}
LONG = ("cut", "mean")


class ClipScore(CosineMetric):
    """Mean cosine. Options: `clip-model`, a hub id or folder, default openai/clip-vit-large-patch14;
    `clip-variant` of VARIANTS; `clip-long`, what becomes of prompts beyond the limit: "cut", as everywhere,
    or "mean" of the cosines of windows of 75 tokens, which is this library's own."""

    source = "CLIPScore (arXiv:2104.08718); CLIP (arXiv:2103.00020)"

    def __init__(self, name: str, context: Context) -> None:
        self.name = name
        options = context.options
        self.variant = options.get("clip-variant", "cosine")
        if self.variant not in VARIANTS:
            raise ValueError(
                f"option clip-variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}"
            )
        self.long = options.get("clip-long", "cut")
        if self.long not in LONG:
            raise ValueError(
                f"option clip-long must be one of {', '.join(LONG)}, got {self.long!r}"
            )
        self.whole = self.long == "mean"
        self.model = options.get("clip-model", MODELS["clip-l14"])
        self.extractor = extractor_of(self.model, context)

    @property
    def constants(self) -> Mapping[str, Any]:
        assert self.extractor is not None
        return {
            "model": shown(self.model),
            "variant": self.variant,
            "long": self.long,
            "weights": digest_of(self.extractor),
        }

    def scaled(self, cosine: float, network: Clip) -> float:
        return VARIANTS[self.variant][1](cosine)

    def notes(self) -> Sequence[str]:
        return () if self.variant == "cosine" else (f"It is {VARIANTS[self.variant][0]}.",)
