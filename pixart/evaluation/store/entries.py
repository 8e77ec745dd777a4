"""The pictures that are judged: which prompt each was drawn for, and where its file is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A line of prompts.jsonl. id: unique in its set, a word for a folder's name. set: where it is from.
    category: "" for none; comparisons are made by category too. reference: the file of a real picture,
    relative to the reference folder, None for none. meta: what single metrics need (questions, what to
    detect). size: pixels "WIDTHxHEIGHT" where the set asks for it, None for the protocol's."""

    id: str
    prompt: str
    set: str = ""
    category: str = ""
    reference: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    size: str | None = None


@dataclass(frozen=True)
class Entry:
    """One picture. sample: which of its prompt's, from 0."""

    prompt: Prompt
    sample: int
    path: Path

    @property
    def key(self) -> str:
        """Unique in a set, and the order of everything: "00017/0000"."""
        return f"{self.prompt.id}/{self.sample:04d}"
