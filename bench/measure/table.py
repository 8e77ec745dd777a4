"""The table of configurations (pixart_kernels.dispatch) as what is measured here rewrites it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pixart.files import read_json, write_bytes
from pixart_kernels.dispatch import bypass, configurations

Entry = dict[str, Any]


def read(path: Path | None = None) -> list[Entry]:
    """The rows of a table's file, of the one in use by default."""
    entries: list[Entry] = read_json(path or configurations.PATH)["rows"]
    return entries


def entry(
    kernel: str,
    architecture: str,
    bits: int,
    span: tuple[int, int],
    source: str,
    candidates: Sequence[Mapping[str, Any]],
) -> Entry:
    """A row for one GPU. span: the least and the largest head dimension, or number of channels."""
    place = {"kernel": kernel, "architectures": [architecture], "bits": bits, "sizes": [*span]}
    return {**place, "source": source, "candidates": [dict(one) for one in candidates]}


def with_entries(entries: Sequence[Entry], new: Sequence[Entry]) -> list[Entry]:
    """The table with these rows before all others of their kernel, and without rows for the same."""
    made = [one for one in entries if not any(_place(one) == _place(other) for other in new)]
    for one in reversed(new):
        kernels = [other["kernel"] for other in made]
        first = kernels.index(one["kernel"]) if one["kernel"] in kernels else len(made)
        made.insert(first, one)
    return made


def _place(one: Entry) -> tuple[object, ...]:
    return (one["kernel"], one["architectures"], one.get("bits"), one.get("sizes"))


def write(path: Path, entries: Sequence[Entry]) -> None:
    """The whole file or nothing. Raises ValueError for rows that no table has, OSError if the disk
    refuses."""
    kernels = [one["kernel"] for one in entries]
    text = '{\n  "rows": ['
    for index, one in enumerate(entries):
        place = json.dumps({name: value for name, value in one.items() if name != "candidates"})
        lines = ",\n      ".join(json.dumps(candidate) for candidate in one["candidates"])
        # An empty line between kernels, round those that have several rows.
        around = {one["kernel"], kernels[index - 1]} if index else {one["kernel"]}
        apart = len(around) > 1 and any(kernels.count(kernel) > 1 for kernel in around)
        text += ("," if index else "") + "\n" * (1 + apart)
        text += f'    {place[:-1]}, "candidates": [\n      {lines}]}}'
    text += "\n  ]\n}\n"
    configurations.parse(text)
    write_bytes(path, text.encode())


def adopt(path: Path) -> None:
    """Launch by this file's table from here on, in this process."""
    configurations.PATH = path
    configurations.rows.cache_clear()
    bypass.forget()


def adopting(path: Path, cases: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
    """The cases of a part, launched by that table if it is there when the part begins: also in a process
    that goes on for one that died."""

    def begin() -> list[Any]:
        if path.exists():
            adopt(path)
        return cases()

    return begin


def forget_launches() -> None:
    """So that `launched` tells of the launches from here on."""
    configurations.forget_chosen()


def launched() -> dict[str, str]:
    """By kernel, the candidate that it was launched with last since `forget_launches`."""
    found = configurations.chosen()
    return {
        kernel: configurations.describe(candidate)
        for kernel, (_, candidate) in sorted(found.items())
    }


def span_of(kernel: str, size: int) -> tuple[int, int]:
    """The sizes that what was measured at one is taken for: head dimensions of as many columns of 8,
    channels up to the same power of two."""
    if kernel.startswith("attention."):
        return (size - 1) // 8 * 8 + 1, -(-size // 8) * 8
    largest = 1 << (size - 1).bit_length()
    return largest // 2 + 1, largest
