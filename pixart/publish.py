"""`python -m pixart.publish OWNER/NAME --model runs/mine`: a repository that diffusers opens.

Writes a folder in diffusers' layout with the code that runs compressed checkpoints, and a model card. It
uploads nothing unless --push says so. Exit codes: 0 done, 2 bad input, 1 failure, 130 cancelled.
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["publish", *sys.argv[1:]])

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pixart import process
from pixart.command import DONE, parse, run_command

if TYPE_CHECKING:
    from pixart.publishing.hub import Target
    from pixart.publishing.writing import Order

NAME = "publish"


@dataclass(frozen=True)
class Options:
    """Write a model as a repository that diffusers opens, and with --push upload it."""

    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR|OWNER/NAME")]
    """A folder to write, or a repository of the Hugging Face hub. OWNER/NAME is a repository unless there is
    a folder OWNER here."""
    model: str
    """What to publish: a run, a stage or a state of pixart train, a pipeline directory, a hub id, a release,
    or the embedded model "shapes"."""
    push: bool = False
    """Upload it. Without it the folder is written, and what would be uploaded is listed."""
    private: bool = False
    """Make the repository a private one."""
    folder: Path | None = None
    """Where the files of OWNER/NAME are written. Default published/NAME."""
    license: str | None = None
    """The licence, as the hub calls it: openrail++, apache-2.0 ... Default: that of the base, where its
    card or its release says one."""
    base: str | None = None
    """What the model was made from, a hub id or a release. Default: what its training state says."""
    results: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A folder of pixart evaluate whose numbers stand in the card. Give it again for further ones."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Of a picture that is drawn for the card. Give it again for further ones. Default: the validation
    prompts of the training, three captions of the embedded world, or a cactus."""
    previews: bool = True
    """Draw pictures for the card."""
    seed: int = 0
    """Of these pictures."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """The precision of the transformer's numbers. Default: as stored."""
    max_shard_size: str = "5GB"
    """Split the transformer's weights into files of this size."""
    device: str | None = None
    """Where pictures are drawn: cpu, cuda ... Default CUDA when there is one."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(
        NAME, lambda: run(parse(Options, NAME, arguments)), "cancelled; nothing was uploaded"
    )


def run(options: Options) -> int:
    """Write, say what was written, and upload where asked for."""
    from pixart.publishing import hub
    from pixart.publishing.folder import files_of
    from pixart.publishing.writing import publish

    target = hub.find_target(options.target, options.folder)
    hub.check_options(target, push=options.push, private=options.private)
    token = hub.find_token() if options.push else ""
    publish(_order(options, target))
    files = files_of(target.folder)
    for name, size in files:
        print(f"{size:>14,}  {name}")
    print(f"{sum(size for _, size in files):>14,}  bytes in {len(files)} files: {target.folder}")
    if target.repository is None:
        return DONE
    kind = "private repository" if options.private else "repository"
    place = f"{kind} https://huggingface.co/{target.repository}"
    if not options.push:
        print(f"nothing was uploaded; with --push all of it goes to the {place}")
        return DONE
    process.at_work()
    address = hub.push(target, token, private=options.private)
    print(f"uploaded to {address}")
    return DONE


def _order(options: Options, target: "Target") -> "Order":
    from pixart.publishing.writing import Order

    return Order(
        target, options.model, options.license, options.base, options.results, options.prompt,
        options.previews, options.seed, options.dtype, options.max_shard_size, options.device,
    )  # fmt: skip
