"""Prompt sets into prompts.jsonl: read from the files of their authors, chosen by a seed, checked.

The SHA-256 of what was read stands in every line, so that it is part of the prompts' own digest, and with it of
a protocol's id.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from pixart.evaluation.needs import MissingError, Need
from pixart.evaluation.prompt_sets import GENERATED, NAMES, OWN, SETS, PromptSet
from pixart.evaluation.prompt_sets.files import read_prompts, write_prompts
from pixart.evaluation.prompt_sets.reading import MAX_PROMPTS, checked
from pixart.evaluation.prompt_sets.shapes import SEED, shapes_prompts
from pixart.evaluation.store.entries import Prompt
from pixart.files import check_writable, listed, sha256_of

SOURCE_KEY = "source_sha256"  # of a prompt's meta
_GENERATED_COUNT = 300


@dataclass(frozen=True)
class Made:
    """Prompts of a set. notes: sentences, where the file is not what is published. source_sha256: of the
    file, or of the names and digests of several; "" where they were generated."""

    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...] = ()
    source_sha256: str = ""


def make_prompts(
    name: str, source: Path | None = None, count: int | None = None, seed: int | None = None
) -> Made:
    """The prompts of a set. source: its file, a folder with its files under their own names, or a
    prompts.jsonl that was made of it. count: how many, None for all (300 of `shapes`); chosen by
    `seed`, of every category as many as its share, in the order of the file.

    MissingError, with where the file is published, without a source or where it is not there; ValueError
    for an unknown name, a file that is not of the set, and a count of more than there are.
    """
    check_name(name)
    if count is not None and not 1 <= count <= MAX_PROMPTS:
        raise ValueError(f"--count must be from 1 to {MAX_PROMPTS:,}, got {count}")
    if name in GENERATED:
        if source is not None:
            raise ValueError(f"{name} is generated and needs no file, got {source}")
        prompts = shapes_prompts(count or _GENERATED_COUNT, SEED if seed is None else seed)
        return Made(tuple(prompts))
    if name in OWN:
        return _own(name, source, count, seed or 0)
    if source is not None and (made := _made_before(name, source)):
        return replace(made, prompts=tuple(choose(made.prompts, count, f"{seed or 0}/{name}")))
    known = SETS[name]
    paths = _files(name, known, source)
    read = known.read(paths, seed or 0)
    checked(read.prompts, paths[0])
    digest = _digest(paths)
    notes = [*read.notes, *_counts(known, read.prompts, paths[0])]
    chosen = choose(read.prompts, count, f"{seed or 0}/{name}")
    return Made(tuple(_marked(chosen, name, digest)), tuple(notes), digest)


def save_prompts(
    name: str,
    output: Path,
    source: Path | None = None,
    count: int | None = None,
    seed: int | None = None,
) -> Made:
    """`make_prompts`, written as prompts.jsonl."""
    check_writable(output)
    made = make_prompts(name, source, count, seed)
    write_prompts(output, made.prompts)
    return made


def check_name(name: str) -> None:
    """ValueError, with the nearest name, for a set that nobody knows."""
    if name not in NAMES:
        near = get_close_matches(name, NAMES, 1)
        way_out = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(NAMES)}"
        raise ValueError(f"prompt set is unknown, got {name[:80]!r}; {way_out}")


def choose(prompts: Sequence[Prompt], count: int | None, seed: str) -> list[Prompt]:
    """`count` of the prompts, in their order: of every category its share, rounded so that they sum up, at
    random by the seed. ValueError for more than there are."""
    if count is None or count == len(prompts):
        return list(prompts)
    if count > len(prompts):
        raise ValueError(f"--count must be at most the {len(prompts):,} prompts, got {count:,}")
    places: dict[str, list[int]] = {}
    for place, one in enumerate(prompts):
        places.setdefault(one.category, []).append(place)
    shares = {name: count * len(those) / len(prompts) for name, those in places.items()}
    whole = {name: int(share) for name, share in shares.items()}
    # What rounding down left goes to the largest remainders, the first of equal ones.
    rest = sorted(shares, key=lambda name: whole[name] - shares[name])
    for name in rest[: count - sum(whole.values())]:
        whole[name] += 1
    rng = random.Random(seed)
    kept = [place for name, those in places.items() for place in rng.sample(those, whole[name])]
    return [prompts[place] for place in sorted(kept)]


def _own(name: str, source: Path | None, count: int | None, seed: int) -> Made:
    if source is None:
        raise ValueError(f"{name} needs --from (--set of draw and run): {OWN[name]}")
    wanted = {"lines": ".txt", "jsonl": ".jsonl"}[name]
    if source.suffix.lower() != wanted:
        raise ValueError(f"{name} is {OWN[name]}, got {source}")
    chosen = choose(read_prompts(source), count, f"{seed}/{name}")
    digest = sha256_of(source)
    return Made(tuple(_marked(chosen, source.stem, digest)), (), digest)


def _made_before(name: str, source: Path) -> Made | None:
    """What `save_prompts` wrote of a set, None for any other file."""
    if source.suffix.lower() != ".jsonl" or not source.is_file():
        return None
    with source.open("rb") as file:
        first = file.readline(2**20)
    if b'"set"' not in first or b'"id"' not in first:
        return None
    prompts = read_prompts(source)
    others = sorted({one.set for one in prompts} - {name})
    if others:
        raise ValueError(f"{source}: must be prompts of {name}, it has some of {listed(others)}")
    digests = {str(one.meta.get(SOURCE_KEY, "")) for one in prompts}
    return Made(tuple(prompts), (), digests.pop() if len(digests) == 1 else "")


def _files(name: str, known: PromptSet, source: Path | None) -> list[Path]:
    """The files of a set, in its order."""
    if source is not None and source.is_file():
        if len(known.files) > 1 and name != "t2i-compbench":
            raise ValueError(
                f"{name} must be given as the folder of {', '.join(known.files)}, got {source}"
            )
        return [source]
    paths = [Path(file) if source is None else source / file for file in known.files]
    if source is not None and name == "drawbench" and not paths[0].is_file():
        paths = [path for path in (paths[0].with_suffix(".json"),) if path.is_file()] or paths
    missing = [path for path in paths if source is None or not path.is_file()]
    if missing:
        place = "--from of prompts, --set of draw and run" if source is None else str(source)
        needs = [Need(path.name, known.source, place) for path in missing]
        raise MissingError(f"prompt set {name}", needs)
    return paths


def _digest(paths: Sequence[Path]) -> str:
    if len(paths) == 1:
        return sha256_of(paths[0])
    lines = "".join(f"{path.name} {sha256_of(path)}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()


def _marked(prompts: Sequence[Prompt], name: str, digest: str) -> Iterator[Prompt]:
    for one in prompts:
        yield replace(one, set=one.set or name, meta={**one.meta, SOURCE_KEY: digest})


def _counts(known: PromptSet, prompts: Sequence[Prompt], path: Path) -> Iterator[str]:
    """What differs from the published counts."""
    found: Mapping[str, int] = Counter(one.category for one in prompts)
    wrong = [
        f"{found.get(name, 0):,} of {name} ({count:,} are published)"
        for name, count in known.counts.items()
        if found.get(name, 0) != count
    ]
    if known.count is not None and len(prompts) != known.count:
        those = f": {listed(wrong)}" if wrong else ""
        over = any(found.get(name, 0) > count for name, count in known.counts.items())
        trap = f"; {known.trap}" if known.trap and over else ""
        yield f"{path}: {len(prompts):,} prompts, {known.count:,} are published{those}{trap}"
    elif wrong:
        yield f"{path}: has {listed(wrong)}"
