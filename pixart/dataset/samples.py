"""Samples of a source, their captions, and what was rejected and why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pixart.files import check_text

PROMPT = "prompt"  # the name of a picture's first caption
CAPTION_FIELDS = {"prompt": PROMPT, "caption": PROMPT, "text": PROMPT, "sharegpt4v": "sharegpt4v"}
EMPTY, MISSING = "empty caption", "missing file"
MAX_CAPTION = 2**20  # bytes of a file
MAX_REASON = 1000  # characters


@dataclass(frozen=True)
class PictureFile:
    """path: where it lies, for messages. version: changes with the file."""

    path: str
    version: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Sample:
    """A picture and its captions by name, none of them empty.

    key: names it within its source. path: where it lies, for messages. version: changes with the
    picture's file. uncaptioned: why `captions` is empty, if it is. relative: the picture's path within
    its folder or shard. control: a picture that steers, where one lies beside it.
    """

    key: str
    path: str
    version: str
    read: Callable[[], bytes]
    captions: Mapping[str, str]
    uncaptioned: str = EMPTY
    relative: str = ""
    control: PictureFile | None = None


@dataclass(frozen=True)
class Prompt:
    """Captions of no picture, by name, none of them empty. path: where they stand, for messages."""

    path: str
    captions: Mapping[str, str]


@dataclass(frozen=True)
class Rejected:
    """What cannot become a sample, and why: text that any report can hold, whatever it was made from."""

    path: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", writable(self.path))
        reason = self.reason
        if len(reason) > MAX_REASON:  # it may quote what is wrong
            reason = f"{reason[:MAX_REASON]} ..."
        object.__setattr__(self, "reason", writable(reason))


Item = Sample | Rejected


class CaptionError(ValueError):
    """Captions that are not text."""


def writable(text: str) -> str:
    """Text in UTF-8: what comes from bytes that were none is written as those bytes, `caf\\xe9.png`."""
    try:
        content = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone half of a pair, which no file name has but JSON may
        content = text.encode("utf-8", "backslashreplace")
    return content.decode("utf-8", "backslashreplace")


def checked(name: str, sample: Sample) -> Item:
    """The sample, or why it cannot be one: what becomes of it is written in UTF-8. name: of its file
    within the source."""
    try:
        check_text("file name", name)
        for key, text in sample.captions.items():
            check_text("name of a caption", key)
            check_text(f"caption {key}", text)
    except ValueError as error:
        return Rejected(sample.path, str(error))
    return sample


def captions_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The captions of an index's object that are not empty. Raises CaptionError."""
    found: dict[str, Any] = {}
    for field, name in CAPTION_FIELDS.items():
        if values.get(field) not in (None, ""):
            # prompt, caption and text share a name: the first of them that is there counts.
            found.setdefault(name, values[field])
    extra = values.get("captions") or {}
    found |= extra if isinstance(extra, Mapping) else {PROMPT: extra}
    captions: dict[str, str] = {}
    for name, text in found.items():
        numbered = isinstance(text, list)
        for number, one in enumerate(text if numbered else [text], 1):
            if not isinstance(one, str | None):
                raise CaptionError(f"caption {name} must be text, got {one!r}")
            if one and one.strip():
                captions[f"{name}.{number}" if numbered else name] = one.strip()
    return captions


def caption_name(extension: str) -> str | None:
    """The caption that a file KEY.extension holds: "txt" and "NAME.txt"; None if it holds none."""
    name, _, last = f".{extension}".rpartition(".")
    if last.lower() != "txt":
        return None
    return name.lstrip(".") or PROMPT


def text_of(content: bytes) -> str:
    """Raises CaptionError if it is not UTF-8."""
    try:
        # Editors put a byte order mark in front, which would become a token of the caption.
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise CaptionError(f"caption must be UTF-8, byte {error.start} is not") from error
