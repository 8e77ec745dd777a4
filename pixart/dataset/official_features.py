"""The official feature files (.npy and .npz) beside the official data_info.json, read as they are.

Latents are (2C, h, w): mean and standard deviation (not the log variance), unscaled. Captions are
`caption_feature` (1, L, D) and `attention_mask` (1, L); only the tokens that the mask keeps count. Edges
that steer a control are latents too, in `hed_feature_R/x/a/b.npz`.

The extractors and loaders name a file in four ways: x/a/b.c.png is x/a_b.c (multi-scale loader: the
last slash turns into an underscore), b.c (caption extractor), b (VAE extractor), or x/a/b.c. They
agree for the published data, whose paths are flat and whose names have one dot.
"""

import re
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixart.dataset.features import Captioned, Entry
from pixart.dataset.samples import CaptionError, Rejected, captions_of
from pixart.dataset.sources import PATH_FIELDS, index_objects

MAX_RATIO = 4.5  # height / width; the official loader has no lower bound
DOWNSAMPLE = 8
# The folders of Σ, then those of α, one of them misspelt as published; {R} is the resolution.
LATENT_FOLDERS = (
    "img_sdxl_vae_features_{R}resolution_ms_new",
    "img_sdxl_vae_features_{R}resolution_new",
    "img_vae_features_{R}resolution/noflip",
    "img_vae_fatures_{R}_multiscale/ms",
)
CAPTION_FOLDERS = {
    "prompt": ("caption_features_new", "caption_feature_wmask"),
    "sharegpt4v": ("sharegpt4v_caption_features_new",),
}
# What NumPy raises over damaged files; it reads a header as Python's tokens and literals.
_DAMAGED = (OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, SyntaxError,
            RuntimeError, OverflowError, MemoryError, tokenize.TokenError, zipfile.BadZipFile,
            zlib.error)  # fmt: skip
MAX_UNPACKED = 2**30  # bytes of a .npz
# Of the edges that the published controls were trained with: KEY.npz, their latents as one array.
CONTROL_FOLDER, CONTROL = "hed_feature_{R}", "hed"


def find_data_info(directory: Path) -> Path | None:
    """The data_info.json of <root>, or of <root>/InternData itself; None if there is none."""
    places = (directory / "InternData" / "data_info.json", directory / "data_info.json")
    return next((place for place in places if place.is_file()), None)


class OfficialFeatures:
    """Samples of a data_info.json that have features; one warning tells of those that have none.

    resolution: which of the latents' folders; None if there is only one.
    """

    scaling_factor: float | None = None  # the files do not say which VAE they came from

    def __init__(self, data_info: Path, resolution: int | None) -> None:
        self.root = data_info.parent
        latents = _latent_folder(self.root, resolution)
        controls = self.root / CONTROL_FOLDER.replace(
            "{R}", _resolution_of(latents.relative_to(self.root))
        )
        self.control = CONTROL if controls.is_dir() else None
        self.entries: list[Entry] = []
        skipped: list[str] = []
        for place, values in index_objects(data_info):
            entry = _entry(self.root, latents, place, values)
            if isinstance(entry, Entry):
                if self.control:
                    entry = replace(entry, control=_find(controls, entry.path, ".npz"))
                self.entries.append(entry)
            else:
                skipped.append(entry)
        _refuse_shared_files(self.entries)
        if skipped:
            first = "; ".join(skipped[:3])
            warnings.warn(
                f"{len(skipped)} samples of {data_info} are left out: {first}", stacklevel=4
            )

    def moments(self, file: Path) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of an entry's image or control, (C, h, w) each."""
        try:
            mean, std = torch.from_numpy(_latents(file)).chunk(2)
            if mean.ndim != 3 or mean.shape != std.shape or not _is_finite(mean, std):
                raise ValueError(f"no finite latents, {tuple(mean.shape)} and {tuple(std.shape)}")
        except _DAMAGED as error:
            raise ValueError(f"{file} cannot be read ({error}); extract it again") from error
        if (std < 0).any():
            raise ValueError(
                f"{file} must hold standard deviations after the means, got negative ones: "
                "log variances? Extract the features again"
            )
        return mean, std

    def caption(self, entry: Captioned, name: str) -> Tensor:
        """The features of a caption, (L, D)."""
        file = entry.captions[name]
        try:
            with _unpacked(file) as stored:
                features = torch.from_numpy(stored["caption_feature"]).flatten(0, -2)
                mask = torch.from_numpy(stored["attention_mask"]).flatten()
            features = features[mask.bool()]
            if features.ndim != 2 or not len(features) or not _is_finite(features):
                raise ValueError(f"no finite features, {tuple(features.shape)}")
            return features
        except _DAMAGED as error:
            raise ValueError(f"{file} must be an official caption file ({error})") from error


def _latents(file: Path) -> Any:
    """The array of a .npy, or of a .npz with one."""
    # NumPy refuses pickled objects, which could run code, unless allow_pickle is given.
    if file.suffix == ".npy":
        return np.load(file)
    with _unpacked(file) as stored:
        return stored["arr_0"]


def _unpacked(file: Path) -> Any:
    """A .npz, of which nothing is read yet."""
    stored = np.load(file)
    if sum(member.file_size for member in stored.zip.infolist()) > MAX_UNPACKED:
        stored.close()
        raise ValueError(f"it unpacks to more than {MAX_UNPACKED >> 20} MiB")
    return stored


def _is_finite(*tensors: Tensor) -> bool:
    return all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in tensors)


def _latent_folder(root: Path, resolution: int | None) -> Path:
    pattern = "*" if resolution is None else str(resolution)
    found = [
        folder
        for template in LATENT_FOLDERS
        for folder in sorted(root.glob(template.replace("{R}", pattern)))
    ]
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(folder.relative_to(root)) for folder in found) or "none"
    wanted = "at this resolution" if resolution else "or name a resolution"
    raise ValueError(f"{root} must hold one folder of latents {wanted}, got {names}")


def _resolution_of(latents: Path) -> str:
    found = re.search(r"\d+", str(latents))
    assert found is not None  # of LATENT_FOLDERS
    return found[0]


def _entry(root: Path, latents: Path, place: str, values: dict[str, Any] | Rejected) -> Entry | str:
    """The sample, or why it is none."""
    if isinstance(values, Rejected):
        return f"{values.path} {values.reason}"
    path = next((values[field] for field in PATH_FIELDS if values.get(field)), None)
    if not isinstance(path, str):
        return f"{place} has no path"
    try:
        names = captions_of(values)
        ratio, height, width = (float(values.get(k) or 0) for k in ("ratio", "height", "width"))
    except (CaptionError, TypeError, ValueError) as error:
        return f"{path}: {error}"
    if ratio > MAX_RATIO:
        return f"{path} has a ratio over {MAX_RATIO}"
    image = _find(latents, path, ".npy")
    captions = {name: _find_caption(root, name, path) for name in names}
    captions = {name: file for name, file in captions.items() if file}
    if image is None or not captions:
        return f"{path} has no {'latents' if image is None else 'caption features'}"
    try:
        # Mapped: of every sample only the head is read.
        rows, cols = np.load(image, mmap_mode="r").shape[-2:]
    except _DAMAGED as error:
        return f"{image} cannot be read ({error})"
    bucket = (rows * DOWNSAMPLE, cols * DOWNSAMPLE)
    size = (int(height), int(width)) if height and width else bucket
    return Entry(path, captions, size, bucket, image)


def _find_caption(root: Path, name: str, path: str) -> Path | None:
    folders = (root / folder for folder in CAPTION_FOLDERS.get(name, ()))
    return next((file for folder in folders if (file := _find(folder, path, ".npz"))), None)


def _find(folder: Path, path: str, suffix: str) -> Path | None:
    files = (folder / f"{name}{suffix}" for name in _names(path))
    return next((file for file in files if file.is_file()), None)


def _names(path: str) -> Iterator[str]:
    parent, slash, name = path.rpartition("/")
    stem = Path(name).stem
    if slash:
        yield f"{parent}_{stem}"
        yield f"{parent}/{stem}"
    yield stem
    yield name.split(".")[0]


def _refuse_shared_files(entries: list[Entry]) -> None:
    """Basenames of different folders meet in one file: that file can be right for one at most."""
    owner: dict[Path, str] = {}
    for entry in entries:
        if owner.setdefault(entry.image, entry.path) != entry.path:
            raise ValueError(
                f"{entry.image} must belong to one sample, got {owner[entry.image]} and "
                f"{entry.path}; extract the features with names that tell them apart"
            )
