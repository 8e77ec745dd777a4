"""Weights and data that somebody has to fetch: nothing here does so unasked.

Whatever is missing is listed at once, each with its file, where it is to be had, its size and SHA-256 as
far as they are known, and the command ends with exit code 3.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pixart.command import MISSING


@dataclass(frozen=True)
class Need:
    """Something that is missing. name: of the file or hub repository. source: where it is published.
    size: bytes, None where nobody knows. sha256: of the file, or the part of it that is known.
    place: where it is looked for, in words."""

    name: str
    source: str
    place: str
    size: int | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        size = f", {self.size / 1e6:,.1f} MB" if self.size else ""
        digest = f", SHA-256 {self.sha256}" if self.sha256 else ""
        return f"{self.name} (from {self.source}{size}{digest}) is looked for in {self.place}"


class MissingError(ValueError):
    """Weights or data are missing: exit code 3."""

    exit_code = MISSING

    def __init__(self, what: str, needs: Iterable[Need]) -> None:
        self.needs = tuple(needs)
        super().__init__(f"{what} needs {'; '.join(map(str, self.needs))}")
