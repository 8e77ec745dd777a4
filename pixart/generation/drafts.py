"""What lines and options come to: a job for each picture, with its request and its model."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from pixart.config import EMBEDDED
from pixart.generation.options import Options
from pixart.generation.prompts import Line, located, naming
from pixart.generation.sweeps import Sweeps, check_alone, combinations
from pixart.pipeline.limits import BUCKET, EXACT_SIZE, STEPS
from pixart.pipeline.metadata import MODEL_OPTIONS
from pixart.pipeline.pictures import Picture
from pixart.pipeline.request import SETTINGS, Request
from pixart.plans.plan import NAMES, OFF, Plan
from pixart.plans.schedule import KVSchedule
from pixart.preprocess import parse_places
from pixart.releases import place_of

OWN = (
    "prompt",
    "negative",
    "seed",
)  # settings that pictures of one kind differ in, and no model looks at
_of_kind = attrgetter(*(name for name in SETTINGS if name not in OWN))


def kind_of(request: Request) -> tuple[Any, ...]:
    """Equal for requests that differ in OWN alone, of which a model takes the same."""
    found: tuple[Any, ...] = _of_kind(request)
    return found


def without_own(request: Request) -> Request:
    """The request without OWN."""
    return replace(request, prompt="", negative="", seed=0)


@dataclass(frozen=True)
class Job:
    """One picture to draw. model: the options that open the pipeline. asked, asked_model: what its file
    is to say was asked for; where a picture is drawn again, choices that were left open still are.
    place: file and line that ask for it, for messages. name: what that line calls it. swept: what --sweep
    sets. inputs: a digest of each picture that it is drawn from. path: its file. there: the picture, if
    this very request drew it before."""

    index: int
    request: Request
    model: Mapping[str, Any]
    asked: Request
    asked_model: Mapping[str, Any]
    place: str = ""
    name: str | None = None
    swept: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    path: Path = Path()
    there: Picture | None = None


def given_lines(options: Options, sweeps: Sweeps) -> list[Line]:
    """What to draw where no file says it."""
    if "prompt" in sweeps:
        return [Line({})]
    # Without a prompt, as `_only_enlarges` allows.
    return [Line({"prompt": text}) for text in options.prompt or ("",)]


class Drafts:
    """Jobs of lines: each in every combination of what is swept, with every seed, which changes first."""

    def __init__(self, options: Options, sweeps: Sweeps) -> None:
        self.settings, self.model = given_settings(options), model_of(options)
        self._sweeps, self._combinations = sweeps, combinations(sweeps)
        self._count = options.num_images
        self.per_line = len(self._combinations) * self._count

    def jobs(self, line: Line, start: int, wanted: range | None = None) -> Iterator[Job]:
        """start: index of the line's first picture. wanted: those of it that are made, from 0; None for all.
        ValueError names the line."""
        wanted = range(self.per_line) if wanted is None else wanted
        count = self._count
        for number in range(
            max(wanted.start, 0) // count, -(-min(wanted.stop, self.per_line) // count)
        ):
            first = number * count
            seeds = range(max(wanted.start - first, 0), min(wanted.stop - first, count))
            yield from self._made(line, self._combinations[number], seeds, start + first)

    def examples(self, line: Line) -> Iterator[Job]:
        """The first of each combination: seeds make no other kind of picture."""
        for swept in self._combinations:
            yield from self._made(line, swept, range(1), 0)

    def _made(
        self, line: Line, swept: Mapping[str, Any], seeds: range, start: int
    ) -> Iterator[Job]:
        own = {name for name, value in line.values.items() if value is not None}
        model, name = self.model, line.values.get("name")
        with naming(line.place):
            check_alone(self._sweeps, own, "the line")
            requests = requests_of(self.settings, {**line.values, **located(swept)}, seeds)
        for index, request in enumerate(requests, start + seeds.start):
            yield Job(index, request, model, request, model, line.place, name, swept)


def model_of(options: Options) -> dict[str, Any]:
    """MODEL_OPTIONS as a picture is to carry them."""
    return {name: _lasting(name, getattr(options, name)) for name in MODEL_OPTIONS}


def given_settings(options: Options) -> dict[str, Any]:
    """The settings of a request, without its prompt, that are given by options."""
    settings = {name: getattr(options, name, None) for name in SETTINGS if name != "prompt"}
    if settings["kv_schedule"] is not None:  # of a file, so that a picture says what was in it
        settings["kv_schedule"] = str(KVSchedule.read(settings["kv_schedule"]))
    return located({name: value for name, value in settings.items() if value is not None})


def requests_of(settings: dict[str, Any], line: dict[str, Any], seeds: range) -> list[Request]:
    """What a line names, and the options for the rest, with seeds so much above those that these say."""
    own = {name: value for name, value in line.items() if name != "name"}
    asked = {name for name in own if own[name] is not None}
    if asked & {*EXACT_SIZE}:
        idle: tuple[str, ...] = (*EXACT_SIZE, *BUCKET)
    else:
        idle = EXACT_SIZE if asked & {*BUCKET} else ()
    if asked & {*STEPS}:
        idle = (*idle, *STEPS)
    rest = {name: value for name, value in settings.items() if name not in idle}
    first = Request.from_dict({**rest, **own})
    if not first.prompt.strip() and not first.only_enlarges:
        raise ValueError("prompt must not be empty; name what to draw")
    return [replace(first, seed=first.seed + k) for k in seeds]


def _lasting(name: str, value: Any) -> str | bool | list[str] | None:
    """As a picture is to carry it: paths from the root, for it may be drawn again elsewhere."""
    if name == "model" and value in (None, EMBEDDED):
        return EMBEDDED
    if name == "lora":
        return [_lasting_lora(text) for text in value]
    if name == "control":
        return [_absolute(text) for text in value]
    if name == "fast":
        return None if value in (None, OFF) else value if value in NAMES else _lasting_plan(value)
    if name == "preprocessor_weights":
        return [f"{network}={_absolute(place)}" for network, place in parse_places(value).items()]
    if value is None or name not in ("model", "transformer", "text_encoder", "config"):
        return value
    return _absolute(value)


def _lasting_plan(place: str) -> str:
    """A plan's file, and a digest of what it sets: another plan under its name draws another picture."""
    path = _absolute(place)
    try:
        return f"{path} (plan {Plan.read(Path(path)).digest()[:12]})"
    except (OSError, ValueError):  # which opening it tells
        return path


def plan_file(said: str | None) -> str | None:
    """The file of `_lasting_plan`."""
    return None if said is None else re.sub(r" \(plan [0-9a-f]{12}\)\Z", "", said)


def _lasting_lora(text: str) -> str:
    from pixart.lora.adapters import parse_lora

    path, weight = parse_lora(text)
    return f"{_absolute(path)}:{weight}"


def _absolute(place: str | Path) -> str:
    """A path that is there, from the root; anything else is a release or a hub id."""
    if place_of(str(place)) is not None:
        return str(place)
    path = os.path.expanduser(place)  # of os, which has an answer for text that is no path at all
    return os.path.abspath(path) if os.path.exists(path) else str(place)
