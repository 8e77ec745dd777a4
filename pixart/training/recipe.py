"""Recipes: a list of stages, shipped with the library or in a YAML file."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from pixart.plain_yaml import read_yaml
from pixart.training.arguments import VARIANT
from pixart.training.bounds import name_problems
from pixart.training.problems import Problems, refuse
from pixart.training.stage import Size, Stage
from pixart.variants import VARIANTS

RECIPES = Path(__file__).parent / "recipes"
ALIASES = {"dmd": "tdm"}  # other names of shipped recipes
MAX_DMD = 4  # steps that are meant by that name
# Fields of which one says the same in another way: what comes later stands in place of either.
_EITHER = {"distil": ("steps", "timesteps")}
PAIRS = tuple[tuple[str, float], ...]  # a mapping in a recipe

_RULES = {  # what pydantic found: what it must be instead
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text; put it in quotes",
    "tuple": "a list",
    "dataclass": "a mapping of fields",
    "literal": "one of {expected}",
}


def shipped() -> list[str]:
    """Names of the recipes that come with the library, aliases among them."""
    return sorted([*(path.stem for path in RECIPES.glob("*.yaml")), *ALIASES])


def load_recipe(
    name: str | Path, settings: Mapping[str, Any] | None = None, only: str | None = None
) -> list[Stage]:
    """The stages of a shipped recipe or of a YAML file: a list under `stages`, each the fields of a
    Stage; what stands under `defaults` holds for all. settings: what is to hold instead, nested like a
    stage; only: for this stage alone. Raises Problems, with all that is wrong."""
    defaults, stages = _read(str(name))
    names = [stage["name"] for stage in stages]
    if only is not None and only not in names:
        raise ValueError(f"--stage must be one of {', '.join(names)}, got {only!r}")
    found: list[Stage] = []
    lines: list[str] = []
    for stage in stages:
        given = (settings or {}) if only in (None, stage["name"]) else {}
        try:
            below = _merge(_with_size(defaults), _with_size(stage))
            built = build_stage(_merge(below, _with_size(given), ("captions", "scenes")))
            if str(name) == "dmd":
                refuse(_dmd_problems(built))
            found.append(built)
        except Problems as problems:
            lines += _placed(problems.lines, f"{name}: {stage['name']}.", given)
    refuse(lines)
    return found


def _dmd_problems(stage: Stage) -> Iterator[str]:
    distil = stage.distil
    own = "timesteps" if distil.timesteps else "steps"
    for name, most in ((own, distil.count), ("also", max(distil.also, default=1))):
        if most > MAX_DMD:
            yield f"distil.{name} must be 1 to {MAX_DMD} steps for dmd, got {most}; tdm takes more"


def _with_size(values: Mapping[str, Any]) -> dict[str, Any]:
    """`size: NAME`, or `size: {variant: NAME, ...}` with fields that are others, as all fields of a size."""
    size = values.get("size")
    others = dict(size) if isinstance(size, Mapping) else {VARIANT: size}
    name = others.pop(VARIANT, None)
    if not isinstance(name, str):
        return dict(values)
    if name not in VARIANTS:
        field = f"size.{VARIANT}" if isinstance(size, Mapping) else "size"
        near = get_close_matches(name, VARIANTS, 1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise Problems(
            [f"{field} must be fields or one of {', '.join(VARIANTS)}, got {name!r}{hint}"]
        )
    return {**values, "size": asdict(Size.of(VARIANTS[name])) | others}


def build_stage(values: Mapping[str, Any]) -> Stage:
    """A stage of nested plain values, as a recipe has them; no value becomes one of another kind. Raises
    Problems, each line of which begins with the name of a field."""
    wrong = list(_other_keys(values, ""))
    values, other = _pairs_as_lists(Stage, values)
    wrong += other
    while True:
        try:
            stage = _adapter().validate_json(json.dumps(values, default=repr), strict=True)
        except ValidationError as error:
            lines = [line for one in error.errors() for line in _complaints(one, values)]
            wrong += lines
            # Without the fields that are wrong, for what is wrong beside them.
            were_there = [_remove(values, field) for field in {_field_of(line) for line in lines}]
            if all(were_there):
                continue
        refuse(wrong)
        return stage


def _field_of(line: str) -> str:
    """The dotted name that a complaint begins with."""
    return line.split()[0].rstrip(":")


def _remove(values: dict[str, Any], field: str) -> bool:
    """Take out a field, or what holds it; whether it was there."""
    *above, last = re.sub(r"\[.*", "", field).split(".")
    for name in above:
        if not isinstance(values.get(name), dict):
            last = name
            break
        values = values[name]
    if last == "name" and not above or last not in values:  # no stage is without a name
        return False
    del values[last]
    return True


@cache
def _adapter() -> TypeAdapter[Stage]:
    return TypeAdapter(Stage)


def _placed(lines: Iterable[str], place: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """The lines with the place that they come from, where that is not the command line."""
    given = {name for name, _ in _flat(settings, "")}
    for line in lines:
        field = _field_of(line)
        from_outside = any(
            name == field or field.startswith((f"{name}.", f"{name}[")) for name in given
        )
        yield line if from_outside else place + line


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in pair_fields():
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# What is wrong with a value.


def _complaints(error: Mapping[str, Any], values: Any) -> Iterator[str]:
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, Problems):
        yield from cause.lines
        return
    name, kind = _dotted(error["loc"], values), error["type"]
    rule = next((rule for start, rule in _RULES.items() if kind.startswith(start)), None)
    if kind == "unexpected_keyword_argument":
        yield f"{name}: unknown field; {_near(error['loc'])}"
    elif rule is None:  # one that no field of today can have
        yield f"{name}: {error['msg']}"
    else:
        rule = rule.format(**error.get("ctx", {}))
        yield f"{name} must be {rule}, got {_shown(error['input'])}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) < 60 else text[:60] + "…"


def _dotted(place: tuple[Any, ...], values: Any) -> str:
    """batch.images, optimizer.betas[1], data.scenes.one."""
    text = ""
    for part in place:
        if isinstance(part, str):
            text += f".{part}"
        elif text.strip(".") not in pair_fields():
            text += f"[{part}]"
        elif isinstance(values, list):
            text += f".{values[part][0]}"
            break
        values = values[part] if isinstance(values, list | dict) else None
    return text.strip(".")


def _near(place: tuple[int | str, ...]) -> str:
    """What somebody may have meant by the name of a field that there is not."""
    kind: Any = Stage
    for part in place[:-1]:
        kind = get_type_hints(kind)[str(part)]
    names, wanted = list(get_type_hints(kind)), str(place[-1])
    if near := get_close_matches(wanted, names, 1):
        return f"did you mean {near[0]}"
    if elsewhere := [name for name in stage_fields() if name.split(".")[-1] == wanted]:
        return f"did you mean {elsewhere[0]}"
    return f"known are {', '.join(names)}"


def _other_keys(values: Mapping[Any, Any], prefix: str) -> Iterator[str]:
    """JSON would turn other keys into text."""
    for key, value in values.items():
        if not isinstance(key, str):
            yield f"{prefix}{key}: names must be text, got {key!r}; put it in quotes"
        elif isinstance(value, Mapping):
            yield from _other_keys(value, f"{prefix}{key}.")


@cache
def pair_fields() -> frozenset[str]:
    """Dotted names of the fields that are mappings in a recipe: names with weights."""
    return frozenset(name for name, hint in stage_fields().items() if hint == PAIRS)


@cache
def stage_fields() -> dict[str, Any]:
    """The type of every field of a stage, by its dotted name."""
    return dict(_fields_of(Stage, ""))


def _fields_of(kind: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from _fields_of(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _pairs_as_lists(
    kind: Any, values: Mapping[str, Any], prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """A copy whose mappings of names to weights are lists of pairs; and what of them is none."""
    hints, changed, wrong = get_type_hints(kind), {}, []
    for key, value in values.items():
        if not isinstance(key, str):
            continue  # a complaint of _other_keys
        if is_dataclass(hints.get(key)) and isinstance(value, Mapping):
            value, more = _pairs_as_lists(hints[key], value, f"{prefix}{key}.")
            wrong += more
        elif hints.get(key) == PAIRS:
            if not isinstance(value, Mapping):
                rule = "must be a mapping of names to weights"
                wrong.append(f"{prefix}{key} {rule}, got {_shown(value)}")
                continue
            value = [[name, weight] for name, weight in value.items() if isinstance(name, str)]
        changed[key] = value
    return changed, wrong


# The file.


def _read(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What holds for all stages, and the stages, each with a name."""
    path = RECIPES / f"{ALIASES.get(name, name)}.yaml" if name in shipped() else Path(name)
    try:
        values = read_yaml(path)
    except OSError as error:
        raise ValueError(
            f"recipe must be one of {', '.join(shipped())}, or a YAML file, got {name!r} "
            f"({error.strerror})"
        ) from error
    if not isinstance(values, dict) or not isinstance(values.get("stages"), list):
        raise ValueError(f"{path}: must hold a list under `stages`")
    if unknown := sorted(set(values) - {"stages", "defaults"}, key=str):
        raise ValueError(f"{path}: knows `stages` and `defaults`, got {unknown[0]!r}")
    defaults = values.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise ValueError(f"{path}: defaults must be a mapping of fields, got {_shown(defaults)}")
    for number, fields in enumerate(values["stages"]):
        if not isinstance(fields, dict) or not isinstance(fields.get("name"), str):
            raise ValueError(f"{path}: stage {number} must be a mapping with a name")
        refuse(f"{path}: stages[{number}].{line}" for line in name_problems(fields["name"]))
    names = [fields["name"] for fields in values["stages"]]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: names of stages must differ, got {names}")
    return defaults, values["stages"]


def _merge(
    below: Mapping[str, Any], above: Mapping[str, Any], whole: Sequence[str] = ("captions",)
) -> dict[str, Any]:
    """The fields of both, above before below; those in `whole` are not mixed."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        if both and any(name in value for name in _EITHER.get(key, ())):
            merged[key] = {k: v for k, v in merged[key].items() if k not in _EITHER[key]}
        merged[key] = _merge(merged[key], value, whole) if both and key not in whole else value
    return merged
