"""Protocols: all that decides a published number, and the numbers.

A protocol is a YAML file, one of `shipped()` or your own. What it was used with, prompts and versions of
metrics included, makes its id: two results with the same id were made the same way. The paper's
table beside ours, and whether both were made the same way, are pixart.evaluation.protocols.published.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.evaluation.protocols.strict_values import build
from pixart.plain_yaml import read_yaml

if TYPE_CHECKING:
    from pixart.evaluation.metric import Metric
    from pixart.evaluation.store.entries import Prompt

PROTOCOLS = Path(__file__).parent
MOST_PROMPTS, MOST_IMAGES, MOST_STEPS, MOST_SIDE = 10_000_000, 1_000, 10_000, 8_192
SEED_RULES = ("prompt", "category", "same")
REFERENCES = ("none", "set", "scenes")


@dataclass(frozen=True)
class Sampling:
    """As a Request of pixart.pipeline.request; None is left to the model."""

    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    negative: str = ""

    def __post_init__(self) -> None:
        _within("steps", self.steps, 1, MOST_STEPS)
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be a finite number from 0 up, got {self.guidance}")


@dataclass(frozen=True)
class Use:
    """A metric of a protocol. options: as `--option NAME=VALUE`, for this metric alone."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stated:
    """What a paper says that it did. None where it does not say, which is no difference by itself:
    what follows from it stands in the protocol's `differs`."""

    set: str | None = None  # the prompt set's name here; for one that is not here, words
    count: int | None = None  # prompts
    images_per_prompt: int | None = None
    size: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    judge: str | None = None


@dataclass(frozen=True)
class Column:
    """A column of a paper's table. metric, value, category: which of our numbers stands under it; value
    None for the metric's own, metric "" where none of ours does. scale: ours times that is in the paper's
    unit. constants: of our metric, as the paper has them. stated: what holds for this column alone.
    differs: as the protocol's, for this column."""

    name: str
    metric: str = ""
    value: str | None = None
    category: str = ""
    scale: float = 1.0
    higher_is_better: bool = True
    constants: Mapping[str, Any] = field(default_factory=dict)
    stated: Stated = field(default_factory=Stated)
    differs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A model of a paper's table. values: by column. unconfirmed: columns of which the number was not
    read in the paper itself. models: hub ids, or file names, that the weights are published under; none,
    and nobody can draw it again. kv_compress: as `--kv-compress`, "" for none; None where it tells no
    rows apart. stated: what holds for this row alone. source: if it is not the table's."""

    name: str
    values: Mapping[str, float]
    unconfirmed: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    kv_compress: str | None = None
    stated: Stated = field(default_factory=Stated)
    source: str | None = None


@dataclass(frozen=True)
class Table:
    """A paper's table. source: paper, arXiv id and table. ours: the row that stands beside our numbers
    unless the model says another."""

    source: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    ours: str
    stated: Stated = field(default_factory=Stated)

    def __post_init__(self) -> None:
        names = [one.name for one in self.rows]
        columns = [one.name for one in self.columns]
        _unique("rows", names)
        _unique("columns", columns)
        if self.ours not in names:
            raise ValueError(f"ours must be one of the rows {', '.join(names)}, got {self.ours!r}")
        for row in self.rows:
            for name in (*row.values, *row.unconfirmed):
                if name not in columns:
                    raise ValueError(
                        f"rows: {row.name!r} must have values of the columns {', '.join(columns)}, "
                        f"got {name!r}"
                    )
            if not all(map(math.isfinite, row.values.values())):
                raise ValueError(f"rows: {row.name!r} must have finite values")


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a number.

    set, count, images_per_prompt: which prompts (`prompt_sets`), how many, pictures of each.
    prompt_seed: of the selection of prompts, or of the generated ones. seed, seed_rule: of pictures, see
    `seeds`. size: "WIDTHxHEIGHT", None for the model's own. reference: what sets are compared with: "set"
    is the real pictures of the prompts, "scenes" drawn scenes of the shapes world, "none" nothing.
    differs: in what this is not the paper's, beside what can be computed, a sentence each. changes: what
    was given instead of the file's.
    """

    name: str
    title: str
    set: str
    count: int
    metrics: tuple[Use, ...]
    images_per_prompt: int = 1
    prompt_seed: int = 0
    seed: int = 0
    seed_rule: str = "prompt"
    size: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    reference: str = "none"
    paper: Table | None = None
    differs: tuple[str, ...] = ()
    changes: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", self.name):
            raise ValueError(f"name must be of a-z, 0-9, - _ and ., got {self.name[:80]!r}")
        _within("count", self.count, 1, MOST_PROMPTS)
        _within("images_per_prompt", self.images_per_prompt, 1, MOST_IMAGES)
        for name in ("seed", "prompt_seed"):
            _within(name, getattr(self, name), 0, 2**64 - 1)
        _one_of("seed_rule", self.seed_rule, SEED_RULES)
        _one_of("reference", self.reference, REFERENCES)
        if not self.metrics:
            raise ValueError("metrics must name one at least, got none")
        _unique("metrics", [one.name for one in self.metrics])
        check_size("size", self.size)

    def changed(
        self,
        *,
        count: int | None = None,
        size: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler: str | None = None,
        images_per_prompt: int | None = None,
        metrics: Sequence[str] | None = None,
    ) -> "Protocol":
        """With what a command line gave instead; what differs from the file stands in `changes`. A size
        of one number is a square. Metrics that the protocol has keep their options."""
        own = {one.name: one for one in self.metrics}
        uses = None if metrics is None else tuple(own.get(one, Use(one)) for one in metrics)
        size = f"{size}x{size}" if size is not None and size.isdecimal() else size
        numbers = {"count": count, "size": size, "images_per_prompt": images_per_prompt}
        sampling = {
            "steps": steps,
            "guidance": None if guidance is None else float(guidance),
            "scheduler": scheduler,
        }
        made = replace(
            self,
            sampling=replace(self.sampling, **_given(sampling)),
            **_given({**numbers, "metrics": uses}),
        )
        found = [*_changes(self, made, numbers), *_changes(self.sampling, made.sampling, sampling)]
        if made.metrics != self.metrics:
            found.append(f"metrics {_named(self.metrics)} → {_named(made.metrics)}")
        object.__setattr__(made, "changes", (*self.changes, *found))
        return made

    def seeds(self, prompts: "Sequence[Prompt]") -> "Iterator[tuple[Prompt, int, int]]":
        """(prompt, sample, seed) of every picture, in order. By seed_rule the first picture is of `seed`
        plus its place among all prompts ("prompt") or among those of its category ("category"), times
        images_per_prompt; or all prompts have the same seeds ("same"). Sample k adds k."""
        places: dict[str, int] = {}
        for prompt in prompts:
            group = prompt.category if self.seed_rule == "category" else ""
            place = places.get(group, 0)
            places[group] = place + (self.seed_rule != "same")
            first = self.seed + place * self.images_per_prompt
            for sample in range(self.images_per_prompt):
                yield prompt, sample, first + sample

    def deciding(self) -> dict[str, Any]:
        """What decides the numbers, as JSON holds it; nothing that only says what they are."""
        values = asdict(self)
        for name in ("name", "title", "paper", "differs", "changes"):
            del values[name]
        return values

    def id(
        self,
        prompts_sha256: str,
        metrics: Mapping[str, Mapping[str, Any]],
        model_options: Mapping[str, Any] | None = None,
        reference: str | None = None,
    ) -> str:
        """ "NAME/HEX8". prompts_sha256: of the lines of prompts.jsonl. metrics: `identity` of each, by
        name. model_options: how the model was opened and what it took for settings that are None here
        (dtype, attention, which weights of several). reference: a digest of the reference set."""
        decides = {
            "protocol": self.deciding(),
            "prompts": prompts_sha256,
            "metrics": {name: metrics[name] for name in sorted(metrics)},
            "model_options": dict(model_options or {}),
            "reference": reference,
        }
        text = json.dumps(decides, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return f"{self.name}/{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def record(self, **facts: Any) -> dict[str, Any]:
        """For protocol.json: the whole protocol, the changes, and the facts of a run (id, prompts,
        prompts_sha256, judge, ...), as JSON holds them."""
        return {**asdict(self), **facts, "changes": list(self.changes)}


def identity(metric: "Metric") -> dict[str, Any]:
    """What of a metric decides its numbers, for `Protocol.id`."""
    return {"version": metric.version, "constants": dict(metric.constants)}


def shipped() -> list[str]:
    """Names of the protocols that come with the library."""
    return sorted(path.stem for path in PROTOCOLS.glob("*.yaml"))


def load_protocol(name: str | Path) -> Protocol:
    """A shipped protocol by its name, or the YAML file of a path (what ends in .yaml or .yml, or has a /).
    ValueError in one line for what is none; OSError for a file that cannot be read."""
    text = str(name)
    if re.search(r"\.ya?ml$|[/\\]", text):
        path = Path(text)
    elif text in shipped():
        path = PROTOCOLS / f"{text}.yaml"
    else:
        near = get_close_matches(text, shipped(), 1)
        way_out = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(shipped())}"
        raise ValueError(
            f"protocol must be one that ships or a .yaml file, got {text[:80]!r}; {way_out}"
        )
    values = read_yaml(path)
    try:
        if isinstance(values, Mapping) and "name" not in values:
            values = {"name": path.stem, **values}
        return build(Protocol, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_size(name: str, size: str | None) -> None:
    """ValueError unless it is None or WIDTHxHEIGHT in pixels."""
    if size is None:
        return
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
    if not found or not all(1 <= int(side) <= MOST_SIDE for side in found.groups()):
        raise ValueError(
            f"{name} must be WIDTHxHEIGHT, each 1 to {MOST_SIDE} pixels, got {size[:80]!r}"
        )


def _within(name: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most:,}, got {value}")


def _one_of(name: str, value: str, words: Sequence[str]) -> None:
    if value not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {value[:80]!r}")


def _unique(name: str, values: Sequence[str]) -> None:
    twice = {one for one in values if values.count(one) > 1}
    if twice:
        raise ValueError(f"{name} must each be there once, got {sorted(twice)[0]!r} twice")


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _changes(before: object, after: object, names: Mapping[str, Any]) -> list[str]:
    pairs = [(name, getattr(before, name), getattr(after, name)) for name in names]
    return [f"{name} {old} → {new}" for name, old, new in pairs if old != new]


def _named(uses: Sequence[Use]) -> str:
    return ", ".join(one.name for one in uses)
