"""Where tars go, by --output: a folder or a URI, and a name with {shard} in it."""

import os
import re
from dataclasses import dataclass

from pixart.addresses import without_secrets
from pixart.files import printable
from pixart.generation.options import Options
from pixart.storage import Storage, as_given

_NAMES = re.compile(r"(?P<before>[^{}]*)\{shard(:0(?P<digits>\d{1,2})d)?\}(?P<after>[^{}]*\.tar)")
_DIGITS = 5
_LONGEST = 240  # bytes of a name, of the 255 that disks take: locks have a suffix


@dataclass(frozen=True)
class ShardNames:
    """place: a folder, or a URI. before, after: what stands around the number of a tar in its name."""

    place: str
    before: str
    after: str
    digits: int = _DIGITS

    def name(self, number: int) -> str:
        return f"{self.before}{number:0{self.digits}d}{self.after}"

    def number(self, name: str) -> int | None:
        """That of a tar of this name; None for the names of other things."""
        inner = name.removeprefix(self.before).removesuffix(self.after)
        is_number = inner.isascii() and inner.isdigit() and len(inner) < 18
        return int(inner) if is_number and self.name(int(inner)) == name else None


def writes_shards(options: Options) -> bool:
    """Whether --output names tars. ValueError for one that does by half, or where tars would do nothing with
    another option."""
    text = "" if options.output is None else str(options.output)
    is_tar, has_field = text.lower().endswith((".tar", ".tgz", ".tar.gz")), "{shard" in text
    if is_tar or has_field:
        return True
    if "://" in (place := as_given(text)):
        raise ValueError(
            "--output must be on this machine for pictures: a store takes tars, as in "
            f"s3://bucket/{{shard:05d}}.tar, got {without_secrets(place)}"
        )
    for name in ("shard", "shard_size"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} must be given with tars, --output tars/{{shard:05d}}.tar, "
                f"got --output {without_secrets(as_given(text)) or 'outputs'}"
            )
    return False


def names_of(options: Options) -> ShardNames:
    """ValueError for an --output that cannot be the names of several tars."""
    given = text = as_given(str(options.output))
    query = ""
    if "://" in text:  # s3://bucket/{shard}.tar?endpoint_override=HOST:PORT
        text, between, settings = text.partition("?")
        query = between + settings
    place, slash, name = text.rpartition("/")
    match = _NAMES.fullmatch(name)
    if match is None or "{" in place or "}" in place:
        raise ValueError(
            "--output must name tars by their number alone, as in tars/{shard:05d}.tar, with one {shard} in the "
            f"file's name and .tar at its end, got {without_secrets(given)}"
        )
    digits = _DIGITS if match["digits"] is None else int(match["digits"])
    length = len(os.fsencode(match["before"] + match["after"])) + max(digits, 9)
    if length > _LONGEST:  # found out when the first tar is finished, else
        raise ValueError(
            f"--output must name tars in at most {_LONGEST} bytes, got {length}: {printable(name, 100)}"
        )
    return ShardNames((place or slash or ".") + query, match["before"], match["after"], digits)


def said(storage: Storage, name: str) -> str:
    """A tar as messages have it."""
    return name if storage.place == "." else f"{storage.place.rstrip('/')}/{name}"
