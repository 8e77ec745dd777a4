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
ProtocolName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROTOCOL")]
SetName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SET")]
Folders = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DIR...")]
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class Model:
    """What draws."""

    model: str = EMBEDDED
    """A pipeline directory, a hub id, a release (sigma-1024, alpha-512 ...), or the embedded model "shapes"."""
    transformer: str | None = None
    """A transformer to use in the pipeline: official .pth, .safetensors or diffusers directory."""
    lora: Repeated = ()
    """PATH[:WEIGHT] of a LoRA. Give it again for further ones: they add up."""
    kv_compress: str | None = None
    """Open a dense transformer compressed: LAYERS:RATIO[:SAMPLING], such as 14-27:2."""
    variant: str | None = None
    """Of the weights: fp16, for diffusion_pytorch_model.fp16.safetensors and its like."""
    ema: bool = False
    """Take the averaged weights of an official .pth."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of transformer and VAE. Default bf16 on CUDA, fp32 on a CPU."""
    text_encoder_dtype: Literal["fp32", "bf16", "fp16", "8bit", "4bit"] | None = None
    """Of T5. Default bf16 if it is large, else that of the rest. 8bit and 4bit need CUDA."""
    attention: Literal["int8", "fp8"] | None = None
    """Self-attention with 8-bit products."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""


@dataclass(frozen=True)
class Changes:
    """What is other than in the protocol; it becomes part of its id."""

    set: Path | None = None
    """The file or folder of the protocol's prompt set; `list` tells which. The embedded world needs none."""
    count: int | None = None
    """Prompts. Default the protocol's."""
    images_per_prompt: int | None = None
    """Pictures of each prompt. Default the protocol's."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels, or one number. Default the protocol's."""
    steps: int | None = None
    """Denoising steps. Default the protocol's."""
    guidance: float | None = None
    """Classifier-free guidance scale. Default the protocol's."""
    scheduler: str | None = None
    """Default the protocol's."""
    shard: str | None = None
    """K/N, such as 3/8: draw this part of the pictures alone. Without it, processes that draw into the same
    folder share the work by themselves."""


@dataclass(frozen=True)
class Networks:
    """What metrics are opened with."""

    weights: Path | None = None
    """A folder with weights and snapshots of the hub, in which networks are looked for."""
    judge: str | None = None
    """Who answers questions about pictures: checker, a folder or hub id, or an http(s) address#MODEL."""
    file: Repeated = ()
    """NAME=PATH of what single metrics read: questions, phrases, detections. Give it again for more."""
    option: Repeated = ()
    """NAME=VALUE of a metric's constant that is not the default. Give it again for more."""


@dataclass(frozen=True)
class Draw(Model, Changes):
    """Draw the pictures of a protocol, and nothing else."""

    protocol: ProtocolName = tyro.MISSING
    """Its name, or a .yaml file; `list` tells which there are."""
    output: Path = tyro.MISSING
    """The folder to draw into. What is there is not drawn again: the same command goes on."""
    json: bool = False
    """Print what was drawn as JSON."""


@dataclass(frozen=True)
class Score(Networks):
    """Score pictures by metrics, as many as are named: shapes,clip,fid-clean."""

    metrics: Metrics = tyro.MISSING
    """Names of metrics with commas between them; `list` tells which there are."""
    output: Path = tyro.MISSING
    """The folder of the results. Features and scores are kept there: the same command goes on."""
    images: Path | None = None
    """A folder of pictures: ID/0000.png, ID.png and ID_1.png, or what pixart generate drew. Default those that
    `draw` drew into --output."""
    prompts: Path | None = None
    """A .jsonl of lines {"id", "prompt", ...}, or a .txt of one prompt a line (00000.png is of the first).
    Pictures of pixart generate need none, nor do metrics that read no prompts, such as fid-clean."""
    reference: Path | None = None
    """A folder of real pictures, or a file of their statistics, for metrics that compare sets."""
    samples: int | None = None
    """Pictures that each prompt should have. Default as many as the one that has most."""
    name: str | None = None
    """What the pictures are called in tables. Default the model that drew them, or their folder."""
    allow_missing: bool = False
    """Leave out pictures that are missing or cannot be scored; the results tell how many."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True)
class Run(Model, Changes, Networks):
    """Draw the pictures of a protocol, score them, and write the report."""

    protocol: ProtocolName = tyro.MISSING
    """Its name, or a .yaml file; `list` tells which there are."""
    output: Path = tyro.MISSING
    """The folder of it all. The same command goes on where it was stopped."""
    metrics: str | None = None
    """Names of metrics with commas between them. Default the protocol's."""
    reference: Path | None = None
    """A folder of real pictures, or a file of their statistics, for metrics that compare sets."""
    variants: Path | None = None
    """A folder of training runs, NAME/STAGE: draw with the newest transformer of each, in --model's pipeline,
    and set them in one table."""
    name: str | None = None
    """What the model is called in tables. Default its own name."""
    allow_missing: bool = False
    """Leave out pictures that cannot be scored; the results tell how many."""
    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True)
class List:
    """List prompt sets, metrics and protocols, what each needs, and whether it runs now."""

    protocols: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PROTOCOL...")
    ] = ()
    """Protocols, shipped or .yaml files. Default all that ship."""
    weights: Path | None = None
    """A folder with weights and snapshots of the hub, in which networks are looked for."""
    json: bool = False
    """Print the list as JSON."""


@dataclass(frozen=True)
class Prompts:
    """Write prompts.jsonl from the files of a prompt set's authors."""

    set: SetName
    """Its name; `list` tells which there are."""
    output: Path
    """The file to write."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """The set's file, or the folder of its files. What is generated needs none."""
    count: int | None = None
    """How many, of every category its share. Default all."""
    seed: int | None = None
    """Of the choice, or of what is generated."""
    json: bool = False
    """Print what was written as JSON."""


@dataclass(frozen=True)
class Report:
    """Write report.html, README.md and plots of one folder of results, or of several side by side."""

    folders: Folders
    """What `run` or `score` filled."""
    output: Path | None = None
    """Where to. Default the folder itself, or report beside several."""
    json: bool = False
    """Print where the report is as JSON."""


@dataclass(frozen=True)
class Compare:
    """Compare two folders of results: the same prompts, paired; what differs, and what nobody can tell."""

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """What `run` or `score` filled."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """Another, of the same prompts."""
    output: Path | None = None
    """Where to. Default compare-A-B beside A."""
    pair_sets: bool = True
    """Also metrics that compare sets, by drawing the same prompts for both again and again."""
    json: bool = False
    """Print the differences as JSON."""


@dataclass(frozen=True)
class Statistics:
    """Keep what a set of real pictures is to networks, so that the pictures are needed once."""

    reference: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="REFERENCE")]
    """A folder of pictures."""
    output: Path
    """The .npz to write; give it to score and run as --reference."""
    features: str = "inception-clean"
    """Names of networks with commas between them."""
    keep_features: bool = False
    """Also the features of each picture, which kid, cmmd and precision-recall need."""
    weights: Path | None = None
    """A folder with weights and snapshots of the hub, in which networks are looked for."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    json: bool = False
    """Print what was written as JSON."""


@dataclass(frozen=True)
class Detect:
    """Write what a detector finds in pictures, as geneval and compbench read it."""

    detector: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DETECTOR")]
    """checker, or the folder or hub id of a Mask2Former or an OWLv2, such as
    facebook/mask2former-swin-small-coco-instance."""
    images: Path
    """A folder of pictures: ID/0000.png, ID.png and ID_1.png."""
    prompts: Path
    """A .jsonl of lines {"id", "prompt", ...} with what GenEval or T2I-CompBench want to be found."""
    output: Path
    """The .jsonl to write; give it to score and run as --file detections=FILE."""
    colours: bool = True
    """Name the colour of each by CLIP ViT-L/14, which geneval's colours need; the checker knows them."""
    weights: Path | None = None
    """A folder with weights and snapshots of the hub, in which networks are looked for."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    json: bool = False
    """Print what was written as JSON."""


@dataclass(frozen=True)
class Trust(Networks):
    """Measure which metric notices which kind of error, against the exact checker of the embedded world."""

    output: Path = tyro.MISSING
    """The folder of the results. Scores are kept there: the same command goes on."""
    metrics: str = ""
    """Names of metrics with commas between them, beside the checker. --judge adds vqascore. Without either,
    clip and kid by the CLIP of the embedded world that comes with the library."""
    count: int = 100
    """Pairs of each kind of fact, and pictures of a set."""
    seed: int = 0
    """Of the pairs."""
    with_model: str | None = None
    """A pipeline of the embedded world, or "shapes": whether metrics rank its pictures as the checker does,
    at 1 to 20 steps and guidance from 1 to 8."""
    model_count: int = 96
    """Pictures of it."""
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


@dataclass(frozen=True)
class CheckWeights:
    """Compare weights that you have with the numbers that are published of them."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Weights, snapshots of the hub, and the published pictures, of which the check tells the names."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    json: bool = False
    """Print what was found as JSON."""


Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Prompts, tyro.conf.subcommand("prompts")]
    | Annotated[Draw, tyro.conf.subcommand("draw")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Statistics, tyro.conf.subcommand("statistics")]
    | Annotated[Detect, tyro.conf.subcommand("detect")]
    | Annotated[Trust, tyro.conf.subcommand("trust")]
    | Annotated[CheckWeights, tyro.conf.subcommand("check-weights")]
    | Annotated[Accuracy, tyro.conf.subcommand("accuracy")]
)
