"""What no model of these options can draw, told before one is opened or fetched."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pixart.config import EMBEDDED, KVCompression, PixArtConfig
from pixart.files import read_json
from pixart.generation.drafts import Job
from pixart.generation.options import Options
from pixart.generation.prompts import naming
from pixart.pipeline.request import Request
from pixart.plans.plan import MOST_STEPS
from pixart.plans.reuse import BlockReuse
from pixart.plans.schedule import KVSchedule
from pixart.releases import release_named


def check_known(options: Options, job: Job, known: set[Any]) -> None:
    """ValueError, with file and line, for blocks to merge or to reuse that the model does not have, and for
    timesteps that a scheduler does not take, where this is known without its weights. known: what was looked
    at before, to which this is added."""
    request = job.request
    blocks = request.kv_schedule, request.reuse_blocks
    kind = request.scheduler, request.steps, request.timesteps, *blocks
    if kind in known:
        return
    known.add(kind)
    with naming(job.place):
        if request.timesteps is not None:
            _check_timesteps(options, request)
        config = known_config(options) if any(blocks) else None
        if config is not None and request.kv_schedule is not None:
            KVSchedule.parse(request.kv_schedule).check(config)
        if config is not None and request.reuse_blocks is not None:
            BlockReuse.parse(request.reuse_blocks).check(config, request.steps or MOST_STEPS)


def known_config(options: Options) -> PixArtConfig | None:
    """Of a release, of the embedded model, or of a folder on this machine; None where it takes more to know it,
    and for what is broken, which opening it tells."""
    from pixart.checkpoint.config import config_from_diffusers
    from pixart.checkpoint.load import read_config

    place = options.transformer or options.model or EMBEDDED
    if options.config is not None:
        return read_config(options.config)
    if (release := release_named(place)) is not None:
        config = release.config
    else:
        folder = _folder(options) if options.transformer is None else Path(options.transformer)
        places = () if folder is None else (folder / "transformer", folder)
        file = next((at / "config.json" for at in places if (at / "config.json").is_file()), None)
        if file is None:
            return None
        try:
            values = read_json(file)
            config = (
                PixArtConfig.from_dict(values)
                if "depth" in values
                else config_from_diffusers(values, {}, model_max_length=1)
            )
        except (OSError, ValueError, TypeError):
            return None
    if options.kv_compress and config.kv_compression is None:
        return replace(config, kv_compression=KVCompression.parse(options.kv_compress))
    return config


def _check_timesteps(options: Options, request: Request) -> None:
    from pixart.pipeline.directory import read_scheduler
    from pixart.sampler.schedulers import make_scheduler
    from pixart.sampler.walk import Walk

    facts: dict[str, Any] = {}
    if request.scheduler is None:
        folder = _folder(options)
        if folder is None or options.transformer is not None or options.lora:
            return  # which may be distilled
        config = known_config(options)
        if config is None or config.few_step is not None:
            return
        try:
            facts = read_scheduler(folder)
        except (OSError, ValueError):
            return
    Walk(make_scheduler(request.scheduler, facts), request.timesteps)


def _folder(options: Options) -> Path | None:
    """Of the pipeline, where it is on this machine by its path."""
    from pixart.pipeline.directory import open_directory

    if options.model in (None, EMBEDDED):
        return open_directory(EMBEDDED, with_transformer=True)
    folder = Path(options.model)
    return folder if folder.is_dir() and release_named(options.model) is None else None
