"""Files: written aside and renamed, read as JSON, compared by digests; and text for them.

Nothing here is written in place. Of a file, a reader, a crash or a full disk meets the old one or the
new one. Of a folder that replaces another too, but for the moment between two renames, in which there
is none at its path: a reader may meet that, and a crash leave it so, with the old one beside it as
`.NAME.HEX.old`.
"""

import difflib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be opened or replaced: one line with path, reason and way out.

    What a file says about itself is quoted in it: control characters are escaped, and a message of
    megabytes is cut in the middle."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class CheckpointWriteError(CheckpointError):
    """The disk refused. Nothing was left behind, and what stood at the destination still does."""

    exit_code = 1  # of a command: not the fault of what was asked for


class DeviceError(OSError):
    """What is to be a file, or to be replaced by one, is a device, a pipe or a folder."""

    exit_code = 2  # of a command: another name is wanted


AGAIN = "download or copy it again"
MAX_JSON = 2**26  # bytes; indexes of data sets are larger, and say so
MAX_DEPTH = 64  # Python's own recursion ends near 1000, in the middle of whatever reads the values
MAX_INDEX = 2**32  # bytes: of JSON about every sample of a data set
_MAX_DIGITS = 64
_LISTED = 10
_LONGEST_WORD, _LONGEST_LINE = 300, 2_000  # characters; a file's name has 255 at most


@contextmanager
def written_aside(path: Path, *, durable: bool = True, replace: bool = True) -> Iterator[Path]:
    """Yield where to write a file or a folder, which takes the place of `path` if all goes well.

    The place is beside `path`, in a new folder of an unpredictable name. durable: flushed to the disk
    before it is renamed; without it, what is lost with the machine must be cheap to make again.
    replace: without it a file must be new, and FileExistsError is raised if one, or a link, has come to
    be there. Raises what the writer raises, and OSError; nothing is left behind then.
    """
    if replace:
        path = Path(os.path.realpath(path))  # through a link, not over it
        _refuse_device(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Beside it, as a rename does not cross file systems.
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", dir=path.parent))
    except OSError as error:
        error.filename = str(path)  # the name that a caller knows
        raise
    try:
        yield holder / "new"
        publish(holder / "new", path, durable=durable, replace=replace)
    except OSError as error:
        if error.errno and error.filename is None:  # a disk that is full does not say of what
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Raise OSError where no file or folder could be written as `path`: to know before work that takes
    long. Leaves nothing."""
    place = Path(os.path.realpath(path))
    _refuse_device(place)
    try:
        above = next(folder for folder in place.parents if folder.exists())
        probe = above / f".{place.name[:40]}.{secrets.token_hex(8)}"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        error.filename = str(path)
        raise


def _refuse_device(path: Path) -> None:
    """A pipe too. Root's rename would take /dev/null from the whole machine."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # nothing is there yet
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DeviceError(errno.EINVAL, "is a pipe or a device, not a file", str(path))


def publish(aside: Path, path: Path, *, durable: bool = True, replace: bool = True) -> None:
    """Rename a finished file or folder to `path`, in place of what stands there. OSError if the disk
    refuses, or a file would replace a folder: what stood there is there still. A file is replaced in
    one step, a folder in two. Without `replace` a file goes where none is, or FileExistsError is raised."""
    if durable:
        # The contents first: a disk may take the new name before them, and a crash would leave an
        # empty file under it.
        for written in [*aside.rglob("*"), aside] if aside.is_dir() else [aside]:
            flush(written)
    if not replace:
        _place(aside, path)
    elif aside.is_dir() and path.is_dir() and not path.is_symlink():
        _exchange(path, aside)
    else:
        os.replace(aside, path)
    if durable:
        # A name is written with its folder, and lost with the machine until then.
        flush(path.parent)


def _place(aside: Path, path: Path) -> None:
    """In one step, of two processes one wins: a second name for the file, which ends with the first."""
    try:
        os.link(aside, path)
    except FileExistsError:
        raise
    except OSError:  # FAT and some shared disks have no second names
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        try:
            os.replace(aside, path)
        except BaseException:
            path.unlink()
            raise


def _exchange(path: Path, new: Path) -> None:
    """No system call replaces a folder that holds something."""
    old = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.old")
    os.replace(path, old)
    try:
        os.replace(new, path)
    # Ctrl-C too must not leave the place empty.
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder. Windows cannot open a folder."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file aside and rename it. OSError if the disk refuses."""
    with written_aside(path, durable=durable) as aside:
        aside.write_bytes(content)


def write_json(path: Path, values: object, indent: int | None = None) -> None:
    """Write JSON aside and rename it. OSError if the disk refuses."""
    write_bytes(path, json.dumps(values, indent=indent, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """A file that holds a JSON object, of at most that many bytes. Raises CheckpointError for any other."""
    try:
        values = parse_json(read_bounded(path, most), str(path), most)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{error}; {AGAIN}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got a {type(values).__name__}")
    return values


def read_bounded(path: Path, most: int) -> bytes:
    """A file's bytes. CheckpointError if there are more, or if it is no file but, say, a named pipe, which
    might never end; OSError if it cannot be read."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError(f"{path}: must be a file, got a folder, a pipe or a device")
    with path.open("rb") as file:
        # Not more at once than there is: Python makes room for all that it is asked for.
        content = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
    if len(content) > most:
        raise CheckpointError(
            f"{path}: must be at most {most:,} bytes, got {os.stat(path).st_size:,}"
        )
    return content


def parse_json(text: str | bytes, name: str, most: int = MAX_JSON, *, unique: bool = False) -> Any:
    """What JSON in UTF-8 says. ValueError, in one line that begins with `name`, for what is not JSON, is
    longer than `most`, or is nested more than 64 deep. unique: and for objects that have a key twice, of
    which Python takes the last. Whole numbers of more than 64 digits are infinite, as 1e999 is."""
    if len(text) > most:
        raise ValueError(f"{name}: must be at most {most:,} bytes of JSON, got {len(text):,}")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        decoder = _UNIQUE_DECODER if unique else _DECODER
        values = decoder.decode(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError(f"{name}: must be nested at most {MAX_DEPTH} deep, it is deeper") from None
    except ValueError as error:  # JSON and UTF-8 errors
        raise ValueError(f"{name}: is not JSON ({error})") from error
    # As many brackets as that cannot be nested deeper: lines and small files are not walked.
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(values):
        raise ValueError(f"{name}: must be nested at most {MAX_DEPTH} deep, it is deeper")
    return values


def read_json_lines(
    path: Path, most: int, *, line: int = MAX_JSON
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, no key twice, each with its place ("FILE, line 3") for messages.
    most: bytes of the file. line: bytes of a line. Blank lines are passed over. ValueError for a line that
    is no JSON object, and what `read_bounded` raises."""
    for number, content in enumerate(read_bounded(path, most).splitlines(), start=1):
        if content.strip():
            place = f"{path}, line {number}"
            values = parse_json(content, place, line, unique=True)
            if not isinstance(values, dict):
                raise ValueError(f"{place}: must be a JSON object, got a {type(values).__name__}")
            yield place, values


def _is_deep(values: object) -> bool:
    level = [values]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _whole_number(digits: str) -> int | float:
    # Python refuses 4300 digits without a word of where, and overflows in comparisons with 310.
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"has {key!r} twice")
            seen.add(key)
    return values


_DECODER = json.JSONDecoder(parse_int=_whole_number)
_UNIQUE_DECODER = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=_with_unique_keys)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a whole file, 64 hexadecimal digits. OSError for what cannot be read."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def fingerprint(directory: Path) -> str:
    """A digest of a folder's files: names, sizes, and 4 KiB at 512 even places of each.

    Files up to 2 MiB are read whole, a 10 GB shard every 20 MB, and T5-XXL's matrices are larger:
    other weights give another digest, copies and downloads of the same weights the same.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return fingerprint_files({path.relative_to(directory).as_posix(): path for path in files})


def fingerprint_files(files: Mapping[str, Path]) -> str:
    """The digest that `fingerprint` makes, of files under names of the caller's choice."""
    found = hashlib.sha256()
    for name, path in files.items():
        size = path.stat().st_size
        found.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(4096, -(-size // 512))):
                file.seek(place)
                found.update(file.read(4096))
    return found.hexdigest()


def check_text(name: str, text: str) -> None:
    """ValueError unless UTF-8 can write it: bytes of a command line that are no UTF-8 come as lone
    surrogates, which nobody can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be UTF-8 text, got {text!r}") from None


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    names = list(names)
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def near(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that a word was perhaps meant to be, None for none. Of a word of megabytes the beginning
    alone is looked at: the comparison takes seconds for each of them."""
    found = difflib.get_close_matches(word[:_LONGEST_WORD], known, 1, cutoff)
    return found[0] if found else None


def printable(text: str, most: int = _LONGEST_LINE) -> str:
    """Text as a terminal may be given it: one line, without control characters, of a bounded length. A
    name of thousands of letters is cut in its middle, as is the whole."""
    word = f"[^\\s/]{{{_LONGEST_WORD + 1},}}"
    text = re.sub(word, lambda found: _cut(found[0], _LONGEST_WORD, "..."), _cut(text, 50 * most))
    text = _cut(text, most)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def short(value: object, most: int = 60) -> str:
    """A value as Python writes it, as a message may hold it."""
    return printable(repr(value), most)


def _cut(text: str, most: int, between: str = " ... ") -> str:
    return text if len(text) <= most else f"{text[: most // 2]}{between}{text[-most // 2 :]}"


def without_controls(text: str) -> str:
    """A text of strangers without what commands a terminal, turns the order of letters around, or has
    no encoding. Line ends and tabs become spaces."""
    text = re.sub(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?", "", text)
    text = re.sub(r"[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029]", " ", text)
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", "", text
    )


def digest(content: bytes) -> str:
    """32 hexadecimal digits that tell contents apart."""
    return hashlib.sha256(content).hexdigest()[:32]
