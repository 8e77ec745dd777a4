"""Features of Inception with random weights, by pytorch-fid, torch-fidelity and clean-fid's resizer:
tests/golden/evaluation/inception.{json,safetensors}. See reference_environment.py."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from reference_environment import FOLDER, let_torchvision_import, versions, write
from safetensors.torch import save_file
from seeded_weights import pictures, weights_of

let_torchvision_import()

import pytorch_fid.inception  # noqa: E402
from cleanfid.resize import make_resizer  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: E402
    FeatureExtractorInceptionV3,
)

SIZES = [(64, 64), (120, 80), (320, 400)]


def torch_fidelity(state: dict[str, torch.Tensor]) -> FeatureExtractorInceptionV3:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(state, path)
        return FeatureExtractorInceptionV3("i", ["2048"], feature_extractor_weights_path=str(path))


def after_resizing(network: FeatureExtractorInceptionV3, x: torch.Tensor) -> torch.Tensor:
    """torch-fidelity's forward behind its resize: as clean-fid calls the layers of its TorchScript file."""
    x = (x - 128) / 128
    for name, part in network.named_children():
        if name != "fc":
            x = part(x)
    return x.flatten(1)


def main() -> None:
    torch.manual_seed(0)
    pytorch_fid.inception.load_state_dict_from_url = lambda *a, **k: state
    empty = pytorch_fid.inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    state = weights_of(empty)
    ours = pytorch_fid.inception.InceptionV3().eval()
    theirs = torch_fidelity(state)
    images = pictures(SIZES)
    clean = make_resizer("PIL", False, "bicubic", (299, 299))
    found: dict[str, list[torch.Tensor]] = {"clean": [], "pytorch": [], "tf": []}
    with torch.inference_mode():
        for image in images:
            levels = np.asarray(image)
            pixels = torch.from_numpy(levels.copy()).permute(2, 0, 1)[None]
            resized = torch.from_numpy(clean(levels)).permute(2, 0, 1)[None]
            found["clean"].append(after_resizing(theirs, resized)[0])
            found["pytorch"].append(ours(pixels.float() / 255)[0].flatten())
            found["tf"].append(theirs(pixels)[0][0])
    save_file(
        {name: torch.stack(rows) for name, rows in found.items()}, FOLDER / "inception.safetensors"
    )
    levels = clean(np.asarray(images[1]))
    write(
        "inception",
        {
            "made_by": {
                "clean": "clean-fid's make_resizer, then the network of torch-fidelity",
                "pytorch": "pytorch_fid.inception.InceptionV3",
                "tf": "torch_fidelity FeatureExtractorInceptionV3",
                "packages": versions("pytorch-fid", "torch-fidelity", "clean-fid", "torchvision"),
            },
            "weights": "tests/builders/seeded_weights.py, weights_of, seed 0",
            "sizes": SIZES,
            "clean_resized_of_picture_1": levels[::37, ::41].tolist(),
        },
    )


if __name__ == "__main__":
    main()
