"""From options to jobs: what generate draws, and where it goes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pixart.config import EMBEDDED, KVCompression
from pixart.generation.names import fill, template_of
from pixart.generation.options import SAMPLING, Options
from pixart.generation.pictures import check_room, read_metadata
from pixart.generation.prompts import read_prompts
from pixart.pipeline.metadata import CHOICES, MODEL_OPTIONS, Metadata
from pixart.pipeline.request import BUCKET, EXACT_SIZE, SETTINGS, Request
from pixart.releases import RELEASES


@dataclass(frozen=True)
class Job:
    """One picture to draw. model: the options that open the pipeline. asked, asked_model: what its file
    is to say was asked for; where a picture is drawn again, choices that were left open still are."""

    index: int
    request: Request
    model: Mapping[str, Any]
    asked: Request
    asked_model: Mapping[str, Any]
    path: Path = Path()


def plan(options: Options) -> tuple[list[Job], Options]:
    """All jobs, checked as far as they can be without a model. A picture given by --from-image
    supplies every option that was not given anew."""
    sources = sum(
        (bool(options.prompt), options.prompts is not None, options.from_image is not None)
    )
    if sources != 1:
        given = "none of them" if sources == 0 else "several"
        raise ValueError(f"give one of: prompts, --prompts FILE, --from-image FILE; got {given}")
    for name in ("num_images", "batch"):
        if (count := getattr(options, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {count}")
    lines: list[dict[str, Any]] = [{"prompt": text} for text in options.prompt]
    if options.from_image is not None:
        return _plan_again(options, read_metadata(options.from_image))
    if options.prompts is not None:
        lines = read_prompts(options.prompts)
    requests = _all_requests(options, lines)
    model = _model_of(options)
    jobs = [Job(k, request, model, request, model) for k, request in enumerate(requests)]
    return _checked(jobs, lines, options), options


def _plan_again(options: Options, drawn: Metadata) -> tuple[list[Job], Options]:
    """The picture as it was drawn, and what its file says was asked for, both with what is given now."""
    asked, asked_model = _as_asked(options, drawn)
    options, line = _as_drawn(options, drawn)
    requests = _all_requests(options, [line])
    was_asked = _all_requests(options, [asked])
    model = _model_of(options)
    jobs = [
        Job(k, request, model, one, asked_model)
        for k, (request, one) in enumerate(zip(requests, was_asked, strict=True))
    ]
    return _checked(jobs, [line], options), options


def _checked(jobs: list[Job], lines: list[dict[str, Any]], options: Options) -> list[Job]:
    """The jobs with their files, refused as early as can be."""
    _check_early(options, [job.request for job in jobs])
    jobs = _with_paths(jobs, lines, options)
    for job in jobs:
        _check_file(job, options.from_image)
    return jobs


def _model_of(options: Options) -> dict[str, Any]:
    return {name: _lasting(name, getattr(options, name)) for name in MODEL_OPTIONS}


def _all_requests(options: Options, lines: list[dict[str, Any]]) -> list[Request]:
    settings = _given_settings(options)
    return [one for line in lines for one in _requests(settings, line, options.num_images)]


def _given_settings(options: Options) -> dict[str, Any]:
    settings = {name: getattr(options, name, None) for name in SETTINGS if name != "prompt"}
    return {name: value for name, value in settings.items() if value is not None}


def _requests(settings: dict[str, Any], line: dict[str, Any], count: int) -> list[Request]:
    """What a line names, and the options for the rest; seeds count upwards."""
    own = {name: value for name, value in line.items() if name != "name"}
    asked = {name for name in own if own[name] is not None}
    if asked & {*EXACT_SIZE}:
        idle: tuple[str, ...] = (*EXACT_SIZE, *BUCKET)
    else:
        idle = EXACT_SIZE if asked & {*BUCKET} else ()
    rest = {name: value for name, value in settings.items() if name not in idle}
    first = Request.from_dict({**rest, **own})
    if not first.prompt.strip():
        raise ValueError("prompt must not be empty; name what to draw")
    return [replace(first, seed=first.seed + k) for k in range(count)]


def _check_early(options: Options, requests: list[Request]) -> None:
    """What needs no model: better refused in the first second than after T5 has been loaded."""
    from pixart.device import check_cuda_graph, choose_device
    from pixart.sampler.schedulers import SCHEDULERS

    for name in dict.fromkeys(request.scheduler for request in requests):
        if name is not None and name not in SCHEDULERS:
            raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}")
    if options.kv_compress:
        KVCompression.parse(options.kv_compress)
    check_cuda_graph(options.cuda_graph, choose_device(options.device))
    if options.dtype not in (None, "fp32", "bf16", "fp16"):  # from a picture: tyro knows
        raise ValueError(f"dtype must be fp32, bf16 or fp16, got {options.dtype!r}")


def _check_file(job: Job, source: Path | None) -> None:
    if source is not None and job.path.resolve() == source.resolve():
        raise ValueError(f"--output must not be the picture to draw again, got {job.path}")
    check_room(job.path, Metadata(job.request, job.model, job.asked, job.asked_model))


def _lasting(name: str, value: Any) -> str | bool | list[str] | None:
    """As a picture is to carry it: paths from the root, for it may be drawn again elsewhere."""
    if name == "model" and value in (None, EMBEDDED):
        return EMBEDDED
    if name == "lora":
        return [_lasting_lora(text) for text in value]
    if value is None or name not in ("model", "transformer", "config"):
        return value
    return _absolute(value)


def _lasting_lora(text: str) -> str:
    from pixart.lora.adapters import parse_lora

    path, weight = parse_lora(text)
    return f"{_absolute(path)}:{weight}"


def _absolute(place: str | Path) -> str:
    """A path that is there, from the root; anything else is a release or a hub id."""
    if place in RELEASES:
        return str(place)
    path = Path(place).expanduser()
    return os.path.abspath(path) if path.exists() else str(place)


def _with_paths(jobs: list[Job], lines: list[dict[str, Any]], options: Options) -> list[Job]:
    """Give every job its file. Names are unique within a run and the same in the next one."""
    template = template_of(options, len(jobs))
    placed: list[Job] = []
    seen: set[Path] = set()
    for job in jobs:
        line = lines[job.index // options.num_images]
        path = fill(template, job.request, job.index, line.get("name"))
        while path in seen:  # the same prompt and seed twice
            path = path.with_name(f"{path.stem}-{job.index}{path.suffix}")
        seen.add(path)
        placed.append(replace(job, path=path))
    return placed


def _given(options: Options) -> set[str]:
    """Names of the options that are given now."""
    defaults = type(options)()
    return {
        f.name for f in fields(options) if getattr(options, f.name) != getattr(defaults, f.name)
    }


def _as_asked(options: Options, drawn: Metadata) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the options of the model that were asked for, overridden by those given now."""
    given, settings, model = _given(options), drawn.asked.to_dict(), dict(drawn.asked_model)
    if given & {"size", *BUCKET}:
        settings |= dict.fromkeys((*EXACT_SIZE, *BUCKET))
    settings |= {name: value for name, value in _given_settings(options).items() if name in given}
    if "device" in given:
        model["cuda_graph"] = False  # it may not record one
    return settings, model | {k: v for k, v in _model_of(options).items() if k in given}


def _as_drawn(options: Options, drawn: Metadata) -> tuple[Options, dict[str, Any]]:
    """The options under which a picture was drawn, overridden by those given now, and its settings.

    A choice that was left open and that depends on what is given now is left open again.
    """
    given, source = _given(options), options.from_image
    assert source is not None
    is_other_model = bool(given & {*MODEL_OPTIONS})
    settings = (drawn.asked if is_other_model else drawn.request).to_dict()
    if given & {"size", *BUCKET}:
        settings |= dict.fromkeys((*EXACT_SIZE, *BUCKET))
        settings |= {name: getattr(drawn.asked, name) for name in CHOICES}
    if "scheduler" in given:
        settings |= {
            name: getattr(drawn.asked, name) for name in ("steps", "guidance", "guidance_interval")
        }
    settings |= {name: value for name, value in _given_settings(options).items() if name in given}
    model = dict(drawn.asked_model if is_other_model else drawn.model)
    model["device"] = drawn.asked_model["device"]  # another machine may have others
    if "device" in given:
        del model["cuda_graph"]  # which it may not record
    taken: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in model.items()
        if name not in given
    }
    if taken.get("config"):
        taken["config"] = Path(taken["config"])
    if "output" not in given:
        kind = f".{options.format}" if options.format else source.suffix
        taken["output"] = source.with_name(f"{source.stem}-again{kind}")
    idle: dict[str, Any] = dict.fromkeys(SAMPLING)  # settings have what was given
    return replace(options, **idle, **taken), settings
