"""DINOv2's transform and features, HPSv2's letterbox and scores, by the references' own code:
tests/golden/evaluation/{dinov2,hps}.json. See reference_environment.py; the sources are unpacked beside:

    facebookresearch/dinov2 at b8931f7, layer6ai-labs/dgm-eval at 74c79f7, tgxs002/HPSv2 at 866735e
    python tests/golden/make_evaluation_vision.py FOLDER_OF_SOURCES
"""

import importlib
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from reference_environment import let_torchvision_import, versions, write
from seeded_weights import pictures, weights_of
from tiny_clip import TEXTS, write_tokenizer

let_torchvision_import()

SOURCES = Path(sys.argv[1])
SIZES = [(300, 200), (95, 160), (64, 64)]  # letterboxed: odd borders above and beside


def package(name: str, folder: Path) -> None:
    """A package without what its __init__ would import."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]  # type: ignore[attr-defined]
    sys.modules[name] = module


def sampled(pixels: torch.Tensor) -> list[Any]:
    return pixels[:, ::17, ::19].double().tolist()


def dinov2() -> None:
    import dinov2_weights as small

    sys.path.insert(0, str(SOURCES / "dinov2"))
    package("dgm_eval", SOURCES / "dgm-eval" / "dgm_eval")
    package("dgm_eval.models", SOURCES / "dgm-eval" / "dgm_eval" / "models")
    from dinov2.models.vision_transformer import DinoVisionTransformer

    encoder = importlib.import_module("dgm_eval.models.dinov2").DINOv2Encoder
    transform = encoder.transform
    here = types.SimpleNamespace(clean_resize=False)
    network = DinoVisionTransformer(
        img_size=small.SIDE, patch_size=small.PATCH, embed_dim=small.WIDTH, depth=small.DEPTH,
        num_heads=small.HEADS, init_values=1.0, block_chunks=0,
    ).eval()  # fmt: skip
    network.load_state_dict(small.published())
    pixels = [transform(here, image).float() for image in pictures(SIZES)]
    with torch.inference_mode():
        features = [network(one[None])[0] for one in pixels]
    write(
        "dinov2",
        {
            "made_by": {
                "transform": "dgm-eval 74c79f7, models/dinov2.py, DINOv2Encoder.transform",
                "network": "facebookresearch/dinov2 b8931f7, DinoVisionTransformer, fp32, CPU",
                "packages": versions("torchvision"),
            },
            "weights": "tests/builders/dinov2_weights.py, seed 0",
            "sizes": SIZES,
            "pixels": [sampled(one) for one in pixels],
            "features": [one.double().tolist() for one in features],
        },
    )


def hps() -> None:
    package("hps_open_clip", SOURCES / "HPSv2" / "hpsv2" / "src" / "open_clip")
    transform = importlib.import_module("hps_open_clip.transform")
    model = importlib.import_module("hps_open_clip.model")
    prepare = transform.image_transform(224, is_train=False, resize_longest_max=True)
    images = pictures(SIZES)
    pixels = [prepare(image) for image in images]
    # What torchvision up to 0.16 did on tensors by default.
    resize = transform.F.resize
    transform.F.resize = lambda img, size, how: resize(img, size, how, antialias=False)
    aliased = [prepare(image) for image in images]
    transform.F.resize = resize
    network = model.CLIP(
        64,
        {"image_size": 224, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14},
        {"context_length": 77, "vocab_size": 514, "width": 128, "heads": 2, "layers": 2},
    ).eval()
    network.load_state_dict(weights_of(network, gain=1.0))
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        (Path(folder) / "config.json").write_text('{"model_type": "clip"}')
        tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    rows = torch.zeros(len(ids), 77, dtype=torch.long)
    for k, row in enumerate(ids):
        rows[k, : len(row)] = torch.tensor(row)
    with torch.inference_mode():
        seen, read, _ = network(torch.stack(pixels), rows)
        scores = (seen.double() @ read.double().T).diagonal() * 100
    write(
        "hps",
        {
            "made_by": {
                "letterbox": "HPSv2 866735e, open_clip/transform.py, image_transform(224, False, "
                "resize_longest_max=True)",
                "network": "HPSv2 866735e, open_clip/model.py, CLIP, fp32, CPU",
                "packages": versions("torchvision"),
                "note": "of its 100 cos only the cosine is in HPSv2's score(); the README prints 100 cos",
            },
            "weights": "tests/builders/seeded_weights.py, weights_of, gain 1, seed 0",
            "sizes": SIZES,
            "shapes": {name: list(t.shape) for name, t in network.state_dict().items()},
            "pixels": [sampled(one) for one in pixels],
            "pixels_without_antialias": [sampled(one) for one in aliased],
            "ids": ids,
            "scores": scores.tolist(),
        },
    )


if __name__ == "__main__":
    dinov2()
    hps()
