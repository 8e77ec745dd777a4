"""What the commands of `python -m pixart.evaluate` do: each returns what is printed, in words and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart import process
from pixart.evaluation.options import SAMPLING, Accuracy, Score

MOST = 1_000_000  # captions; all are made before the first picture


@dataclass(frozen=True)
class Said:
    """What a command prints: text, or values as JSON with --json."""

    text: str
    values: Mapping[str, Any]


def score(options: Score) -> Said:
    """Score pictures that are there; the numbers go to results.json."""
    from pixart.evaluation.api import score_folder

    return said_of(
        score_folder(
            options.output,
            names(options.metrics),
            images=options.images,
            prompts=options.prompts,
            reference=options.reference,
            samples=options.samples,
            name=options.name,
            weights=options.weights,
            judge=options.judge,
            files={name: Path(value) for name, value in pairs("--file", options.file).items()},
            options=pairs("--option", options.option),
            allow_missing=options.allow_missing,
            device=options.device,
        ),
        options.output,
    )


def said_of(results: Mapping[str, Any], output: Path) -> Said:
    """The numbers, a line each with its interval, and the id of how they were made."""
    lines = [
        f"{name}: {_number(value)} {block['unit']}".rstrip()
        for block in results["metrics"].values()
        for name, value in block["values"].items()
    ]
    told = f"protocol {results['protocol']['id']}, {results['pictures']} pictures"
    errors = f", {results['errors']} left out" if results["errors"] else ""
    return Said("\n".join([*lines, f"{told}{errors}: see {output}"]), results)


def _number(value: Mapping[str, Any]) -> str:
    ends = ("?" if value[end] is None else f"{value[end]:.4g}" for end in ("low", "high"))
    return f"{value['value']:.4g} [{', '.join(ends)}]"


def names(text: str) -> list[str]:
    """Of metrics, with commas between them. ValueError for none, and for one that is there twice."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise ValueError(f"metrics must be named, such as shapes,clip, got {text!r}")
    if len(set(found)) < len(found):
        raise ValueError(f"each metric must be named once, got {text}")
    return found


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE of each. ValueError for what has no name, and for a name that is there twice."""
    found: dict[str, str] = {}
    for one in given:
        name, between, value = one.partition("=")
        if not (name and between) or name in found:
            raise ValueError(f"{option} must be NAME=VALUE, each name once, got {one!r}")
        found[name] = value
    return found


def accuracy(options: Accuracy) -> Said:
    """Draw and check captions of the embedded world, and write the results if a file is named."""
    import torch

    from pixart.evaluation.caption_accuracy import evaluate
    from pixart.files import check_writable, write_json
    from pixart.pipeline.text_to_image import Pipeline

    file = options.json_file
    if not 1 <= options.count <= MOST:
        raise ValueError(f"--count must be from 1 to {MOST:,}, got {options.count}")
    if file is not None and file.is_dir():
        raise ValueError(f"--json-file must be a file, got the folder {file}")
    if file is not None:
        check_writable(file)
    like = options.like  # refused before a model is opened
    pipe = Pipeline.from_pretrained(
        options.model,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype],
        device=options.device,
        attention=options.attention,
        cache_dir=None,
    )
    text, values = evaluate(pipe, options)
    used = pipe.resolve(like)
    settings = {name: getattr(used, name) for name in ("seed", *SAMPLING)}
    values = {**settings, "dtype": options.dtype, "attention": options.attention, **values}
    if file is not None:
        process.at_work()
        write_json(file, values, indent=2)
    return Said(text, values)
