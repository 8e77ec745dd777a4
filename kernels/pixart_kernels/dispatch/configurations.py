"""How each kernel is launched: a table, so that the same call has the same bits in every process.

A kernel's tiles fix the order of its sums. Chosen by timing at run time they would follow the noise of
the clock; here they are rows of `configurations.json`, by kernel, architecture, element size and head
dimension (or channels). A row says where it comes from: "compiled code" (registers, spills and
instructions, no GPU) or "measured on GPU, commit". `python -m bench.tune` writes the latter.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from pixart_kernels.dispatch import bypass

PATH = Path(__file__).with_name("configurations.json")
# What Triton's compiler takes; everything else in a candidate is a constant of the kernel, or,
# in small letters, for its launcher.
OPTIONS = ("num_warps", "num_stages", "maxnreg")
Candidate = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """The candidates of a kernel, the one to launch first, and what they are for.

    architectures: names as `launch.architecture` gives them, or patterns with *. bits: of an element
    of the tokens, None for any. sizes: the least and the largest head dimension (attention) or number
    of channels, None for any.
    """

    kernel: str
    architectures: tuple[str, ...]
    source: str
    candidates: tuple[Candidate, ...]
    bits: int | None = None
    sizes: tuple[int, int] | None = None

    def serves(self, architecture: str, bits: int, size: int) -> bool:
        return (
            any(fnmatchcase(architecture, pattern) for pattern in self.architectures)
            and self.bits in (None, bits)
            and (self.sizes is None or self.sizes[0] <= size <= self.sizes[1])
        )


@cache
def rows() -> tuple[Row, ...]:
    """The table, as the package has it."""
    return parse(PATH.read_text(encoding="utf-8"))


def parse(text: str) -> tuple[Row, ...]:
    """The rows of a table's text, in its order. Raises ValueError for what is not one."""
    found = []
    for number, entry in enumerate(json.loads(text)["rows"]):
        try:
            lists = {"architectures", "candidates", "sizes"} & entry.keys()
            found.append(Row(**{**entry, **{name: tuple(entry[name]) for name in lists}}))
        except (TypeError, AttributeError) as error:
            raise ValueError(f"row {number} of the configurations: {error}") from error
        if not found[-1].candidates:
            raise ValueError(f"row {number} of the configurations has no candidate")
    return tuple(found)


def find(kernel: str, architecture: str, bits: int, size: int) -> Row:
    """The first row that serves. Raises LookupError if none does."""
    for row in rows():
        if row.kernel == kernel and row.serves(architecture, bits, size):
            return row
    raise LookupError(f"no configuration of {kernel} for {architecture}, {bits} bits, size {size}")


_pinned: dict[str, Candidate] = {}
_chosen: dict[str, tuple[Row, Candidate]] = {}


def choose(
    kernel: str,
    architecture: str,
    bits: int,
    size: int,
    admits: Callable[[Candidate], bool] = lambda candidate: True,
    wanted: str | None = None,
) -> Candidate:
    """What to launch a kernel with: the row's first candidate that `admits` lets pass, one in the
    `wanted` language if there is one, unless another is pinned. Raises LookupError if there is none, or
    if what is pinned is not let pass."""
    row = find(kernel, architecture, bits, size)
    offered = row.candidates
    if kernel in _pinned:
        offered = (_pinned[kernel],)
    elif wanted is not None:
        offered = tuple(sorted(offered, key=lambda candidate: language(candidate) != wanted))
    for candidate in offered:
        if admits(candidate):
            _chosen[kernel] = row, candidate
            return candidate
    raise LookupError(f"{kernel} cannot be launched for these tensors with {describe(offered[0])}")


def split(candidate: Candidate) -> tuple[dict[str, Any], dict[str, int]]:
    """The constants of the kernel among it, and the options of the compiler."""
    constants = {name: value for name, value in candidate.items() if name.isupper()}
    return constants, {name: candidate[name] for name in OPTIONS if name in candidate}


def constants_of(
    kernel: str, architecture: str, bits: int, size: int, wanted: str
) -> list[dict[str, Any]]:
    """The constants of a row's candidates in the `wanted` language, in its order."""
    found = find(kernel, architecture, bits, size).candidates
    return [split(candidate)[0] for candidate in found if language(candidate) == wanted]


def language(candidate: Candidate) -> str:
    """Of the kernel that it is for: "triton", or "gluon"."""
    return str(candidate.get("language", "triton"))


def describe(candidate: Candidate) -> str:
    """ "BLOCK_Q=128, BLOCK_K=64, num_warps=8, num_stages=2"."""
    return ", ".join(f"{name}={value}" for name, value in candidate.items())


@contextmanager
def pinned(candidates: Mapping[str, Candidate]) -> Iterator[None]:
    """While it lasts, launch these kernels, {name: candidate}, so: for benches and tests."""
    before = dict(_pinned)
    _pinned.update(candidates)
    try:
        with bypass.apart(tuple((kernel, describe(one)) for kernel, one in _pinned.items())):
            yield
    finally:
        _pinned.clear()
        _pinned.update(before)


def forget_chosen() -> None:
    """So that `chosen` tells of the launches from here on."""
    _chosen.clear()
    bypass.forget()


def chosen() -> dict[str, tuple[Row, Candidate]]:
    """By kernel, the row and the candidate that were chosen last since `forget_chosen`."""
    return dict(_chosen)
