"""Images to latents and back, through the AutoencoderKL in a pipeline's `vae/` folder: our own network, or
diffusers' where that folder holds another one.

Sizes that the memory at hand cannot take whole are run in tiles (tiling.py), with the same result
but for rounding. Precision: fp16 overflows in the original SD and SDXL decoders, which say so by
`force_upcast` in their configuration, true where it is absent: those run in fp32 when fp16 is asked
for. The fp16-fix VAE that Σ is published with runs as asked, and bf16 always does.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixart.device import free_memory
from pixart.files import read_json
from pixart.libraries import importing, silenced
from pixart.tensors import check_size, read_tensors
from pixart.vae.network import Autoencoder, AutoencoderConfig, unread
from pixart.vae.tiling import (
    count_band_passes,
    count_passes,
    decoder_stages,
    encoder_stages,
    run_tiled,
)
from pixart.weights import check_finite, check_loaded, errors_naming, find_weights

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.vae.strips import Strips

logger = logging.getLogger("pixart")
Generators = torch.Generator | list[torch.Generator] | None
Tiled = Callable[[int, int], object]  # (tiles done, tiles in all)
DEFAULT_TILE = 512
TILES = (1024, 512, 256, 128)  # pixels; the largest that fits is taken
# Peak memory of a whole run in units of its largest tensor. Measured on a CPU with torch 2.13 at 512
# and 768 px: decoding 3.7 to 4.1 in fp32 and 4.8 to 6.5 in bf16, encoding 5.0 to 5.3 in fp32.
PEAK = 6.5
BETWEEN_STAGES = 1.25  # what a tiled run keeps of the whole image, in the same unit
SHARE_OF_FREE = 0.9
_MOST_LEVELS, _MOST_SCALE = 16, 1e6


@dataclass(frozen=True)
class Plan:
    """tile: the side in pixels, None for the whole image. on_host: what waits, waits in RAM."""

    tile: int | None
    on_host: bool = False


class VAE:
    """Encodes and decodes. Latents outside are scaled: (x - shift_factor) · scaling_factor, the numbers
    that the transformer was trained on. memory: bytes by which tiles are chosen, None for what is free.
    is_sample: compute one tile of each stage alone, for who asks what memory it takes."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.scaling_factor = _scaling_factor(model.config.scaling_factor)
        self.shift_factor = _shift_factor(getattr(model.config, "shift_factor", None))
        self.latent_channels: int = model.config.latent_channels
        self.downsample = 2 ** (len(model.config.block_out_channels) - 1)
        self.memory: int | None = None
        self.is_sample = False

    @classmethod
    def from_pretrained(
        cls,
        pipeline_dir: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        sizes_only: bool = False,
    ) -> "VAE":
        """variant: "fp16" or another of the weights; None takes the plain ones, or the only variant
        there is. sizes_only: a network on the meta device, which computes nothing. CheckpointError lists
        the tensors that are not those of the configuration, or that are not finite, and names a scaling
        factor that is no number. What else a configuration says is logged."""
        folder = Path(pipeline_dir) / "vae"
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{pipeline_dir} must hold vae/config.json, it does not")
        config = read_json(folder / "config.json")
        if names := unread(config):
            logger.warning(
                "%s: its config.json has %s, which is not read", folder, ", ".join(names)
            )
        if dtype == torch.float16 and config.get("force_upcast", True):
            dtype = torch.float32
        with errors_naming(folder):
            files, variant = find_weights(folder, variant)
            _check_size(config, files)
            if sizes_only:
                return cls(_empty(config).to(dtype))
            model: Any = _own(config, files, dtype, folder)
            if model is None:
                model = _load(folder, dtype, variant, files[0].suffix == ".safetensors")
            return cls(model.to(device))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: torch.device | str) -> "VAE":
        """Moves the weights."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        *,
        tile: int | bool | None = None,
        progress: Tiled | None = None,
        strips: "Strips | None" = None,
    ) -> Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, H, W) about [-1, 1], float32, not clamped.

        One image at a time, so that an image is the same in any batch. tile: the side of the tiles
        in pixels, True for 512, False for none, None to choose by the free memory. progress: called
        with the tiles done and the tiles in all of each image, one for an untiled image. strips: the
        processes that share the work, if it is tiled or they are more than two: the statistics of normalisations
        cost as much again.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents must be (B, {self.latent_channels}, h, w), got {tuple(latents.shape)}"
            )
        plan = self._plan("decode", latents.shape[2:].numel() * self.downsample**2, tile)
        images = []
        for latent in latents.to(self.device).split(1):
            # Unscaled in fp32, then rounded once.
            latent = (latent / self.scaling_factor + self.shift_factor).to(self.dtype)
            if strips is not None and _pays(strips, plan):
                image = self._decode_shared(latent, plan, strips, progress)
            else:
                image = self._decode_alone(latent, plan, progress)
            images.append(image.to(self.device, torch.float32))
        return images[0] if len(images) == 1 else torch.cat(images)

    def _decode_alone(self, latent: Tensor, plan: Plan, progress: Tiled | None) -> Tensor:
        if plan.tile:
            return self._decode_tiled(latent, plan, progress)
        image = self.model.decode(latent)[0]
        _counted(progress, 1)()
        return image

    def choose_tile(self, height: int, width: int, tile: int | bool | None = None) -> int | bool:
        """The `tile` with which `decode` would decode an image of that many pixels: False, or a
        side. Given to it another day, it gives the same bits whatever memory is free then."""
        return self._plan("decode", height * width, tile).tile or False

    def encode(
        self,
        images: Tensor,
        generator: Generators = None,
        sample: bool = True,
        *,
        tile: int | bool | None = None,
        strips: "Strips | None" = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, H/8, W/8), float32.

        sample draws from the posterior, with one generator for the batch or one per image; without
        it the latents are the posterior's mean. tile and strips are as in `decode`.
        """
        mean, std = self.posterior(images, tile=tile, strips=strips)
        latents = mean + std * _noise(mean, generator) if sample else mean
        return (latents - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def posterior(
        self,
        images: Tensor,
        *,
        tile: int | bool | None = None,
        strips: "Strips | None" = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, each (B, C, H/8, W/8), float32, unscaled.
        tile and strips are as in `decode`: to the processes of strips the same numbers are given."""
        if images.ndim != 4 or any(side % self.downsample for side in images.shape[2:]):
            raise ValueError(
                f"images must be (B, 3, H, W) with sides that {self.downsample} divides, "
                f"got {tuple(images.shape)}"
            )
        plan = self._plan("encode", images.shape[2:].numel(), tile)
        # One by one where the batch does not fit, though one image may.
        whole_batch = self._plan("encode", images[:, 0].numel(), tile)
        shared = strips if strips is not None and _pays(strips, plan) else None
        moments = []
        for part in images.split(1 if whole_batch.tile or shared else len(images)):
            part = part.to(self.device, self.dtype)
            if shared is not None:
                moments.append(self._encode_shared(part, plan, shared))
            else:
                moments.append(self._encode_alone(part, plan))
        mean, log_variance = torch.cat(moments).float().chunk(2, 1)
        # The limits of diffusers' own posterior: exp of an outlier would be infinite.
        return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))

    def _encode_alone(self, images: Tensor, plan: Plan) -> Tensor:
        if plan.tile is None:
            return self._quantised(self.model.encoder(images))
        images = images.cpu() if plan.on_host else images
        stages = encoder_stages(self.model.encoder)
        given = stages, images, plan.tile, self.device
        return self._from_middle(run_tiled(*given, is_sample=self.is_sample))

    def _encode_shared(self, image: Tensor, plan: Plan, strips: "Strips") -> Tensor:
        parts = strips.split(image.shape[2], self.downsample)
        if parts is None:  # a small picture: each encodes it for itself
            return self._encode_alone(image, plan)
        stages, tile = encoder_stages(self.model.encoder), plan.tile or max(image.shape[2:])
        return self._from_middle(strips.run(stages, image, parts, tile))

    def _from_middle(self, features: Tensor) -> Tensor:
        """The moments of what the encoder's stages end with."""
        encoder = self.model.encoder
        features = encoder.mid_block(features.to(self.device))
        features = encoder.conv_act(encoder.conv_norm_out(features))
        return self._quantised(encoder.conv_out(features))

    def _quantised(self, moments: Tensor) -> Tensor:
        return moments if self.model.quant_conv is None else self.model.quant_conv(moments)

    def _decode_shared(
        self, latent: Tensor, plan: Plan, strips: "Strips", progress: Tiled | None
    ) -> Tensor:
        parts = strips.split(latent.shape[2])
        if parts is None:  # a small picture: each decodes it for itself
            return self._decode_alone(latent, plan, progress)
        stages, features = decoder_stages(self.model.decoder), self._to_middle(latent)
        tile = plan.tile or 2 * self.downsample * max(latent.shape[2:])
        own = parts[strips.rank]
        passes = count_band_passes(stages, own.stop - own.start, latent.shape[3], tile)
        return strips.run(stages, features, parts, tile, _counted(progress, passes))

    def _to_middle(self, latent: Tensor) -> Tensor:
        """What the decoder's stages begin with."""
        if self.model.post_quant_conv is not None:
            latent = self.model.post_quant_conv(latent)
        decoder = self.model.decoder
        return decoder.mid_block(decoder.conv_in(latent))

    def _decode_tiled(self, latent: Tensor, plan: Plan, progress: Tiled | None = None) -> Tensor:
        assert plan.tile
        features = self._to_middle(latent)
        features = features.cpu() if plan.on_host else features
        stages = decoder_stages(self.model.decoder)
        passes = count_passes(stages, features.shape[2], features.shape[3], plan.tile)
        given = stages, features, plan.tile, self.device, _counted(progress, passes)
        return run_tiled(*given, is_sample=self.is_sample)

    def _plan(self, direction: str, pixels: int, tile: int | bool | None) -> Plan:
        if tile is False:
            return Plan(None)
        if tile is not None and tile is not True and tile < 16:
            raise ValueError(f"tile must be True, False, None or at least 16 pixels, got {tile}")
        memory = free_memory(self.device) if self.memory is None else self.memory
        free = memory * SHARE_OF_FREE
        widest = self._widest(direction) * self.dtype.itemsize  # bytes a pixel
        if tile is None and PEAK * widest * pixels <= free:
            return Plan(None)
        deepest = max(self.model.config.block_out_channels) * self.dtype.itemsize
        kept = BETWEEN_STAGES * widest * pixels

        def fits(side: int, kept: float = kept) -> bool:
            return kept + PEAK * deepest * side**2 <= free

        if tile is None:
            tile = next(filter(fits, TILES), None)
        if tile is None:
            is_alone = self.device.type != "cpu"  # the tiles have the GPU for themselves then
            tile = next((side for side in TILES if is_alone and fits(side, 0)), TILES[-1])
        side = DEFAULT_TILE if tile is True else tile
        # Where not even the smallest tiles leave room for what waits, a GPU's image waits in RAM.
        return Plan(side, on_host=self.device.type != "cpu" and not fits(side))

    def _widest(self, direction: str) -> float:
        """Channels of the largest tensor, counted at the size of the image."""
        channels = self.model.config.block_out_channels
        if direction == "decode":  # a level's first tensor still has the channels of the one below
            channels = (*channels[1:], channels[-1])
        return max(width / 4**level for level, width in enumerate(channels))


def _pays(strips: "Strips", plan: Plan) -> bool:
    """Whether strips are quicker than each process by itself: the first pass, for the statistics, doubles the
    work, as tiles do."""
    return plan.tile is not None or strips.processes > 2


def _counted(progress: Tiled | None, passes: int) -> Callable[[], None]:
    """Calls progress with one more of so many."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, passes)

    return advance


def _scaling_factor(value: object) -> float:
    least, most = 1 / _MOST_SCALE, _MOST_SCALE
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"scaling_factor must be a number from {least} to {most}, got {value!r}")
    return float(value)


def _shift_factor(value: object) -> float:
    if value is None:  # in the files of those that have none
        return 0.0
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not abs(value) <= _MOST_SCALE
    ):
        raise ValueError(
            f"shift_factor must be null or a number up to {_MOST_SCALE}, got {value!r}"
        )
    return float(value)


def _check_size(config: Mapping[str, Any], files: list[Path]) -> None:
    """Raise ValueError for a configuration of more weights than the files hold, before the memory for them
    is taken, or of no network at all."""
    channels, layers = config.get("block_out_channels", [64]), config.get("layers_per_block", 1)
    if not isinstance(channels, list) or not 1 <= len(channels) <= _MOST_LEVELS:
        raise ValueError(
            f"block_out_channels must be a list of 1 to {_MOST_LEVELS} numbers, got {channels!r}"
        )
    levels = {f"block_out_channels[{level}]": width for level, width in enumerate(channels)}
    sizes = (
        "latent_channels",
        "in_channels",
        "out_channels",
        "layers_per_block",
        "norm_num_groups",
    )
    held = check_size({**config, **levels}, (*sizes, *levels), files)
    # One 3×3 convolution of each block of the encoder and of the decoder has that many.
    least = sum(9 * width**2 * (2 * layers + 1) for width in channels)
    if least > 2 * held:  # what lacks a few is told better by their names
        raise ValueError(
            f"config.json must describe {held:,} weights, got block_out_channels {channels} of "
            f"{layers} layers, which have more than {least:,}"
        )
    for name in ("down_block_types", "up_block_types"):
        kinds = config.get(name, [""])
        if not isinstance(kinds, list) or len(kinds) != len(channels):
            raise ValueError(
                f"{name} must be a list of as many names as block_out_channels has numbers, {len(channels)}, got "
                f"{kinds!r:.100}"
            )
    if not isinstance(activation := config.get("act_fn", "silu"), str):
        raise ValueError(f"act_fn must be a name, got {activation!r:.60}")


def _own(
    config: Mapping[str, Any], files: Sequence[Path], dtype: torch.dtype, folder: Path
) -> Autoencoder | None:
    """The network as we compute it, None where configuration or weights are not just that network's."""
    known = AutoencoderConfig.of(config)
    if known is None:
        return None
    tensors = {name: one for file in files for name, one in read_tensors(file).items()}
    with torch.device("meta"):
        model = Autoencoder(known)
    own = {name: one.shape for name, one in model.state_dict().items()}
    if own != {name: one.shape for name, one in tensors.items()}:
        return None
    # Copies: what is mapped from a file changes with it.
    tensors = {name: one.to(dtype, copy=True) for name, one in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    check_finite(tensors, str(folder))
    return model


def _empty(config: Mapping[str, Any]) -> Any:
    """The network on the meta device."""
    known = AutoencoderConfig.of(config)
    with torch.device("meta"):
        if known is not None:
            return Autoencoder(known)
        with importing():
            from diffusers import AutoencoderKL

        return AutoencoderKL.from_config(dict(config))


def _load(folder: Path, dtype: torch.dtype, variant: str | None, is_safe: bool) -> Any:
    with importing():
        from diffusers import AutoencoderKL

    return open_model(AutoencoderKL, folder, dtype, variant, is_safe)


def open_model(
    kind: Any, folder: Path, dtype: torch.dtype, variant: str | None, is_safe: bool = True
) -> Any:
    """A model of diffusers from its folder. kind: its class. CheckpointError for weights that do not fit,
    are missing, or are not finite."""
    with silenced():  # its warnings become our error
        model, info = kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=variant,
            use_safetensors=is_safe,
            # Needs accelerate and saves nothing worth having on so small a model.
            low_cpu_mem_usage=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_loaded(folder, info)
    check_finite(dict(model.named_parameters()), str(folder))
    return model


def to_images(images: Tensor) -> "list[Image]":
    """(B, 3, H, W) about [-1, 1] to PIL images, rounded to the nearest of 256 levels."""
    from PIL import Image

    return [Image.fromarray(pixels) for pixels in to_levels(images).numpy()]


def to_levels(images: Tensor) -> Tensor:
    """(B, H, W, 3) of 8 bits in host memory."""
    levels = (images.float() * 0.5 + 0.5).clamp(0, 1) * 255
    # A cast to uint8 cuts off, and would darken all by half a level.
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _noise(like: Tensor, generator: Generators) -> Tensor:
    """Drawn where the generators are, so that a seed means the same on every device."""
    if not isinstance(generator, list):
        device = generator.device if generator else like.device
        return torch.randn(like.shape, generator=generator, device=device).to(like.device)
    if len(generator) != len(like):
        raise ValueError(f"generator must be one or {len(like)}, got {len(generator)}")
    return torch.cat([_noise(row[None], g) for row, g in zip(like, generator, strict=True)])
