"""Which picture of a folder belongs to which prompt.

    ID/0000.png     a folder a prompt, as `draw` makes it (ID/samples/0000.png, as GenEval does, too)
    ID.png ID_1.png flat: named by the prompt's id, further samples numbered
    *.png           drawn by `pixart generate`: each says its prompt itself, no prompts file is needed; nor for
                    metrics that read no prompts, to which pictures of other tools are one of a prompt each

A reference set is a folder of pictures, whatever they are called.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixart.command import FAILURE
from pixart.evaluation.prompt_sets.files import check_id
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.files import listed, parse_json
from pixart.pictures import Head, PictureError, head_of, open_picture, picture_suffixes

TEXT_KEY = "pixart"  # of the PNG text of pictures that we drew
HEAD = 65_536  # bytes that tell size and format of most files
MAX_SAMPLES = 10_000  # of a prompt: four digits
MAX_PICTURES = 10_000_000  # each takes memory, whether it is there or not


class MissingPictures(ValueError):
    """Pictures that should be there are not."""

    exit_code = FAILURE


@dataclass(frozen=True)
class Found:
    """prompts: in order of their ids. samples: pictures that each should have. entries: all that should
    be there, in order of their keys. missing: keys of those that are not. extra: pictures, relative to the
    folder, that belong to no prompt."""

    prompts: tuple[Prompt, ...]
    samples: int
    entries: tuple[Entry, ...]
    missing: frozenset[str] = frozenset()
    extra: tuple[str, ...] = ()

    def complaint(self, folder: Path) -> str:
        """A line that names what is missing."""
        keys = sorted(self.missing)
        return (
            f"{folder}: {len(keys)} of {len(self.entries)} pictures are missing ({listed(keys)}); draw "
            "them, or say --allow-missing to leave them out, which the results tell"
        )


def find_pictures(
    folder: Path,
    prompts: Sequence[Prompt] | None,
    samples: int | None = None,
    *,
    unread: bool = False,
) -> Found:
    """The pictures of a folder, by prompt. prompts: None takes them from the pictures, which `pixart
    generate` drew then; ValueError where one says none. samples: how many each prompt should have; None is as
    many as the one that has most. unread: nobody reads the prompts, so that pictures of which none says one
    are taken too, each by itself under its own name."""
    if samples is not None and not 1 <= samples <= MAX_SAMPLES:
        raise ValueError(f"--samples must be from 1 to {MAX_SAMPLES:,}, got {samples:,}")
    there = pictures_in(folder)
    if not there:
        raise ValueError(f"{folder}: must hold pictures, it holds none")
    if prompts is None:
        return _as_told(folder, there, samples, unread)
    by_key, extra = _by_prompt(folder, there, prompts)
    if not by_key:
        raise ValueError(
            f"{folder}: no picture is named by an id of the prompts, such as {prompts[0].id}/0000.png or "
            f"{prompts[0].id}.png (the lines of a .txt are 00000, 00001 and so on; a .jsonl names the ids: "
            f'{{"id": "cat", "prompt": "a cat"}} is of cat.png); it has {listed(sorted(there))}'
        )
    return _with_samples(folder, prompts, samples, by_key, extra)


def _with_samples(
    folder: Path,
    prompts: Sequence[Prompt],
    samples: int | None,
    by_key: Mapping[tuple[str, int], Path],
    extra: Sequence[str],
) -> Found:
    """What is there, with so many pictures of each prompt; None is as many as the one that has most."""
    last = max(by_key, key=lambda key: key[1])
    most = 1 + last[1]
    wanted = most if samples is None else samples
    over = [path for (_, sample), path in by_key.items() if sample >= wanted]
    if len(prompts) * wanted > MAX_PICTURES:
        name = "" if samples is not None else f" (as {by_key[last].name} of prompt {last[0]} says)"
        raise ValueError(
            f"{folder}: must be of at most {MAX_PICTURES:,} pictures, got {len(prompts):,} prompts with "
            f"{wanted:,} each{name}; give --samples"
        )
    left = [*extra, *(path.relative_to(folder).as_posix() for path in over)]
    return _expected(folder, prompts, wanted, by_key, left)


def reference_pictures(folder: Path, names: Iterable[str] | None = None) -> Found:
    """The pictures of a reference set: those named, relative to the folder, or all. MissingPictures where a
    named one is not there."""
    there = pictures_in(folder)
    wanted = sorted(there if names is None else set(names))
    if absent := [name for name in wanted if name not in there]:
        raise MissingPictures(
            f"{folder}: {len(absent)} of {len(wanted)} reference pictures are missing ({listed(absent)})"
        )
    if not wanted:
        raise ValueError(f"{folder}: must hold pictures, it holds none")
    prompts = tuple(Prompt(name, "") for name in wanted)
    return Found(prompts, 1, tuple(Entry(one, 0, there[one.id]) for one in prompts))


def kinds_of(entries: Iterable[Entry]) -> dict[str, list[str]]:
    """Sizes ("WIDTHxHEIGHT") and formats of those pictures that are there, by their heads: the same scenes
    in other pixels, or through JPEG, are other numbers."""
    sizes, formats = set(), set()
    for entry in entries:
        if not entry.path.is_file():  # missing, or a pipe, which might never end
            continue
        try:
            with entry.path.open("rb") as file:
                head = _head_of(file.read(HEAD), entry.path)
        except (OSError, PictureError):  # scoring says so
            continue
        sizes.add((head.width, head.height))
        formats.add(head.format)
    return {"sizes": [f"{w}x{h}" for w, h in sorted(sizes)], "formats": sorted(formats)}


def _head_of(start: bytes, path: Path) -> Head:
    try:
        return head_of(start, str(path))
    except PictureError:  # some formats keep what they are at their ends
        return head_of(path, str(path))


def pictures_in(folder: Path) -> dict[str, Path]:
    """All pictures below a folder, by path relative to it with "/"; through links, each folder once."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of pictures")
    suffixes = picture_suffixes()
    return {
        path.relative_to(folder).as_posix(): path
        for path in _files(folder)
        if path.suffix.lower() in suffixes
    }


def _files(folder: Path) -> Iterator[Path]:
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        own = os.stat(place)
        if (own.st_dev, own.st_ino) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add((own.st_dev, own.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _by_prompt(
    folder: Path, there: Mapping[str, Path], prompts: Sequence[Prompt]
) -> tuple[dict[tuple[str, int], Path], list[str]]:
    """({(id, sample): file}, pictures of no prompt). ValueError for two files of one sample."""
    ids = {prompt.id for prompt in prompts}
    found: dict[tuple[str, int], Path] = {}
    extra = []
    for name, path in there.items():
        key = _key_of(name, ids)
        if key is None:
            extra.append(name)
            continue
        if key in found:
            raise ValueError(
                f"{folder}: picture {key[1]} of prompt {key[0]} is there twice, as "
                f"{found[key].relative_to(folder).as_posix()} and {name}; take one away"
            )
        found[key] = path
    return found, extra


def _key_of(name: str, ids: set[str]) -> tuple[str, int] | None:
    """(id, sample) of a picture's relative path, None if it belongs to no prompt."""
    *folders, last = name.split("/")
    stem = last.rpartition(".")[0]
    if folders and folders[-1] == "samples":
        folders = folders[:-1]
    if len(folders) == 1 and folders[0] in ids and _is_number(stem):
        return folders[0], int(stem)
    if folders:
        return None
    if stem in ids:  # an id may end in _1 itself
        return stem, 0
    before, between, number = stem.rpartition("_")
    if between and before in ids and _is_number(number):
        return before, int(number)
    return None


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,5}", text)) and int(text) < MAX_SAMPLES


def _expected(
    folder: Path,
    prompts: Sequence[Prompt],
    samples: int,
    by_key: Mapping[tuple[str, int], Path],
    extra: Sequence[str],
) -> Found:
    ordered = tuple(sorted(prompts, key=lambda prompt: prompt.id))
    entries, missing = [], set()
    for prompt in ordered:
        for sample in range(samples):
            path = by_key.get((prompt.id, sample))
            entry = Entry(prompt, sample, path or folder / prompt.id / f"{sample:04d}.png")
            entries.append(entry)
            if path is None:
                missing.add(entry.key)
    entries.sort(key=lambda entry: entry.key)
    return Found(ordered, samples, tuple(entries), frozenset(missing), tuple(sorted(extra)))


def _as_told(folder: Path, there: Mapping[str, Path], samples: int | None, unread: bool) -> Found:
    """Pictures that say their prompt themselves. Those of one prompt are its samples, in order of their
    names; the prompt's id is the name of the first."""
    prompts: dict[str, Prompt] = {}
    counts: dict[str, int] = {}
    by_key: dict[tuple[str, int], Path] = {}
    texts = {name: _told_prompt(there[name]) for name in sorted(there)}
    if unread and not any(text is not None for text in texts.values()):
        return _by_name(folder, there)
    for name, text in texts.items():
        if text is None:
            raise ValueError(
                f"{there[name]}: holds no prompt, pictures of pixart generate do; give --prompts FILE, "
                f'with a line for each picture: {{"id": "{Path(name).stem}", "prompt": "..."}}'
            )
        stem = name.rpartition(".")[0].replace("/", "-")
        prompt = prompts.setdefault(text, Prompt(stem, text))
        by_key[prompt.id, counts.get(text, 0)] = there[name]
        counts[text] = counts.get(text, 0) + 1
    if len({prompt.id for prompt in prompts.values()}) < len(prompts):
        raise ValueError(f"{folder}: names of pictures must differ in more than their suffix")
    return _with_samples(folder, list(prompts.values()), samples, by_key, ())


def _by_name(folder: Path, there: Mapping[str, Path]) -> Found:
    """Each picture is of a prompt of its own that nobody knows."""
    by_key: dict[tuple[str, int], Path] = {}
    for name in sorted(there):
        stem = name.rpartition(".")[0].replace("/", "-")
        check_id(str(there[name]), stem)
        if (stem, 0) in by_key:
            raise ValueError(f"{folder}: names of pictures must differ in more than their suffix")
        by_key[stem, 0] = there[name]
    return _expected(folder, [Prompt(stem, "") for stem, _ in by_key], 1, by_key, ())


def _told_prompt(path: Path) -> str | None:
    """What the picture says that it was drawn for."""
    try:
        text = open_picture(path, str(path)).info.get(TEXT_KEY)
        values = parse_json(text, "metadata") if isinstance(text, str) else None
    except PictureError:
        raise
    except ValueError:
        return None
    request = values.get("request", values) if isinstance(values, dict) else {}
    prompt = request.get("prompt") if isinstance(request, dict) else None
    return prompt if isinstance(prompt, str) else None
