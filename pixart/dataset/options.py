"""The options of `python -m pixart.data prepare|prompts|caption|filter|clean|verify|statistics`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
Output = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where the work is done, or whether it is only told of."""

    engine: Literal["here", "ray"] = "here"
    """here: in this process. ray: in workers of a Ray cluster, whose machines see the source and the output
    (pip install "pixart-fast[ray]")."""
    address: str | None = None
    """The cluster: auto (the one that runs here, or RAY_ADDRESS), HOST:PORT or ray://HOST:PORT. Default one
    on this machine, for the run."""
    dry_run: bool = False
    """Say what there is to do and how long it will take, by a few pictures that are measured here; write
    nothing."""
    json: bool = False
    """Print what --dry-run found as JSON."""


@dataclass(frozen=True)
class Prepare(Run):
    """Encode a source's pictures and captions into a directory that training reads."""

    source: Source
    """A folder of x.png and x.txt, a .json or .jsonl index, the official data_info.json or its
    root, WebDataset shards (a path, URL or name-{000..017}.tar)."""
    output: Output
    """The directory to fill. Other resolutions of the same source may share it."""
    resolution: int
    """256, 512, 1024, 2048, 4096 ... pixels. Pictures go to the nearest of its buckets."""
    model: str = "shapes"
    """The VAE and the text encoder to use: a pipeline directory, a hub id, or "shapes"."""
    square: bool = False
    """Crop everything to a square, as for the 256 px stages."""
    prompt: str | None = None
    """The prompt of every picture, in the place of its own: "a photo of sks dog"."""
    captions: tuple[Path, ...] = ()
    """Files that `caption` wrote: their captions are added."""
    scores: Path | None = None
    """A file that `filter` wrote."""
    min_score: float | None = None
    """Leave out pictures with a score below this."""
    keep: str | None = None
    """Keep pictures of which this holds: "min(width,height)>=512 and not duplicate". Needs --measurements."""
    measurements: Path | None = None
    """A file that `clean` wrote."""
    control: str | None = None
    """Pictures that steer, to train a control: a folder with one of the same name and size for each,
    "members" for KEY.control.png of tar shards, or canny, hed, depth or pose, made of each picture."""
    preprocessor_weights: tuple[str, ...] = ()
    """NAME=PLACE of the networks of --control: hed=, depth=, pose=, person=; a path or hub id."""
    max_ratio: float = 4.5
    """Reject pictures whose long side is more than this times the short one."""
    min_side: int | None = None
    """Reject pictures whose shorter side has fewer pixels. Default half the shorter side of the bucket
    that they would be scaled up to."""
    max_length: int | None = None
    """Tokens of a caption that are kept. Default 120 for α, 300 for Σ, 77 for a CLIP."""
    half: bool = False
    """Store latents in fp16 rather than fp32."""
    vae_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The VAE's precision."""
    text_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """The precision of the text encoder and of the stored features. Default bf16 if it is large, else fp32."""
    text_encoder: str | None = None
    """A file of T5 in the place of the pipeline's: .safetensors, in fp8 too, or .gguf; a path or hub-id/file."""
    text_encoder_memory: Literal["auto", "resident", "stream"] = "auto"
    """Where T5's weights are: on the device, or streamed there from the disk, block by block. auto: streamed
    where they do not fit what is free. Features have the same bits."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    workers: int | None = None
    """Threads that read and scale pictures; default 4. With --engine ray workers, each with 4 such threads;
    default one for each GPU, or machine."""


@dataclass(frozen=True)
class Prompts(Run):
    """Encode prompts alone, without pictures, into a directory that few-step training (tdm) reads."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A .txt, a prompt a line (`#` begins a comment), or a .jsonl, an object with a caption a line."""
    output: Output
    """The directory to fill, of prompts alone."""
    model: str = "shapes"
    """Whose text encoder to use: a pipeline directory, a hub id, or "shapes"."""
    max_length: int | None = None
    """Tokens of a prompt that are kept. Default 120 for α, 300 for Σ, 77 for a CLIP."""
    text_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """The precision of the text encoder and of the stored features. Default bf16 if it is large, else fp32."""
    text_encoder: str | None = None
    """A file of T5 in the place of the pipeline's: .safetensors, in fp8 too, or .gguf; a path or hub-id/file."""
    text_encoder_memory: Literal["auto", "resident", "stream"] = "auto"
    """Where T5's weights are: on the device, or streamed there from the disk, block by block. auto: streamed
    where they do not fit what is free. Features have the same bits."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    workers: int | None = None
    """Workers with --engine ray; default one for each GPU, or machine."""


@dataclass(frozen=True)
class Caption(Run):
    """Write captions with a vision-language model, as lines of a file beside the old ones."""

    source: Source
    """As in prepare; pictures need no captions."""
    output: Output
    """A .jsonl file to append to; give it to prepare with --captions."""
    model: str
    """A model of transformers (a directory or hub id), or the endpoint's name for one."""
    name: str = "long"
    """The caption's name, by which training weights captions."""
    count: int = 1
    """Captions per picture. Several are sampled, differ, and are called NAME.1, NAME.2 ..."""
    rank: bool = False
    """Order the several by their mean log-likelihood a token, so that NAME.1 is the model's surest."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1. Its key, if it
    wants one, is read from the environment variable OPENAI_API_KEY; it goes to no other server."""
    prompt: str = "Describe this image in detail."
    """The question that the model answers."""
    max_tokens: int = 300
    """Tokens of a caption at most."""
    device: str | None = None
    """The device of a transformers model. Default CUDA when there is one."""
    workers: int | None = None
    """Requests that the endpoint gets at a time; default 8. With --engine ray workers, each with 8 requests or
    a model of its own; default one for each GPU, or machine."""


@dataclass(frozen=True)
class Filter(Run):
    """Score pictures with a function of yours, as lines of a file."""

    source: Source
    """As in prepare; pictures need no captions."""
    output: Output
    """A .jsonl file to append to; give it to prepare with --scores and --min-score."""
    scorer: str
    """MODULE:FUNCTION; called with an RGB Pillow image, it returns a number."""
    workers: int | None = None
    """Workers with --engine ray, each with a scorer of its own; default one for each GPU, or machine."""


@dataclass(frozen=True)
class Clean(Run):
    """Measure pictures and captions, and find duplicates; nothing is left out."""

    source: Source
    """As in prepare; pictures need no captions."""
    output: Path
    """A .jsonl file to write, a line a picture; give it to prepare with --measurements and --keep. The
    folder of its name without .jsonl has an overview, and what lets a stopped run go on."""
    scorer: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """[NAME=]MODULE:FUNCTION; called with an RGB Pillow image, and with the caption if it takes two
    arguments, it returns a number. May be given several times."""
    keep: str | None = None
    """Count what an expression would keep, rule by rule, and show what it would not."""
    workers: int | None = None
    """Threads that read and measure pictures; default 4. With --engine ray workers, each with 4 such threads;
    default one for each GPU, or machine."""


@dataclass(frozen=True)
class Verify:
    """Find the damaged files of a prepared directory, and make them again from its source."""

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """What prepare filled."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... for what is encoded again. Default CUDA when there is one."""
    json: bool = False
    """Print what was found and done as JSON."""


@dataclass(frozen=True)
class Statistics:
    """Count pictures, captions and nouns of data sets, side by side."""

    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DATA [DATA ...]")]
    """Sources as in prepare, or what it filled (whose source is read again). Behind a + each takes files
    that caption, filter or clean wrote: pictures+synth.jsonl+scores.jsonl."""
    captions: tuple[str, ...] = ()
    """Names of captions to count apart, each in a column; synth is synth.1, synth.2 ... together. Default
    all of a picture together."""
    nouns: str | None = None
    """What finds nouns: spacy:MODEL (spacy:en_core_web_sm), words:FILE (a noun a line, other forms behind
    commas), MODULE:FUNCTION (from a caption to its nouns), or shapes. Default nouns are not counted."""
    tokenizer: Path | None = None
    """T5's tokenizer, to count tokens: its folder, that of a pipeline, or shapes."""
    score: str | None = None
    """The score of the files to average. Default aesthetic, or else score, as filter calls its own."""
    json: bool = False
    """Print the numbers as JSON."""


Work = Prepare | Prompts | Caption | Filter | Clean  # what a cluster may do
Command = (
    Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Prompts, tyro.conf.subcommand("prompts")]
    | Annotated[Caption, tyro.conf.subcommand("caption")]
    | Annotated[Filter, tyro.conf.subcommand("filter")]
    | Annotated[Clean, tyro.conf.subcommand("clean")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Statistics, tyro.conf.subcommand("statistics")]
)
