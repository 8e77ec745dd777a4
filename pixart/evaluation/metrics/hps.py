"""Human preference scores (HPSv2, arXiv:2306.09341), versions 2.0 and 2.1, whose scales differ: SDXL has 27.7
in one and 30.6 in the other."""

from collections.abc import Mapping
from typing import Any

from pixart.evaluation.metric import Context
from pixart.evaluation.metrics.cosine import CosineMetric, digest_of
from pixart.evaluation.networks.clip import Clip
from pixart.evaluation.networks.hps import TOKENIZER, HpsImages


class Hps(CosineMetric):
    """100 times the cosine. name: "hpsv2.0" or "hpsv2.1"."""

    unit = "x100"
    source = "HPSv2 (arXiv:2306.09341); github.com/tgxs002/HPSv2"
    extractor: HpsImages

    def __init__(self, name: str, context: Context) -> None:
        self.name = name
        self.extractor = HpsImages(f"{name}-pictures", context)

    @property
    def constants(self) -> Mapping[str, Any]:
        return {
            "file": self.extractor.weights.name,
            "tokenizer": TOKENIZER,
            "antialias": self.extractor.antialias,
            "weights": digest_of(self.extractor),
        }

    def scaled(self, cosine: float, network: Clip) -> float:
        return 100 * cosine
