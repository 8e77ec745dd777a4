"""Training the embedded model's VAE: a diffusers AutoencoderKL on drawn scenes.

A free latent space took this small VAE thousands of steps to leave its first plateau (colours
merged, 15 dB). So the space is anchored to one that is known from the start and kind to a
diffusion model: three channels are the block means of the colours, the fourth is where in its
block the brightness lies. The encoder is trained to produce it, the decoder to draw from it with
clean edges, and the diffusion model can train on it meanwhile. Crops around the shapes come first,
whole pictures last.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pixart.shapes.scene import BACKGROUNDS, COLOURS, draw, sample_scene
from pixart.training.loop import Losses, Optimisation, Stage
from pixart.training.parallel import draw_number, share_of

LATENT_NOISE = 0.05  # on the latents that the decoder trains on, against small errors of sampling
DOWNSAMPLE = 8
COLOUR_SCALE, DETAIL_SCALE = 1.5, 8.0  # bring the latents near unit scale


def anchor_latents(pictures: Tensor) -> Tensor:
    """The latents (B, 4, H/8, W/8) of pictures (B, 3, H, W) in [-1, 1]: the mean colour of each
    8×8 block, and the first moment of its brightness along the diagonal."""
    means = F.avg_pool2d(pictures, DOWNSAMPLE)
    ramp = (torch.arange(DOWNSAMPLE, device=pictures.device) + 0.5) / DOWNSAMPLE - 0.5
    weight = (ramp[:, None] + ramp[None, :])[None, None] / DOWNSAMPLE**2
    detail = F.conv2d(pictures.mean(dim=1, keepdim=True), weight, stride=DOWNSAMPLE)
    return torch.cat([COLOUR_SCALE * means, DETAIL_SCALE * detail], dim=1)


def build_vae() -> Any:
    """A small AutoencoderKL in the published layout: 8× downsampling, 4 latent channels."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,  # the anchored latents are near unit scale as they are
    )
    with torch.no_grad():  # log-variance near the noise that training adds
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-6.0)
    return vae


def draw_batch(rng: random.Random, size: int, batch: int, crop: int | None = None) -> Tensor:
    """(batch, 3, crop or size, crop or size) pictures in [-1, 1] with slightly varied colours."""
    pictures = []
    for _ in range(batch):
        scene = sample_scene(rng, rng.choice(("one", "pair", "pair", "group")))
        picture = draw(scene, size, _varied_palette(rng))
        if crop is not None:
            thing = rng.choice(scene.things)
            left, top = (_crop_start(rng, c, size, crop) for c in (thing.x, thing.y))
            picture = picture[top : top + crop, left : left + crop]
        pictures.append(picture)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _varied_palette(rng: random.Random) -> dict[str, tuple[int, int, int]]:
    named = {**COLOURS, **BACKGROUNDS}
    return {
        name: tuple(min(255, max(0, c + rng.randint(-8, 8))) for c in colour)  # type: ignore[misc]
        for name, colour in named.items()
    }


def _crop_start(rng: random.Random, centre: float, size: int, crop: int) -> int:
    start = centre * size - crop / 2 + rng.uniform(-0.4, 0.4) * crop
    return min(size - crop, max(0, round(start)))


def reconstruction_loss(vae: Any, pictures: Tensor) -> Losses:
    """Encoder and decoder side by side: the one to the anchored latents, the other from them.

    L1 on pixels and on their differences (edges are all there is to see in flat scenes), beside a
    squared error that carries the colours through the first steps.
    """
    anchors = anchor_latents(pictures)
    noisy = anchors + LATENT_NOISE * torch.randn_like(anchors)
    with torch.autocast(pictures.device.type, torch.bfloat16):
        latents = vae.encode(pictures).latent_dist.mode()
        decoded = vae.decode(noisy).sample
    decoded, latents = decoded.float(), latents.float()
    encoding = F.mse_loss(latents, anchors)
    edge = sum(F.l1_loss(decoded.diff(dim=d), pictures.diff(dim=d)) for d in (2, 3))
    mse = F.mse_loss(decoded, pictures)
    loss = F.l1_loss(decoded, pictures) + edge + mse + encoding
    return {"loss": loss, "encoding": encoding, "psnr": -10 * torch.log10(mse / 4)}


def vae_stage(
    vae: Any,
    settings: Optimisation,
    directory: Path,
    *,
    size: int,
    batch: int,
    crop: int | None,
) -> Stage:
    """A stage that trains `vae` on pictures of `size` pixels, or on `crop`-pixel parts of them."""
    share = share_of(batch)

    def loss(step: int) -> Losses:
        rng = random.Random(f"{settings.seed}/{directory.name}/{draw_number(step)}")
        return reconstruction_loss(vae, draw_batch(rng, size, share, crop))

    return Stage(directory.name, vae, loss, settings, directory)
