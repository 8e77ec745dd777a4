"""WebDataset shards: tar files, on this machine or elsewhere, whose members share a key.

Local files need nothing more; braces (`{000..017}`) and URLs are the webdataset package's, which
reads http with curl and hf and gs in their ways. s3 goes through the `aws` command. Its `pipe:`, which
gives the rest to a shell, is refused: `verify` takes the source from a file, which may be anybody's.
"""

import importlib.util
import lzma
import math
import re
import shlex
import stat
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from pixart.addresses import masking_of, without_secrets
from pixart.dataset.samples import (
    EMPTY,
    MISSING,
    CaptionError,
    Item,
    PictureFile,
    Rejected,
    Sample,
    caption_name,
    captions_of,
    checked,
    text_of,
    writable,
)
from pixart.files import digest, parse_json
from pixart.pictures import MAX_BYTES, readable_suffixes, unread

# What tarfile and the decompressors raise over damaged bytes.
_DAMAGED = (tarfile.TarError, OSError, EOFError, ValueError, LookupError, ArithmeticError, TypeError,
            MemoryError, RecursionError, zlib.error, lzma.LZMAError)  # fmt: skip
MOST_ZEROS = (
    2**20 + tarfile.BLOCKSIZE
)  # at the end; tar rounds a shard's length up to 10 KiB unless told
SCHEMES = ("http", "https", "s3", "gs", "hf", "sftp", "ftps", "scp")
MOST_BYTES, MOST_NAME = 2**33, 2**20  # of a member, and of a header's text for the next
_OF_NEXT = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
MOST_SHARDS = 100_000  # that a source with braces may stand for
CONTROL = "control."  # a picture that steers ends in .control.png, .control.jpg ...
_CUT = "it is cut off before the end of its archive"
_OF_MACOS = re.compile(r"(^|/)(PaxHeaders?(\.\d+)?|__MACOSX)(/|$)")


def is_shards(source: str) -> bool:
    """Whether this names tar shards: by its ending, or because it is a URL."""
    return "://" in source or re.search(r"\.(tar|tgz|tar\.gz)(\?.*)?$", source) is not None


def shards_of(source: str) -> list[str]:
    """The shards that a source names, its braces expanded. ValueError for a URL that is not read."""
    is_url = "://" in source
    if not is_url and ("{" not in source or Path(source).expanduser().is_file()):
        return [source]
    most = math.prod(map(_count, re.findall(r"\{([^{}]*)\}", source)))
    if most > MOST_SHARDS:
        raise ValueError(f"source must name at most {MOST_SHARDS:,} shards, it names {most:,}")
    if is_url:
        _check_url(source)
    try:
        shards = list(_webdataset(source).shardlists.expand_urls(source))
    except (
        ValueError,
        AssertionError,
    ) as error:  # half a pair of braces, a variable that is not set
        raise ValueError(f"{without_secrets(source)}: {_reason(error)}") from error
    for shard in shards:
        if "://" in shard:  # braces can make one of a path
            _check_url(shard)
    return shards


def _count(within: str) -> int:
    """How many words a pair of braces stands for, at most."""
    ends = re.match(r"(-?\d{1,30})\.\.(-?\d{1,30})", within)
    return abs(int(ends[2]) - int(ends[1])) + 1 if ends else within.count(",") + 1


def _check_url(url: str) -> None:
    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise ValueError(
            f"source must be a path or begin with {', '.join(SCHEMES)} and ://, "
            f"got {without_secrets(url)[:300]!r}"
        )
    # Earlier versions of webdataset put it between such quotes, for a shell.
    if "'" in url and scheme != "s3":
        raise ValueError(f"source must have %27 for ', got {without_secrets(url)[:300]!r}")


def read_shards(shards: Sequence[str]) -> Iterator[Item]:
    """The samples of the shards, in their order. A shard that breaks off is rejected from there."""
    for shard in shards:
        yield from _read_shard(shard)


def _open(url: str) -> IO[bytes]:
    if "://" not in url:
        path = Path(url).expanduser()
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("a folder, a pipe or a device, not a file")
        return path.open("rb")
    if url.startswith("s3://"):
        # Quoted, as webdataset hands this to a shell.
        url = f"pipe:aws s3 cp {shlex.quote(url)} -"
    return _webdataset(url).gopen(url)


def _webdataset(source: str) -> Any:
    if importlib.util.find_spec("webdataset") is None:
        raise ModuleNotFoundError(
            f"reading {without_secrets(source)} needs: pip install webdataset"
        )
    import webdataset
    import webdataset.shardlists

    return webdataset


class _Header(tarfile.TarInfo):
    """A member's header. tarfile ends where it finds none, or a damaged one, as it does at the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(_CUT)
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf.strip(b"\0"):  # the end
                raise
            raise tarfile.ReadError(f"damaged header ({error})") from error
        most = MOST_BYTES if header.type not in _OF_NEXT else MOST_NAME
        if not 0 <= header.size <= most:
            raise tarfile.ReadError(f"damaged header (a size of {header.size})")
        return header


@dataclass
class _Members:
    """What a shard holds of one key. names: of all, by extension; contents: of those that count."""

    key: str
    names: list[str] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""

    def add(self, extension: str, header: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        if extension in self.names:
            self.fault = f"two members end in .{extension}"
        self.names.append(extension)
        if not _counts(extension) or self.fault:
            return
        # A sparse member of a few bytes may claim to hold any number of zeros.
        if header.issparse() or not 0 <= header.size <= MAX_BYTES:
            self.fault = f".{extension} must be at most {MAX_BYTES:,} bytes and not sparse"
        elif file := archive.extractfile(header):
            self.contents[extension] = file.read()


def _read_shard(url: str) -> Iterator[Item]:
    members: _Members | None = None
    reading = ""  # the key of the member that is being read, "" within a header
    try:
        # "r|": front to back, as what comes through a pipe cannot be sought in.
        with _open(url) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
            while header := tar.next():
                # A pax header may have given the size; tarfile skips it by reading on behind the end.
                if not 0 < tar.offset - header.offset <= MOST_BYTES:
                    raise tarfile.ReadError(f"damaged header (a size of {header.size})")
                reading, extension = _split(header.name) if header.isfile() else ("", "")
                if not reading:
                    continue
                # A sample's members are adjacent: another key ends it.
                if members is None or reading != members.key:
                    if members is not None:
                        yield _sample(url, members)
                    members = _Members(reading)
                members.add(extension, header, tar)
                reading = ""
            _check_end(tar)
    except _DAMAGED as error:
        yield from _broken_off(url, members, reading)
        reason = masking_of(url)(_reason(error))  # of curl's command, which holds the URL
        yield Rejected(without_secrets(url), f"unreadable shard: {reason}")
        return
    if members is not None:
        yield _sample(url, members)


def _check_end(tar: tarfile.TarFile) -> None:
    """Of the blocks of zeros that end an archive the first was read. A download that broke off may lack
    them, and one that was given its length in advance has zeros in the place of members."""
    assert tar.fileobj is not None
    behind = 0
    while block := tar.fileobj.read(1 << 20):
        behind += len(block)
        if block.strip(b"\0"):
            raise tarfile.ReadError("it goes on behind the end of its archive; that is not read")
    if behind < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(_CUT)
    if behind > MOST_ZEROS:
        raise tarfile.ReadError(f"it ends in {behind:,} zeros, as a download that broke off may")


def _broken_off(url: str, members: _Members | None, reading: str) -> Iterator[Item]:
    """The last sample of a shard that breaks off: itself, if it can be used as far as it goes."""
    if members is None:
        return
    item = _sample(url, members)
    if reading or isinstance(item, Rejected) or not item.captions:
        item = Rejected(item.path, "truncated shard: it breaks off within this sample")
    yield item


def _reason(error: Exception) -> str:
    if str(error) == "unexpected end of data":  # tarfile's own words, within a member
        return _CUT
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _split(path: str) -> tuple[str, str]:
    """Up to the first dot of the file's name, as WebDataset cuts; "" for what is no part of a sample:
    a name without a dot or that begins with one, and what the tar of macOS puts beside the files."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    if not stem or not dot or _OF_MACOS.search(folder):
        return "", ""
    return folder + slash + stem, extension.lower()


def _counts(extension: str) -> bool:
    return (
        f".{extension.removeprefix(CONTROL)}" in readable_suffixes()
        or extension == "json"
        or bool(caption_name(extension))
    )


def _sample(url: str, members: _Members) -> Item:
    key, path = (f"{place}#{members.key}" for place in (url, without_secrets(url)))
    if members.fault:
        return Rejected(path, members.fault)
    contents = members.contents
    pictures = {name: data for name, data in contents.items() if f".{name}" in readable_suffixes()}
    if not pictures:
        reasons = filter(None, (unread(f".{name}") for name in members.names))
        no_picture = f"{MISSING}: no picture among {', '.join(members.names)}"
        return Rejected(path, next(reasons, no_picture))
    try:
        captions, lacking = _captions(contents)
    except CaptionError as error:
        return Rejected(path, f"unreadable caption: {error}")
    extension, image = next(iter(pictures.items()))
    sample = Sample(
        *(key, writable(path), digest(image), partial(bytes, image), captions, lacking),
        relative=f"{members.key}.{extension}",
        control=_control(writable(path), contents),
    )
    return checked(members.key, sample)


def _control(path: str, contents: dict[str, bytes]) -> PictureFile | None:
    for name, data in contents.items():
        if name.startswith(CONTROL) and f".{name.removeprefix(CONTROL)}" in readable_suffixes():
            return PictureFile(f"{path}.{name}", digest(data), partial(bytes, data))
    return None


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
