"""`verify`: which shards of a folder that `prepare` filled are damaged, and making them again.

A damaged shard is set aside, and what it held is encoded again by the command that encoded it, from the
same samples in the same order. Where the source is gone or has changed, or an earlier version wrote
the folder, the shard stays where it is and is named: an index never loses samples by this.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pixart.addresses import without_secrets
from pixart.dataset.features import (
    Shard,
    holds_prompts,
    indices_of,
    places_of,
    read_prompts,
    shard_name,
)
from pixart.dataset.options import Prepare
from pixart.dataset.parts import read_checked, write_checked
from pixart.files import listed, printable
from pixart.progress import counted

ASIDE = ".damaged"  # behind the name of a shard while it is made again

# Options that say where and how a run goes, and not what it makes: the folder may move, and to another
# machine. `workers` was kept by earlier versions.
_OF_A_RUN = {"output", "device", "workers", "engine", "address", "dry_run", "json"}
_BY_HAND = "delete the damaged shards and run prepare again"

# Prepares a resolution again: of what there is nothing that it needs, it encodes.
Remake = Callable[[int], None]


@dataclass
class Verified:
    """shards: how many there are. unchecked: those without checksums. damaged: what is wrong, by name
    of the shard; remade: those of them that are made again; unused: those that no index needed, and that
    are removed. kept: why others were not made again, by resolution."""

    shards: int = 0
    unchecked: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    remade: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    kept: dict[int, str] = field(default_factory=dict)

    @property
    def remaining(self) -> list[str]:
        return sorted(self.damaged.keys() - {*self.remade, *self.unused})

    @property
    def is_whole(self) -> bool:
        return not self.remaining and not self.kept

    def to_dict(self) -> dict[str, Any]:
        """All of it, for --json."""
        return {**asdict(self), "remaining": self.remaining}

    def complaint(self) -> str:
        """What stays damaged, and why."""
        reasons = [f"at {resolution} px {reason}" for resolution, reason in self.kept.items()]
        named = [f"damaged shards stay: {listed(self.remaining)}"] if self.remaining else []
        return "; ".join([*named, *reasons])

    def summary(self) -> str:
        """A sentence on what was found and done."""
        parts = [f"{self.shards} shards", f"{len(self.damaged)} damaged"]
        parts += [f"{len(self.remade)} made again"] if self.remade else []
        parts += [f"{len(self.unused)} removed that no index needs"] if self.unused else []
        lines = [", ".join(parts)]
        lines += [printable(f"{name}: {reason}") for name, reason in sorted(self.damaged.items())]
        if self.unchecked:
            lines.append(
                f"{self.unchecked} shards are of an earlier version and have no checksums: only their "
                "form was checked"
            )
        return "\n".join(lines)


def check_shards(directory: Path, remake: Remake) -> Verified:
    """Check every shard, and what the indexes need of them; make damaged ones again, but those of prompts.
    Raises ValueError for what is no prepared folder."""
    folder = directory / "features"
    indices = indices_of(directory)
    prompts = [read_prompts(directory)] if holds_prompts(directory) else []
    if not folder.is_dir() or not (indices or prompts):
        raise ValueError(
            f"{directory} must be a folder that `pixart data prepare` filled, it is none"
        )
    needed = _needed([*indices.values(), *prompts])
    found = Verified()
    there = {file.name for file in folder.glob("*.safetensors")}
    for name in counted(sorted(there | needed.keys()), "verify"):
        _check(folder / name, needed.get(name, set()), found)
    if found.damaged and not prompts:
        with _set_aside(directory, found.damaged):
            _make_again(directory, indices, found, remake)
        needed_now = _needed(indices_of(directory).values())
        for name in found.damaged:
            still = Verified()
            if name in needed_now or (folder / name).exists():
                _check(folder / name, needed_now.get(name, set()), still)
            if not still.damaged:
                # Under its own name, or under that of another: captions that two share go to the first.
                (found.remade if name in needed else found.unused).append(name)
    return found


def _check(path: Path, needed: set[str], found: Verified) -> None:
    """Count a shard, and note what is wrong with it."""
    found.shards += 1
    try:
        shard = Shard(path)
        lacking = needed - shard.names
        if lacking:
            raise ValueError(f"it lacks {sorted(lacking)[0]}")
        if path.name != shard_name(shard.names) and shard.has_checksums:
            raise ValueError("it holds what belongs to another")
        for name in shard.names:
            shard.read(name)
        found.unchecked += not shard.has_checksums
    except ValueError as error:
        found.damaged[path.name] = _reason(path, error)


def _reason(path: Path, error: ValueError) -> str:
    if not path.exists():
        return "it is not there"
    inner = str(error)
    prefix = f"{path} cannot be read ("
    return inner.removeprefix(prefix).rpartition("); ")[0] if inner.startswith(prefix) else inner


@contextlib.contextmanager
def _set_aside(directory: Path, damaged: Iterable[str]) -> Iterator[None]:
    """Take damaged shards out of the way. Those that nothing has taken the place of come back, unless
    nothing needs them."""
    folder = directory / "features"
    aside = {folder / name: folder / f"{name}{ASIDE}" for name in damaged}
    for path, place in aside.items():
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, place)
    try:
        yield
    finally:
        needed = _needed(indices_of(directory).values())
        for path, place in aside.items():
            if path.exists() or path.name not in needed:
                place.unlink(missing_ok=True)
            elif place.exists():
                os.replace(place, path)


def _make_again(
    directory: Path, indices: Mapping[int, Mapping[str, Any]], found: Verified, remake: Remake
) -> None:
    for resolution, index in indices.items():
        if found.damaged.keys() & {shard for shard, _ in places_of(index)}:
            try:
                remake(resolution)
                lost = len(index["samples"]) - len(indices_of(directory)[resolution]["samples"])
                if lost:
                    raise ValueError(f"{lost} samples cannot be used any more: see report.json")
            except (ValueError, OSError) as error:
                found.kept[resolution] = str(error)


def _needed(indices: Iterable[Mapping[str, Any]]) -> dict[str, set[str]]:
    """The tensors that indexes need of each shard."""
    needed: dict[str, set[str]] = {}
    for index in indices:
        for shard, name in places_of(index):
            needed.setdefault(shard, set()).add(name)
    return needed


def write_settings(options: Prepare) -> None:
    """Keep beside the work what prepared it, for `verify`. OSError if the disk refuses."""
    values = {name: value for name, value in asdict(options).items() if name not in _OF_A_RUN}
    if without_secrets(options.source) != options.source:
        values["source"] = None  # a password or a key is not kept
    values["captions"] = [str(file) for file in options.captions]
    values["scores"] = options.scores and str(options.scores)
    values["measurements"] = options.measurements and str(options.measurements)
    # Paths stay as they were given: those of samples begin with them, and name the work.
    content = {"folder": os.getcwd(), "options": values}
    write_checked(_settings_file(options.output, options.resolution), content)


@contextlib.contextmanager
def settings_of(directory: Path, resolution: int, device: str | None) -> Iterator[Prepare]:
    """What prepared a resolution, in the working directory that it was prepared from. Raises ValueError
    where that was not kept or is damaged, OSError where the working directory is gone."""
    content = read_checked(_settings_file(directory.absolute(), resolution))
    if content is None or not _are_settings(content):
        raise ValueError(f"what prepared it is damaged, or of an earlier version: {_BY_HAND}")
    folder, values = content["folder"], content["options"]
    if values["source"] is None:
        raise ValueError(f"its source has a password or a key, which is not kept: {_BY_HAND}")
    values["captions"] = tuple(map(Path, values.get("captions", ())))
    values["preprocessor_weights"] = tuple(values.get("preprocessor_weights", ()))
    for name in ("scores", "measurements"):
        values[name] = values.get(name) and Path(values[name])
    options = Prepare(**values, output=directory.absolute(), device=device)
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield options
    finally:
        os.chdir(before)


def _are_settings(content: Mapping[str, Any]) -> bool:
    """Whether this is what write_settings writes: a digest tells of damage, not who wrote it."""
    folder, values = content.get("folder"), content.get("options")
    kinds = get_type_hints(Prepare)
    kinds["source"] |= None
    return (
        isinstance(folder, str)
        and isinstance(values, dict)
        and {"source", "resolution"} <= values.keys() <= kinds.keys() - _OF_A_RUN | {"workers"}
        and all(_is_of(value, kinds[name]) for name, value in values.items())
    )


def _is_of(value: object, kind: Any) -> bool:
    """Whether JSON gave an option's type; paths are text there, and tuples lists."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, one) for one in inner)
    if get_origin(kind) is Literal:
        return value in inner
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is_of(one, inner[0]) for one in value)
    wanted = {Path: (str,), float: (int, float)}.get(kind, (kind,))
    return type(value) in wanted


def check_source(parts: list[str], index: Mapping[str, Any], source: str) -> None:
    """ValueError unless a source still gives the parts that an index is made of: what is prepared from
    another would be a set of other samples."""
    if parts != index.get("parts"):
        raise ValueError(f"{source}, or what encodes it, has changed since: {_BY_HAND}")


def _settings_file(directory: Path, resolution: int) -> Path:
    return directory / "work" / f"prepare-{resolution}.json"
