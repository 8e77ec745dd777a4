"""Training the embedded model's VAE: a diffusers AutoencoderKL on drawn scenes.

A free latent space took this small VAE thousands of steps to leave its first plateau (colours
merged, 15 dB). So the space is anchored to one that is known from the start and kind to a
diffusion model: three channels are the block means of the colours, the fourth is where in its
block the brightness lies. The encoder is trained to produce it, the decoder to draw from it with
clean edges, and the diffusion model can train on it meanwhile. Crops around the shapes come first.
Last the decoder trains by itself, on whole pictures and on latents as unclean as sampling leaves them:
the encoder is exact by then, and all that the VAE loses, the decoder loses.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixart.distributed import own, rank, share, world_size
from pixart.libraries import importing, silenced
from pixart.pipeline.directory import open_directory
from pixart.shapes.scene import BACKGROUNDS, COLOURS, draw, sample_scene
from pixart.training.batch import drawn_data_problems, part_problems, whole_state
from pixart.training.plan import weights_plan
from pixart.training.problems import attempt, problems_of
from pixart.training.run import Run
from pixart.training.scenes import DOWNSAMPLE, anchor_latents
from pixart.training.stage import DECODER, PREVIOUS, RANDOM, ResolvedStage, Stage
from pixart.training.starts import start_is_here
from pixart.weights import check_loaded

LATENT_NOISE = 0.05  # on the latents that the decoder trains on, against small errors of sampling
DECODER_NOISE = 0.12  # the most, when it trains alone: what sampling leaves on outlines at 128 px


def check(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the fields of a stage that trains an autoencoder, or its decoder."""
    yield from part_problems(stage)
    yield from drawn_data_problems(stage, "crop", "sizes")
    if stage.start == RANDOM and stage.trains == DECODER:
        yield "start of a decoder must be previous or a pipeline with a VAE, got 'random'"
    sides = [("data.sizes", side) for side in stage.data.sizes]
    if stage.data.crop is not None:
        sides.append(("data.crop", stage.data.crop))
    for name, side in sides:
        if side < DOWNSAMPLE or side % DOWNSAMPLE:
            yield f"{name} must be a positive multiple of {DOWNSAMPLE}, got {side}"
    yield from _size_problems(stage)


def _size_problems(stage: Stage) -> Iterator[str]:
    crop, sizes = stage.data.crop, stage.data.sizes
    side = min(sizes) if sizes else stage.resolution
    if crop is not None and side is not None and crop > side:
        rule = "the least of data.sizes" if sizes else "resolution"
        yield f"data.crop must be at most {rule} {side}, got {crop}"


def check_files(stage: ResolvedStage, run: Run) -> Iterator[str]:
    """Yield what a stage needs and is not there, or does not fit the resolution that it left open."""
    yield from _size_problems(stage)
    if stage.start == PREVIOUS:
        yield from problems_of(lambda: run.expect_previous(stage))
        before, _ = attempt(lambda: run.before(stage))
        if before is not None and before.trains not in ("autoencoder", DECODER):
            yield f"start must be an autoencoder, stage {before.name} trains a {before.trains}"
    elif stage.start != RANDOM and start_is_here(stage):
        yield from problems_of(lambda: _open_start(_vae_of(stage)))


def plan(stage: ResolvedStage, run: Run) -> str:
    """Say in words what a stage will cost."""
    return weights_plan(stage, build_vae)


def build(stage: ResolvedStage, run: Run) -> "AutoencoderTask":
    """Make the task as the stage begins."""
    if stage.start == RANDOM:
        return AutoencoderTask(build_vae(), stage)
    place = run.previous(stage) / "vae" if stage.start == PREVIOUS else _vae_of(stage)
    return AutoencoderTask(_open_start(place), stage)


def _vae_of(stage: Stage) -> Path:
    """The folder of the VAE in the pipeline that stage.start names."""
    return open_directory(stage.start, with_transformer=False) / "vae"


def _open_start(folder: Path) -> Any:
    """Raises ValueError for a VAE of another layout."""
    vae, wanted = load_vae(folder), build_vae()
    shapes, expected = (
        {name: weight.shape for name, weight in one.state_dict().items()} for one in (vae, wanted)
    )
    if shapes != expected:
        raise ValueError(f"start must have a VAE of the embedded model's layout, got {folder}")
    return vae


def build_vae() -> Any:
    """A small AutoencoderKL in the published layout: 8× downsampling, 4 latent channels."""
    with importing():
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


@silenced()
def load_vae(folder: Path) -> Any:
    """Open what AutoencoderTask exported. CheckpointError for weights that are missing, or not its own."""
    with importing():
        from diffusers import AutoencoderKL

    model, info = AutoencoderKL.from_pretrained(
        folder, low_cpu_mem_usage=False, output_loading_info=True
    )
    check_loaded(folder, info)
    return model


@dataclass(frozen=True)
class Pictures:
    """pictures: (B, 3, H, W) in [-1, 1]; noise: (B, 4, H/8, W/8), to be added to the latents."""

    pictures: Tensor
    noise: Tensor


def draw_picture(rng: random.Random, size: int, crop: int | None = None) -> Tensor:
    """(1, 3, crop or size, crop or size) in [-1, 1], in slightly varied colours."""
    scene = sample_scene(rng, rng.choice(("one", "pair", "pair", "group")))
    picture = draw(scene, size, _varied_palette(rng))
    if crop is not None:
        thing = rng.choice(scene.things)
        left, top = (_crop_start(rng, c, size, crop) for c in (thing.x, thing.y))
        picture = picture[top : top + crop, left : left + crop]
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 127.5 - 1


def _varied_palette(rng: random.Random) -> dict[str, tuple[int, int, int]]:
    named = {**COLOURS, **BACKGROUNDS}
    return {
        name: tuple(min(255, max(0, c + rng.randint(-8, 8))) for c in colour)  # type: ignore[misc]
        for name, colour in named.items()
    }


def _crop_start(rng: random.Random, centre: float, size: int, crop: int) -> int:
    start = centre * size - crop / 2 + rng.uniform(-0.4, 0.4) * crop
    return min(size - crop, max(0, round(start)))


def reconstruction_losses(vae: Any, pictures: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Encoder and decoder side by side: the one to the anchored latents, the other from them.

    L1 on pixels and on their differences (edges are all there is to see in flat scenes), beside a
    squared error that carries the colours through the first steps. The first argument is called
    once, through its forward, so that it may be a module that exchanges gradients; it may give no
    latents, where the decoder trains alone. noise: added to the latents, in their units.
    """
    anchors = anchor_latents(pictures)
    latents, decoded = vae(pictures, anchors + noise)
    decoded = decoded.float()
    edge = sum(F.l1_loss(decoded.diff(dim=d), pictures.diff(dim=d)) for d in (2, 3))
    mse = F.mse_loss(decoded, pictures)
    loss = F.l1_loss(decoded, pictures) + edge + mse
    losses = {"psnr": -10 * torch.log10(mse / 4)}
    if latents is not None:
        losses["encoding"] = F.mse_loss(latents.float(), anchors)
        loss = loss + losses["encoding"]
    return {"loss": loss, **losses}


class EncoderAndDecoder(nn.Module):
    """Encoder and decoder of an AutoencoderKL in one call: latents of pictures, pictures of latents.

    encodes: whether it computes the latents, or gives None in their place.
    """

    def __init__(self, vae: Any, encodes: bool = True) -> None:
        super().__init__()
        self.vae, self.encodes = vae, encodes

    def forward(self, pictures: Tensor, latents: Tensor) -> tuple[Tensor | None, Tensor]:
        encoded = self.vae.encode(pictures).latent_dist.mode() if self.encodes else None
        return encoded, self.vae.decode(latents).sample


class AutoencoderTask:
    """A Task of pixart.training.trainer: the VAE on drawn scenes of stage.resolution pixels, or of
    stage.data.sizes in turn, or on parts of stage.data.crop pixels of them; its decoder alone where
    that is what the stage trains."""

    def __init__(self, vae: Any, stage: ResolvedStage) -> None:
        self.decodes_only = stage.trains == DECODER
        if self.decodes_only:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        self.model: nn.Module = EncoderAndDecoder(vae, encodes=not self.decodes_only)
        self.stage = stage

    def load(self, step: int, parts: int) -> list[Pictures]:
        sizes = self.stage.data.sizes or (self.stage.resolution,)
        size, shares = sizes[step % len(sizes)], world_size() * parts
        if self.stage.data.sizes and self.stage.data.crop is None:
            images = self.stage.drawn_images(size, shares)
        else:
            images = self.stage.batch.of(1, world_size())
        pictures = [self._draw(rng, size) for rng in own(self.stage.rngs(step, images))]
        return [_stack(share(pictures, part, parts)) for part in range(parts)]

    def _draw(self, rng: random.Random, size: int) -> Pictures:
        picture = draw_picture(rng, size, self.stage.data.crop)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        latents = (1, 4, *(side // DOWNSAMPLE for side in picture.shape[2:]))
        noise = torch.randn(latents, generator=generator)
        level = rng.uniform(0, DECODER_NOISE) if self.decodes_only else LATENT_NOISE
        return Pictures(picture, level * noise)

    def losses(self, model: nn.Module, part: Pictures) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        pictures, noise = part.pictures.to(device), part.noise.to(device)
        with self.stage.autocast(device):
            return reconstruction_losses(model, pictures, noise)

    def images(self, part: Pictures) -> int:
        return len(part.pictures)

    def tokens(self, part: Pictures) -> int:
        return part.noise[:, 0].numel()

    def flops(self, part: Pictures) -> float:
        return 0.0  # not counted

    @silenced()
    def export(self, folder: Path) -> None:
        """FOLDER/vae in diffusers' layout, fp32."""
        state = whole_state(self.model)
        if rank() == 0:
            whole = EncoderAndDecoder(build_vae())
            whole.load_state_dict(state)
            whole.vae.save_pretrained(folder / "vae")

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """The losses on pictures that are the same every time."""
        size = self.stage.resolution
        places = range(self.stage.validation.images)
        part = _stack([self._draw(random.Random(f"validation/{place}"), size) for place in places])
        return {name: float(value) for name, value in self.losses(self.model, part).items()}


def _stack(parts: Sequence[Pictures]) -> Pictures:
    return Pictures(
        torch.cat([part.pictures for part in parts]), torch.cat([part.noise for part in parts])
    )
