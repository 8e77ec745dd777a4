"""What metrics share that ask a judge about pictures."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pixart.evaluation.judges import Judge, open_judge
from pixart.evaluation.metric import Context, Estimate, PictureMetric
from pixart.evaluation.needs import Need
from pixart.evaluation.statistics.pooled import pooled_mean

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

NO_JUDGE = Need(
    "a judge",
    "you: checker, a folder or hub id of a vision-language model, or http(s)://...#MODEL",
    "--judge",
)


class JudgedMetric(PictureMetric):
    """The judge is part of what it measures: its id is a constant, and its weights are."""

    def __init__(self, name: str, context: Context) -> None:
        self.name = name
        self.context = context
        self._judge = open_judge(context.judge, context) if context.judge else None

    @property
    def judge(self) -> Judge:
        """ValueError where none was named."""
        return self._judge or open_judge(None, self.context)

    @property
    def constants(self) -> Mapping[str, Any]:
        if self._judge is None:
            return {"judge": None}
        values = {"judge": self._judge.id, "judge_weights": self._judge.digest}
        if self._judge.precision:
            values["judge_precision"] = self._judge.precision
        return values

    def needs(self) -> Sequence[Need]:
        return [NO_JUDGE] if self._judge is None else self._judge.needs()

    def release(self) -> None:
        if self._judge is not None:
            self._judge.release()


def shown(images: "Sequence[Image] | None", entries: "Sequence[Entry]") -> "Sequence[Image]":
    """The pictures, one for each entry."""
    if images is None or len(images) != len(entries):
        count = "none" if images is None else len(images)
        raise ValueError(f"images must be one for each of {len(entries)} entries, got {count}")
    return images


def flag(context: Context, name: str) -> bool:
    """Whether an option is "yes". ValueError for what is neither yes nor no."""
    value = context.options.get(name, "no")
    if value not in ("yes", "no"):
        raise ValueError(f"--option {name} must be yes or no, got {value!r}")
    return value == "yes"


def by_kind(
    name: str,
    entries: "Sequence[Entry]",
    kinds: Iterable[Mapping[str, Sequence[float]]],
) -> dict[str, Estimate]:
    """ "NAME/KIND" for each kind: the mean of all its values, as the papers have it. kinds: of each entry in
    turn, its values by kind."""
    each = list(kinds)
    names = sorted({kind for one in each for kind in one})
    return {
        f"{name}/{kind}": pooled_mean(entries, [one.get(kind, ()) for one in each])
        for kind in names
    }
