"""What a recipe says: stages, each a frozen configuration that YAML files and command lines spell.

A stage states where its model comes from, what it sees, how it is optimised and when it ends. Every
field has the same dotted name in a recipe file (`recipe`) and on the command line (`arguments`), whose
values one strict check reads together. Here are the rules that hold whatever a stage trains; each of
`tasks` adds those of its own.
"""

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
import tyro

from pixart.config import MAX_LENGTH, KVCompression, PixArtConfig
from pixart.lora.adapters import TARGETS
from pixart.training.bounds import (
    MAX_IMAGES,
    MAX_SIDE,
    MAX_STEPS,
    Bounds,
    name_problems,
    number_problems,
)
from pixart.training.distil_settings import DistilSettings
from pixart.training.optimizers import OptimizerSettings
from pixart.training.problems import Problems, problems_of, refuse
from pixart.training.validation import Validation

PREVIOUS, RANDOM = "previous", "random"
DIT = "dit:"  # before the path of a class-conditional DiT
DECODER = "decoder"  # of an autoencoder
CLIP = "clip"
CONTROLNET = "controlnet"
TDM, LCM = "tdm", "lcm"
DISTILLED = (TDM, LCM)  # transformers that learn of a teacher to draw in a few steps
OTHER_PARTS = ("autoencoder", DECODER, "text_encoder", CLIP, CONTROLNET)
DRAWN = "shapes"  # data that is drawn as it is needed

OPEN = ("resolution", "max_length", "vae_scale", "prediction")  # fields that may be left open

MAX_COMPRESSION = 200  # characters of kv_compress
MAX_LOGIT = 20  # beyond it all timesteps are the first or the last

SEQUENCE = "fsdp+sequence"

Prediction = Literal["epsilon", "v_prediction"]
Parallel = Literal["ddp", "fsdp", "fsdp+sequence"]

_STAGE_BOUNDS = {
    "steps": Bounds(1, MAX_STEPS),
    "resolution": Bounds(16, MAX_SIDE),
    "max_length": Bounds(1, 2**16),
    "checkpoint_blocks": Bounds(0, 256),
    "sequence": Bounds(1, 2**16),
    "hours": Bounds(0, 1e6, above=True),
    "min_snr": Bounds(0, 1e6, above=True),
    "pe_interpolation": Bounds(0, 1e3, above=True),
    "vae_scale": Bounds(0, 1e3, above=True),
    "seed": Bounds(-(2**63), 2**63 - 1),
}


@dataclass(frozen=True)
class Size:
    """The transformer of a random start; the defaults are XL/2. `--size NAME`, or `size: NAME` in a recipe,
    takes that of a variant (pixart.variants), such as pixart-h1024-d56; options of a size change it."""

    __pydantic_config__ = {"extra": "forbid"}

    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    caption_channels: int = 4096
    """Width of the text features."""
    caption_embedding: bool = True
    """An MLP brings the text features to hidden_size; without it they must be of that width, and the blocks
    attend to them as they are."""
    pred_sigma: bool = True
    """Learn the variance beside the noise."""
    qk_norm: bool = False

    @classmethod
    def of(cls, config: PixArtConfig) -> "Size":
        """That of a transformer. Its longest caption and its resolution are fields of a stage."""
        return cls(**{one.name: getattr(config, one.name) for one in fields(cls)})

    def __post_init__(self) -> None:
        most = {"hidden_size": 16384, "depth": 256, "num_heads": 256, "caption_channels": 65536}
        bounds = {name: Bounds(1, value) for name, value in most.items()}
        refuse(number_problems(self, bounds, "size."))


@dataclass(frozen=True)
class LoRA:
    """Adapters that are trained in the place of all weights."""

    __pydantic_config__ = {"extra": "forbid"}

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float | None = None
    """Their sum is scaled by alpha / rank; None takes the rank."""
    targets: tuple[str, ...] = TARGETS
    """Layers that get one, by the ends of their names."""

    def __post_init__(self) -> None:
        bounds = {"rank": Bounds(0, 4096), "alpha": Bounds(0, 1e6, above=True)}
        refuse(number_problems(self, bounds, "lora."))
        if self.rank == 0 and (self.alpha is not None or self.targets != TARGETS):
            raise Problems(["lora.rank must be positive beside other settings of lora, got 0"])


@dataclass(frozen=True)
class ControlSettings:
    """A control network (ControlNet-Transformer), which steers a base that stays as it is."""

    __pydantic_config__ = {"extra": "forbid"}

    blocks: int | None = None
    """Blocks of the base that are copied, from its first on. None: as many as the control has that this one
    goes on from, else 13 of 28, as published, or that share."""
    start: str = ""
    """A control to go on from, in any format that --control takes. Empty: that of the previous stage
    where it trained one, else copies of the base's blocks that change nothing yet."""

    hint_rate: float = 1.0
    """The learning rate of what projects the picture, times that of the rest. Lines are little beside the
    ground that they are on: more lets a short training see them sooner."""

    def __post_init__(self) -> None:
        bounds = {"blocks": Bounds(1, 255), "hint_rate": Bounds(0, 1e3, above=True)}
        refuse(number_problems(self, bounds, "control."))

    @property
    def factors(self) -> dict[str, float]:
        """Of the learning rate, by a part of parameters' names."""
        return {} if self.hint_rate == 1 else {".before_proj.": self.hint_rate}


@dataclass(frozen=True)
class Data:
    """What is learned from."""

    __pydantic_config__ = {"extra": "forbid"}

    source: str = ""
    """A folder made by `python -m pixart.data prepare`, the official feature layout, or "shapes"."""
    captions: tuple[tuple[str, float], ...] = (("prompt", 1.0),)
    """Which of an image's captions is drawn, by weight; those that an image lacks are left out."""
    prior: str = ""
    """A second source, of the class that a subject belongs to (DreamBooth's prior preservation)."""
    prior_weight: float = 1.0
    scenes: tuple[tuple[str, float], ...] = (("one", 0.35), ("pair", 0.5), ("group", 0.15))
    """Kinds of scenes that "shapes" draws, by weight."""
    sizes: tuple[int, ...] = ()
    """Sides in pixels of drawn "shapes" that take turns; empty takes the resolution."""
    crop: int | None = None
    """Side in pixels of the parts of drawn "shapes" that an autoencoder trains on; of each of the sizes."""
    caption_dropout: float = 0.1
    """Share of captions that are replaced by the null caption, under their own mask."""
    nameless: float = 0.0
    """Share of the captions of drawn "shapes" that tell neither shapes nor places ("a red one on white"):
    a control has to."""
    short: float = 0.0
    """Share of the captions of drawn "shapes" that leave out all that they may ("a red star"), so that many
    pictures fit: what few steps are hard for. Validation then draws such ones."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if not 0 <= self.caption_dropout <= 1:
            yield f"data.caption_dropout must be from 0 to 1, got {self.caption_dropout}"
        if not self.prior and self.prior_weight != Data.prior_weight:
            yield f"data.prior_weight is for data.prior only, got {self.prior_weight}"
        if not 0 <= self.nameless <= 1:
            yield f"data.nameless must be from 0 to 1, got {self.nameless}"
        if not 0 <= self.short <= 1:
            yield f"data.short must be from 0 to 1, got {self.short}"
        weight, side = Bounds(0, 1e6), Bounds(1, MAX_SIDE)
        yield from number_problems(
            self,
            {
                **dict.fromkeys(("captions", "prior_weight", "scenes"), weight),
                **dict.fromkeys(("sizes", "crop"), side),
            },
            "data.",
        )


@dataclass(frozen=True)
class Batch:
    """The images of one optimiser step, over all processes and accumulated parts."""

    __pydantic_config__ = {"extra": "forbid"}

    images: int = 64
    tokens: int | None = None
    """Image tokens of a step instead: larger buckets then get fewer images."""
    accumulate: int = 1
    """Parts that a step is computed in, one after the other."""
    multiple: int | None = None
    """With `tokens`, the images of a step are a multiple of this. None: a multiple of the processes /
    sequence × accumulate that a run begins with."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        bounds = dict.fromkeys(("images", "multiple", "accumulate"), Bounds(1, MAX_IMAGES))
        yield from number_problems(self, bounds | {"tokens": Bounds(1, 10**10)}, "batch.")
        if self.tokens is None and self.multiple is not None:
            yield f"batch.multiple is for batch.tokens only, got {self.multiple}"

    def unit(self, groups: int) -> int:
        """The images that a step can have least. Raises ValueError where groups of processes and
        accumulated parts cannot share what is asked for."""
        shares = groups * self.accumulate
        asked = "images" if self.tokens is None else "multiple"
        value = getattr(self, asked)
        if value is not None and value % shares:
            raise ValueError(
                f"batch.{asked} must be a multiple of processes / sequence × batch.accumulate, {shares}, "
                f"got {value}; --batch.{asked} {math.lcm(value, shares)} makes it one"
            )
        return value if self.tokens is not None and value is not None else shares

    def of(self, tokens: int, groups: int) -> int:
        """Images in a step of a bucket of so many tokens each, shared evenly by all parts."""
        unit = self.unit(groups)
        if self.tokens is None:
            return self.images
        return max(self.tokens // tokens // unit, 1) * unit


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe."""

    __pydantic_config__ = {"extra": "forbid"}

    name: tyro.conf.Fixed[str]
    trains: str = "transformer"
    """transformer, or tdm or lcm, which distil one into few steps, or controlnet, which steers one by a
    picture, or autoencoder, decoder (of the
    autoencoder, by itself) or text_encoder, which are parts of the embedded model, or clip, which judges
    its pictures. A transformer whose previous stage
    trained the text encoder starts with that and random weights of its own."""
    start: str = PREVIOUS
    """previous (stage), random, a checkpoint in any format or a hub id, or dit:PATH: a
    class-conditional DiT with the published names."""
    size: Size = field(default_factory=Size)
    resolution: int | None = None
    """Side in pixels of the square with the area of every bucket. None: that of the prepared data; of the
    start where data are drawn; 1024 for a random start."""
    aspect: bool = False
    """Train in the 40 aspect-ratio buckets instead of squares."""
    pe_interpolation: float | None = None
    """Divides the coordinates of the position table. None: resolution / 512 where the start is random,
    and a start of another resolution keeps their range."""
    max_length: int | None = None
    """Caption tokens. None: as many as the start takes; 300 for a random start."""
    micro_condition: bool = False
    """Tell the model picture size and aspect ratio, as PixArt-α at 1024 px; new to a start that
    does not know them."""
    vae_scale: float | None = None
    """The scaling factor of the VAE whose latents the data hold. None: what the data say, or the VAE of
    the pipeline; 0.13025, PixArt-Σ's, where nothing does."""
    pipeline: str = ""
    """A pipeline folder or hub id: its T5 gives the null caption and reads the validation prompts,
    its VAE draws them. For "shapes": the stage that trained the VAE."""
    kv_compress: str = ""
    """LAYERS:RATIO[:SAMPLING], such as 14-27:2; empty keeps what the start has."""
    kv_norm: Literal["layer", "none"] | None = None
    """LayerNorm after compression; None takes the published choice."""
    kv_start: Literal["mean", "calibrated", "random"] = "mean"
    """mean: the published start. calibrated: the shared norm is fitted to K and V first."""
    lora: LoRA = field(default_factory=LoRA)
    control: ControlSettings = field(default_factory=ControlSettings)
    distil: DistilSettings = field(default_factory=DistilSettings)
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    steps: int = 1000
    hours: float | None = None
    """Wall-clock budget; the stage ends at whichever comes first."""
    ema: float | None = 0.9999
    """Decay of the average of the weights; None keeps none."""
    prediction: Prediction | None = None
    """What the model predicts. None: what the pipeline says, or the start; epsilon where nothing does."""
    timesteps: str = "uniform"
    """uniform, or logit-normal:MEAN: the logit of timestep / 1000 is normal with standard deviation 1
    (arXiv 2403.03206, section 3.1). 0 has its median at 500."""
    min_snr: float | None = None
    """Clamp of the signal-to-noise ratio that weights the squared error; None: all weigh alike."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the computation; weights and states are fp32."""
    checkpoint_blocks: int = 1
    """Recompute each k-th block in the backward pass; 0 keeps every activation."""
    parallel: Parallel = "ddp"
    sequence: int = 1
    """With parallel fsdp+sequence, how many processes share the tokens of a picture."""
    validation: Validation = field(default_factory=Validation)
    seed: int = 0

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        yield from name_problems(self.name)
        yield from number_problems(self, _STAGE_BOUNDS)
        if self.ema is not None and not 0 < self.ema < 1:
            yield f"ema must be between 0 and 1, got {self.ema}"
        yield from self._start_problems()
        for read in (lambda: self.compression, lambda: self.timestep_mean):
            yield from problems_of(read)

    def _start_problems(self) -> Iterator[str]:
        if not self.kv_compress and (self.kv_start != "mean" or self.kv_norm is not None):
            yield "kv_compress must name layers beside kv_start and kv_norm, got none"
        if self.start == RANDOM and self.kv_start != "mean":
            yield f"kv_start must be left out with --start random, got {self.kv_start}"
        is_new = self.start == RANDOM or self.data.source == DRAWN
        # A DiT knows no captions.
        width = self.size.caption_channels if self.start.startswith(DIT) else Size.caption_channels
        if not is_new and self.size != Size(caption_channels=width):
            yield f"size must be left out with --start {self.start}, which has its own"

    def rngs(self, step: int, images: int) -> list[random.Random]:
        """Sources of chance for a step that draws its images, one each: the same however many
        processes and parts share them."""
        return [random.Random(f"{self.seed}/{self.name}/{step}/{place}") for place in range(images)]

    @property
    def factors(self) -> dict[str, float]:
        """Of the learning rate, by a part of parameters' names."""
        if self.trains == TDM:
            return {"fake.": self.distil.fake_rate}
        return self.control.factors if self.trains == CONTROLNET else {}

    @property
    def trains_transformer(self) -> bool:
        """Whether a transformer comes of it: of any task but those for the other parts of a pipeline."""
        return self.trains not in OTHER_PARTS

    @property
    def compression(self) -> KVCompression | None:
        if not self.kv_compress:
            return None
        if len(self.kv_compress) > MAX_COMPRESSION:
            length = len(self.kv_compress)
            raise ValueError(
                f"kv_compress must have at most {MAX_COMPRESSION} characters, got {length}"
            )
        return KVCompression.parse(self.kv_compress, norm=self.kv_norm)

    @property
    def timestep_mean(self) -> float | None:
        """Mean of the logit of timesteps; None for uniform ones."""
        kind, _, mean = self.timesteps.partition(":")
        if kind == "logit-normal":
            with contextlib.suppress(ValueError):
                if abs(number := float(mean)) <= MAX_LOGIT:  # nor NaN
                    return number
        if self.timesteps != "uniform":
            raise ValueError(
                f"timesteps must be uniform or logit-normal:MEAN, got {self.timesteps!r}; MEAN is "
                f"from {-MAX_LOGIT} to {MAX_LOGIT}"
            )
        return None

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that `precision` asks for."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    def resolved(
        self,
        *,
        resolution: int = 1024,
        max_length: int = MAX_LENGTH["sigma"],
        vae_scale: float = 0.13025,
        prediction: Prediction = "epsilon",
    ) -> "ResolvedStage":
        """The stage with these values where it says none."""
        values: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(Stage)}
        given = {
            "resolution": resolution,
            "max_length": max_length,
            "vae_scale": vae_scale,
            "prediction": prediction,
        }
        taken = {name: value for name, value in given.items() if values[name] is None}
        return ResolvedStage(**values | taken)


@dataclass(frozen=True)
class ResolvedStage(Stage):
    """A stage that leaves nothing open; see `Stage.resolved`."""

    resolution: int = 0
    max_length: int = 0
    vae_scale: float = 0.0
    prediction: Prediction = "epsilon"

    def drawn_images(self, side: int, shares: int) -> int:
        """Images of `side` px in a step of drawn data: as many pixels as batch.images squares of the
        resolution have, and a multiple of `shares`."""
        images = self.batch.images * self.resolution**2 // side**2
        return max(images // shares, 1) * shares

    @property
    def position_scale(self) -> float:
        return self.resolution / 512 if self.pe_interpolation is None else self.pe_interpolation
