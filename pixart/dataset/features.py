"""Features on disk, found by a digest of what they were made from.

`prepare` writes, in one directory:

    features/*.safetensors   NAME.mean and NAME.std of pictures, (C, h, w); NAME of captions, (L, D)
    index-512.json           for each resolution: which sample uses which of them
    report.json              what was rejected, and why
    work/                    who does what while it is done

A picture's NAME is a digest of its bytes, the VAE, its bucket and how it was scaled; a caption's of
its text and the text encoder. So nothing is computed or kept twice: not for another resolution, not
for a caption that many pictures have, not after samples were added, moved or renamed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from pixart.files import MAX_INDEX, digest, read_json, write_bytes

FORMAT = 1  # raise it when the meaning of an index changes
OPEN_SHARDS = 64  # files held open by a reader


@dataclass(frozen=True)
class Entry:
    """A sample with features. size: of the picture, bucket: of its latents, (height, width) px.

    image and captions (by name): where a reader finds the features.
    """

    path: str
    size: tuple[int, int]
    bucket: tuple[int, int]
    image: Any
    captions: Mapping[str, Any]


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
            with open_shard(self.folder / name) as file:
                self._note(name, file.keys())

    def shard_of(self, name: str) -> str | None:
        """The file that holds a tensor, None if none does."""
        return self._shard_of.get(name)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write a file with these. Two processes that write the same write the same file."""
        from safetensors.torch import save

        name = f"{digest(' '.join(sorted(tensors)).encode())}.safetensors"
        content = save({key: tensors[key].contiguous() for key in sorted(tensors)})
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
        self.entries, self.scaling_factor = _contents(self.index_file, self.index)
        folder = directory / "features"
        # Data may have thousands of shards, and a process only so many open files.
        self._open: Callable[[str], Any] = lru_cache(OPEN_SHARDS)(
            lambda shard: open_shard(folder / shard)
        )

    def moments(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, (C, h, w) each."""
        shard, name = entry.image
        return self._tensor(shard, f"{name}.mean"), self._tensor(shard, f"{name}.std")

    def caption(self, entry: Entry, name: str) -> Tensor:
        """The features of a caption, (L, D)."""
        return self._tensor(*entry.captions[name])

    def _tensor(self, shard: str, name: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            return self._open(shard).get_tensor(name)
        except SafetensorError as error:
            raise _damaged(self.index_file.parent / "features" / shard, error) from error


def open_shard(path: Path) -> Any:
    """A safetensors file, not read yet. Raises ValueError if it is damaged or gone."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read ({error}); delete it and run prepare again")


def _find_index(directory: Path, resolution: int | None) -> Path:
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
    try:
        index = read_json(file, MAX_INDEX)
    except ValueError as error:
        raise ValueError(f"{error}; run prepare again") from error
    if index.get("format") != FORMAT:
        raise ValueError(f"{file} must have format {FORMAT}; run prepare again")
    return index


def _contents(file: Path, index: Mapping[str, Any]) -> tuple[list[Entry], float | None]:
    """The samples of an index and its VAE's scaling factor. ValueError says where it is damaged."""
    samples, vae = index.get("samples"), index.get("vae")
    factor = vae.get("scaling_factor", "none") if isinstance(vae, dict) else "none"
    if not isinstance(samples, list) or not (factor is None or _is_number(factor)):
        what = "vae.scaling_factor" if isinstance(samples, list) else "samples"
        raise ValueError(f"{file}: {what} is damaged; run prepare again")
    entries = []
    for number, sample in enumerate(samples):
        if (entry := _entry(sample)) is None:
            raise ValueError(f"{file}: samples[{number}] is damaged; run prepare again")
        entries.append(entry)
    return entries, factor


def _entry(sample: Any) -> Entry | None:
    """None for one that prepare would not have written."""
    if not isinstance(sample, dict) or not isinstance(sample.get("path"), str):
        return None
    size, bucket, image, captions = map(sample.get, ("size", "bucket", "image", "captions"))
    if not (
        _is_size(size) and _is_size(bucket) and _is_place(image) and isinstance(captions, dict)
    ):
        return None
    if not all(map(_is_place, captions.values())):
        return None
    return Entry(sample["path"], tuple(size), tuple(bucket), image, captions)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return _is_list(value, int) and min(value) > 0


def _is_place(value: Any) -> bool:
    """A shard, in the folder of features and nowhere else, and a name in it."""
    if not _is_list(value, str) or value[0] != Path(value[0]).name:
        return False
    return all(part.isascii() and part.isprintable() for part in value)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and [type(part) for part in value] == [kind, kind]
