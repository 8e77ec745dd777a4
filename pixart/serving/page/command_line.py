"""The command line that draws a picture again, from what its file says."""

import shlex
from collections.abc import Iterator
from typing import Any

from pixart.few_step import spelt
from pixart.generation.options import SAMPLING
from pixart.pipeline.metadata import MODEL_OPTIONS, Metadata


def command_of(metadata: Metadata) -> str:
    """For a POSIX shell. Pictures that it began with, LoRAs and controls stand in it by their names."""
    return shlex.join(["python", "-m", "pixart.generate", *words_of(metadata)])


def words_of(metadata: Metadata) -> list[str]:
    """What `pixart.generate` is given. The prompt is last, where no option can be taken for it."""
    request = metadata.request
    settings = {name: getattr(request, name) for name in SAMPLING}
    if request.height is not None and request.width is not None:
        settings |= {
            "size": f"{request.width}x{request.height}",
            "aspect": None,
            "resolution": None,
        }
    options = {**settings, **{name: metadata.model[name] for name in MODEL_OPTIONS}}
    if options["device"] == "cpu":  # which has none
        del options["cuda_graph"]
    words = [word for name, value in options.items() for word in _option(name, value)]
    return [*words, "--", request.prompt]


def _option(name: str, value: Any) -> Iterator[str]:
    option = f"--{name.replace('_', '-')}"
    if value is None or value == "" or (name == "ema" and not value):
        return
    if name == "ema":
        yield option
    elif name == "timesteps":
        yield f"{option}={spelt(value)}"
    elif name.endswith("_interval") and not isinstance(value[0], tuple):
        yield from (option, *map(repr, value))
    elif isinstance(value, list | tuple):  # given again for each
        for one in value:
            yield from _option(name, one)
    else:  # in one word: a text may begin with a dash
        yield f"{option}={value}"
