"""Opens what an evaluation is done with, and asks for all that is missing at once."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pixart.evaluation.metric import Context, Metric, SetMetric
from pixart.evaluation.metrics import open_metric
from pixart.evaluation.needs import MissingError, Need
from pixart.evaluation.protocols.protocol import Use
from pixart.files import check_text

Value = TypeVar("Value")


@dataclass(frozen=True)
class Given:
    """What a command line gives to metrics: see `pixart.evaluation.metric.Context`."""

    device: str | None = None
    weights: Path | None = None
    judge: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights is not None and not self.weights.is_dir():
            raise FileNotFoundError(f"--weights must be a folder, there is none at {self.weights}")
        for name, path in self.files.items():
            if not path.exists():
                raise FileNotFoundError(f"--file {name}: no such file: {path}")


class _Asked(Mapping[str, Value]):
    """A mapping that notes which of its keys were asked for."""

    def __init__(self, values: Mapping[str, Value], asked: set[str]) -> None:
        self.values_, self.asked = dict(values), asked

    def __getitem__(self, key: str) -> Value:
        self.asked.add(key)
        return self.values_[key]

    def __iter__(self) -> Iterator[str]:
        self.asked |= self.values_.keys()
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def open_metrics(uses: Sequence[Use], given: Given) -> list[Metric]:
    """The metrics, none of which has opened anything yet. ValueError for an unknown name, and for an
    option or file that none of them knows: it would be without effect."""
    from pixart.device import choose_device

    device = choose_device(given.device)
    options: set[str] = set()
    files: set[str] = set()
    opened = []
    for use in uses:
        merged = {**use.options, **given.options}
        context = Context(
            device, given.weights, given.judge, _Asked(given.files, files), _Asked(merged, options)
        )
        metric = open_metric(use.name, context)
        check_text("metric", json.dumps(dict(metric.constants), allow_nan=False, default=str))
        opened.append(metric)
    names = ", ".join(use.name for use in uses)
    for kind, known, have in (
        ("--option", options, given.options),
        ("--file", files, given.files),
    ):
        if unknown := sorted(have.keys() - known):
            raise ValueError(f"{kind} {unknown[0]}: none of {names} knows it")
    return opened


def check_needs(metrics: Sequence[Metric], also: Iterable[Need] = (), what: str = "") -> None:
    """MissingError with all that any of them lacks, and with `also`, which `what` lacks."""
    lacking = {metric.name: list(metric.needs()) for metric in metrics}
    needs = {str(one): one for found in ([*also], *lacking.values()) for one in found}
    if needs:
        wanting = [what] if what else []
        wanting += [name for name, found in lacking.items() if found]
        raise MissingError(", ".join(wanting), needs.values())


def compares_sets(metrics: Sequence[Metric]) -> list[str]:
    """Names of those that need a reference."""
    return [metric.name for metric in metrics if isinstance(metric, SetMetric)]


def identities_of(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What decides the numbers of metrics, from their blocks of results.json: how many pictures are left out
    as well, of which no protocol says anything."""
    names = ("version", "constants", "left_out")
    return {
        metric: {name: block[name] for name in names if name in block}
        for metric, block in blocks.items()
    }
