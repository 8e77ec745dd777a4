"""Latents as pictures without the VAE's decoder: what a picture is going to be, at next to no cost.

A colour is nearly a linear function of the latent at its place. For the VAEs of SD and SDXL, which α and Σ
were published with, the numbers are those that ComfyUI draws its previews with; for any other they
are fitted, on first use, to its own encodings. TAESD's small decoder gives all pixels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart.files import CheckpointError, read_json
from pixart.libraries import importing
from pixart.tensors import check_size
from pixart.vae.autoencoder import VAE, open_model, to_images
from pixart.weights import errors_naming, find_weights, resolve

if TYPE_CHECKING:
    from PIL.Image import Image

# By scaling_factor: red, green and blue in [-1, 1] of the four channels of scaled latents, then what is
# added. Published in ComfyUI, comfy/latent_formats.py (classes SD15 and SDXL) at commit 040a324.
PUBLISHED = {
    0.18215: (
        (0.3512, 0.2297, 0.3227),
        (0.3250, 0.4974, 0.2350),
        (-0.2829, 0.1762, 0.2721),
        (-0.2120, -0.2616, -0.7177),
        (0.0, 0.0, 0.0),
    ),
    0.13025: (
        (0.3651, 0.4232, 0.4341),
        (-0.2533, -0.0042, 0.1068),
        (0.1076, 0.1111, -0.0362),
        (-0.3165, -0.2492, -0.2188),
        (0.1084, -0.0175, -0.0011),
    ),
}
_PUBLISHED_CHANNELS = (128, 256, 512, 512)
_FITTED_TO, _LATENT_SIDE = 32, 16  # pictures, and latents along a side of each
_TAESD_LISTS = {
    "encoder_block_out_channels": (64,) * 4, "num_encoder_blocks": (1, 3, 3, 3),
    "decoder_block_out_channels": (64,) * 4, "num_decoder_blocks": (3, 3, 3, 1),
}  # fmt: skip
_MOST_LEVELS = 8
_WHOLE = 128  # latents along the side of the largest square that TAESD decodes in one piece


class Preview:
    """Small pictures of latents; with a TAESD, pictures at full size.

    taesd: a folder or hub id in diffusers' layout (AutoencoderTiny), made for this VAE: madebyollin/taesd
    for α, madebyollin/taesdxl for Σ. Raises CheckpointError for one that cannot be opened, whose weights
    are missing or not finite, or that is for another number of channels or another size.
    """

    def __init__(self, vae: VAE, taesd: str | Path | None = None) -> None:
        self.vae = vae
        self._decoder = None if taesd is None else _open_taesd(taesd, vae)
        self._colours = _published(vae)

    @property
    def colours(self) -> Tensor:
        """(C + 1, 3) float32: the colour in [-1, 1] that each channel of a latent adds, and the one that
        all have. Fitted when it is first asked for, where nobody has published it."""
        if self._colours is None:
            self._colours = fit(self.vae)
        return self._colours

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> "list[Image]":
        """RGB pictures of clean, scaled latents (B, C, h, w), such as Progress.predicted: a pixel for each
        latent, or the VAE's own size with a TAESD. Numbers that are not finite are black."""
        if latents.ndim != 4 or latents.shape[1] != self.vae.latent_channels:
            raise ValueError(
                f"latents must be (B, {self.vae.latent_channels}, h, w), got {tuple(latents.shape)}"
            )
        if self._decoder is not None:
            images = torch.cat([self._decoder(latent) for latent in latents.split(1)])
        else:
            colours = self.colours.to(latents.device)
            images = torch.einsum("bchw,cr->brhw", latents.float(), colours[:-1])
            images = images + colours[-1][:, None, None]
        return to_images(images.nan_to_num(-1.0))


def _published(vae: VAE) -> Tensor | None:
    """Told by the configuration: derived VAEs, such as the one mended for fp16, have the same latents."""
    config = vae.model.config
    is_known = tuple(config.block_out_channels) == _PUBLISHED_CHANNELS and vae.shift_factor == 0
    table = PUBLISHED.get(vae.scaling_factor) if is_known and vae.latent_channels == 4 else None
    return None if table is None else torch.tensor(table)


def fit(vae: VAE) -> Tensor:
    """The linear map, (C + 1, 3) as in `Preview.colours`, that is nearest to what the VAE makes of patterns
    of random colours. The same every time; takes a second on a CPU for the embedded VAE."""
    images = _patterns(_LATENT_SIDE * vae.downsample)
    latents = vae.encode(images, sample=False, tile=False).cpu().double()  # (B, C, h, w)
    wanted = F.avg_pool2d(images, vae.downsample).double()  # (B, 3, h, w)
    rows = torch.cat([latents, torch.ones_like(latents[:, :1])], 1)
    # gelsd also finds the answer where a channel says nothing.
    solved = torch.linalg.lstsq(_as_rows(rows), _as_rows(wanted), driver="gelsd")
    return solved.solution.float()


def _as_rows(images: Tensor) -> Tensor:
    return images.movedim(1, -1).flatten(0, -2)


def _patterns(side: int) -> Tensor:
    """(B, 3, side, side) in [-1, 1]: plain grounds, chequers of 2 to 8 colours a side, and smooth ones."""
    generator, images = torch.Generator().manual_seed(0), []
    for number in range(_FITTED_TO):
        cells = 2 ** (number % 4)
        colours = torch.rand(1, 3, cells, cells, generator=generator) * 2 - 1
        mode = "nearest" if number % 8 < 4 else "bilinear"
        images.append(F.interpolate(colours, size=(side, side), mode=mode))
    return torch.cat(images)


def _open_taesd(taesd: str | Path, vae: VAE) -> Callable[[Tensor], Tensor]:
    """A function of latents (1, C, h, w), on any device, to an image (1, 3, H, W) about [-1, 1], float32."""
    folder = resolve(taesd, allow_patterns=["config.json", "*.safetensors"])
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} must hold the config.json of an AutoencoderTiny")
    with errors_naming(folder):
        model = _load_taesd(folder, vae)

    def decode(latent: Tensor) -> Tensor:
        model.to(latent.device)
        model.use_tiling = latent.shape[2:].numel() > _WHOLE**2  # by memory: blended at their edges
        return model.decode(latent.to(vae.dtype), return_dict=False)[0].float()

    return decode


def _load_taesd(folder: Path, vae: VAE) -> Any:
    with importing():
        from diffusers import AutoencoderTiny

    config = read_json(folder / "config.json")
    files, variant = find_weights(folder, None)
    if files[0].suffix != ".safetensors":
        raise CheckpointError(f"{folder}: must hold safetensors, got {files[0].name}")
    _check_taesd(config, files, vae, folder)
    model = open_model(AutoencoderTiny, folder, vae.dtype, variant)
    return model.eval().requires_grad_(False)


def _check_taesd(config: dict[str, Any], files: list[Path], vae: VAE, folder: Path) -> None:
    """Before memory is taken for what the configuration says."""
    if config.get("_class_name") != "AutoencoderTiny":
        raise CheckpointError(
            f"{folder}: must be an AutoencoderTiny, got {config.get('_class_name')!r}; "
            "name a TAESD in diffusers' layout"
        )
    sizes = {name: config.get(name, 4) for name in ("latent_channels", "out_channels")}
    lists = {name: config.get(name, default) for name, default in _TAESD_LISTS.items()}
    for name, values in lists.items():
        if not isinstance(values, list | tuple) or not 1 <= len(values) <= _MOST_LEVELS:
            raise ValueError(f"{name} must be 1 to {_MOST_LEVELS} numbers, got {values!r:.60}")
        sizes |= {f"{name}[{level}]": value for level, value in enumerate(values)}
    held = check_size(sizes, sizes, files)
    for part in ("encoder", "decoder"):  # a block has three 3x3 convolutions
        blocks = zip(lists[f"{part}_block_out_channels"], lists[f"num_{part}_blocks"], strict=False)
        if sum(27 * width**2 * count for width, count in blocks) > 2 * held:
            raise ValueError(f"config.json must describe {held:,} weights, it describes more")
    _check_fits(sizes["latent_channels"], len(lists["decoder_block_out_channels"]), vae, folder)


def _check_fits(channels: int, levels: int, vae: VAE, folder: Path) -> None:
    for what, wanted, got in (
        ("latent channels", vae.latent_channels, channels),
        ("pixels a latent", vae.downsample, 2 ** (levels - 1)),
    ):
        if wanted != got:
            raise CheckpointError(
                f"{folder}: must have the {wanted} {what} of the VAE, got {got}; "
                "name the TAESD that was made for this VAE"
            )
