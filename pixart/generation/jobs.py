"""From options to jobs: what generate draws, and where it goes."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pixart.config import KVCompression
from pixart.generation.drafts import (
    Drafts,
    Job,
    given_lines,
    given_settings,
    model_of,
    plan_file,
    requests_of,
)
from pixart.generation.early import check_known
from pixart.generation.names import Places, Template, picture_name, template_of
from pixart.generation.options import SAMPLING, Options
from pixart.generation.prompts import located, naming, read_prompts
from pixart.generation.sheet import MAX_PICTURES
from pixart.generation.sources import Sources
from pixart.generation.sweeps import Sweeps, check_alone, combinations, parse_sweeps
from pixart.pipeline.inputs import named_in
from pixart.pipeline.limits import BUCKET, EXACT_SIZE, STEPS
from pixart.pipeline.metadata import CHOICES, CUDA_GRAPH, MODEL_OPTIONS, Metadata
from pixart.pipeline.pictures import check_room, find_drawn, read_metadata
from pixart.pipeline.request import PER_CONTROL, Request
from pixart.preprocess import networks_of, parse_places

MAX_JOBS = 1_000_000  # each is held, with its file: a few KB
# What a model took because of others, which are first, and takes again where one of those is given anew.
_TAKEN_FOR = (
    (("scheduler",), ("steps", "timesteps", "guidance", "guidance_interval")),
    ((*EXACT_SIZE, *BUCKET), ("upscale", *CHOICES)),
    (
        ("image", "strength", "fit", "mask", "outpaint"),
        (
            "strength",
            "fit",
            *EXACT_SIZE,
            *BUCKET,
            "guidance",
            "upscale",
            "upscale_guidance",
            *CHOICES,
        ),
    ),
    (("upscale",), ("guidance", "upscale_guidance", "fit", *EXACT_SIZE, *BUCKET, *CHOICES)),
    (("control_image",), PER_CONTROL),
)


def plan(options: Options) -> tuple[list[Job], Options]:
    """All jobs, checked as far as they can be without a model. A picture given by --from-image
    supplies every option that was not given anew. They have their files unless `needs_model`."""
    sweeps = checked_sweeps(options)
    sources, source = Sources(), "" if options.from_image is None else str(options.from_image)
    with naming(source):
        if options.from_image is None:
            jobs = list(_jobs_of_lines(options, sweeps))
        else:
            jobs, options = _plan_again(options, sweeps, sources)
        check_early(options, jobs)
        jobs = [with_inputs(job, options, sources) for job in jobs]
    _check_output(options, jobs)
    return (jobs if needs_model(jobs, options) else placed(jobs, options)), options


def checked_sweeps(options: Options) -> Sweeps:
    """What is swept. ValueError for options that do not go together, whatever the lines of a file say."""
    sweeps = parse_sweeps(options.sweep)
    _check_counts(options, sweeps)
    check_alone(sweeps, given_settings(options), "options")
    _check_source(options, sweeps)
    return sweeps


def needs_model(jobs: Sequence[Job], options: Options) -> bool:
    """Whether --output names settings that are left to the model."""
    template = template_of(options, len(jobs))
    return any(template.is_open(job.request) for job in jobs)


def placed(
    jobs: Sequence[Job], options: Options, resolved: Sequence[Request] | None = None
) -> list[Job]:
    """The jobs with their files: those that this very request drew before, or free names.

    Names are unique within a run, and the same in the next one. resolved: the requests with what the
    model takes where they leave something open.
    """
    template, places = template_of(options, len(jobs)), Places()
    requests = [job.request for job in jobs] if resolved is None else resolved
    return [
        _placed(job, _wanted(template, job, request, options), places, options.overwrite)
        for job, request in zip(jobs, requests, strict=True)
    ]


def _wanted(template: Template, job: Job, request: Request, options: Options) -> Path:
    path = template.fill(request, job.index, picture_name(request, job.name, job.swept))
    if options.from_image is not None and path.resolve() == options.from_image.resolve():
        raise ValueError(f"--output must not be the picture to draw again, got {path}")
    return path


def _placed(job: Job, wanted: Path, places: Places, overwrite: bool) -> Job:
    there = None
    for path in places.there(wanted):
        if there := find_drawn(path, job.asked, job.asked_model, job.inputs):
            break
    else:
        is_taken = os.path.isdir(wanted)  # which is refused where it is to be written
        path = wanted if is_taken else places.free(wanted, beside=not overwrite)
    places.take(path)
    said = Metadata(job.request, job.model, job.asked, job.asked_model, inputs=job.inputs)
    check_room(path, said)
    return replace(job, path=path, there=None if overwrite else there)


def _check_source(options: Options, sweeps: Sweeps) -> None:
    sources = (options.prompt, options.prompts, options.from_image, sweeps.get("prompt"))
    count = sum(bool(source) for source in sources)
    if count != 1 and not (count == 0 and _only_enlarges(options, sweeps)):
        given = "none of them" if count == 0 else "several"
        hint = '; "" is an empty prompt' if count == 0 and options.image is not None else ""
        raise ValueError(
            f"give one of: prompts, --prompts FILE, --from-image FILE; got {given}{hint}"
        )


def _only_enlarges(options: Options, sweeps: Sweeps) -> bool:
    """Whether a picture is given to be made larger, which needs no prompt."""
    given = {*given_settings(options), *sweeps}
    return {"image", "upscale"} <= given and "strength" not in given


def _check_counts(options: Options, sweeps: Sweeps) -> None:
    for name in ("num_images", "batch"):
        if (count := getattr(options, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {count}")
    if "seed" in sweeps and options.num_images > 1:
        raise ValueError(
            f"--num-images must be 1 where seed is swept, got {options.num_images}; sweep more seeds"
        )
    if options.quality is not None and not 1 <= options.quality <= 100:
        raise ValueError(f"--quality must be from 1 to 100, got {options.quality}")


def _check_output(options: Options, jobs: Sequence[Job]) -> None:
    template = template_of(options, len(jobs))
    if options.quality is not None and template.text.lower().endswith(".png"):
        raise ValueError(
            "--quality must be left out for .png, which loses nothing; give --format jpg or webp"
        )
    if options.grid and len(jobs) > MAX_PICTURES:
        raise ValueError(
            f"--grid must be of at most {MAX_PICTURES} pictures, got {len(jobs)}; leave it out"
        )


def _jobs_of_lines(options: Options, sweeps: Sweeps) -> Iterator[Job]:
    """Every line in every combination; seeds change first."""
    lines = read_prompts(options.prompts) if options.prompts else given_lines(options, sweeps)
    drafts, index = Drafts(options, sweeps), 0
    _check_total(len(lines) * drafts.per_line)
    for line in lines:
        for job in drafts.jobs(line, index):
            yield job
            index += 1


def _check_total(count: int) -> None:
    if count > MAX_JOBS:
        raise ValueError(
            f"a run must be of at most {MAX_JOBS:,} pictures, got {count:,}; tars take more "
            "(--output tars/{shard:05d}.tar)"
        )


def with_inputs(job: Job, options: Options, sources: Sources) -> Job:
    """The job with what its pictures are now, once it is clear that it can be drawn from them."""
    with naming(job.place):
        check_control(options, job.request)
        if not named_in(job.request):
            return job
        sources.check(job.request)
        return replace(job, inputs=sources.digests(job.request))


def check_control(options: Options, request: Request) -> None:
    files, pictures = len(options.control), len(request.control_image or ())
    if files != pictures:
        raise ValueError(
            f"control_image must be given once for each --control, got {pictures} for {files}"
        )


def _plan_again(options: Options, sweeps: Sweeps, sources: Sources) -> tuple[list[Job], Options]:
    """The picture as it was drawn, and what its file says was asked for, both with what is given now."""
    assert options.from_image is not None
    drawn, place = read_metadata(options.from_image), str(options.from_image)
    sources.check_same(drawn, {*_given(options), *sweeps})
    jobs: list[Job] = []
    opened, several = options, combinations(sweeps)
    _check_total(len(several) * options.num_images)
    for swept in several:
        asked, asked_model = _as_asked(options, drawn, swept)
        opened, line = _as_drawn(options, drawn, swept)
        model = model_of(opened)
        seeds = range(options.num_images)
        requests, was_asked = requests_of({}, line, seeds), requests_of({}, asked, seeds)
        for request, one in zip(requests, was_asked, strict=True):
            job = Job(len(jobs), request, model, one, asked_model, place, None, swept)
            jobs.append(job)
    return jobs, opened


def check_early(options: Options, jobs: Iterable[Job]) -> None:
    """What needs no model: better refused in the first second than after T5 has been loaded."""
    import torch

    from pixart.device import check_attention, check_cuda_graph, choose_device
    from pixart.quantize import check_quantize
    from pixart.sampler.schedulers import SCHEDULERS

    if options.kv_compress:
        KVCompression.parse(options.kv_compress)
    device = choose_device(options.device, may_lack=options.plan)
    check_cuda_graph(CUDA_GRAPH[options.cuda_graph], device)
    check_attention(options.attention, device)
    if options.dtype not in (None, "fp32", "bf16", "fp16"):  # from a picture: tyro knows
        raise ValueError(f"dtype must be fp32, bf16 or fp16, got {options.dtype!r}")
    is_half = options.dtype == "fp16"
    check_quantize(options.quantize, torch.float16 if is_half else None, device, options.plan)
    kinds: set[str] = set()
    known: set[Any] = set()
    for job in jobs:
        name = job.request.scheduler
        if name is not None and name not in SCHEDULERS:
            with naming(job.place):
                raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}")
        check_known(options, job, known)
        kinds |= {*(job.request.control_preprocessor or ())}
    read = {network for kind in kinds for network in networks_of(kind)}
    if unread := parse_places(options.preprocessor_weights).keys() - read:
        raise ValueError(
            "preprocessor_weights must be of networks that --control-preprocessor has, got "
            f"{', '.join(sorted(unread))} with {', '.join(sorted(kinds)) or 'none'}"
        )


def _given(options: Options) -> set[str]:
    """Names of the options that are given now."""
    defaults = type(options)()
    return {
        f.name for f in fields(options) if getattr(options, f.name) != getattr(defaults, f.name)
    }


def _as_asked(
    options: Options, drawn: Metadata, swept: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the options of the model that were asked for, overridden by those given now."""
    given, settings = {*_given(options), *swept}, drawn.asked.to_dict()
    model = dict(drawn.asked_model)
    if given & {*EXACT_SIZE, *BUCKET}:
        settings |= dict.fromkeys((*EXACT_SIZE, *BUCKET))
    if given & {*STEPS}:
        settings |= dict.fromkeys(STEPS)
    settings |= {**given_settings(options), **located(swept)}
    if "device" in given:
        model["cuda_graph"] = "auto"  # it may not record one
    return settings, model | {k: v for k, v in model_of(options).items() if k in given}


def _as_drawn(
    options: Options, drawn: Metadata, swept: Mapping[str, Any]
) -> tuple[Options, dict[str, Any]]:
    """The options under which a picture was drawn, overridden by those given now, and its settings.

    A choice that was left open and that depends on what is given now is left open again.
    """
    from pixart.device import choose_device

    given, source = {*_given(options), *swept}, options.from_image
    assert source is not None
    is_other_model = bool(given & {*MODEL_OPTIONS})
    settings = (drawn.asked if is_other_model else drawn.request).to_dict()
    for causes, taken_for_them in _TAKEN_FOR:
        if given & {*causes}:
            settings |= {name: getattr(drawn.asked, name) for name in taken_for_them}
    if given & {*EXACT_SIZE, *BUCKET}:
        settings |= dict.fromkeys((*EXACT_SIZE, *BUCKET))
    if given & {*STEPS}:
        settings |= dict.fromkeys(STEPS)
    settings |= {**given_settings(options), **located(swept)}
    model = dict(drawn.asked_model if is_other_model else drawn.model)
    model["fast"] = plan_file(model["fast"])
    model["device"] = drawn.asked_model["device"]  # another machine may have others
    asked = drawn.asked_model["cuda_graph"]
    if "device" in given:
        del model["cuda_graph"]  # which it may not record
    elif asked == "auto" and choose_device(model["device"], may_lack=options.plan).type != "cuda":
        model["cuda_graph"] = asked  # nobody asked for what this machine cannot do
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
