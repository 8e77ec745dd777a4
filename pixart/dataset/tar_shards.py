"""WebDataset shards: tar files, on this machine or elsewhere, whose members share a key.

Local files need nothing more; braces (`{000..017}`) and URLs are the webdataset package's, which
reads http with curl and hf and gs in their ways. s3 goes through the `aws` command.
"""

import importlib.util
import re
import shlex
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pixart.dataset.samples import (
    EMPTY,
    MISSING,
    CaptionError,
    Item,
    Rejected,
    Sample,
    caption_name,
    captions_of,
    text_of,
)
from pixart.files import digest, parse_json
from pixart.pictures import readable_suffixes

_DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error)


def is_shards(source: str) -> bool:
    """Whether this names tar shards: by its ending, or because it is a URL."""
    return "://" in source or re.search(r"\.(tar|tgz|tar\.gz)(\?.*)?$", source) is not None


def read_shards(sources: Sequence[str]) -> Iterator[Item]:
    """The samples of the shards, in their order. A shard that breaks off is rejected from there."""
    for source in sources:
        for url in _expand(source):
            yield from _read_shard(url)


def _expand(source: str) -> list[str]:
    if "{" not in source and "://" not in source:
        return [source]
    return list(_webdataset(source).shardlists.expand_urls(source))


def _open(url: str) -> IO[bytes]:
    if "://" not in url:
        return open(Path(url).expanduser(), "rb")
    if url.startswith("s3://"):
        # Quoted, as webdataset hands this to a shell.
        url = f"pipe:aws s3 cp {shlex.quote(url)} -"
    return _webdataset(url).gopen(url)


def _webdataset(source: str) -> Any:
    if importlib.util.find_spec("webdataset") is None:
        raise ModuleNotFoundError(f"reading {source} needs: pip install webdataset")
    import webdataset
    import webdataset.shardlists

    return webdataset


def _read_shard(url: str) -> Iterator[Item]:
    key = ""
    members: dict[str, bytes] = {}
    try:
        # "r|": front to back, as what comes through a pipe cannot be sought in.
        with _open(url) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                name, dot, extension = _split(member.name)
                if file is None or not dot:
                    continue
                # A sample's members are adjacent: another key ends it.
                if name != key and members:
                    yield _sample(url, key, members)
                    members = {}
                key, members[extension] = name, file.read()
    except _DAMAGED as error:
        if members:
            yield Rejected(f"{url}#{key}", "truncated shard: it breaks off within this sample")
        yield Rejected(url, f"unreadable shard: {error}")
        return
    if members:
        yield _sample(url, key, members)


def _split(path: str) -> tuple[str, str, str]:
    """Up to the first dot of the file's name, as WebDataset cuts."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    return folder + slash + stem, dot, extension.lower()


def _sample(url: str, key: str, members: dict[str, bytes]) -> Item:
    path = f"{url}#{key}"
    image = next(
        (data for name, data in members.items() if f".{name}" in readable_suffixes()), None
    )
    if image is None:
        return Rejected(path, f"{MISSING}: no picture among {', '.join(members)}")
    try:
        captions, lacking = _captions(members)
    except CaptionError as error:
        return Rejected(path, f"unreadable caption: {error}")
    return Sample(path, path, digest(image), lambda: image, captions, lacking)


def _captions(members: dict[str, bytes]) -> tuple[dict[str, str], str]:
    """The captions of a sample's members, and why there are none."""
    captions: dict[str, str] = {}
    has_text = False
    if "json" in members:
        captions |= captions_of(_object(members["json"]))
        has_text = True
    for extension, content in members.items():
        if name := caption_name(extension):
            has_text = True
            if text := text_of(content):
                captions[name] = text
    return captions, EMPTY if has_text else f"{MISSING}: no .txt or .json with a caption"


def _object(content: bytes) -> dict[str, Any]:
    try:
        values = parse_json(content, ".json")
    except ValueError as error:
        raise CaptionError(str(error)) from error
    if not isinstance(values, dict):
        raise CaptionError(".json must hold an object")
    return values
