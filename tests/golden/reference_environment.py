"""What the scripts that make evaluation goldens share. They run in an environment of their own, outside
the repository, with the reference packages and this project's torch:

    pip install --target /tmp/references --no-deps torch-fidelity pytorch-fid clean-fid \\
        open_clip_torch torchvision==0.28.0 timm ftfy wcwidth
    PYTHONPATH=/tmp/references:tests/builders:tests/golden python tests/golden/make_evaluation_NAME.py
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "evaluation"
_LIBRARY = torch.library.Library("torchvision", "DEF")


def let_torchvision_import() -> None:
    """PyPI's torchvision is built for CUDA: beside a CPU torch its operators do not load, and importing
    it fails. Its Python code is all that the references need."""
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", *packages)}


def write(name: str, values: dict[str, Any]) -> None:
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(path, path.stat().st_size, "bytes")
