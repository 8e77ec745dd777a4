"""Features on disk, found by a digest of what they were made from.

`prepare` writes, in one directory:

    features/*.safetensors   NAME.mean and NAME.std of pictures, (C, h, w); NAME of captions, (L, D)
    index-512.json           for each resolution: which sample uses which of them
    report.json              what was rejected, and why
    work/                    who does what while it is done, and with which settings

A picture's NAME is a digest of its bytes, the VAE, its bucket and how it was scaled; a caption's of
its text and the text encoder. A picture that steers another (`--control`) is a picture like any, or its
NAME is a digest of the other's and of what makes it. So nothing is computed or kept twice: not for
another resolution, not for a caption that many pictures have, not after samples were added, moved or
renamed.

A shard's name is a digest of the names in it, and its header has a checksum of each tensor, which is
compared whenever one is read. Shards of earlier versions have none, and are read as they are.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.files import MAX_INDEX, digest, parse_json, read_json, write_bytes

FORMAT = 1  # raise it when the meaning of an index changes
PROMPTS, HOLDS = "prompts.json", "prompts only"  # the index of `prompts`, and what it says it holds
OPEN_SHARDS = 64  # files held open by a reader
CHECKSUMS = "checksums"  # in a shard's header: of each tensor by name


@dataclass(frozen=True)
class Captioned:
    """A sample with features of captions: where a reader finds them, by the captions' names."""

    path: str
    captions: Mapping[str, Any]


@dataclass(frozen=True)
class Entry(Captioned):
    """A picture with features. size: of the picture, bucket: of its latents, (height, width) px.

    image, and control, of the picture that steers, None for none: where a reader finds the features.
    """

    size: tuple[int, int]
    bucket: tuple[int, int]
    image: Any
    control: Any = None


class ShardStore:
    """Tensors by name in the safetensors files of a folder, which several processes may fill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shard_of: dict[str, str] = {}
        self._seen: set[str] = set()

    def refresh(self) -> None:
        """Take notice of the files that other processes have added."""
        names = {file.name for file in self.folder.glob("*.safetensors")}
        for name in sorted(names - self._seen):
            self._note(name, Shard(self.folder / name).names)

    def shard_of(self, name: str) -> str | None:
        """The file that holds a tensor, None if none does."""
        return self._shard_of.get(name)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write a file with these. Two processes that write the same write the same file."""
        from safetensors.torch import save

        name = shard_name(tensors)
        ordered = {key: tensors[key].contiguous() for key in sorted(tensors)}
        checksums = {key: _checksum(tensor) for key, tensor in ordered.items()}
        # In one entry: safetensors writes several in another order each time.
        content = save(ordered, {CHECKSUMS: json.dumps(checksums)})
        # Flushed to the disk before a file in work/ says that the chunk is done.
        write_bytes(self.folder / name, content)
        self._note(name, tensors)

    def _note(self, shard: str, names: Any) -> None:
        self._seen.add(shard)
        for name in names:
            # Two processes may have encoded the same caption: either copy will do.
            self._shard_of.setdefault(name, shard)


class PreparedFeatures:
    """What `prepare` wrote for a resolution; without one, for the only one that there is."""

    def __init__(self, directory: Path, resolution: int | None) -> None:
        self.index_file = _find_index(directory, resolution)
        self.index = _read_index(self.index_file)
        self.entries = [
            Entry(
                *(s["path"], s["captions"], tuple(s["size"]), tuple(s["bucket"]), s["image"]),
                control=s.get("control"),
            )
            for s in self.index["samples"]
        ]
        self.scaling_factor: float | None = self.index["vae"]["scaling_factor"]
        self.control: str | None = self.index.get("control")
        self.shards = Shards(directory / "features")

    def moments(self, place: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of an entry's image or control, (C, h, w) each."""
        shard, name = place
        mean, std = (self.shards.read(shard, f"{name}.{moment}", 3) for moment in ("mean", "std"))
        if mean.shape != std.shape or (std < 0).any():
            raise _damaged(self.shards.folder / shard, f"{name}.std is no deviation of {name}.mean")
        return mean, std

    def caption(self, entry: Captioned, name: str) -> Tensor:
        """The features of a caption, (L, D)."""
        return self.shards.caption(entry, name)


class PromptFeatures:
    """What `prompts` wrote: captions without pictures."""

    def __init__(self, directory: Path) -> None:
        self.index_file = directory / PROMPTS
        self.index = read_prompts(directory)
        self.entries = [Captioned(s["path"], s["captions"]) for s in self.index["samples"]]
        self.shards = Shards(directory / "features")

    def caption(self, entry: Captioned, name: str) -> Tensor:
        """The features of a caption, (L, D)."""
        return self.shards.caption(entry, name)


class Shards:
    """The tensors of a folder of shards, of which some are held open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Data may have thousands of shards, and a process only so many open files.
        self._open: Callable[[str], Shard] = lru_cache(OPEN_SHARDS)(
            lambda shard: Shard(folder / shard)
        )

    def caption(self, entry: Captioned, name: str) -> Tensor:
        """The features of a caption, (L, D)."""
        shard, tensor = entry.captions[name]
        return self.read(shard, tensor, 2)

    def read(self, shard: str, name: str, dimensions: int) -> Tensor:
        """A tensor of so many dimensions. ValueError for what is damaged, or no such tensor."""
        tensor = self._open(shard).read(name)
        if tensor.ndim != dimensions or not tensor.isfinite().all():
            raise _damaged(self.folder / shard, f"{name} is not finite, or has no such shape")
        return tensor


class Shard:
    """A safetensors file, of which nothing is read yet but its header. ValueError, which names it, if it is
    damaged or gone."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self.names = set(self._file.keys())
            stated = (self._file.metadata() or {}).get(CHECKSUMS)
            self._checksums = None if stated is None else parse_json(stated, CHECKSUMS)
        except (OSError, SafetensorError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        if self.has_checksums and (
            not isinstance(self._checksums, dict) or self.names != self._checksums.keys()
        ):
            raise _damaged(path, "its checksums are of other tensors")

    @property
    def has_checksums(self) -> bool:
        return self._checksums is not None

    def read(self, name: str) -> Tensor:
        """A tensor, compared with its checksum."""
        from safetensors import SafetensorError

        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.path, str(error)) from error
        if self._checksums is not None and self._checksums[name] != _checksum(tensor):
            raise _damaged(self.path, f"{name} is not what was written")
        return tensor


def shard_name(names: Iterable[str]) -> str:
    """The file that tensors of these names are written to."""
    return f"{digest(' '.join(sorted(names)).encode())}.safetensors"


def _checksum(tensor: Tensor) -> str:
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _damaged(path: Path, reason: str) -> ValueError:
    directory = path.parent.parent
    way_out = (
        "delete it and run `pixart data prompts` again"
        if holds_prompts(directory)
        else f"`pixart data verify {directory}` makes it again"
    )
    return ValueError(f"{path} cannot be read ({reason}); {way_out}")


def indices_of(directory: Path) -> dict[int, dict[str, Any]]:
    """The indexes of a folder that `prepare` filled, by resolution. Raises ValueError for damaged ones."""
    found = (
        re.fullmatch(r"index-(\d{1,9})\.json", file.name) for file in directory.glob("index-*")
    )
    resolutions = sorted(int(match[1]) for match in found if match)
    return {number: _read_index(directory / f"index-{number}.json") for number in resolutions}


def places_of(index: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(shard, tensor) of everything that an index needs."""
    for sample in index["samples"]:
        yield from features_of(sample)


def features_of(sample: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(shard, tensor) of everything that an index's sample needs."""
    for kind in ("image", "control"):
        if kind in sample:
            shard, name = sample[kind]
            yield from ((shard, f"{name}.mean"), (shard, f"{name}.std"))
    yield from ((shard, name) for shard, name in sample["captions"].values())


def holds_prompts(directory: Path) -> bool:
    """Whether a folder is one that `prompts` fills: it has no pictures."""
    return (directory / PROMPTS).is_file()


def refuse_prompts(directory: Path, way_out: str) -> None:
    """ValueError, in one line, for a folder that `prompts` filled. way_out: what to do instead."""
    if holds_prompts(directory):
        raise ValueError(
            f"{directory} holds {HOLDS} (`pixart data prompts` made it), there are no pictures; {way_out}"
        )


def read_prompts(directory: Path) -> dict[str, Any]:
    """The index of a folder that `prompts` filled. Raises ValueError for a damaged one."""
    return _read(directory / PROMPTS, _check_prompts, "run `pixart data prompts` again")


def _find_index(directory: Path, resolution: int | None) -> Path:
    refuse_prompts(directory, "`pixart data prepare` encodes pictures")
    if resolution is not None:
        file = directory / f"index-{resolution}.json"
        if not file.is_file():
            raise ValueError(f"{directory} must be prepared at {resolution} px, {_held(directory)}")
        return file
    files = sorted(directory.glob("index-*.json"))
    if len(files) != 1:
        wanted = "name a resolution" if files else "run prepare to its end first"
        raise ValueError(f"{directory} must hold one index, {_held(directory)}; {wanted}")
    return files[0]


def _held(directory: Path) -> str:
    names = ", ".join(file.name for file in sorted(directory.glob("index-*.json")))
    return f"it holds {names or 'none'}"


def _read_index(file: Path) -> dict[str, Any]:
    return _read(file, _check_index, "run prepare again")


def _read(file: Path, check: Callable[[Mapping[str, Any]], None], way_out: str) -> dict[str, Any]:
    try:
        index = read_json(file, MAX_INDEX)
    except ValueError as error:
        raise ValueError(f"{error}; {way_out}") from error
    if index.get("format") != FORMAT:
        raise ValueError(f"{file} must have format {FORMAT}; {way_out}")
    try:
        check(index)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); {way_out}"
        ) from error
    return index


def _check_index(index: Mapping[str, Any]) -> None:
    """Raises one of several errors over what no reader can use."""
    factor = index["vae"]["scaling_factor"]
    if factor is not None and not 0 < float(factor) < math.inf:
        raise ValueError(f"scaling_factor must be positive, got {factor}")
    if not isinstance(index.get("control", ""), str):
        raise ValueError(f"control must be text, got {index['control']!r}")
    _check_captions(index)
    for sample in index["samples"]:
        for height, width in (sample["size"], sample["bucket"]):
            if not (0 < int(height) < 2**20 and 0 < int(width) < 2**20):
                raise ValueError(f"a size must be in pixels, got {height}, {width}")
        if "image" not in sample or ("control" in sample) != ("control" in index):
            raise ValueError("a sample must have an image, and a control where all have")


def _check_prompts(index: Mapping[str, Any]) -> None:
    """The same of the index of prompts."""
    if index["holds"] != HOLDS:
        raise ValueError(f"it must hold {HOLDS}, got {index['holds']!r}")
    _check_captions(index)


def _check_captions(index: Mapping[str, Any]) -> None:
    for sample in index["samples"]:
        if not isinstance(sample["path"], str) or not sample["captions"]:
            raise ValueError("a sample must have a path and captions")
    for shard, name in places_of(index):
        # An index may come from anywhere: it must not lead out of its folder.
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard) or not _is_name(name):
            raise ValueError(f"shards must be files of the folder features, got {shard!r}")


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.isprintable()  # a lone surrogate is no UTF-8
