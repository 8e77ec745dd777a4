"""What judges share that are networks of transformers, from a folder or the hub's cache."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pixart.evaluation.judges.judge import Judge
from pixart.evaluation.metric import Context
from pixart.evaluation.needs import Need, find_snapshot, need_snapshot
from pixart.files import fingerprint


class NetworkJudge(Judge):
    """kind: the way in which it is asked, with its version; its id is that and the model's name."""

    kind: str

    def __init__(self, name: str, context: Context) -> None:
        self.name, self.context = name, context
        self._opened: tuple[Any, Any] | None = None  # processor and model, once it was asked

    @property
    def id(self) -> str:
        return f"{self.kind}:{self.name.rstrip('/').rpartition('/')[2]}"

    @cached_property
    def digest(self) -> str:
        folder = find_snapshot(self.name, self.context)
        return fingerprint(folder)[:16] if folder else ""

    def needs(self) -> Sequence[Need]:
        return need_snapshot(self.name, self.context)

    def release(self) -> None:
        self._opened = None
