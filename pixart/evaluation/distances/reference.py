"""Files of statistics: what is kept of a set of real pictures, so that they are needed once.

An `.npz` has of each extractor `mu` (d,), `sigma` (d, d), `n`, `extractor` ("NAME-DIGEST") and, if they are
kept, `features` (n, d) and their `keys`; with several extractors, each name behind "NAME-DIGEST/". Files of
pytorch-fid and clean-fid are read too: `mu` and `sigma`, or `feats`, which do not say what they are of.
No array of a file is read before its head has been looked at.
"""

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from pixart.evaluation.distances import RunningMoments
from pixart.evaluation.metric import Extractor, Features, Moments
from pixart.evaluation.running.computing import extracting
from pixart.evaluation.store.entries import Entry
from pixart.evaluation.store.folders import reference_pictures
from pixart.files import AGAIN, printable, written_aside
from pixart.pictures import PictureError
from pixart.progress import Bar

MAX_WIDTH = 2**14  # features; a covariance has 2 GB then
MAX_FEATURES = 2**34  # bytes
_MAX_LETTERS = 4096  # of a name or a key
_MAX_RATIO = 100  # of an array to its compressed bytes: covariances have 1.1, bombs 1,000
_BATCH = 32  # pictures
_DAMAGED = (
    ValueError, RuntimeError, NotImplementedError, EOFError, OSError, LookupError, TypeError,
    SyntaxError, OverflowError, MemoryError, zipfile.BadZipFile, zlib.error, struct.error,
    tokenize.TokenError,
)  # fmt: skip


class StatisticsError(ValueError):
    """A file of statistics that cannot be used: one line with its name, the reason and the way out."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(printable(f"{path}: {reason}"))


def write_statistics(
    folder: Path, extractors: Sequence[Extractor], output: Path, *, keep_features: bool = False
) -> int:
    """Write to the file `output` what every extractor makes of all pictures of a folder; returns how many
    there are. keep_features: for KID, CMMD, precision and recall; n x d x 4 bytes more. PictureError
    for one that cannot be read, ValueError for fewer than two, or an extractor of several rows a picture.
    """
    if not extractors:
        raise ValueError("extractors must be at least one, got none")
    entries = reference_pictures(folder).entries
    if len(entries) < 2:
        raise ValueError(f"{folder}: must hold at least 2 pictures, got {len(entries)}")
    arrays: dict[str, np.ndarray] = {}
    for extractor in extractors:
        if extractor.rows != 1:
            raise ValueError(
                f"{extractor.name} has {extractor.rows} rows a picture, for which there are no files of "
                "statistics; compare with the folder of pictures itself"
            )
        identity = _identity(extractor)
        prefix = f"{identity}/" if len(extractors) > 1 else ""
        running, features = RunningMoments(), []
        for rows in _batches(extractor, entries):
            running.add(rows)
            features += [rows] if keep_features else []
        extractor.release()
        moments = running.moments()
        arrays |= {
            f"{prefix}mu": moments.mean,
            f"{prefix}sigma": moments.covariance,
            f"{prefix}n": np.array(running.n),
            f"{prefix}extractor": np.array(identity),
        }
        if keep_features:
            arrays[f"{prefix}features"] = np.concatenate(features)
            arrays[f"{prefix}keys"] = np.array([entry.key for entry in entries])
    with written_aside(output) as aside, aside.open("wb") as file:
        # Typed for names of arguments: names with "/" are names of files in the archive.
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return len(entries)


def read_statistics(path: Path) -> dict[str, Moments]:
    """Moments by extractor, "NAME-DIGEST"; by "" where the file does not say. StatisticsError for a file
    that is damaged, hostile or of something else."""
    with _opened(path) as archive:
        return {
            key: Moments(*_moments(archive, prefix), key or None)
            for prefix, key in archive.sets.items()
        }


def statistics_for(path: Path, extractor: Extractor) -> Features | Moments:
    """What the file has of an extractor's features: the features if they are kept, else their moments.
    StatisticsError where it has those of another network, digest or resize, and says so; and where
    they have another width."""
    wanted = _identity(extractor)
    with _opened(path) as archive:
        places = {key: prefix for prefix, key in archive.sets.items()}
        if wanted not in places and "" not in places:
            raise StatisticsError(path, _refusal(wanted, extractor.name, list(places)))
        prefix = places.get(wanted, places.get("", ""))
        found = _features(archive, prefix)
        width = found.values.shape[1] if found else len(archive.read(f"{prefix}mu"))
        if width != extractor.width:
            raise StatisticsError(
                path, f"features must be {extractor.width} wide for {extractor.name}, got {width}"
            )
        return found or Moments(*_moments(archive, prefix), archive.sets[prefix] or None)


def _refusal(wanted: str, name: str, have: list[str]) -> str:
    same = [key for key in have if key.rpartition("-")[0] == name]
    why = (
        "other weights or another way of preparing pictures"
        if same
        else "features of different networks or resizes cannot be compared"
    )
    return (
        f"must be of {wanted}, it is of {', '.join(have)}: {why}; make one with pixart evaluate "
        "statistics"
    )


def _identity(extractor: Extractor) -> str:
    return f"{extractor.name}-{extractor.digest}"


def _batches(extractor: Extractor, entries: Sequence[Entry]) -> Iterator[np.ndarray]:
    """Rows (n, d), in order. PictureError for the first picture that has none."""
    cuts = (list(entries[k : k + _BATCH]) for k in range(0, len(entries), _BATCH))
    with Bar(extractor.name, len(entries)) as bar:
        for found in extracting(extractor)(cuts):
            for one in found:
                if isinstance(one, PictureError):
                    raise one
            yield np.stack(found)
            bar.advance(len(found))


class _Archive:
    """sets: prefix of the names -> "NAME-DIGEST", "" where it is not said."""

    def __init__(self, path: Path, file: zipfile.ZipFile, arrays: Any) -> None:
        self.path, self._file, self._arrays = path, file, arrays
        self.names = {name.removesuffix(".npy") for name in file.namelist()}
        ends = ("mu", "feats", "features")
        prefixes = {
            name.removesuffix(end)
            for name in self.names
            for end in ends
            if name == end or name.endswith(f"/{end}")
        }
        if not prefixes:
            names = ", ".join(sorted(self.names)[:5])
            raise StatisticsError(
                path, f"must have mu and sigma, or feats, it has {names or 'nothing'}"
            )
        self.sets = {prefix: self._said(prefix) for prefix in sorted(prefixes)}

    def _said(self, prefix: str) -> str:
        name = f"{prefix}extractor"
        return str(self.read(name, "U")) if name in self.names else prefix.removesuffix("/")

    def read(self, name: str, kinds: str = "f") -> np.ndarray:
        """An array of one of these kinds, whose head is sound."""
        if name not in self.names:
            raise StatisticsError(self.path, f"must have {name}, it is not there")
        info = self._file.getinfo(f"{name}.npy")
        with self._file.open(info) as file:
            shape, dtype = _head(file)
            start = file.tell()
        size = math.prod(shape) * dtype.itemsize
        letters = dtype.itemsize // 4 if dtype.kind == "U" else 0
        if dtype.kind not in kinds or dtype.itemsize > 8 and not letters or letters > _MAX_LETTERS:
            raise StatisticsError(self.path, f"{name} must be of kind {kinds!r}, got {dtype}")
        if info.file_size != start + size:
            raise StatisticsError(
                self.path,
                f"{name} must have {start + size:,} bytes, it has {info.file_size:,}; {AGAIN}",
            )
        if size > MAX_FEATURES or size > _MAX_RATIO * info.compress_size + 2**20:
            raise StatisticsError(
                self.path, f"{name} claims {size:,} bytes from {info.compress_size:,}, too many"
            )
        found: np.ndarray = self._arrays[name]
        if found.shape != shape or found.dtype != dtype:
            raise StatisticsError(self.path, f"{name} is there twice; {AGAIN}")
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise StatisticsError(self.path, f"{name} must be finite, it is not; {AGAIN}")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        with self._file.open(self._file.getinfo(f"{name}.npy")) as file:
            return _head(file)[0]


def _head(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"an array is of format {version}")
    shape, _, dtype = readers[version](file)
    return shape, dtype


@contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    """StatisticsError for whatever goes wrong inside."""
    try:
        with (
            path.open("rb") as file,
            zipfile.ZipFile(file) as archive,
            np.load(path, allow_pickle=False) as arrays,
        ):
            yield _Archive(path, archive, arrays)
    except StatisticsError:
        raise
    except FileNotFoundError as error:
        raise StatisticsError(path, "no such file of statistics") from error
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StatisticsError(path, f"cannot be read as an .npz ({reason}); {AGAIN}") from error


def _moments(archive: _Archive, prefix: str) -> tuple[np.ndarray, np.ndarray, int | None]:
    """(mean, covariance, n) of a set; of its features where it has nothing else."""
    if f"{prefix}mu" not in archive.names:
        features = _features(archive, prefix)
        assert features is not None
        running = RunningMoments()
        running.add(features.values)
        found = running.moments()
        return found.mean, found.covariance, found.n
    mu = f"{prefix}mu"
    if f"{prefix}sigma" not in archive.names:
        raise StatisticsError(archive.path, f"must have {prefix}sigma beside {mu}, it is not there")
    shape, square = archive.shape(mu), archive.shape(f"{prefix}sigma")
    if len(shape) != 1 or not 1 <= shape[0] <= MAX_WIDTH or square != shape * 2:
        raise StatisticsError(
            archive.path,
            f"mu must be (d,) and sigma (d, d), d at most {MAX_WIDTH:,}, got {shape} and {square}",
        )
    mean = archive.read(mu).astype(np.float64)
    covariance = archive.read(f"{prefix}sigma").astype(np.float64)
    _check_covariance(archive.path, covariance)
    return mean, (covariance + covariance.T) / 2, _count(archive, prefix)


def _check_covariance(path: Path, covariance: np.ndarray) -> None:
    """No more than what rounding to fp32 leaves."""
    diagonal = covariance.diagonal()
    most = float(np.abs(diagonal).max())
    deviations = np.sqrt(diagonal.clip(min=0))
    bounds = np.outer(deviations, deviations)
    if (
        diagonal.min() < -1e-6 * most
        or np.abs(covariance - covariance.T).max() > 1e-4 * most
        or (np.abs(covariance) > 1.001 * bounds + 1e-4 * most).any()
    ):
        raise StatisticsError(path, f"sigma must be a covariance, it is not; {AGAIN}")


def _count(archive: _Archive, prefix: str) -> int | None:
    if f"{prefix}n" not in archive.names:
        return None
    n = archive.read(f"{prefix}n", "iu")
    if n.shape != () or not 2 <= int(n) < 2**40:
        raise StatisticsError(archive.path, f"n must be a number of pictures, got {n.shape}")
    return int(n)


def _features(archive: _Archive, prefix: str) -> Features | None:
    name = next(
        (f"{prefix}{end}" for end in ("features", "feats") if f"{prefix}{end}" in archive.names),
        None,
    )
    if name is None:
        return None
    shape = archive.shape(name)
    if len(shape) != 2 or shape[0] < 2 or not 1 <= shape[1] <= MAX_WIDTH:
        raise StatisticsError(
            archive.path, f"{name} must be (n, d), d at most {MAX_WIDTH:,}, got {shape}"
        )
    values = archive.read(name).astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise StatisticsError(archive.path, f"{name} must be finite in fp32, it is not")
    if f"{prefix}keys" not in archive.names:
        return Features([f"{row:08d}" for row in range(len(values))], values)
    keys = archive.read(f"{prefix}keys", "U")
    if keys.shape != shape[:1]:
        raise StatisticsError(archive.path, f"keys must be ({shape[0]},), got {keys.shape}")
    return Features([str(key) for key in keys], values)
