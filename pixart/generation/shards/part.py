"""Which part of a long work falls to this process: --shard I/N, or what Slurm and torchrun say."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pixart import process

_ARRAY = "SLURM_ARRAY_TASK_"


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`, from 0 up: of numbered things number, number + of, number + 2 · of ..."""

    number: int = 0
    of: int = 1

    MOST: ClassVar[int] = 10**9

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of <= self.MOST:
            raise ValueError(
                f"a part must be I of N with I from 0 to N - 1, got {self.number} of {self.of}"
            )

    @classmethod
    def here(cls, shard: str | None, environment: Mapping[str, str] = os.environ) -> "Part":
        """That of this process. shard: what --shard says, or None for the task of a Slurm array, if this is
        one; torchrun's processes, if there are several, share it. ValueError for variables that do not tell."""
        part = _of_array(environment) if shard is None else cls.parse(shard)
        return part.shared(*process.place())

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Of I/N, the first of which is 0/N."""
        number, between, of = text.strip().partition("/")
        if between and not number.strip():
            raise ValueError(
                f"--shard must be I/N, such as 0/8, got {text[:40]!r}, which lacks I: is the variable that it "
                "was to come from empty, as $SLURM_ARRAY_TASK_ID is without sbatch --array?"
            )
        if not (_is_count(number) and _is_count(of)) or not int(number) < int(of) <= cls.MOST:
            raise ValueError(
                f"--shard must be I/N with I from 0 to N - 1, such as 0/8 for the first of 8, got {text[:40]!r}"
            )
        return cls(int(number), int(of))

    def shared(self, rank: int, world: int) -> "Part":
        """What is left of it to one of `world` processes that share it."""
        return Part(self.number + self.of * rank, self.of * world)

    def numbers(self, count: int) -> range:
        """Those below `count` that are in it."""
        return range(self.number, count, self.of)


def _of_array(environment: Mapping[str, str]) -> Part:
    """By SLURM_ARRAY_TASK_ID, _COUNT, _MIN, _MAX and _STEP; all of it where none is set."""
    said = {name: environment.get(_ARRAY + name) for name in ("ID", "COUNT", "MIN", "MAX", "STEP")}
    if said["ID"] is None and said["COUNT"] is None:
        return Part()
    for name in ("ID", "COUNT"):
        if not said[name]:
            how = "not set" if said[name] is None else "empty"
            raise ValueError(
                f"{_ARRAY}{name} must be a number, it is {how}: start this with sbatch --array, or say "
                "--shard I/N"
            )
    numbers = {name: _number(name, text) for name, text in said.items() if text is not None}
    count, first, step = numbers["COUNT"], numbers.get("MIN", 0), numbers.get("STEP", 1)
    number, beside = divmod(numbers["ID"] - first, step or 1)
    last = numbers.get("MAX", first + step * (count - 1))
    if beside or not 0 <= number < count or first + step * (count - 1) != last:
        given = ", ".join(f"{name} {value}" for name, value in numbers.items())
        raise ValueError(
            f"{_ARRAY}* must be those of an even array such as --array=0-7 or 8-64:8, got {given}; for "
            "another array say --shard I/N"
        )
    return Part(number, count)


def _number(name: str, text: str) -> int:
    if not _is_count(text):
        raise ValueError(f"{_ARRAY}{name} must be a number, got {text[:20]!r}; say --shard I/N")
    return int(text)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
