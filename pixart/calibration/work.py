"""What `python -m pixart.calibrate` does: a model opened, its schedule found, a plan and a table of it."""

import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pixart import process
from pixart.calibration.journal import Journal
from pixart.calibration.options import Options
from pixart.calibration.pictures import Row, compare, table
from pixart.calibration.run import Calibration, Found
from pixart.calibration.studio import Scene, Settings, Studio
from pixart.config import EMBEDDED, KVCompression
from pixart.device import processor_name
from pixart.evaluation import caption_accuracy
from pixart.files import check_writable
from pixart.generation.prompts import read_prompts
from pixart.lora.adapters import parse_lora
from pixart.pipeline.fast import identity_of
from pixart.pipeline.request import Request, checked
from pixart.pipeline.text_to_image import Pipeline
from pixart.plans.plan import FEWEST_STEPS, Plan
from pixart.plans.schedule import RATIOS
from pixart.progress import Bar, say
from pixart.sampler.schedulers import STEPS, default_steps

KINDS = ("one", "pair", "group")  # of captions of the embedded world, in turn
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LATER = 10_000_019  # seeds of captions are none of those that the model card was measured with
# The most: all scenes are held, and PyTorch starts as many threads as it is told.
_COUNTS = {
    "scenes": (1, 10_000), "verify": (2, 10_000), "images": (1, 10_000), "bands": (1, 1000),
    "threads": (1, 1024),
}  # fmt: skip


def check_options(options: Options) -> list[Scene]:
    """The pictures to measure on. ValueError for what needs no model to be refused."""
    if not 0 < options.budget <= 1:
        raise ValueError(f"--budget must be above 0 and at most 1, got {options.budget:g}")
    for name, (least, most) in _COUNTS.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name} must be from {least} to {most:,}, got {value:,}")
    checked("seed", options.seed)
    checked("seed", options.seed + options.scenes + options.verify + options.images - 1)
    if not options.ratios or not {*options.ratios} <= {*RATIOS[1:]}:
        given = ", ".join(map(str, options.ratios)) or "none"
        raise ValueError(f"--ratios must be of 2, 3 and 4, got {given}")
    if options.prompts is None and options.model not in (None, EMBEDDED):
        raise ValueError(
            "--prompts must be given for a model that is not the embedded one: a plan is measured on what "
            "will be drawn"
        )
    if os.path.lexists(options.output) and not options.overwrite:
        raise ValueError(
            f"--output must be a new file, or given with --overwrite, got {options.output}"
        )
    if options.output.is_dir():
        raise ValueError(f"--output must be a file, {options.output} is a folder")
    check_writable(options.output)
    return _scenes(options)


def calibrate(options: Options) -> str:
    """Write the plan; returns the table."""
    scenes = check_options(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pipe = _open(options)
    by_default, settings = _settings(pipe, options)
    height, width = _size(pipe, options)
    studio = Studio(pipe, height, width)
    process.at_work()
    measured = scenes[: options.scenes + options.verify]  # --images may be others the next time
    about = {
        **{name: str(value) for name, value in asdict(options).items() if name not in _NOT_ABOUT},
        "prompts": [scene.prompt for scene in measured], "settings": str((by_default, settings)),
        "model": identity_of(pipe).config, "weights": dict(identity_of(pipe).weights),
    }  # fmt: skip
    journal = Journal(options.output.with_name(f"{options.output.name}.partial"), about)
    if journal.taken_up and not options.quiet:
        say(f"calibrate: {journal.taken_up} measurements are there already")
    try:
        pipe.prepare([scene.prompt for scene in scenes] + [""])
        found, rows = _measure(options, studio, (by_default, settings), scenes, journal)
    finally:
        journal.write()
    plan = Plan(
        identity_of(pipe), settings.steps, settings.interval, settings.guidance, settings.scheduler,
        found.schedule, _measured(options, studio, found, rows), settings.reuse,
    )  # fmt: skip
    plan.write(options.output)
    journal.remove()
    merged = "no block merged within the budget" if found.schedule is None else str(found.schedule)
    return f"{table(rows)}\n\nKV schedule: {merged}\nverified error: {found.error:.4f} of {options.budget:g}"


# What decides no number: a run may be taken up with another.
_NOT_ABOUT = ("output", "overwrite", "threads", "quiet", "budget", "images", "prompts")


def _measure(
    options: Options, studio: Studio, ways: tuple[Settings, Settings], scenes: list[Scene],
    journal: Journal,
) -> tuple[Found, list[Row]]:  # fmt: skip
    by_default, settings = ways
    probed, rest = scenes[: options.scenes], scenes[options.scenes :]
    verified, shown = rest[: options.verify], rest[options.verify :]
    studio.pipe.transformer.to(studio.pipe.device)
    calibration = Calibration(
        studio, settings, journal, bands=options.bands, ratios=options.ratios, quiet=options.quiet
    )
    found = calibration.find(options.budget, probed, verified)
    rows = compare(
        studio,
        [
            ("by default", by_default),
            ("no schedule", settings),
            ("plan", settings.with_schedule(found.schedule)),
        ],
        shown,
        journal,
        options.quiet,
    )
    return found, rows


def _open(options: Options) -> Pipeline:
    with Bar("load", None, quiet=options.quiet):
        return Pipeline.from_pretrained(
            options.model or EMBEDDED,
            transformer=options.transformer,
            lora=[parse_lora(text) for text in options.lora],
            kv_compression=KVCompression.parse(options.kv_compress)
            if options.kv_compress
            else None,
            variant=options.variant,
            device=options.device,
            dtype=_DTYPES[options.dtype] if options.dtype else None,
            cuda_graph=False,
        )


def _settings(pipe: Pipeline, options: Options) -> tuple[Settings, Settings]:
    """By default, and of the plan. ValueError where no plan could be made."""
    height, width = _size(pipe, options)
    like = Request("", height=height, width=width)
    by_default = Settings.of(pipe.resolve(like))
    wanted = Request(
        "", height=height, width=width, steps=options.steps, guidance=options.guidance,
        guidance_interval=options.guidance_interval, scheduler=options.scheduler,
        reuse_blocks=options.reuse_blocks,
    )  # fmt: skip
    settings = Settings.of(pipe.resolve(wanted))
    if pipe.few_step is not None:
        raise ValueError(
            f"--model must draw in many steps, got one that was distilled for {pipe.few_step}: there is nothing "
            "left to leave out"
        )
    for one in (by_default, settings):
        if one.scheduler is None:
            raise ValueError("--scheduler must be given for a model whose own has no name here")
        if one.steps <= FEWEST_STEPS or default_steps(pipe.solver(one.scheduler)) < STEPS:
            raise ValueError(
                f"--steps must be above {FEWEST_STEPS}, of a model and a scheduler that draw in so many, got "
                f"{one.steps} of {one.scheduler}: there is nothing left to leave out"
            )
    return by_default, settings


def _size(pipe: Pipeline, options: Options) -> tuple[int, int]:
    size = pipe.size_of(Request("", size=options.size))
    return size.height, size.width


def _scenes(options: Options) -> list[Scene]:
    count = options.scenes + options.verify + options.images
    if options.prompts is not None:
        texts = _prompts(options)[:count]
    else:
        of_kind = {
            kind: caption_accuracy.captions(
                caption_accuracy.Task(kind, 128, count=count), options.seed + _LATER
            )
            for kind in KINDS
        }
        texts = [of_kind[KINDS[n % len(KINDS)]][n] for n in range(count)]
    return [Scene(text, options.seed + n) for n, text in enumerate(texts)]


def _prompts(options: Options) -> list[str]:
    """Different ones, as what is verified on what was probed says nothing. ValueError for too few of them, and
    for a line that has more than a prompt."""
    assert options.prompts is not None
    texts: dict[str, None] = {}
    for line in read_prompts(options.prompts):
        of_no_picture = ("prompt", "name", "version")
        others = [
            name
            for name, value in line.values.items()
            if name not in of_no_picture and value is not None
        ]
        if others:
            raise ValueError(
                f"{line.place}: must have a prompt alone, settings are those of the command, got {others[0]}"
            )
        texts[str(line.values["prompt"])] = None
    count = options.scenes + options.verify + options.images
    if len(texts) < count:
        raise ValueError(
            f"--prompts must be a file of {count} different prompts or more (--scenes {options.scenes}, --verify "
            f"{options.verify}, --images {options.images}: one for each), {options.prompts} has {len(texts)}"
        )
    return list(texts)


def _measured(options: Options, studio: Studio, found: Found, rows: list[Row]) -> dict[str, Any]:
    first, plan = rows[0], rows[-1]
    device = studio.pipe.device
    is_cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if is_cuda else processor_name()
    values: dict[str, Any] = {
        "cost": plan.cost, "budget": options.budget, "schedule_error": found.error, "error": plan.error,
        "psnr": plan.psnr, "ssim": plan.ssim, "seconds": plan.seconds,
        "seconds_by_default": first.seconds, "images": plan.count, "seed": options.seed,
        "size": f"{studio.width}x{studio.height}", "commit": _commit(), "machine": machine,
    }  # fmt: skip
    if plan.right is not None and first.right is not None:
        values["accuracy"] = [plan.right, plan.count]
        values["accuracy_by_default"] = [first.right, first.count]
    return {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in values.items()
        if value == value  # pictures that are too small have no SSIM
    }


def _commit() -> str:
    """Of the code that measured, "" where it is in no repository."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
