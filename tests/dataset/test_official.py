"""The official feature files: their folders, the four ways in which they are named, their traps."""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from pictures import write

from pixart.dataset.batches import FeatureDataset

MULTI = "img_sdxl_vae_features_512resolution_ms_new"


def save_latents(file: Path, value: float = 1.0, height: int = 8, width: int = 12) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    mean, std = np.full((4, height, width), -value), np.full((4, height, width), value)
    np.save(file, np.concatenate([mean, std]).astype(np.float16))


def save_caption(file: Path, tokens: int = 3, length: int = 10, value: float = 1.0) -> None:
    """Beyond the mask the last token's features repeat, as the official loader leaves them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    features = np.full((1, length, 6), value, dtype=np.float16)
    mask = (np.arange(length) < tokens)[None].astype(np.int16)
    np.savez_compressed(file, caption_feature=features, attention_mask=mask)


def layout(root: Path, *objects: dict[str, Any]) -> Path:
    """<root>/InternData with a data_info.json; returns InternData."""
    write(root / "InternData" / "data_info.json", list(objects))
    return root / "InternData"


def info(path: str, **changes: Any) -> dict[str, Any]:
    return {"path": path, "width": 300, "height": 200, "ratio": 0.667, "prompt": "raw",
            "sharegpt4v": "long"} | changes  # fmt: skip


def test_the_published_layout_loads_as_it_is(tmp_path: Path) -> None:
    data = layout(tmp_path, info("000.png"), info("001.png", sharegpt4v=""))
    for number in range(2):
        save_latents(data / MULTI / f"00{number}.npy", value=number + 1)
        save_caption(data / "caption_features_new" / f"00{number}.npz", tokens=3)
        save_caption(data / "sharegpt4v_caption_features_new" / f"00{number}.npz", tokens=5)
    for place in (tmp_path, data):
        features = FeatureDataset(place, 512)
        assert features.buckets == [(64, 96)] * 2 and features.scaling_factor is None
        batch = features.batch([0, 1], Random(0), {"sharegpt4v": 1, "prompt": 0.001})
        assert batch.mean.dtype == torch.float32
        assert batch.mean[:, 0, 0, 0].tolist() == [-1, -2]
        assert batch.std[:, 0, 0, 0].tolist() == [1, 2]
        assert batch.mask.sum(1).tolist() == [5, 3]  # the second one's long caption is empty
        assert batch.features.shape == (2, 5, 6) and batch.size.tolist() == [[200, 300]] * 2
        assert batch.aspect_ratio[0].item() == pytest.approx(64 / 96)


@pytest.mark.parametrize("name", ["x/a_b.c", "x/a/b.c", "b.c", "b"])
def test_every_way_of_naming_is_found(tmp_path: Path, name: str) -> None:
    data = layout(tmp_path, info("x/a/b.c.png"))
    save_latents(data / MULTI / f"{name}.npy")
    save_caption(data / "caption_features_new" / f"{name}.npz")
    assert len(FeatureDataset(tmp_path)) == 1


@pytest.mark.parametrize(
    ("latents", "captions"),
    [
        ("img_sdxl_vae_features_256resolution_new", "caption_features_new"),
        ("img_vae_features_256resolution/noflip", "caption_feature_wmask"),
        ("img_vae_fatures_256_multiscale/ms", "caption_feature_wmask"),
    ],
)
def test_single_scale_and_alpha_folders_are_found(
    tmp_path: Path, latents: str, captions: str
) -> None:
    data = layout(tmp_path, info("0.png"))
    save_latents(data / latents / "0.npy")
    save_caption(data / captions / "0.npz")
    assert len(FeatureDataset(tmp_path, 256)) == 1


def test_a_resolution_chooses_among_folders(tmp_path: Path) -> None:
    data = layout(tmp_path, info("0.png"))
    save_caption(data / "caption_features_new" / "0.npz")
    save_latents(data / MULTI / "0.npy", height=8)
    save_latents(data / MULTI.replace("512", "1024") / "0.npy", height=16)
    assert FeatureDataset(tmp_path, 1024).buckets == [(128, 96)]
    with pytest.raises(ValueError, match="name a resolution, got .*1024resolution.*512resolution"):
        FeatureDataset(tmp_path)
    with pytest.raises(ValueError, match="at this resolution, got none"):
        FeatureDataset(tmp_path, 2048)


def test_samples_without_features_are_left_out_with_a_warning(tmp_path: Path) -> None:
    names = ["good", "bare", "mute", "tall", "torn"]
    data = layout(
        tmp_path, *(info(f"{name}.png", ratio=5 if name == "tall" else 1) for name in names)
    )
    for name in names:
        if name != "bare":
            save_latents(data / MULTI / f"{name}.npy")
        if name != "mute":
            save_caption(data / "caption_features_new" / f"{name}.npz")
    (data / MULTI / "torn.npy").write_bytes(b"\x93NUMPY")
    with pytest.warns(UserWarning, match="4 samples .* are left out: bare.png has no latents"):
        features = FeatureDataset(tmp_path)
    assert [entry.path for entry in features.entries] == ["good.png"]


def test_an_object_that_makes_no_sense_is_left_out(tmp_path: Path) -> None:
    data = layout(tmp_path, info("0.png"), info("1.png", height="tall"), {"prompt": "x"}, info("2"))
    save_latents(data / MULTI / "0.npy")
    save_caption(data / "caption_features_new" / "0.npz")
    with pytest.warns(UserWarning, match="3 samples .* 1.png: could not .*has no path"):
        assert len(FeatureDataset(tmp_path)) == 1


def test_log_variances_are_not_taken_for_deviations(tmp_path: Path) -> None:
    data = layout(tmp_path, info("0.png"))
    save_latents(data / MULTI / "0.npy", value=-1)
    save_caption(data / "caption_features_new" / "0.npz")
    with pytest.raises(ValueError, match="log variances"):
        FeatureDataset(tmp_path).batch([0], Random(0))


def test_one_file_for_two_samples_is_refused(tmp_path: Path) -> None:
    """Extractors that name by the basename overwrote one with the other."""
    data = layout(tmp_path, info("a/0.png"), info("b/0.png"))
    save_latents(data / MULTI / "0.npy")
    save_caption(data / "caption_features_new" / "0.npz")
    with pytest.raises(ValueError, match="one sample, got a/0.png and b/0.png"):
        FeatureDataset(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", "other"])
def test_a_damaged_caption_file_is_named(tmp_path: Path, content: bytes | str) -> None:
    data = layout(tmp_path, info("0.png"))
    save_latents(data / MULTI / "0.npy")
    file = data / "caption_features_new" / "0.npz"
    save_caption(file)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.savez(file, something=np.zeros(3))
    with pytest.raises(ValueError, match="0.npz"):
        FeatureDataset(tmp_path).batch([0], Random(0))


HEADERS = {
    "open brackets": b"\x93NUMPY\x01\x00\x76\x00{'descr': ((((((((".ljust(126) + b"\n",
    "endless shape": b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f2', 'fortran_order': False, "
    b"'shape': (8, 999999999, 99999999), }".ljust(86) + b"\n",
}  # fmt: skip


@pytest.mark.parametrize("damage", [*HEADERS, "nan", "text", "objects", "flat", "odd"])
def test_damaged_latents_are_named(tmp_path: Path, damage: str) -> None:
    data = layout(tmp_path, info("0.png"))
    save_caption(data / "caption_features_new" / "0.npz")
    file = data / MULTI / "0.npy"
    save_latents(file, value=np.nan if damage == "nan" else 1.0)
    features = FeatureDataset(tmp_path)  # before it is damaged
    arrays: dict[str, Any] = {
        "text": np.array([["a"]]),
        "objects": np.array([{}], dtype=object),
        "flat": np.ones(8, np.float32),
        "odd": np.ones((5, 4, 4), np.float32),
    }
    if damage in arrays:
        np.save(file, arrays[damage])
    elif damage in HEADERS:
        file.write_bytes(HEADERS[damage])
    with pytest.raises(ValueError, match=r"0\.npy cannot be read .*; extract it again") as caught:
        features.batch([0], Random(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_captions_that_are_not_finite_or_unpack_without_end_are_named(
    tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = layout(tmp_path, info("0.png"))
    save_latents(data / MULTI / "0.npy")
    save_caption(data / "caption_features_new" / "0.npz", value=value)
    with pytest.raises(ValueError, match="0.npz must be an official caption file .no finite"):
        FeatureDataset(tmp_path).batch([0], Random(0))
    monkeypatch.setattr("pixart.dataset.official_features.MAX_UNPACKED", 100)
    with pytest.raises(ValueError, match="0.npz must be .*unpacks to more than"):
        FeatureDataset(tmp_path).batch([0], Random(0))
