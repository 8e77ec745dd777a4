"""Where results go: a folder on this machine, or a place in a store of objects such as s3://bucket/prefix.

A reader meets a whole object or none: files are written aside and renamed, objects put in one piece, from a
file on this machine. pyarrow speaks to the stores (pip install "pixart-fast[ray]"); credentials are those that
it finds: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, the machine's role; GOOGLE_APPLICATION_CREDENTIALS.
"""

import errno
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

from pixart.addresses import masking
from pixart.command import message_of
from pixart.files import DeviceError, check_writable, printable, written_aside
from pixart.locks import claimed
from pixart.process import Whole

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

REMOTE = ("s3", "gs", "gcs")
PROBE = ".pixart-can-write"
PATIENCE = 20  # seconds in which Google's store must answer: the library's own limit is 15 minutes
BLOCK = 32 * 2**20  # bytes put at once; S3 takes 10,000 of them for an object
ABANDONED = 86_400.0  # seconds after which what another machine wrote aside is nobody's


class Storage(Protocol):
    """Objects by names with / between their parts. Picklable. All raise OSError, in one line with the
    place, for what the disk or the store refuses; FileNotFoundError for what is not there."""

    @property
    def place(self) -> str:
        """As messages may hold it."""

    def exists(self, name: str) -> bool: ...

    def names(self) -> Iterator[str]:
        """Of what lies in the place itself, in order; folders there are not looked into."""

    def size(self, name: str) -> int:
        """In bytes."""

    def head(self, name: str, count: int) -> bytes:
        """The first bytes of an object, so many at most."""

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, content: bytes) -> None: ...

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """Yields a file on this machine to fill, which goes there if all goes well."""

    def claimed(self, name: str, *, wait: bool) -> AbstractContextManager[bool]:
        """Whether nobody else that asks writes it meanwhile. A store has no locks, and always says so: of two
        that write one object, the last one's stays."""


def open_storage(place: str | Path, *, writing: bool = True) -> Storage:
    """A folder or a URI (s3://, gs://, file://). writing: find out now whether it may be written.

    Raises ValueError, in one line without credentials, for a place that cannot be: an unknown scheme, no
    such bucket, no rights, no credentials, nothing that answers; ModuleNotFoundError without pyarrow.
    """
    text = as_given(str(place))
    scheme, between, rest = text.partition("://")
    if between and scheme not in (*REMOTE, "file"):
        raise ValueError(
            f"a place for results must be a folder, s3://, gs:// or file://, got {printable(scheme)}://..."
        )
    if not between or scheme == "file":
        return _opened_folder(text if not between else _path_of(rest), writing)
    _check_uri(scheme, rest)
    store = Store(text)
    try:
        store.open()
        if writing:
            store.write(PROBE, b"")
            with suppress(OSError):  # who may write need not be one who may delete
                store.delete(PROBE)
    except OSError as error:
        raise ValueError(str(error)) from None
    return store


def local_or_store(text: str) -> str:
    """A place as a `Path` keeps it: that of file:///a%20b is /a b. ValueError for a URI that would become
    another one, as a path makes one slash of several."""
    scheme, between, rest = text.partition("://")
    if between and scheme == "file":
        return _path_of(rest)
    if between and scheme in REMOTE and rest.startswith("/"):
        raise ValueError(
            f"{scheme}:// must be followed by a bucket, as in {scheme}://bucket/prefix"
        )
    return text


def as_given(place: str) -> str:
    """A path makes one slash of the two in s3://bucket."""
    return re.sub(r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", place)


# What RFC 3986 allows in each part of a URI.
_CODE = "%[0-9A-Fa-f]{2}"
_PLAIN = rf"(?:[A-Za-z0-9._~!$&'()*+,;=:-]|{_CODE})"
_AFTER_SCHEME = re.compile(
    rf"(?:{_PLAIN}*@)?(?:[A-Za-z0-9._~-]|{_CODE})+(?P<path>(?:/(?:{_PLAIN}|@)*)*)(?:\?(?:{_PLAIN}|[/?])*)?"
)


def _check_uri(scheme: str, rest: str) -> None:
    """ValueError for what libraries would read in another way than it was meant, or refuse with all of it in
    the message: where a secret is not encoded, nobody can tell where it ends."""
    authority, _, path = rest.partition("?")[0].partition("/")
    bucket = authority.rpartition("@")[2]
    if ":" in bucket and "@" in path:
        raise ValueError(
            f"{scheme}:// must have its secret percent-encoded (/ as %2F), or better none: credentials are "
            "taken from the environment too"
        )
    if not bucket:
        raise ValueError(
            f"{scheme}:// must be followed by a bucket, as in {scheme}://bucket/prefix"
        )
    match = _AFTER_SCHEME.fullmatch(rest)
    if match is None:
        shown = "another" if "@" in rest else printable(f"{scheme}://{authority}/{path}", 200)
        raise ValueError(
            f"{scheme}:// must be followed by a bucket and a prefix, other characters percent-encoded (@ as "
            f"%40, # as %23, a space as %20), got {shown}"
        )
    if {".", ".."} & set(unquote(match["path"]).split("/")):
        raise ValueError(
            f"{scheme}://{bucket} must have no . and .. in its path: a store has no folders, got {match['path']}"
        )


def _path_of(rest: str) -> str:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash or re.search("[?#]", path):
        shown = "another" if re.search("[@?#]", rest) else printable(f"file://{host}", 200)
        raise ValueError(
            "file:// must be followed by a path of this machine, as file:///data/tars, ? in it as %3F and # as "
            f"%23, got {shown}"
        )
    return unquote(slash + path)


def _opened_folder(path: str, writing: bool) -> "Folder":
    try:
        folder = Path(path).expanduser()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: must be a folder, it is a file")
        if writing:
            check_writable(folder / PROBE)
    except OSError as error:
        reason = error.strerror or message_of(error)
        raise ValueError(
            f"{printable(path, 300)}: cannot be written ({reason}); name another place"
        ) from None
    except (ValueError, RuntimeError) as error:  # a NUL; ~ of somebody unknown
        if str(error).endswith("it is a file"):
            raise
        raise ValueError(
            f"{printable(path, 300)}: must be the path of a folder ({error})"
        ) from None
    return Folder(str(folder))


@dataclass(frozen=True)
class Folder:
    """A folder, also one on a disk that machines share."""

    place: str

    def exists(self, name: str) -> bool:
        return self._path(name).exists()

    def names(self) -> Iterator[str]:
        found = (path for path in Path(self.place).glob("*") if path.is_file())
        # What is written aside, and locks, are hidden.
        return iter(sorted(path.name for path in found if not path.name.startswith(".")))

    def size(self, name: str) -> int:
        return self._path(name).stat().st_size

    def head(self, name: str, count: int) -> bytes:
        with self._file(name).open("rb") as file:
            return file.read(count)

    def read(self, name: str) -> bytes:
        return self._file(name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as aside:
            aside.write_bytes(content)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        if self._path(name).exists():
            self._file(name)
        with written_aside(self._path(name)) as aside:
            (aside.parent / "owner").write_text(_owner(name), "utf-8")
            yield aside

    @contextmanager
    def claimed(self, name: str, *, wait: bool) -> Iterator[bool]:
        lock = Path(self.place) / ".locks" / f"{name.replace('/', '-')}.lock"
        with claimed(lock, wait=wait) as is_ours:
            try:
                if is_ours:
                    self._sweep(name)
                yield is_ours
            finally:
                if is_ours:
                    with suppress(OSError):  # others' locks are in there
                        lock.unlink()
                        lock.parent.rmdir()

    def _path(self, name: str) -> Path:
        return Path(self.place) / name

    def _file(self, name: str) -> Path:
        """A pipe would be waited for until somebody writes to it, and no file takes the place of a folder."""
        path = self._path(name)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DeviceError(
                errno.EINVAL, "is a folder, a pipe or a device, not a file", str(path)
            )
        return path

    def _sweep(self, name: str) -> None:
        """Remove what processes of this machine left that were killed as they wrote this: the lock is ours.
        Locks of some shared disks do not reach other machines, whose asides must be old."""
        path = self._path(name)
        for aside in path.parent.glob(f".{escape(path.name[:40])}.*"):
            try:
                owner = (aside / "owner").read_text("utf-8")
                is_old = time.time() - max(p.stat().st_mtime for p in aside.iterdir()) > ABANDONED
            except (OSError, ValueError):  # gone, or about to be filled
                continue
            is_of_name = owner.partition("\n")[2] == name
            if owner == _owner(name) or (is_of_name and is_old):
                shutil.rmtree(aside, ignore_errors=True)


def _owner(name: str) -> str:
    return f"{socket.gethostname()}\n{name}"


@dataclass(frozen=True)
class Store:
    """A place in a store of objects, by its URI, which may hold credentials."""

    uri: str = field(repr=False)

    @property
    def place(self) -> str:
        parts = urlsplit(self.uri)
        bucket = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{bucket}{unquote(parts.path)}".rstrip("/")

    def exists(self, name: str) -> bool:
        from pyarrow.fs import FileType

        with self._saying(name):
            system, path = self.open(name)
            return system.get_file_info(path).type == FileType.File

    def names(self) -> Iterator[str]:
        from pyarrow.fs import FileSelector, FileType

        with self._saying():
            system, base = self.open()
            found = system.get_file_info(FileSelector(base, allow_not_found=True))
        files = [one.path for one in found if one.type == FileType.File]
        names = [path.removeprefix(f"{base}/") for path in files]
        return iter(sorted(name for name in names if name != PROBE))

    def size(self, name: str) -> int:
        with self._saying(name), self._reading(name) as file:
            return int(file.size())

    def head(self, name: str, count: int) -> bytes:
        with self._saying(name), self._reading(name) as file:
            return bytes(file.read(count))

    def read(self, name: str) -> bytes:
        with self._saying(name), self._reading(name) as file:
            return bytes(file.read())

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as file:
            file.write_bytes(content)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="pixart-") as folder:
            yield Path(folder) / "new"
            with self._saying(name):
                self._put(Path(folder) / "new", name)

    @contextmanager
    def claimed(self, name: str, *, wait: bool) -> Iterator[bool]:
        yield True

    def delete(self, name: str) -> None:
        with self._saying(name):
            system, path = self.open(name)
            system.delete_file(path)

    def open(self, name: str | None = None) -> "tuple[FileSystem, str]":
        """The file system, opened once in a process, and the path of an object there, or of all of them."""
        with self._saying():
            system, base = _file_system(self.uri)
        base = base.rstrip("/")
        return system, base if name is None else f"{base}/{name}"

    def _reading(self, name: str) -> Any:
        system, path = self.open(name)
        return system.open_input_file(path)

    def _put(self, source: Path, name: str) -> None:
        # In one piece, also for Ctrl-C: pyarrow finishes an object that is left alone, and makes it visible.
        with source.open("rb") as file, Whole():
            system, path = self.open(name)
            stream = system.open_output_stream(path, compression=None)
            while block := file.read(BLOCK):
                stream.write(block)
            stream.close()

    @contextmanager
    def _saying(self, name: str | None = None) -> Iterator[None]:
        try:
            yield
        except (_Refusal, ModuleNotFoundError):
            raise
        except FileNotFoundError as error:
            raise FileNotFoundError(self._line(name, error)) from None
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's are among them
            raise _Refusal(self._line(name, error)) from None

    def _line(self, name: str | None, error: Exception) -> str:
        place = self.place if name in (None, PROBE) else f"{self.place}/{name}"
        return f"{place}: {_reason(_masking(self.uri)(str(error)))}"


class _Refusal(OSError):
    """What a store refused, in one line."""


_REASONS = (
    (r"NO_SUCH_BUCKET|[Bb]ucket.*(not found|does not exist)|NoSuchBucket",
     "there is no such bucket; make it, or name another"),
    (r"ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY|InvalidAccessKey|SIGNATURE|INVALID_CLIENT_TOKEN|"
     r"UNRECOGNIZED_CLIENT|EXPIRED|HTTP status (401|403)|[Ff]orbidden|PermissionDenied|[Uu]nauthenticated|"
     r"[Cc]redentials",
     "the store refuses; give credentials that may read and write there (AWS_ACCESS_KEY_ID and "
     "AWS_SECRET_ACCESS_KEY, a profile or role; GOOGLE_APPLICATION_CREDENTIALS)"),
    (r"NETWORK_CONNECTION|curlCode|[Cc]onnect|[Tt]imeout|timed out|[Uu]navailable|resolve host",
     "the store does not answer; look at the address (endpoint_override=, region=) and the network"),
)  # fmt: skip


def _reason(text: str) -> str:
    """What a library says of a store, with the way out where that is known."""
    said = printable(" ".join(text.split()), 300)
    for pattern, reason in _REASONS:
        if re.search(pattern, text):
            return f"{reason} ({said})"
    return said


def _masking(uri: str) -> Callable[[str], str]:
    """Takes user and password out of a text; regions and hosts of the query may stay."""
    secrets = urlsplit(uri).netloc.rpartition("@")[0].split(":")
    return masking({form for text in secrets for form in (text, unquote(text))})


@lru_cache(maxsize=8)
def _file_system(uri: str) -> "tuple[FileSystem, str]":
    try:
        from pyarrow.fs import FileSystem
    except ImportError:
        raise ModuleNotFoundError(
            'pyarrow is needed for s3:// and gs://, and is not installed; pip install "pixart-fast[ray]"'
        ) from None
    if uri.startswith(("gs", "gcs")) and "retry_limit_seconds" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={PATIENCE}"
    system, path = FileSystem.from_uri(uri)
    return system, path
