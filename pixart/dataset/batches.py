"""Prepared features as batches for training: what `prepare` wrote, or the official feature files."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pixart.dataset.features import (
    Captioned,
    Entry,
    PreparedFeatures,
    PromptFeatures,
    holds_prompts,
)
from pixart.dataset.official_features import OfficialFeatures, find_data_info


@dataclass(frozen=True)
class FeatureBatch:
    """Latents and captions of B samples of one bucket.

    mean, std: (B, C, h, w) of the VAE's posterior, fp32, unscaled. features: (B, L, D) in the dtype
    that they were stored in, zero beyond a caption's tokens. mask: (B, L) bool, true where a token
    counts. size: (B, 2) fp32, height and width of the original picture in pixels. aspect_ratio:
    (B, 1) fp32, height / width of the bucket. control_mean, control_std: as mean and std, of the pictures
    that steer a control; None where they were not asked for.
    """

    mean: Tensor
    std: Tensor
    features: Tensor
    mask: Tensor
    size: Tensor
    aspect_ratio: Tensor
    control_mean: Tensor | None = None
    control_std: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mean)

    def to(self, device: torch.device | str) -> "FeatureBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: one.to(device) for k, one in values.items() if one is not None})


class CaptionDataset:
    """The captions of what was prepared: of prompts alone, or of pictures.

    `entries`: the samples. `caption_names`: of all of them.
    """

    def __init__(
        self,
        directory: Path,
        features: PromptFeatures | PreparedFeatures | OfficialFeatures,
    ) -> None:
        self.directory, self._features = directory, features
        self.entries: Sequence[Captioned] = features.entries
        if not self.entries:
            raise ValueError(f"{directory} must hold at least one sample; its report says why not")
        self.caption_names = sorted({name for entry in self.entries for name in entry.captions})

    def __len__(self) -> int:
        return len(self.entries)

    def caption(
        self, index: int, rng: random.Random, caption_weights: Mapping[str, float] | None = None
    ) -> Tensor:
        """The features (L, D) of one of a sample's captions, drawn as `FeatureDataset.batch` draws it."""
        entry = self.entries[index]
        return self._features.caption(entry, _draw(entry, caption_weights, rng))

    def check_captions(self, caption_weights: Mapping[str, float]) -> None:
        """Raises ValueError if `batch` would for some sample: better known before training."""
        self._check_names(caption_weights)
        for entry in self.entries:
            _odds(entry, caption_weights)

    def caption_mix(self, caption_weights: Mapping[str, float]) -> "CaptionMix":
        """How often each caption is drawn. Raises ValueError as check_captions does."""
        self._check_names(caption_weights)
        shares = dict.fromkeys(self.caption_names, 0.0)
        wanted = {name for name, weight in caption_weights.items() if weight > 0}
        lacking = 0
        for entry in self.entries:
            odds = _odds(entry, caption_weights)
            whole = sum(odds.values()) * len(self.entries)
            for name, weight in odds.items():
                shares[name] += weight / whole
            lacking += not wanted <= {*odds, *map(_group, odds)}
        return CaptionMix(shares, len(self.entries), lacking)

    def _check_names(self, weights: Mapping[str, float] | None) -> None:
        known = {*self.caption_names, *map(_group, self.caption_names)}
        if unknown := set(weights or ()) - known:
            raise ValueError(
                f"caption_weights must name captions of the data ({', '.join(sorted(known))}), "
                f"got {', '.join(sorted(unknown))}"
            )
        if any(weight < 0 for weight in (weights or {}).values()):
            raise ValueError(f"caption_weights must not be negative, got {weights}")


class FeatureDataset(CaptionDataset):
    """The samples of a directory that `prepare` filled, or of the official layout.

    resolution: in pixels; may be left out where the directory holds one. `scaling_factor` is that
    of the VAE, None where the files do not say; `control` names what makes the pictures that steer, None
    where there are none. Raises ValueError if there is nothing to read.
    """

    def __init__(self, directory: str | Path, resolution: int | None = None) -> None:
        directory = Path(directory)
        prepared = any(directory.glob("index-*.json"))
        data_info = None if prepared else find_data_info(directory)
        features = (
            OfficialFeatures(data_info, resolution)
            if data_info
            else PreparedFeatures(directory, resolution)
        )
        super().__init__(directory, features)
        self._pictures = features
        self.entries: Sequence[Entry] = features.entries
        self.scaling_factor = features.scaling_factor
        self.control = features.control

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Height and width in pixels of every sample's bucket."""
        return [entry.bucket for entry in self.entries]

    def batch(
        self,
        indices: Sequence[int],
        rng: random.Random,
        caption_weights: Mapping[str, float] | None = None,
        *,
        control: bool = False,
    ) -> FeatureBatch:
        """The samples of some indices, which must share a bucket, each with one of its captions.

        caption_weights: by name, relative; a name without its number (`synthetic` for synthetic.1,
        synthetic.2 ...) shares its weight among them. A caption that a sample lacks leaves its
        weight to the others. Without weights all captions of a sample are as likely. control: read the
        pictures that steer as well, which every sample must have.
        """
        chosen = [self.entries[index] for index in indices]
        buckets = {entry.bucket for entry in chosen}
        if len(buckets) != 1:
            raise ValueError(f"indices must be of one bucket, got {sorted(buckets)}")
        self._check_names(caption_weights)
        names = [_draw(entry, caption_weights, rng) for entry in chosen]
        mean, std = self._moments([entry.image for entry in chosen])
        steering = self._steering(chosen, mean.shape) if control else (None, None)
        captions = [self._features.caption(e, name) for e, name in zip(chosen, names, strict=True)]
        features, mask = pad(captions)
        (height, width) = buckets.pop()
        return FeatureBatch(
            mean=mean,
            std=std,
            features=features,
            mask=mask,
            size=torch.tensor([entry.size for entry in chosen], dtype=torch.float32),
            aspect_ratio=torch.full((len(chosen), 1), height / width),
            control_mean=steering[0],
            control_std=steering[1],
        )

    def _moments(self, places: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) each, fp32."""
        mean, std = zip(*map(self._pictures.moments, places), strict=True)
        return torch.stack(mean).float(), torch.stack(std).float()

    def _steering(self, chosen: Sequence[Entry], shape: torch.Size) -> tuple[Tensor, Tensor]:
        for entry in chosen:
            if entry.control is None:
                raise ValueError(self._uncontrolled(entry))
        mean, std = self._moments([entry.control for entry in chosen])
        if mean.shape != shape:
            raise ValueError(
                f"control pictures must have latents of their pictures' shape, got {tuple(mean.shape)} for "
                f"{tuple(shape)} of {chosen[0].path}"
            )
        return mean, std

    def _uncontrolled(self, entry: Entry) -> str:
        example = f", {entry.path} has none" if self.control else ""
        return (
            f"{self.directory} must have a control picture of every sample{example}; prepare it with "
            "--control"
        )

    def check_controls(self) -> None:
        """Raises ValueError unless every sample has a picture that steers: better known before training."""
        for entry in self.entries:
            if entry.control is None:
                raise ValueError(self._uncontrolled(entry))


def open_captions(directory: str | Path, resolution: int | None = None) -> CaptionDataset:
    """The captions of a folder that `prompts` filled, or of prepared pictures of a resolution."""
    directory = Path(directory)
    if holds_prompts(directory):
        return CaptionDataset(directory, PromptFeatures(directory))
    return FeatureDataset(directory, resolution)


@dataclass(frozen=True)
class CaptionMix:
    """shares: of the captions that are drawn over all samples, by name; together 1. lacking: samples, of so
    many, without a caption of some name that has a weight, which they give to their others."""

    shares: Mapping[str, float]
    samples: int
    lacking: int

    def __str__(self) -> str:
        """Captions of a group that are as likely together: "prompt 62 %, synth.1 … synth.5 7.6 % each"."""
        together: dict[tuple[str, str], list[str]] = {}
        for name in sorted(self.shares, key=_in_order):
            share = 100 * self.shares[name]
            percent = f"{share:.0f}" if share >= 9.95 or not share else f"{share:.2g}"
            together.setdefault((_group(name), percent), []).append(name)
        said = [
            f"{_run_of(names)} {percent} %{' each' if len(names) > 1 else ''}"
            for (_, percent), names in together.items()
        ]
        if self.lacking:
            said[-1] += (
                f"; {self.lacking} of {self.samples} pictures lack one of these, and show their others"
            )
        return ", ".join(said)


def _run_of(names: Sequence[str]) -> str:
    numbers = [_in_order(name)[1] for name in names]
    if len(names) > 2 and numbers == list(range(numbers[0], numbers[0] + len(names))):
        return f"{names[0]} … {names[-1]}"
    return ", ".join(names)


def _in_order(name: str) -> tuple[str, int, str]:
    """By group, and in it by number: synth.2 before synth.10."""
    group, _, number = name.partition(".")
    return group, int(number) if number.isdecimal() else 0, name


def pad(captions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features (L_i, D) as (B, L, D) with zeros behind, and the mask (B, L) of what counts."""
    length = max(len(caption) for caption in captions)
    padded = [F.pad(caption, (0, 0, 0, length - len(caption))) for caption in captions]
    lengths = torch.tensor([len(caption) for caption in captions])
    return torch.stack(padded), torch.arange(length) < lengths[:, None]


def _group(name: str) -> str:
    return name.split(".")[0]


def _draw(entry: Captioned, weights: Mapping[str, float] | None, rng: random.Random) -> str:
    if weights is None:
        # Sorted: a seed draws the same caption in whatever order an index lists them.
        return rng.choice(sorted(entry.captions))
    odds = _odds(entry, weights)
    return rng.choices(list(odds), list(odds.values()))[0]


def _odds(entry: Captioned, weights: Mapping[str, float]) -> dict[str, float]:
    """The weight of each of a sample's captions, by name."""
    names = sorted(entry.captions)
    shared = [_group(name) for name in names if name not in weights]
    odds = {
        name: weights[name]
        if name in weights
        else weights.get(_group(name), 0) / max(1, shared.count(_group(name)))
        for name in names
    }
    if not any(odds.values()):
        raise ValueError(
            f"caption_weights must give weight to a caption of every sample, got {dict(weights)} "
            f"for {entry.path}, which has {', '.join(names)}"
        )
    return odds
