"""What a run was begun with, beside what it is to go on with.

A state keeps its stage as it was resolved, and a digest of its data. What a saved model cannot go on
with is refused; what would make another run of it, too, unless it is accepted by name; what changes
nothing that is learned is said.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pixart.dataset.batches import CaptionDataset
from pixart.dataset.features import Entry
from pixart.files import parse_json
from pixart.training.parallel import groups
from pixart.training.recipe import stage_fields
from pixart.training.run import Run
from pixart.training.stage import CONTROLNET, DRAWN, ResolvedStage
from pixart.training.state import read_progress

# Names of fields, or of what holds them.
NEVER = (
    "trains",
    "size",
    "resolution",
    "pe_interpolation",
    "max_length",
    "micro_condition",
    "vae_scale",
    "kv_compress",
    "kv_norm",
    "kv_start",
    "prediction",
    "control.blocks",
    "optimizer.name",
)
FREE = (
    "batch.accumulate",
    "hours",
    "checkpoint_blocks",
    "parallel",
    "sequence",
    "validation.every",
    "validation.timesteps",
    "validation.prompts",
    "validation.guidance",
    "validation.sampling_steps",
    "validation.metrics",
    "validation.metric_count",
    "validation.metric_reference",
    "validation.metric_options",
    "validation.metric_weights",
    "validation.best",
    "validation.patience",
    "save_every",
    "log_every",
    "keep",
    "track",
)
_ELSEWHERE = ("name", "lora")  # checked of every state
_SOURCES = ("data.source", "data.prior")


def record(run: Run, stage: ResolvedStage) -> dict[str, Any]:
    """What a stage is trained with: fields by their dotted names, and digests of its data."""
    fields = dict(_flat(parse_json(json.dumps(asdict(stage)), "stage"), ""))
    if stage.batch.tokens is not None:
        fields["batch.multiple"] = stage.batch.unit(groups(stage))
    fields |= {"save_every": run.save_every, "log_every": run.log_every, "keep": run.keep}
    fields["track"] = list(run.trackers)
    data: dict[str, CaptionDataset] = {}
    if stage.data.source not in ("", DRAWN):
        data["data.source"] = run.captions(stage)
    if stage.data.prior not in ("", DRAWN):
        data["data.prior"] = run.dataset(stage.data.prior, stage.resolution)
    is_steered = stage.trains == CONTROLNET
    digests = {name: _data_digest(one, is_steered) for name, one in data.items()}
    return {"fields": fields, "data": digests}


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _data_digest(data: CaptionDataset, is_steered: bool) -> str:
    """Of what is learned from, in its order: not of where it lies. is_steered: with the pictures that steer."""
    found = hashlib.sha256()
    for entry in data.entries:
        captions = {name: _name(place) for name, place in sorted(entry.captions.items())}
        values: list[Any] = [captions]
        if isinstance(entry, Entry):
            values = [entry.bucket, entry.size, _name(entry.image), captions]
            values += [_name(entry.control)] if is_steered else []
        found.update(json.dumps(values).encode())
    return found.hexdigest()


def _name(place: Any) -> str:
    """The digest that names a prepared feature, without its shard; the name of an official file."""
    return str(place[-1]) if isinstance(place, list | tuple) else Path(str(place)).name


def check_accepted(names: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the names of --accept-changes."""
    fields = [name for name in stage_fields() if not _is_in(name, _ELSEWHERE)]
    meant = [name for name in fields if not _is_in(name, (*NEVER, *FREE))]
    for name in names:
        plain = name.replace("-", "_")
        if any(_is_of(field, plain) for field in meant):
            continue
        if never := [field for field in fields if _is_of(field, plain)]:
            rule = "can never be" if _is_in(never[0], NEVER) else "need not be"
            yield f"--accept-changes: {name} {rule} accepted; leave it out"
        else:
            words = {part for field in meant for part in (field, field.split(".")[-1])}
            near = [_option(word) for word in get_close_matches(plain, sorted(words), 1)]
            hint = f"did you mean {near[0]}" if near else "such as learning-rate or data"
            yield f"--accept-changes must name fields of a stage, got {name!r}; {hint}"


def check_changes(run: Run, stage: ResolvedStage) -> Iterator[str]:
    """Yield what a stage cannot go on with, or only if it is accepted; say what it may."""
    state = run.state(stage)
    said = []
    for field, before, now, kind in _changes(run, stage, state) if state is not None else ():
        rule = f"{field} must be as {state} was trained, {before}, got {now}"
        if kind == "never":
            yield f"{rule}; give another --output for another run"
        elif kind == "free" or any(_is_of(field, name.replace("-", "_")) for name in run.accepted):
            said.append(f"{field} {now} instead of {before}")
        else:
            option = "data" if field in _SOURCES else _option(field.split(".")[-1])
            yield f"{rule}; if it is meant, --accept-changes {option}, else another --output"
    if said:
        run.say(f"stage {stage.name}: goes on with {', '.join(said)}")


def other_settings(run: Run, stage: ResolvedStage) -> list[str]:
    """What a finished stage was trained with, where that is not what it says now."""
    state = run.state(stage)
    changes = _changes(run, stage, state) if state is not None else ()
    return [
        f"{field} {before}, not {now}" for field, before, now, kind in changes if kind != "free"
    ]


def _changes(run: Run, stage: ResolvedStage, state: Path) -> Iterator[tuple[str, str, str, str]]:
    """Field, what it was, what it is, and "never", "meant" or "free"; none of a state that does not
    say how it was begun."""
    begun = read_progress(state).get("begun")
    if begun is None:
        return
    fields, digests = begun.get("fields"), begun.get("data")
    if not isinstance(fields, dict) or not isinstance(digests, dict):
        raise ValueError(f"{state}: begun must hold fields and data, got {_shown(begun)}")
    now = record(run, stage)
    for name, value in now["fields"].items():
        if name not in fields or _is_in(name, _ELSEWHERE):
            continue
        same_data = digests.get(name) == now["data"].get(name)
        if name in _SOURCES and not same_data and fields[name] and value:
            yield name, "with the samples of then", f"others in {value}", "meant"
        elif fields[name] != value:
            is_moved = name in _SOURCES and same_data and name in digests
            kind = "free" if is_moved else _kind(name, fields, now["fields"])
            yield name, _shown(fields[name]), _shown(value), kind


def _kind(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if _is_in(name, NEVER) or name == "ema" and None in (before[name], now[name]):
        return "never"
    # A rate that decays towards the last step is another one from the first on.
    schedules = {before.get("optimizer.schedule"), now["optimizer.schedule"]}
    return (
        "free" if _is_in(name, FREE) or name == "steps" and schedules == {"constant"} else "meant"
    )


def _is_in(field: str, names: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)


def _is_of(field: str, name: str) -> bool:
    """Whether a name means a field: its last part, all of it, or what holds it."""
    return _is_in(field, (name,)) or field.endswith(f".{name}")


def _option(name: str) -> str:
    return name.replace("_", "-")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:60] + "…"
