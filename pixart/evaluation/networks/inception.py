"""Features of Inception-v3 (FID's of 2015), with three ways of pictures into it.

They are never to be compared with each other:

    inception-clean      Pillow's bicubic filter over floats (clean-fid, arXiv:2104.11222)
    inception-pytorch    bilinear of four neighbours, centres aligned (pytorch-fid)
    inception-tf         bilinear of four neighbours, first pixels aligned (TensorFlow 1, torch-fidelity)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pixart.evaluation.metric import Context, Extractor
from pixart.evaluation.needs import Need, find_file, open_file
from pixart.evaluation.networks.inception_network import SIDE, WIDTH, network
from pixart.evaluation.networks.preparing import bicubic_of_floats, bilinear, bilinear_of_tensorflow
from pixart.evaluation.networks.weighing import weights_digest
from pixart.tensors import read_tensors
from pixart.weights import fit

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from pixart.evaluation.store.entries import Entry

BATCH = 32
WEIGHTS = Need(
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
    aliases=("weights-inception-2015-12-05-6726825d.pth",),  # torch-fidelity's name
)
_VERSION = "1"  # of preparing pictures and of the network: another one, other features


def _clean(image: "Image") -> np.ndarray:
    return (bicubic_of_floats(image, SIDE, SIDE) - 128) / 128


def _pytorch(image: "Image") -> np.ndarray:
    # From -1 to 1 and not to 127/128: pytorch-fid divides by 255.
    return 2 * bilinear(image, SIDE) - 1


def _tf(image: "Image") -> np.ndarray:
    return (bilinear_of_tensorflow(image, SIDE) - 128) / 128


_WAYS = {"inception-clean": _clean, "inception-pytorch": _pytorch, "inception-tf": _tf}


class Inception(Extractor):
    """name: one of the three ways."""

    width = WIDTH

    def __init__(self, name: str, context: Context) -> None:
        if name not in _WAYS:
            raise ValueError(f"name must be one of {', '.join(_WAYS)}, got {name!r}")
        self.name, self._context = name, context
        self._network: nn.Module | None = None

    def needs(self) -> Sequence[Need]:
        return () if find_file(WEIGHTS, self._context) else (WEIGHTS,)

    @property
    def digest(self) -> str:
        return weights_digest(_VERSION, [open_file(self.name, WEIGHTS, self._context)])

    def prepare(self, image: "Image", entry: "Entry") -> Any:
        return _WAYS[self.name](image)

    @torch.inference_mode()
    def __call__(self, prepared: Sequence[Any]) -> np.ndarray:
        if self._network is None:
            path = open_file(self.name, WEIGHTS, self._context)
            self._network = self.fitted(read_tensors(path), path)
        device = self._context.device
        parts = [
            self._network(torch.from_numpy(np.stack(prepared[k : k + BATCH])).to(device)).cpu()
            for k in range(0, len(prepared), BATCH)
        ]
        return torch.cat(parts).numpy()

    def fitted(self, state: "Mapping[str, Tensor]", path: Path) -> "nn.Module":
        """The network with these weights. path: for messages. CheckpointError unless they fit."""
        opened = network()
        fit(opened, state, path, unused=r"fc\..*")
        return opened.to(self._context.device)

    def release(self) -> None:
        self._network = None
