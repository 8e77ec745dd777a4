"""At which steps the blocks after the first few are not computed: what they added before is added again.

A static list, and no threshold: what a step costs is known before it runs, and a plan that was measured stays what
it was. Imports no torch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from pixart.config import PixArtConfig, ranges_of
from pixart.files import check_text, short

_LONGEST = 10_000  # characters
_MOST_STEPS = 1000
_FORM = "reuse_blocks must be FIRST:STEPS such as 1:3,5,7-9 or 1:3-19/2"
_RANGE = re.compile(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4})(?:\s*/\s*(\d{1,4}))?)?\s*", re.ASCII)


@dataclass(frozen=True)
class BlockReuse:
    """first: how many blocks are computed at every step. steps: at which the others are not, counted from 1,
    of all the steps from noise to picture."""

    first: int
    steps: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "BlockReuse":
        """FIRST:STEPS, of STEPS numbers and ranges with commas between; 3-19/2 is every second from 3 to 19."""
        check_text("reuse_blocks", text)
        if len(text) > _LONGEST:
            raise ValueError(
                f"reuse_blocks must be {_LONGEST:,} characters at most, got {len(text):,}"
            )
        first, colon, listed = text.partition(":")
        if not colon or not re.fullmatch(r"\s*\d{1,3}\s*", first, re.ASCII):
            raise ValueError(f"{_FORM}, got {short(text)}")
        steps = sorted({step for part in listed.split(",") for step in _steps_of(part)})
        if int(first) < 1:
            raise ValueError(f"reuse_blocks must compute one block at least, got {short(text)}")
        return cls(int(first), tuple(steps))

    def __str__(self) -> str:
        """What `parse` reads, in one form for all ways to write it."""
        return f"{self.first}:{ranges_of(self.steps)}"

    def check(self, config: PixArtConfig, steps: int) -> None:
        """ValueError unless a model has more blocks, and so many steps these and a computed one before each."""
        if self.first >= config.depth:
            raise ValueError(
                f"reuse_blocks must compute fewer than the {config.depth} blocks of this model, got {self.first}"
            )
        if self.steps[-1] > steps:
            raise ValueError(
                f"reuse_blocks must be of steps from 2 to {steps}, got {self.steps[-1]}"
            )

    def counter(self, depth: int) -> Callable[[int, tuple[str, ...]], int]:
        """How many blocks are computed in the evaluations of a picture, asked in their order. step: its number.
        halves: of guidance, which it evaluates; one that was not evaluated before is computed whole."""
        known: set[str] = set()

        def blocks(step: int, halves: tuple[str, ...]) -> int:
            if step in self.steps and known.issuperset(halves):
                return self.first
            known.update(halves)
            return depth

        return blocks


def _steps_of(part: str) -> range:
    match = _RANGE.fullmatch(part)
    if not match:
        raise ValueError(f"{_FORM}, got {short(part)}")
    low, high, stride = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
    if not 2 <= low <= high <= _MOST_STEPS or stride < 1:
        raise ValueError(
            f"reuse_blocks must have steps from 2, before which something is computed, to {_MOST_STEPS}, "
            f"got {short(part)}"
        )
    return range(low, high + 1, stride)
