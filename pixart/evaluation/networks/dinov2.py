"""DINOv2's features for Fréchet distances (arXiv:2306.04675; github.com/layer6ai-labs/dgm-eval): the class
token of ViT-L/14 behind the last layer norm, 1,024 numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pixart.evaluation.metric import Context, Extractor
from pixart.evaluation.needs import Need, need_snapshot, open_snapshot
from pixart.evaluation.networks.preparing import IMAGENET_MEAN, IMAGENET_STD, normalised, squashed
from pixart.evaluation.networks.weighing import weights_digest, width_in
from pixart.libraries import importing
from pixart.weights import T5_WEIGHTS, find_weights, open_pretrained

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

MODEL, SIDE, BATCH = "facebook/dinov2-large", 224, 32
_OFFSET = 0.1  # of a patch: in the published code against rounding, and in all of its features
_VERSION = "1"  # of preparing pictures and of positions: another one, other features


class Dinov2(Extractor):
    """Pictures are squashed to 224 pixels, where transformers' own processor would crop them."""

    def __init__(self, name: str, context: Context) -> None:
        self.model, self._context = context.options.get("dinov2-model", MODEL), context
        # Of another size it is not what papers mean by FD-DINOv2: its name says so, and notes go by that.
        self.name = name if self.model == MODEL else f"{name}-{Path(self.model).name}"
        self._network: Any = None

    def needs(self) -> Sequence[Need]:
        return need_snapshot(self.model, self._context)

    @property
    def width(self) -> int:  # type: ignore[override]
        return width_in(self._folder() / "config.json", "hidden_size")

    @property
    def digest(self) -> str:
        folder = self._folder()
        weights, _ = find_weights(folder, None, T5_WEIGHTS)
        return weights_digest(_VERSION, [folder / "config.json", *weights])

    def prepare(self, image: "Image", entry: "Entry") -> Any:
        return normalised(squashed(image, SIDE, SIDE), IMAGENET_MEAN, IMAGENET_STD)

    @torch.inference_mode()
    def __call__(self, prepared: Sequence[Any]) -> np.ndarray:
        if self._network is None:
            self._network = _opened(self._folder()).to(self._context.device)
        found = []
        for k in range(0, len(prepared), BATCH):
            pixels = torch.from_numpy(np.stack(prepared[k : k + BATCH])).to(self._context.device)
            # Layer-normalised already.
            found.append(self._network(pixel_values=pixels).last_hidden_state[:, 0].cpu())
        return torch.cat(found).float().numpy()

    def release(self) -> None:
        self._network = None

    def _folder(self) -> Path:
        return open_snapshot(self.name, self.model, self._context)


def _opened(folder: Path) -> Any:
    with importing():
        from transformers import Dinov2Model

    model = open_pretrained(Dinov2Model, folder)
    _place(model)
    return model


def _place(model: Any) -> None:
    """Positions for the patches of 224 pixels, as the published code has them: with them in place,
    transformers does not make its own, which differ by the offset."""
    grid = SIDE // model.config.patch_size
    embeddings = model.embeddings
    embeddings.position_embeddings = torch.nn.Parameter(
        positions(embeddings.position_embeddings.detach(), grid), requires_grad=False
    )


def positions(table: Tensor, grid: int) -> Tensor:
    """A table of (1, 1 + side², width) for grid x grid patches (github.com/facebookresearch/dinov2,
    vision_transformer.py, interpolate_offset 0.1, no antialias)."""
    side = round((table.shape[1] - 1) ** 0.5)
    if side == grid:
        return table
    patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + _OFFSET) / side
    resized = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], resized.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)], 1)
