"""`python -m pixart.data prepare|caption|filter`: training data, before training.

prepare encodes pictures and captions once; caption lets a vision-language model write captions;
filter scores pictures. All go on where they were stopped, and list what they could not use instead
of stopping over it. Exit codes: 0 done, 2 bad input, 1 failure, 130 cancelled.
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import main as command

    sys.exit(command(["data", *sys.argv[1:]]))

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pixart.command import DONE, parse, run_command

if TYPE_CHECKING:
    from pixart.dataset.annotations import Tally
    from pixart.dataset.samples import Item

NAME = "data"
Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
Output = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")]


@dataclass(frozen=True)
class Prepare:
    """Encode a source's pictures and captions into a directory that training reads."""

    source: Source
    """A folder of x.png and x.txt, a .json or .jsonl index, the official data_info.json or its
    root, WebDataset shards (a path, URL or name-{000..017}.tar)."""
    output: Output
    """The directory to fill. Other resolutions of the same source may share it."""
    resolution: int
    """In pixels: 256, 512, 1024, 2048, 4096 ... Pictures go to the nearest of its buckets."""
    model: str = "shapes"
    """Whose VAE and text encoder: a pipeline directory, a hub id, or "shapes"."""
    square: bool = False
    """Crop everything to a square, as for the 256 px stages."""
    prompt: str | None = None
    """What to call every picture, in the place of its own prompt: "a photo of sks dog"."""
    captions: tuple[Path, ...] = ()
    """Files that `caption` wrote: their captions are added."""
    scores: Path | None = None
    """A file that `filter` wrote."""
    min_score: float | None = None
    """Leave out pictures with a score below this."""
    max_ratio: float = 4.5
    """Reject pictures whose long side is more than this times the short one."""
    max_length: int | None = None
    """Tokens of a caption that are kept. Default 120 for α, 300 for Σ."""
    half: bool = False
    """Store latents in fp16 rather than fp32."""
    vae_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the VAE computes in."""
    text_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """What T5 computes in, and features are stored in. Default bf16 if it is large, else fp32."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    workers: int = 4
    """Threads that read and scale pictures."""


@dataclass(frozen=True)
class Caption:
    """Write captions with a vision-language model, as lines of a file beside the old ones."""

    source: Source
    """As in prepare; pictures need no captions."""
    output: Output
    """A .jsonl file to append to; give it to prepare with --captions."""
    model: str
    """A model of transformers (a directory or hub id), or the endpoint's name for one."""
    name: str = "long"
    """What the caption is called, where captions are weighted in training."""
    count: int = 1
    """Captions per picture. Several are sampled and called NAME.1, NAME.2 ..."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1. Its key, if it
    wants one, is read from the environment variable OPENAI_API_KEY."""
    prompt: str = "Describe this image in detail."
    """What the model is asked."""
    max_tokens: int = 300
    """Of a caption."""
    device: str | None = None
    """Of a transformers model. Default CUDA when there is one."""
    workers: int = 8
    """Requests to the endpoint at a time."""


@dataclass(frozen=True)
class Filter:
    """Score pictures with a function of yours, as lines of a file."""

    source: Source
    """As in prepare; pictures need no captions."""
    output: Output
    """A .jsonl file to append to; give it to prepare with --scores and --min-score."""
    scorer: str
    """MODULE:FUNCTION; called with an RGB Pillow image, it returns a number."""


Command = (
    Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Caption, tyro.conf.subcommand("caption")]
    | Annotated[Filter, tyro.conf.subcommand("filter")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(
        NAME,
        lambda: run(parse(Command, NAME, arguments)),  # type: ignore[arg-type]
        "cancelled; the same command goes on",
    )


def run(options: Prepare | Caption | Filter) -> int:
    commands = {Prepare: prepare, Caption: caption, Filter: filter_}
    print(commands[type(options)](options))  # type: ignore[operator]
    return DONE


def prepare(options: Prepare) -> str:
    """Returns a sentence on what was prepared and what was not."""
    import torch

    from pixart.dataset.prepare import Preparation, Settings, open_encoders
    from pixart.device import choose_device

    if (options.scores is None) != (options.min_score is None):
        raise ValueError("--scores and --min-score must be given together, got one of them")
    if options.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {options.workers}")
    items = _items(options)  # refuses what it can before models are loaded
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    encoders = open_encoders(
        options.model,
        device=choose_device(options.device),
        vae_dtype=dtypes[options.vae_dtype],
        text_dtype=dtypes[options.text_dtype] if options.text_dtype else None,
        max_length=options.max_length,
    )
    settings = Settings(options.resolution, options.square, options.max_ratio, options.half)
    preparation = Preparation(options.output, encoders, settings, options.workers)
    first = [items]
    report = preparation.run(lambda: first.pop() if first else _items(options))
    rejected = len(report["rejected"])
    return f"{report['prepared']} samples prepared, {rejected} rejected: see {preparation.report}"


def _items(options: Prepare) -> "Iterable[Item]":
    from pixart.dataset.annotations import with_captions, with_prompt, with_scores
    from pixart.dataset.sources import open_source

    items = open_source(options.source)
    if options.prompt is not None:
        items = with_prompt(items, options.prompt)
    if options.captions:
        items = with_captions(items, options.captions)
    if options.scores is not None and options.min_score is not None:
        items = with_scores(items, options.scores, options.min_score)
    return items


def caption(options: Caption) -> str:
    """Returns a sentence on what was captioned."""
    from pixart.dataset.annotations import check_output
    from pixart.dataset.captioning import Wish, caption_source, open_endpoint, open_model
    from pixart.dataset.sources import open_source
    from pixart.device import choose_device

    check_output(options.output, options.source)
    items = open_source(options.source)
    wish = Wish(options.prompt, options.max_tokens, options.name, options.count)
    if options.endpoint:
        captioner = open_endpoint(options.endpoint, options.model, wish)
        tally = caption_source(items, options.output, captioner, wish, options.workers)
    else:
        captioner = open_model(options.model, wish, choose_device(options.device))
        tally = caption_source(items, options.output, captioner, wish, 1)
    return _told(tally, options.output, "captioned")


def filter_(options: Filter) -> str:
    """Returns a sentence on what was scored, with the scores that quantiles of it reach."""
    from pixart.dataset.annotations import check_output
    from pixart.dataset.scoring import load_scorer, quantiles, score_source
    from pixart.dataset.sources import open_source

    check_output(options.output, options.source)
    items = open_source(options.source)
    tally = score_source(items, options.output, load_scorer(options.scorer))
    return f"{_told(tally, options.output, 'scored')}\n{quantiles(options.output)}"


def _told(tally: "Tally", output: Path, done: str) -> str:
    earlier = f", {tally.known} before" if tally.known else ""
    where = f": see {output.with_suffix('.report.json')}" if tally.rejected else ""
    return f"{tally.new} pictures {done}{earlier}, {len(tally.rejected)} rejected{where}"
