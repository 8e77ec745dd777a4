"""The work on a source, cut into chunks that any number of processes share.

Each takes the chunks that no other has taken, and all end when everything is done. A chunk that is done is a
file in work/, named by a digest of its items and of what encodes them, so that the same command does again only
what was not finished, or what has changed since.

On a Ray cluster one process lists the chunks and its workers do them, with the same claims. A feature that two
chunks share is then encoded with the first of them, as it is without: the second waits for it.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from pixart.dataset.features import ShardStore, features_of
from pixart.dataset.parts import Part, read_part, write_part
from pixart.dataset.samples import Item, Prompt, Rejected, Sample
from pixart.files import check_writable, digest
from pixart.locks import claimed, occupied
from pixart.progress import Bar, counted

PATIENCE = 30.0  # seconds that a chunk waits for another at which nobody is
APPEARING = 60.0  # seconds in which a shared disk shows what another machine has written
_LOOK = 0.1  # seconds between two looks


@dataclass(frozen=True)
class Chunk:
    """Items that are done together, and the file in work/ that tells of it afterwards. sharing, alike:
    files of earlier chunks that may not be done yet, which have a caption, or a picture, that this one has."""

    items: Sequence[Any]
    file: str
    sharing: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()


# Does chunks, and gives the files of those that are done.
Work = Callable[[Iterable[Chunk]], Iterator[str]]


class Encodes(Protocol):
    """What makes features of items; nobody else needs to know of what kind they are."""

    store: ShardStore

    def made_by(self) -> list[Any]:
        """All that features depend on, short of the items."""

    def encode(
        self,
        chunk: Sequence[Any],
        *,
        before_captions: Callable[[], None] = ...,
        before_writing: Callable[[], None] = ...,
    ) -> Part:
        """What becomes of each item; what is new of it lies in the store afterwards. The calls wait for what
        others add to the store."""

    def into(self, store: ShardStore) -> "Encodes":
        """The same for another store."""


class Chunks:
    """The features of a source in `directory`; see the module. size: items that are done together. name: of
    the work, among those that a directory can have. conflict: what another is at that refuses this one.
    Whoever inherits from it writes in `finish` what readers look for."""

    label = "prepare"  # of the progress that is shown
    at_once = 1  # items that may be encoded in one pass

    def __init__(
        self, directory: Path, encoding: Encodes, size: int, name: str, conflict: str
    ) -> None:
        self.directory, self.encoding, self.size = directory, encoding, size
        self.store = encoding.store
        self.name, self._conflict = name, conflict
        self.work = directory / "work"
        self.report = directory / "report.json"

    def takes_together(self) -> bool:
        """Whether items are encoded in one pass, which takes hardly longer than one item does."""
        return False

    def finish(self, parts: list[str]) -> dict[str, Any]:
        """Write what tells of all chunks, by the names of their files. Returns a report. ValueError where there
        are none."""
        raise NotImplementedError

    def run(
        self,
        source: Callable[[], Iterable[Any]],
        origin: str = "",
        workers: Callable[[Path], Work] | None = None,
    ) -> dict[str, Any]:
        """Encode what `source()` gives, which is called again if other processes are at work. origin:
        what it reads and how, the same in processes that share the work. workers: who does the chunks, if
        it is not this process, in any order; given a file in `work` that none but this process has
        written.

        Returns what `finish` does. Raises ValueError if there is nothing in the source, and
        Occupied while another process does something else under this name: an index would
        be written over the other.
        """
        what = json.dumps([*self.made_by(), origin], sort_keys=True)
        shared = digest(what.encode())
        with occupied(self.work / self.name, self._conflict, shared=shared) as claim:
            elsewhere = workers and workers(claim)
            parts = self._run_in(elsewhere, source()) if elsewhere else self._run_here(source)
            return self.finish(parts)

    def merged(self, parts: Iterable[str]) -> Part:
        """What became of all chunks."""
        merged = Part()
        for name in parts:
            part = read_part(self.work / name)
            if part is None:
                raise RuntimeError(f"{self.work / name} was damaged meanwhile; run it again")
            merged.samples += part.samples
            merged.rejected += part.rejected
            merged.notes += part.notes
        return merged

    def parts(self, source: Iterable[Any]) -> list[str]:
        """The names of the chunks' files: they change with the samples, and with what encodes them."""
        return [chunk.file for chunk in self.chunks(source)]

    def chunks(self, source: Iterable[Any]) -> Iterator[Chunk]:
        """What is to be done for a source, as it is listed."""
        iterator = iter(source)
        while items := list(islice(iterator, self.size)):
            # Named by all that the chunk's features depend on, short of the bytes of pictures.
            content = [_told(item) for item in items]
            key = json.dumps([*self.made_by(), content], sort_keys=True)
            yield Chunk(items, f"{digest(key.encode())}.json")

    def made_by(self) -> list[Any]:
        """All that features depend on, short of the items."""
        return self.encoding.made_by()

    def _run_here(self, source: Callable[[], Iterable[Any]]) -> list[str]:
        # First what nobody has begun; then wait for what others are doing. Where one of them dies
        # its lock opens, and the chunk is done here.
        parts: list[str] = []
        for wait in (False, True):
            parts = []
            for chunk in self.chunks(counted(source(), self.label)):
                parts.append(chunk.file)
                self.do(chunk, wait=wait)
            if all((self.work / part).exists() for part in parts):
                break
        return parts

    def _run_in(self, work: Work, source: Iterable[Any]) -> list[str]:
        """The same in workers, which see the same disk."""
        parts: list[str] = []
        begun, given = _Begun(), set[str]()

        def todo() -> Iterator[Chunk]:
            for chunk in self.chunks(source):
                parts.append(chunk.file)
                # A source may list the same again; that would wait for itself.
                if chunk.file not in given and not self.is_done(chunk.file):
                    given.add(chunk.file)
                    yield begun.add(chunk)

        with Bar(self.label) as bar:
            for file in work(todo()):
                bar.advance(begun.remove(file))
        over = time.monotonic() + APPEARING
        while time.monotonic() < over and not all((self.work / part).exists() for part in parts):
            time.sleep(_LOOK)
        return parts

    def do(self, chunk: Chunk, *, wait: bool = True) -> None:
        """Encode a chunk and write its file, unless it is done. wait: for another process that is at it,
        or leave it to that."""
        if self.is_done(chunk.file):
            return
        file = self.work / chunk.file
        lock = file.with_suffix(".lock")
        with claimed(lock, wait=wait) as mine:
            # Asked again: it may have been done while this process waited for the lock.
            if mine and not self.is_done(chunk.file):
                # Others may have encoded captions that this chunk shares.
                self.store.refresh()
                part = self.encoding.encode(
                    chunk.items,
                    before_captions=lambda: self._await(chunk.sharing),
                    before_writing=lambda: self._await(chunk.alike),
                )
                write_part(file, part)
        if mine:
            # Safe although others may hold the removed file locked and a new one at the same time:
            # both find the chunk done. Windows removes no file that is open elsewhere.
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)

    def _await(self, files: Sequence[str]) -> None:
        """Wait for chunks that others do, and take notice of what they have written; without end while one
        is at them, and for PATIENCE while none is: its worker may be gone, or not there yet."""
        for name in files:
            file = self.work / name
            over = time.monotonic() + PATIENCE
            while not file.exists() and time.monotonic() < over:
                if _is_claimed(file.with_suffix(".lock")):
                    over = time.monotonic() + PATIENCE
                time.sleep(_LOOK)
        if files:
            self.store.refresh()

    def is_done(self, name: str) -> bool:
        """Whether a chunk was prepared, and nobody has deleted its features since."""
        return self.part(name) is not None

    def part(self, name: str) -> Part | None:
        """What became of a chunk that is done."""
        part = read_part(self.work / name)
        if part is None:
            return None
        shards = {shard for sample in part.samples for shard, _ in features_of(sample)}
        is_whole = all((self.store.folder / shard).exists() for shard in shards)
        return part if is_whole else None


def _told(item: Item | Prompt) -> list[Any]:
    """What tells an item from others, short of the pictures' bytes."""
    if isinstance(item, Rejected):
        return [asdict(item)]
    if isinstance(item, Prompt):
        return [item.path, dict(item.captions)]
    told = [item.path, item.version, dict(item.captions), item.uncaptioned]
    return told if item.control is None else [*told, item.control.path, item.control.version]


class _Begun:
    """Chunks that may not be done yet, by what they have that others may have too."""

    def __init__(self) -> None:
        self._texts: dict[str, set[str]] = {}
        self._pictures: dict[str, set[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, chunk: Chunk) -> Chunk:
        """The chunk, with those of before that it is to wait for."""
        used = [item for item in chunk.items if not isinstance(item, Rejected)]
        texts = {text for item in used for text in item.captions.values()}
        samples = [item for item in used if isinstance(item, Sample)]
        files = [file for one in samples for file in (one, one.control) if file is not None]
        # A digest of its bytes, or its size and its time, of which copies share the first.
        pictures = {file.version.partition("-")[0] for file in files}
        sharing = tuple(file for file, those in self._texts.items() if those & texts)
        alike = tuple(file for file, those in self._pictures.items() if those & pictures)
        self._texts[chunk.file], self._pictures[chunk.file] = texts, pictures
        self._counts[chunk.file] = len(chunk.items)
        return replace(chunk, sharing=sharing, alike=alike)

    def remove(self, file: str) -> int:
        """It is done. Returns of how many samples it is."""
        del self._texts[file], self._pictures[file]
        return self._counts.pop(file)


def _is_claimed(lock: Path) -> bool:
    """Asked without making the lock."""
    if not lock.exists():
        return False
    with claimed(lock, wait=False) as is_open:
        return not is_open


def open_chunk_worker(
    open_chunks: Callable[[], Chunks], output: Path, model: str, made_by: list[Any], claim: Path
) -> Work:
    """What does chunks in a process of any machine. model: the name of what encodes them. made_by: as the process
    that lists them has it. claim: a file that it has written in the output. ValueError where one of them is
    another here."""
    host = socket.gethostname()
    if not claim.exists():
        raise ValueError(
            f"output must be seen by all machines, {host} does not see {output} as the first one "
            "does; name a folder on a shared disk"
        )
    check_writable(output / "features" / "new")
    chunks = open_chunks()
    if chunks.made_by() != made_by:
        raise ValueError(
            f"model must be the same on all machines, {host} has other weights as {model}; name a "
            "folder on a shared disk"
        )

    def work(given: Iterable[Chunk]) -> Iterator[str]:
        for chunk in given:
            chunks.do(chunk)
            yield chunk.file

    return work
