"""PickScore (arXiv:2305.01569): a CLIP that learned which of two pictures people pick."""

from collections.abc import Mapping
from typing import Any

from pixart.evaluation.metric import Context
from pixart.evaluation.metrics.cosine import CosineMetric, digest_of
from pixart.evaluation.networks.clip import Clip, ClipImages, shown

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = (
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # whose tokenizer and processor it was trained with
)


class PickScore(CosineMetric):
    """exp(logit_scale) times the cosine: 19 to 23 for most pictures; some tools print it over 100."""

    source = "Pick-a-Pic (arXiv:2305.01569); huggingface.co/yuvalkirstain/PickScore_v1"

    def __init__(self, name: str, context: Context) -> None:
        self.name = name
        self.model = context.options.get("pickscore-model", MODEL)
        self.processor = context.options.get("pickscore-processor", PROCESSOR)
        self.extractor = ClipImages("pickscore-pictures", context, self.model, self.processor)

    @property
    def constants(self) -> Mapping[str, Any]:
        assert self.extractor is not None
        weights = digest_of(self.extractor)
        return {"model": shown(self.model), "processor": shown(self.processor), "weights": weights}

    def scaled(self, cosine: float, network: Clip) -> float:
        return network.scale * cosine
