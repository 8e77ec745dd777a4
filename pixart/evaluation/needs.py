"""Weights and data that somebody has to fetch: nothing here does so unasked.

Whatever is missing is listed at once, each with its file, where it is to be had, its size and SHA-256 as
far as they are known, and the command ends with exit code 3. What is there is looked for in `--weights`,
as a path, and in the user's Hugging Face cache, in this order; the hub itself is never asked. What comes with
the library has a name of its own.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from pixart.command import MISSING
from pixart.files import AGAIN, CheckpointError, sha256_of

SHIPPED = ("shapes-clip",)  # networks that come with the library, by their names
_ASSETS = Path(__file__).parent.parent / "assets"
PLACE = "--weights, the working folder and the Hugging Face cache"


@dataclass(frozen=True)
class Need:
    """Something that is missing. name: of the file or hub repository. source: where it is published.
    size: bytes, None where nobody knows. sha256: of the file, or the part of it that is known.
    place: where it is looked for, in words. repository: the hub id that holds a file of this name, None
    for none. aliases: other names that the same file goes by."""

    name: str
    source: str
    place: str = PLACE
    size: int | None = None
    sha256: str | None = None
    repository: str | None = None
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = f", {self.size / 1e6:,.1f} MB" if self.size else ""
        digest = f", SHA-256 {self.sha256}" if self.sha256 else ""
        return f"{self.name} (from {self.source}{size}{digest}), looked for in {self.place}"


class MissingError(ValueError):
    """Weights or data are missing: exit code 3."""

    exit_code = MISSING

    def __init__(self, what: str, needs: Iterable[Need]) -> None:
        self.needs = tuple(needs)
        super().__init__(f"{what} needs {'; '.join(map(str, self.needs))}")


class HasWeights(Protocol):
    """A Context, or whatever else knows `--weights`."""

    @property
    def weights(self) -> Path | None: ...


def find_file(need: Need, context: HasWeights) -> Path | None:
    """The file of a need under its name, an alias, or as safetensors; None where it is not found. The
    contents are not looked at."""
    return next((path for path in _files(need, context) if path.is_file()), None)


def open_file(what: str, need: Need, context: HasWeights) -> Path:
    """The file of a need, whose digest is right as far as it is known. what: who needs it. Raises
    MissingError, and CheckpointError for another file of the same name."""
    path = find_file(need, context)
    if path is None:
        raise MissingError(what, [need])
    known = need.sha256 or digest_in_name(path)
    if known and path.suffix == Path(need.name).suffix:
        check_digest(path, known)
    return path


def find_snapshot(
    hub_id: str, context: HasWeights, files: Iterable[str] = ("config.json",)
) -> Path | None:
    """The folder of a Hugging Face repository that holds `files`; None where there is none. hub_id:
    OWNER/NAME, or the path of a folder."""
    wanted = tuple(files)
    for folder in _folders(hub_id, context):
        if all((folder / name).is_file() for name in wanted):
            return folder
    return None


def need_snapshot(
    hub_id: str, context: HasWeights, files: Iterable[str] = ("config.json",)
) -> list[Need]:
    """What is missing of a Hugging Face repository: nothing, or the whole."""
    if find_snapshot(hub_id, context, files) is not None:
        return []
    return [snapshot(hub_id)]


def open_snapshot(
    what: str, hub_id: str, context: HasWeights, files: Iterable[str] = ("config.json",)
) -> Path:
    """The folder of a repository. what: who needs it. Raises MissingError."""
    folder = find_snapshot(hub_id, context, files)
    if folder is None:
        raise MissingError(what, [snapshot(hub_id)])
    return folder


def snapshot(hub_id: str) -> Need:
    """The need of a whole Hugging Face repository."""
    return Need(hub_id, f"huggingface.co/{hub_id}")


def digest_in_name(path: Path) -> str | None:
    """The first hexadecimal digits of the SHA-256 that a file's name ends with, as torch's model zoo
    names them ("...-6726825d.pth"); None without."""
    found = re.search(r"-([0-9a-f]{8,64})$", path.stem)
    return found[1] if found else None


def check_digest(path: Path, known: str) -> None:
    """CheckpointError unless the file's SHA-256 begins with `known`."""
    status = path.stat()
    found = _sha256(path, status.st_size, status.st_mtime_ns)
    if not found.startswith(known.lower()):
        raise CheckpointError(
            f"{path}: must have the SHA-256 {known}{'...' if len(known) < 64 else ''}, got {found}; {AGAIN}"
        )


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed: int) -> str:
    """Of gigabytes it takes seconds: once a process. size, changed: so that another file is another."""
    return sha256_of(path)


def _files(need: Need, context: HasWeights) -> Iterator[Path]:
    stem = Path(need.name).stem
    names = dict.fromkeys((need.name, *need.aliases, f"{stem}.safetensors"))
    given = context.weights
    if given is not None and given.is_file() and given.name in names:
        yield given
    for folder in (given, Path()) if given is not None else (Path(),):
        for name in names:
            yield folder / name
            if need.repository:
                yield from (place / name for place in _under(folder, need.repository))
    if need.repository:
        for name in names:
            yield from _cached_file(need.repository, name)


def _folders(hub_id: str, context: HasWeights) -> Iterator[Path]:
    if hub_id in SHIPPED:
        yield _ASSETS / hub_id
    given = context.weights
    if given is not None:
        if given.name in (hub_id.split("/")[-1], hub_id.replace("/", "--")):
            yield given
        yield from _under(given, hub_id)
        yield from _cached_folder(hub_id, given)
    yield Path(hub_id).expanduser()
    yield from _cached_folder(hub_id, None)


def _under(folder: Path, hub_id: str) -> Iterator[Path]:
    if not Path(hub_id).is_absolute():
        yield from (
            folder / hub_id.split("/")[-1],
            folder / hub_id.replace("/", "--"),
            folder / hub_id,
        )


def _is_hub_id(hub_id: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id) is not None


def _cached_file(hub_id: str, name: str) -> Iterator[Path]:
    """From the user's cache; asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, name)
    if isinstance(found, str):
        yield Path(found)


def _cached_folder(hub_id: str, cache: Path | None) -> Iterator[Path]:
    """From a cache, None for the user's: the snapshot of the branch main; asks nobody."""
    if not _is_hub_id(hub_id):
        return
    from huggingface_hub import snapshot_download

    try:
        yield Path(snapshot_download(hub_id, local_files_only=True, cache_dir=cache))
    except (OSError, ValueError):  # it is not there
        return
