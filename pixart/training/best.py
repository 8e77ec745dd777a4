"""The best state so far by a metric of the validation: `validation.best`.

It is a state like others, saved at the step that was found best, and spared when older ones are deleted.
Each state says which was the best when it was saved, so a run that is killed and goes on, from whichever
state, knows as much as it did then. `best` in the stage's folder is a link to it.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pixart.distributed import rank, said_by_first
from pixart.files import parse_json
from pixart.training.measuring import open_metrics
from pixart.training.stage import Stage
from pixart.training.state import state_name

LINK = "best"

logger = logging.getLogger("pixart")


@dataclass(frozen=True)
class Found:
    """What a metric said at a step. worse: validations in a row, the last ones, that it finds worse by more
    than their interval."""

    metric: str
    step: int
    value: float
    worse: int = 0


class Best:
    """The best of a stage in `directory`; of a stage that names no metric there is none."""

    def __init__(self, stage: Stage, directory: Path) -> None:
        self.metric, self.directory = stage.validation.best, directory
        self.patience = stage.validation.patience
        self.found: Found | None = None
        self._sign = 1
        if self.metric:
            metrics = open_metrics(stage, torch.device("cpu"))
            metric = next(one for one in metrics if one.name == self.metric)
            self._sign = 1 if metric.higher_is_better else -1

    def note(self, values: Mapping[str, float], step: int) -> None:
        """Take what a validation found, which the first process knows; called by all. Of equal values
        the first stays; what is not finite is never the best."""
        if not self.metric:
            return
        names = (self.metric, f"{self.metric}/{'high' if self._sign > 0 else 'low'}")
        said = said_by_first(" ".join(repr(values.get(name, math.nan)) for name in names))
        value, edge = map(float, said.split())
        best = None if self.found is None else self._sign * self.found.value
        if math.isfinite(value) and (best is None or self._sign * value > best):
            self.found = Found(self.metric, step, value)
        elif self.found is not None and best is not None:
            is_worse = self._sign * edge < best  # NaN is not
            self.found = replace(self.found, worse=self.found.worse + 1 if is_worse else 0)

    @property
    def is_lost(self) -> bool:
        """Whether it has been worse than the best for as long as the stage waits."""
        return bool(self.patience and self.found and self.found.worse >= self.patience)

    def is_at(self, step: int) -> bool:
        """Whether this step is the best so far."""
        return self.found is not None and self.found.step == step

    def said(self) -> dict[str, Any]:
        """What a state keeps of it."""
        return {} if self.found is None else {"best": asdict(self.found)}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Take up what a state says, where it is by the same metric and the best state is still there."""
        found = best_said(progress)
        if not self.metric or found is None or found.metric != self.metric:
            return
        is_there = said_by_first(json.dumps((self.directory / state_name(found.step)).is_dir()))
        if parse_json(is_there, "best"):
            self.found = found
            self.link()
        elif rank() == 0:
            logger.warning(
                "%s: is gone, which was the best by %s; the best is looked for anew",
                self.directory / state_name(found.step),
                found.metric,
            )

    def spared(self) -> Iterator[Path]:
        """States that are not to be deleted: the best, and the one that `best` still leads to."""
        if self.found is not None:
            yield self.directory / state_name(self.found.step)
            yield self.directory / LINK

    def link(self) -> None:
        """Let `best` lead to the best state, once that is saved."""
        if self.found is None or rank() != 0:
            return
        aside = self.directory / f".{LINK}.{os.getpid()}"
        aside.unlink(missing_ok=True)
        aside.symlink_to(state_name(self.found.step))
        os.replace(aside, self.directory / LINK)


def best_said(progress: Mapping[str, Any]) -> Found | None:
    """The best state that a state knew of. ValueError for what no training wrote."""
    said = progress.get("best")
    if said is None:
        return None
    try:
        numbers = float(said["value"]), said.get("worse", 0)
        found = Found(str(said["metric"]), said["step"], *numbers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"best must hold metric, step and value, got {said}") from error
    counts = type(found.step), type(found.worse)
    if counts != (int, int) or not math.isfinite(found.value):
        raise ValueError(f"best must hold a step and a finite value, got {said}")
    return found
