"""The line `parameters` of gallery tools, read from a picture that a client sent."""

import json
import re

from pixart.pictures import PictureError
from pixart.pipeline.pictures import read_texts
from pixart.serving.refusal import Refusal

_NEGATIVE = "Negative prompt:"
# A value is JSON's text in quotes, or what comes before the next comma.
_PAIR = re.compile(r'\s*([\w][\w \-/]{0,60}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


def infotext(content: bytes) -> tuple[str, dict[str, str]]:
    """The text of a file, "" where it has none, and what it says: Prompt, Negative prompt, and its
    settings by their names there. Refusal (400) for what cannot be read."""
    try:
        text = read_texts(content, "image")[1]
    except PictureError as error:
        raise Refusal(400, str(error), code="bad_picture", field="image") from error
    return text, parse_parameters(text) if text else {}


def parse_parameters(text: str) -> dict[str, str]:
    """Prompts, then one last line of `Name: value, ...`."""
    *prompts, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < 3:  # no settings: all of it is prompts
        prompts, pairs = [*prompts, last], []
    whole = "\n".join(prompts)
    prompt, _, negative = whole.partition(_NEGATIVE)
    found = {"Prompt": prompt.strip(), "Negative prompt": negative.strip()}
    return found | {name: _unquoted(value.strip()) for name, value in pairs}


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
