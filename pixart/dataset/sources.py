"""Raw pictures with captions: a folder, a JSON or JSONL index, the official data_info.json, tar shards.

A source is read once, in an order that is always the same. What it lists but cannot give comes as a
`Rejected`, so that one bad sample stops nobody and none is lost without a word.

    a folder       x.png with its caption in x.txt; x.NAME.txt is a further caption, called NAME
    an index       objects with a path (`path`, `file_name`, `image` or `file`) relative to the index,
                   a caption (`prompt`, `caption` or `text`), a long one (`sharegpt4v`), and
                   `captions` with others: {name: text or [texts]}
    data_info.json the same; in a folder InternData its paths are relative to InternImgs beside it
    tar shards     WebDataset: KEY.png, KEY.txt, KEY.NAME.txt, KEY.json with the fields of an index; and
                   KEY.control.png, a picture that steers

The caption of x.txt, `prompt`, `caption` and `text` is called "prompt". A list of n texts called
NAME becomes NAME.1 ... NAME.n.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pixart.addresses import without_secrets
from pixart.dataset.features import refuse_prompts
from pixart.dataset.samples import (
    EMPTY,
    MAX_CAPTION,
    MISSING,
    PROMPT,
    CaptionError,
    Item,
    PictureFile,
    Rejected,
    Sample,
    captions_of,
    checked,
    text_of,
    writable,
)
from pixart.files import MAX_INDEX, parse_json, read_bounded
from pixart.pictures import MAX_BYTES, picture_suffixes, unread

PATH_FIELDS = ("path", "file_name", "image", "file")
OBJECT = "must be a JSON object"


def open_source(source: str | Path) -> Iterable[Item]:
    """The samples of a folder, an index file, or tar shards (a path, a URL, `name-{000..017}.tar`).

    A folder that holds InternData/data_info.json, one other index, or tar files is read as those.
    Raises ValueError for anything else.
    """
    from pixart.dataset.tar_shards import is_shards, read_shards, shards_of

    if is_shards(str(source)):
        return read_shards(shards_of(str(source)))
    path = Path(source).expanduser()
    if path.is_dir():
        refuse_prompts(path, "name a source of pictures")
        if index := _index_of(path):
            return read_index(index)
        if shards := [
            str(path / name) for name in sorted(_content(path)[1]) if name.endswith(".tar")
        ]:
            return read_shards(shards)
        return read_folder(path)
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        return read_index(path)
    raise ValueError(
        f"source must be a folder, a .json, a .jsonl or .tar shards, got {without_secrets(str(source))}"
    )


def read_folder(root: Path) -> Iterator[Item]:
    """All pictures in a folder and its subfolders; a .txt without a picture is a missing file."""
    failures: list[OSError] = []
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue  # a link to a folder above would lead in circles
            seen.add((status.st_dev, status.st_ino))
            folders, names = _content(folder)
        except OSError as error:
            failures.append(error)
            continue
        # Sorted: the disk's own order differs from machine to machine, and the chunks of several
        # processes with it.
        waiting += [folder / name for name in sorted(folders, reverse=True)]
        yield from _read_directory(root, folder, sorted(names))
    for failure in failures:
        yield Rejected(str(failure.filename), f"unreadable folder: {failure.strerror}")


def _content(folder: Path) -> tuple[list[str], list[str]]:
    """Names of folders and of other things in a folder, without files that desktops put there."""
    folders, names = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link in circles
                is_folder = False
            if is_folder:
                folders.append(entry.name)
            elif not entry.name.startswith("."):  # ._x.png, .DS_Store
                names.append(entry.name)
    return folders, names


def read_index(index: Path) -> Iterator[Item]:
    """The objects of a .json list or mapping, or of a .jsonl, in their order."""
    root = image_root(index)
    for place, values in index_objects(index):
        if isinstance(values, Rejected):
            yield values
            continue
        path = next((values[field] for field in PATH_FIELDS if values.get(field)), None)
        if not isinstance(path, str):
            yield Rejected(place, f"must have a path, one of {', '.join(PATH_FIELDS)}")
            continue
        try:
            yield _local_sample(root, path, captions_of(values))
        except CaptionError as error:
            yield Rejected(str(root / path), str(error))


def image_root(index: Path) -> Path:
    """Where an index's paths begin: beside it, or in the InternImgs beside its InternData."""
    folder = index.parent
    return folder.parent / "InternImgs" if folder.name == "InternData" else folder


def index_objects(index: Path) -> Iterator[tuple[str, "dict[str, Any] | Rejected"]]:
    """(place, object) of an index. Raises ValueError if a .json is none."""
    if index.suffix == ".jsonl":
        # errors="surrogateescape": one bad byte must not cost all lines behind it, nor become part of
        # a caption.
        with index.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parsed(f"{index}:{number}", line)
        return
    try:
        content = parse_json(read_bounded(index, MAX_INDEX), str(index), MAX_INDEX)
    except OSError as error:
        raise ValueError(f"{index}: cannot be read ({error.strerror})") from error
    if isinstance(content, dict):  # {path: caption} or {path: object}
        content = [
            {"path": path, **(value if isinstance(value, dict) else {PROMPT: value})}
            for path, value in content.items()
        ]
    if not isinstance(content, list):
        raise ValueError(f"{index} must hold a list of objects, got {type(content).__name__}")
    for number, values in enumerate(content):
        yield _checked(f"{index}[{number}]", values)


def _read_directory(root: Path, folder: Path, names: list[str]) -> Iterator[Item]:
    images = [name for name in names if Path(name).suffix.lower() in picture_suffixes()]
    stems = {Path(name).stem for name in images}
    texts: dict[str, dict[str, Path]] = {stem: {} for stem in stems}
    for name in names:
        if not name.lower().endswith(".txt"):
            continue
        stem, caption = _split(name[:-4], stems)
        if stem is None:
            yield Rejected(str(folder / name), f"{MISSING}: no picture for this caption")
        else:
            texts[stem][caption] = folder / name
    for name in images:
        files = texts[Path(name).stem]
        lacking = EMPTY if files else f"{MISSING}: no caption {Path(name).stem}.txt"
        try:
            captions = {
                key: text_of(read_bounded(file, MAX_CAPTION)) for key, file in files.items()
            }
            captions = {key: text for key, text in captions.items() if text}
            yield _local_sample(
                root, (folder / name).relative_to(root).as_posix(), captions, lacking
            )
        except (OSError, ValueError) as error:
            yield Rejected(str(folder / name), f"unreadable caption: {error}")


def _split(name: str, stems: set[str]) -> tuple[str | None, str]:
    """x.NAME to the longest stem of a picture that it begins with, and the rest."""
    stem, caption = name, ""
    while stem not in stems:
        stem, dot, last = stem.rpartition(".")
        if not dot:
            return None, ""
        caption = f"{last}.{caption}" if caption else last
    return stem, caption or PROMPT


def picture_file(file: Path) -> "PictureFile | Rejected":
    """A file as a picture that can be read when it is wanted, or why not."""
    if reason := unread(file.suffix):
        return Rejected(str(file), reason)
    try:
        status = file.stat()
    except ValueError:  # a zero byte in the path, or half of a pair
        return Rejected(str(file), MISSING)
    except OSError as error:
        is_there = error.errno not in (errno.ENOENT, errno.ENOTDIR)
        return Rejected(str(file), f"unreadable file: {error.strerror}" if is_there else MISSING)
    if not stat.S_ISREG(status.st_mode):
        return Rejected(str(file), f"{MISSING}: it is a folder, a pipe or a device")
    if status.st_size > MAX_BYTES:
        reason = f"must be at most {MAX_BYTES:,} bytes, got {status.st_size:,}"
        return Rejected(str(file), reason)
    # Not a digest: every process lists the whole source before it reads a part of it.
    version = f"{status.st_size}-{status.st_mtime_ns}"
    # Absolute: another machine that reads it is in another folder.
    read = partial(read_bounded, file.absolute(), MAX_BYTES)
    return PictureFile(writable(str(file)), version, read)


def _local_sample(
    root: Path, path: str, captions: dict[str, str], uncaptioned: str = EMPTY
) -> Item:
    found = picture_file(root / path)
    if isinstance(found, Rejected):
        return found
    version, read = found.version, found.read
    sample = Sample(path, found.path, version, read, captions, uncaptioned, relative=path)
    return checked(path, sample)


def _index_of(folder: Path) -> Path | None:
    official = folder / "InternData" / "data_info.json"
    if official.is_file():
        return official
    files = [folder / name for name in sorted(_content(folder)[1])]
    stems = {file.stem for file in files if file.suffix.lower() in picture_suffixes()}
    # x.json beside x.png is about that picture, and no index.
    indices = [f for f in files if f.suffix in (".json", ".jsonl") and f.stem not in stems]
    found = [file for file in indices if file.is_file()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{folder} must hold one index at most, got {names}; name the file")
    return found[0] if found else None


def _checked(place: str, values: object) -> tuple[str, "dict[str, Any] | Rejected"]:
    if isinstance(values, dict):
        return place, values
    return place, Rejected(place, OBJECT)


def _parsed(place: str, line: str) -> tuple[str, "dict[str, Any] | Rejected"]:
    try:
        return _checked(place, parse_json(line, "line"))
    except ValueError as error:
        reason = str(error).removeprefix("line: ")
        return place, Rejected(place, OBJECT if reason.startswith("is not JSON") else reason)
