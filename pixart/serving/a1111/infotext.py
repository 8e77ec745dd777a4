"""The line `parameters` of gallery tools, read from a picture that a client sent."""

import re
from collections.abc import Iterator

from pixart.files import parse_json
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
    pairs = [*pairs_of(last)]
    if len(pairs) < 3:  # no settings: all of it is prompts
        prompts, pairs = [*prompts, last], []
    whole = "\n".join(prompts)
    prompt, _, negative = whole.partition(_NEGATIVE)
    found = {"Prompt": prompt.strip(), "Negative prompt": negative.strip()}
    return found | {name: _unquoted(value) for name, value in pairs}


def pairs_of(line: str) -> Iterator[tuple[str, str]]:
    """The settings of the last line, and their values as they are written."""
    # From comma to comma: where a search may begin anywhere, a line of spaces takes hours.
    at = 0
    while at < len(line):
        if found := _PAIR.match(line, at):
            yield found[1], found[2].strip()
            at = found.end()
        else:
            at = line.find(",", at) + 1 or len(line)


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(parse_json(value, "parameters"))
    except ValueError:
        return value
