"""Recipes: a list of stages, shipped with the library or in a YAML file."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import tyro

from pixart.training.stage import Stage

RECIPES = Path(__file__).parent / "recipes"


def shipped() -> list[str]:
    """Names of the recipes that come with the library."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str | Path) -> list[Stage]:
    """The stages of a shipped recipe or of a YAML file: a list under `stages`, each the fields of a
    Stage; what stands under `defaults` holds for all. Raises ValueError for what is no recipe."""
    path = RECIPES / f"{name}.yaml" if str(name) in shipped() else Path(name)
    values = _read(path, str(name))
    stages = []
    for number, fields in enumerate(values["stages"]):
        if not isinstance(fields, dict) or not isinstance(fields.get("name"), str):
            raise ValueError(f"{path}: stage {number} must be a mapping with a name")
        where = f"{path}, stage {fields['name']}"
        merged = _merge(values.get("defaults") or {}, fields)
        stages.append(_parse(merged, where))
    names = [stage.name for stage in stages]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: names of stages must differ, got {names}")
    return stages


def _read(path: Path, name: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"recipe must be one of {', '.join(shipped())}, or a YAML file, got {name!r} "
            f"({getattr(error, 'strerror', None) or error})"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict) or not isinstance(values.get("stages"), list):
        raise ValueError(f"{path}: must hold a list under `stages`")
    if unknown := sorted(set(values) - {"stages", "defaults"}, key=str):
        raise ValueError(f"{path}: knows `stages` and `defaults`, got {unknown[0]!r}")
    return values


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both and key != "captions" else value
    return merged


def _parse(values: dict[str, Any], where: str) -> Stage:
    name = values.pop("name")
    arguments = list(_flags(Stage, values, "", where))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return tyro.cli(Stage, default=Stage(name), args=arguments)
    except SystemExit:
        lines = (line.strip("│╭╮╰╯─ ") for line in said.getvalue().splitlines())
        reason = " ".join(line for line in lines if line)
        raise ValueError(f"{where}: {reason}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _flags(kind: type, values: Mapping[str, Any], prefix: str, where: str) -> Iterator[str]:
    """The command line that says the same."""
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{where}: knows {', '.join(hints)}, got {prefix}{key}")
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: {prefix}{key} must be a mapping, got {value!r}")
            yield from _flags(hints[key], value, f"{prefix}{key}.", where)  # type: ignore[arg-type]
            continue
        flag = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, bool):
            *above, last = flag.split(".")
            yield "--" + ".".join([*above, last if value else f"no-{last}"])
            continue
        yield f"--{flag}"
        if isinstance(value, Mapping):
            yield from (str(part) for pair in value.items() for part in pair)
        else:
            yield from (str(one) for one in (value if isinstance(value, list) else [value]))
