"""The published checkpoints: their short names, where they are, and what their files do not say."""

import os
from dataclasses import dataclass
from pathlib import Path

from pixart.config import MAX_LENGTH, Family, PixArtConfig
from pixart.few_step import FewStep

_HUB = "PixArt-alpha/"
_SIGMA_PIPELINE = _HUB + "PixArt-Sigma-XL-2-1024-MS"
_ALPHA_PIPELINE = _HUB + "PixArt-XL-2-512x512"


@dataclass(frozen=True)
class Release:
    """A published XL/2 checkpoint.

    pixels: native side. file: its .pth, if that is all there is. pipeline: whose T5, VAE and scheduler
    it draws with, if its own repository has a transformer alone. few_step: what it was distilled for,
    which its files do not say.
    """

    hub_id: str
    family: Family
    pixels: int
    pe_interpolation: float
    micro_condition: bool = False
    file: str | None = None
    pipeline: str | None = None
    few_step: FewStep | None = None

    @property
    def name(self) -> str:
        """The last part of the hub id, or the file's stem."""
        return (self.file or self.hub_id).rpartition("/")[2].removesuffix(".pth")

    @property
    def place(self) -> str:
        """The hub id, with the file if there is one."""
        return f"{self.hub_id}/{self.file}" if self.file else self.hub_id

    @property
    def model_max_length(self) -> int:
        return MAX_LENGTH[self.family]

    @property
    def config(self) -> PixArtConfig:
        return PixArtConfig(
            input_size=self.pixels // 8,
            model_max_length=self.model_max_length,
            pe_interpolation=self.pe_interpolation,
            micro_condition=self.micro_condition,
        )


@dataclass(frozen=True)
class AdapterRelease:
    """A published LoRA, in peft's layout. base: the short name of what it was made for."""

    hub_id: str
    base: str
    few_step: FewStep

    @property
    def name(self) -> str:
        return self.hub_id.rpartition("/")[2]


# The four of 50 DDIM timesteps that LCMScheduler takes for 4 steps.
_LCM = FewStep("lcm", (999, 759, 499, 259))
_ONE_STEP = FewStep("dmd", (400,))

# By the short name that stands for a hub id wherever one is taken.
# α-256 was trained with a coordinate step of 1, Σ-256 with a step of 2.
# The 2K model attends to every key, although its official config file is called "kvcompress".
RELEASES: dict[str, Release] = {
    "sigma-256": Release(
        _HUB + "PixArt-Sigma-XL-2-256x256", "sigma", 256, 0.5, pipeline=_SIGMA_PIPELINE
    ),
    "sigma-512": Release(
        _HUB + "PixArt-Sigma-XL-2-512-MS", "sigma", 512, 1.0, pipeline=_SIGMA_PIPELINE
    ),
    "sigma-1024": Release(_SIGMA_PIPELINE, "sigma", 1024, 2.0),
    "sigma-2k": Release(
        _HUB + "PixArt-Sigma-XL-2-2K-MS", "sigma", 2048, 4.0, pipeline=_SIGMA_PIPELINE
    ),
    "alpha-sam-256": Release(
        _HUB + "PixArt-alpha", "alpha", 256, 1.0,
        file="PixArt-XL-2-SAM-256x256.pth", pipeline=_ALPHA_PIPELINE,
    ),
    "alpha-256": Release(
        _HUB + "PixArt-alpha", "alpha", 256, 1.0,
        file="PixArt-XL-2-256x256.pth", pipeline=_ALPHA_PIPELINE,
    ),
    "alpha-512": Release(_ALPHA_PIPELINE, "alpha", 512, 1.0),
    "alpha-1024": Release(
        _HUB + "PixArt-XL-2-1024-MS", "alpha", 1024, 2.0, micro_condition=True
    ),
    # A whole pipeline with an LCMScheduler (its model_index.json); its card draws 4 steps at diffusers'
    # guidance_scale 0, which is none. It has no embedding of a guidance scale: one is inside.
    "lcm-1024": Release(
        _HUB + "PixArt-LCM-XL-2-1024-MS", "alpha", 1024, 2.0, micro_condition=True, few_step=_LCM
    ),
    # A transformer alone. The demo of the official repository (app/app_pixart_dmd.py) draws it in one step
    # from timestep 400, without guidance.
    "dmd-512": Release(
        _HUB + "PixArt-Alpha-DMD-XL-2-512x512", "alpha", 512, 1.0,
        pipeline=_ALPHA_PIPELINE, few_step=_ONE_STEP,
    ),
    # One safetensors file of a transformer of Σ's layout, under diffusers' names: one step from timestep 400,
    # without guidance. Not verified: neither repository was looked at, nor how the file in it is called.
    "nitro-1024": Release(
        "amd/Nitro-1-PixArt", "sigma", 1024, 2.0, pipeline=_SIGMA_PIPELINE, few_step=_ONE_STEP
    ),
    "sigma-nitro": Release(
        "amd/PixArt-Sigma-Nitro", "sigma", 1024, 2.0, pipeline=_SIGMA_PIPELINE, few_step=_ONE_STEP
    ),
}  # fmt: skip

# By the short name that stands for a hub id where a LoRA is taken.
ADAPTERS: dict[str, AdapterRelease] = {
    # Of train_pixart_lcm_lora.py, which begins with α-1024. The official readme puts it on the LCM model
    # instead, which has what it does already: not drawn with, either way.
    "lcm-lora": AdapterRelease(_HUB + "PixArt-LCM-LoRA-XL-2-1024-MS", "alpha-1024", _LCM),
    # Flash Diffusion (arXiv:2406.02347). The authors' example draws 4 steps of diffusers' LCMScheduler, made
    # of α-1024's scheduler, at its guidance_scale 0, which is none.
    "flash-pixart": AdapterRelease("jasperai/flash-pixart", "alpha-1024", _LCM),
}

# Published with their own bases, which they hold too: α of 512 px, and of 1024 px. For outlines of HED.
CONTROL_REPOSITORY = _HUB + "PixArt-ControlNet"
CONTROLS: dict[str, str] = {
    "controlnet-512": f"{CONTROL_REPOSITORY}/PixArt-XL-2-512-ControlNet.pth",
    "controlnet-1024": f"{CONTROL_REPOSITORY}/PixArt-XL-2-1024-ControlNet.pth",
}

RELEASED: dict[str, Release] = {release.name: release for release in RELEASES.values()}


def place_of(name: str) -> str | None:
    """The hub id of a short name's checkpoint, or id/file; None if the name is none.

    As with "shapes", the name comes before a file or folder of that name, which is ./NAME.
    """
    if name in RELEASES:
        return RELEASES[name].place
    return ADAPTERS[name].hub_id if name in ADAPTERS else CONTROLS.get(name)


def adapter_named(source: str) -> AdapterRelease | None:
    """The published LoRA of a short name or hub id, unless that is a path that is here."""
    if source in ADAPTERS:
        return ADAPTERS[source]
    found = (one for one in ADAPTERS.values() if one.hub_id == source)
    return None if os.path.exists(source) else next(found, None)


def adapter_of(file: str | Path) -> AdapterRelease | None:
    """The published LoRA that an adapter's folder or single file is named after, or the repository that the
    hub's cache has it from."""
    file = Path(file)
    names = [file.parent.name, file.name.removesuffix(".safetensors")]
    names += [part.rpartition("--")[2] for part in file.parts if part.startswith("models--")]
    return next((one for one in ADAPTERS.values() if one.name in names), None)


def release_named(source: str) -> Release | None:
    """The release of a short name or of a place on the hub, unless that is a path that is here."""
    if source in RELEASES:
        return RELEASES[source]
    found = (release for release in RELEASES.values() if release.place == source)
    # Of os, which has an answer for what is too long for a path, too.
    return None if os.path.exists(source) else next(found, None)


def release_of(path: str | Path) -> Release | None:
    """The release that a file or folder is named after, or the repository that the hub's cache has it
    from. What it holds may be another model all the same: compare its tensors."""
    path = Path(path)
    names = [path.parent.name if path.name == "transformer" else path.name]
    names += [part.rpartition("--")[2] for part in path.parts if part.startswith("models--")]
    stems = (name.removesuffix(".pth").removesuffix(".safetensors") for name in names)
    return next((RELEASED[stem] for stem in stems if stem in RELEASED), None)
