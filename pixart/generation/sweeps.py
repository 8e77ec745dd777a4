"""--sweep guidance=3,4.5,6: the values that one setting takes from picture to picture."""

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any, get_origin

from pixart.files import parse_json
from pixart.pipeline.limits import BUCKET, EXACT_SIZE
from pixart.pipeline.request import SETTINGS, check_keys, checked, kinds_of

MAX_COMBINATIONS = 10_000

Sweeps = dict[str, list[Any]]


def parse_sweeps(texts: Sequence[str]) -> Sweeps:
    """Each SETTING=VALUE,VALUE,... or SETTING=[JSON, JSON]. ValueError says which cannot be meant."""
    sweeps: Sweeps = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"--sweep must be SETTING=VALUE,VALUE,... got {text!r}")
        try:
            check_keys([name], SETTINGS)
        except ValueError as error:
            raise ValueError(f"--sweep: {error}") from error
        if name in sweeps:
            raise ValueError(f"--sweep must name {name} once, got it twice; join the values")
        sweeps[name] = _parse_values(name, values.strip())
    count = math.prod(map(len, sweeps.values()))
    if count > MAX_COMBINATIONS:
        raise ValueError(
            f"--sweep must make at most {MAX_COMBINATIONS:,} combinations, got {count:,}"
        )
    return sweeps


def combinations(sweeps: Sweeps) -> list[dict[str, Any]]:
    """Every combination of the values, the last setting's changing first; one empty without a sweep."""
    return [
        dict(zip(sweeps, values, strict=True)) for values in itertools.product(*sweeps.values())
    ]


def check_alone(sweeps: Sweeps, given: Collection[str], where: str) -> None:
    """ValueError if one of the settings that are given `where` says what a sweep says."""
    said = {*sweeps}
    if said & {*EXACT_SIZE}:
        said |= {*EXACT_SIZE, *BUCKET}
    elif said & {*BUCKET}:
        said |= {*EXACT_SIZE}
    both = [name for name in SETTINGS if name in said and name in given]
    if both:
        raise ValueError(
            f"{where} must leave out {both[0]}, as --sweep sets {' and '.join(sweeps)}"
        )


def _parse_values(name: str, text: str) -> list[Any]:
    if text.startswith("["):
        values = parse_json(text, f"--sweep {name}")
    else:
        values = [_parse_value(name, word.strip()) for word in text.split(",")]
    if not values:
        raise ValueError(f"--sweep {name} must have a value, got none")
    values = [_checked(name, value) for value in values]
    for place, value in enumerate(values):
        # 1 is True to Python, and not to us.
        if any(value == other and type(value) is type(other) for other in values[:place]):
            raise ValueError(f"--sweep {name} must have each value once, got {value!r} twice")
    return values


def _checked(name: str, value: Any) -> Any:
    try:
        return checked(name, value)
    except ValueError as error:
        raise ValueError(f"--sweep: {error}") from error


def _parse_value(name: str, word: str) -> Any:
    kinds = kinds_of(name)
    if tuple[str, ...] in kinds:  # of which none is a word
        return (word,)
    if word.lower() == "none" and type(None) in kinds:
        return None
    if bool in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        if int in kinds:
            return int(word)
        if float in kinds:
            return float(word)
        if tuple[int, ...] in kinds:
            return tuple(int(part) for part in word.split(":"))
        if any(get_origin(one) is tuple for one in kinds):
            return tuple(float(part) for part in word.split(":"))
    except ValueError:
        return word  # which Request refuses by saying what it must be
    return word
