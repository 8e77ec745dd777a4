"""The options of `python -m pixart.evaluate`, a dataclass for each of its commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pixart.config import EMBEDDED
from pixart.pipeline.request import Request, as_options

# Of a Request; what is not given is left to the model.
SAMPLING = ("steps", "guidance", "guidance_interval")
_Sampling: Any = as_options(SAMPLING)

Metrics = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="METRICS")]
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class Score:
    """Score pictures by metrics, as many as are named: shapes,clip,fid-clean."""

    metrics: Metrics
    """Names of metrics with commas between them; `list` tells which there are."""
    output: Path
    """The folder of the results. Features and scores are kept there: the same command goes on."""
    images: Path | None = None
    """A folder of pictures: ID/0000.png, ID.png and ID_1.png, or what pixart generate drew. Default the
    images in --output."""
    prompts: Path | None = None
    """A .jsonl of lines {"id", "prompt", ...}, or a .txt of one prompt a line. Pictures of pixart generate
    need none."""
    reference: Path | None = None
    """A folder of real pictures, or a file of their statistics, for metrics that compare sets."""
    samples: int | None = None
    """Pictures that each prompt should have. Default as many as the one that has most."""
    name: str | None = None
    """What the pictures are called in tables. Default the model that drew them, or their folder."""
    weights: Path | None = None
    """A folder with weights and snapshots of the hub, in which networks are looked for."""
    judge: str | None = None
    """Who answers questions about pictures: checker, a folder or hub id, or an http(s) address#MODEL."""
    file: Repeated = ()
    """NAME=PATH of what single metrics read: questions, phrases, detections. Give it again for more."""
    option: Repeated = ()
    """NAME=VALUE of a metric's constant that is not the default. Give it again for more."""
    allow_missing: bool = False
    """Leave out pictures that are missing or cannot be scored; the results tell how many."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True)
class Settings(_Sampling):
    """What decides the captions and the pictures of `accuracy`."""

    count: int = 300
    """Captions of each task."""
    seed: int = 1_000_000
    """Of the captions and of the first picture."""
    sizes: tuple[int, ...] = ()
    """Sides in pixels, instead of the metric's own."""

    @property
    def like(self) -> Request:
        """What all pictures are drawn like: a request from the first seed, without its prompt."""
        given = {name: getattr(self, name) for name in SAMPLING}
        return Request("", seed=self.seed, **given)


@dataclass(frozen=True)
class Accuracy(Settings):
    """Print how well a model of the embedded world follows captions, as its card does; nothing is kept."""

    model: str = EMBEDDED
    """A pipeline directory, or the embedded model "shapes"."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of transformer and VAE."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    attention: Literal["int8", "fp8"] | None = None
    """Self-attention with 8-bit products; on a CPU rounded as the kernels round."""
    json_file: Path | None = None
    """Where to write settings and results."""
    json: bool = False
    """Print settings and results as JSON."""


Command = (
    Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Accuracy, tyro.conf.subcommand("accuracy")]
)
