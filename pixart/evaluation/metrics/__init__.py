"""The metrics: METRICS, name -> "module:class". `open_metric` opens one, `register` adds one of yours."""

from importlib import import_module
from typing import TYPE_CHECKING

from pixart.evaluation.metric import Context, Metric

if TYPE_CHECKING:
    from collections.abc import Callable

# Each class is called with (name, context), and must not open anything before its `needs` are met.
METRICS: "dict[str, str | Callable[[str, Context], Metric]]" = {
    "aesthetic": "pixart.evaluation.metrics.aesthetic:Aesthetic",
    "aesthetic-v1": "pixart.evaluation.metrics.aesthetic:Aesthetic",
    "clip": "pixart.evaluation.metrics.clip:ClipScore",
    "cmmd": "pixart.evaluation.metrics.kernels:Cmmd",
    "compbench": "pixart.evaluation.metrics.compbench:CompBench",
    "dpg": "pixart.evaluation.metrics.dpg:Dpg",
    "fd-dinov2": "pixart.evaluation.metrics.frechet:Frechet",
    "fid-clean": "pixart.evaluation.metrics.frechet:Frechet",
    "fid-pytorch": "pixart.evaluation.metrics.frechet:Frechet",
    "fid-tf": "pixart.evaluation.metrics.frechet:Frechet",
    "geneval": "pixart.evaluation.metrics.geneval:GenEval",
    "hpsv2.0": "pixart.evaluation.metrics.hps:Hps",
    "hpsv2.1": "pixart.evaluation.metrics.hps:Hps",
    "image-reward": "pixart.evaluation.metrics.image_reward:ImageReward",
    "kid": "pixart.evaluation.metrics.kernels:Kid",
    "patch-fd": "pixart.evaluation.metrics.patches:PatchFrechet",
    "pickscore": "pixart.evaluation.metrics.pickscore:PickScore",
    "precision-recall": "pixart.evaluation.metrics.neighbours:PrecisionRecall",
    "shapes": "pixart.evaluation.metrics.shapes:ShapesAccuracy",
    "shapes-edges": "pixart.evaluation.metrics.shapes:ShapesEdges",
    "shapes-purity": "pixart.evaluation.metrics.shapes:ShapesPurity",
    "soft-tifa": "pixart.evaluation.metrics.tifa:SoftTifa",
    "texture": "pixart.evaluation.metrics.texture:Texture",
    "tifa": "pixart.evaluation.metrics.tifa:Tifa",
    "vqascore": "pixart.evaluation.metrics.vqascore:VqaScore",
}


def register(name: str, metric: "str | Callable[[str, Context], Metric]") -> None:
    """Add a metric under a name that is free. metric: what is called with (name, context), or "module:class"
    for one that is imported when it is opened. ValueError for a name that is taken."""
    if name in METRICS:
        raise ValueError(f"name must be free, there is a metric {name!r} already")
    METRICS[name] = metric


def open_metric(name: str, context: Context) -> Metric:
    """ValueError for a name that nobody knows."""
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(sorted(METRICS))}, got {name!r}")
    metric = METRICS[name]
    if isinstance(metric, str):
        module, _, attribute = metric.partition(":")
        metric = getattr(import_module(module), attribute)
    return metric(name, context)
