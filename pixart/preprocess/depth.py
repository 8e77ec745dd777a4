"""Depth maps through transformers' depth estimation, near bright and far dark as ControlNets have them.

Most networks (Depth Anything, DPT) give an inverse depth up to scale and shift, which is bright where things
are near. Those that give metres (ZoeDepth, Depth Pro, Depth Anything's metric ones) are turned over.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pixart.files import CheckpointError
from pixart.libraries import importing, silenced
from pixart.weights import errors_naming, open_pretrained

if TYPE_CHECKING:
    from PIL.Image import Image

_IN_METRES = ("zoedepth", "depth_pro")  # model types, whose configurations do not say so


def open_depth(folder: Path, device: torch.device | str = "cpu") -> Any:
    """transformers' pipeline over a folder's model. CheckpointError for a folder of anything else."""
    with importing():
        from transformers import (
            AutoImageProcessor,
            AutoModelForDepthEstimation,
            DepthEstimationPipeline,
        )
    model = open_pretrained(AutoModelForDepthEstimation, folder, may_hold_more=True)
    with errors_naming(folder), silenced():
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return DepthEstimationPipeline(
            model=model, image_processor=processor, device=torch.device(device)
        )


@torch.inference_mode()
def draw_depth(estimate: Any, image: "Image") -> "Image":
    """The depth of an RGB picture as RGB of three equal channels: its nearest point is 255, its farthest 0.
    Black where all is as near. CheckpointError for a network that gives NaN."""
    import numpy as np
    from PIL import Image

    # The pipeline makes a picture too, and divides 0 by 0 where all is as near.
    with silenced(), np.errstate(invalid="ignore"):
        depth: Tensor = estimate(image)["predicted_depth"].float()
    depth = depth.reshape(1, 1, *depth.shape[-2:])
    if depth.shape[-2:] != (image.height, image.width):  # of older transformers
        depth = F.interpolate(depth, (image.height, image.width), mode="bicubic")
    low, high = depth.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(f"{estimate.model.name_or_path}: gives a depth that is not finite")
    near = (high - depth if _is_metric(estimate.model.config) else depth - low) / (high - low)
    near = near.nan_to_num(0.0)
    return Image.fromarray((near[0, 0] * 255).round().byte().cpu().numpy()).convert("RGB")


def _is_metric(config: Any) -> bool:
    kind = getattr(config, "depth_estimation_type", None)
    return kind == "metric" or config.model_type in _IN_METRES
