"""The options of `python -m pixart.preference build|serve|page|add|judge|fit`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

StudyFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STUDY")]


@dataclass(frozen=True)
class Build:
    """Make a blind study: pairs of pictures of the same prompts by several models."""

    pictures: tyro.conf.UseAppendAction[tuple[str, ...]]
    """[NAME=]FOLDER of a model's pictures, once for each model: what `evaluate draw` made, or ID/0000.png
    or ID.png for every prompt. The folder's name is the model's unless one is given."""
    prompts: Path
    """The prompts: prompts.jsonl with "id" and "prompt", or .txt with one a line (ids 00000, 00001 ...)."""
    output: Path
    """The study's folder, new or empty."""
    count: int | None = None
    """How many prompts are used, chosen at random. Default 300, or all where there are fewer."""
    design: Literal["against-first", "round-robin", "balanced"] = "against-first"
    """Of each prompt: every model against the first; every two models; or each model once, in turns, so
    that every two meet as often and no picture comes twice."""
    checks: float = 0.05
    """Attention checks, as a share of the pairs that count; 0 for none."""
    check_kind: Literal["same", "checker"] = "same"
    """The same picture twice, which is a tie; or, in the shapes world, half of them a right picture beside
    one of another prompt, where the exact checker knows."""
    side: int = 2048
    """Pixels of a picture's longer side at most."""
    seed: int | None = None
    """Of prompts and sides. Default a random one, which the key keeps: voters could work out another."""


@dataclass(frozen=True)
class Serve:
    """Let people vote: a web page of this machine. Ctrl-C ends it, and every vote is kept."""

    study: StudyFolder
    """What build made."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 is all of this machine's."""
    port: int = 8000
    """0 takes one that is free."""
    name: tuple[str, ...] = ()
    """Host names under which voters reach it, such as study.example.org; addresses need none."""


@dataclass(frozen=True)
class Page:
    """Write the study as one HTML file that keeps votes in the browser, to be sent to voters."""

    study: StudyFolder
    """What build made."""
    output: Path | None = None
    """Default page.html in the study; with --beside the folder page."""
    beside: bool = False
    """Leave the pictures beside the page, for large studies."""


@dataclass(frozen=True)
class Add:
    """Add votes that voters saved from a page. A file that was added before adds nothing."""

    study: StudyFolder
    """What build made."""
    files: tyro.conf.Positional[tuple[Path, ...]]
    """votes.json files."""


@dataclass(frozen=True)
class Judge:
    """Let a model judge every pair in both orders; what was judged before is kept."""

    study: StudyFolder
    """What build made."""
    model: str | None = None
    """The endpoint's name for a model, or one of transformers: a folder, or the id of one that is in the
    hub's cache already (hf download ID)."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1. Its key, if it
    wants one, is read from the environment variable OPENAI_API_KEY; it goes to no other server."""
    judge: Literal["checker"] | None = None
    """In place of a model the exact checker of the shapes world."""
    workers: int = 4
    """Requests that the endpoint gets at a time."""
    max_tokens: int = 500
    """Tokens of an answer of the endpoint at most."""
    device: str | None = None
    """The device of a transformers model. Default CUDA when there is one."""


@dataclass(frozen=True)
class Fit:
    """Win rates, strengths, agreement and the figure, from all votes and judgements."""

    study: StudyFolder
    """What build made."""
    prior: float = 0.1
    """Games added between every two models that met, half won by each: against strengths without end."""
    resamples: int = 2000
    """Of each bootstrap."""
    seed: int = 0
    """Of the bootstraps."""
    figure: bool = True
    """Draw plots/preference.svg and .png, which needs matplotlib."""
    json: bool = False
    """Print fit.json."""


Command = (
    Annotated[Build, tyro.conf.subcommand("build")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Page, tyro.conf.subcommand("page")]
    | Annotated[Add, tyro.conf.subcommand("add")]
    | Annotated[Judge, tyro.conf.subcommand("judge")]
    | Annotated[Fit, tyro.conf.subcommand("fit")]
)
