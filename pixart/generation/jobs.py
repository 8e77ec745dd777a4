"""From options to jobs: what generate draws, and where it goes."""

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.config import EMBEDDED, KVCompression
from pixart.generation.pictures import (
    CHOICES,
    EXIF_LIMIT,
    MODEL_OPTIONS,
    SUFFIXES,
    carried,
    read_request,
)

if TYPE_CHECKING:
    from pixart.generation.options import Options
    from pixart.pipeline.text_to_image import Pipeline

_OTHER_PICTURES = (
    ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".jfif", ".jpe",
    ".svg", ".ico", ".ppm", ".tga", ".exr", ".pdf",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One picture to draw. height and width are 0 until `sized`; batched and tile are None until the
    picture is drawn, unless it is drawn again."""

    index: int
    prompt: str
    negative: str
    seed: int
    steps: int | None
    guidance: float | None
    guidance_interval: tuple[float, float]
    scheduler: str | None
    size: str | None
    aspect: str | None
    resolution: str | None
    model: dict[str, str | bool | list[str] | None]
    path: Path
    batched: bool | None = None
    tile: int | bool | None = None
    height: int = 0
    width: int = 0
    note: str = ""

    def sized(self, pipe: "Pipeline") -> "Job":
        """With the size in pixels that the pipeline's model will draw."""
        from pixart.resolution import resolve_size

        size = resolve_size(
            self.size, self.aspect, self.resolution, native=pipe.native, multiple=pipe.multiple
        )
        return replace(self, height=size.height, width=size.width, note=size.note)

    def request(self) -> dict[str, Any]:
        """What draws this picture again."""
        left_out = {"index", "path", "note", "height", "width"}
        return {key: value for key, value in asdict(self).items() if key not in left_out}


def plan(options: "Options") -> "tuple[list[Job], Options]":
    """All jobs, checked as far as they can be without a model. A picture given by --from-image
    supplies every option that was not given anew."""
    sources = sum(
        (bool(options.prompt), options.prompts is not None, options.from_image is not None)
    )
    if sources != 1:
        given = "none of them" if sources == 0 else "several"
        raise ValueError(f"give one of: prompts, --prompts FILE, --from-image FILE; got {given}")
    if options.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {options.num_images}")
    choices: dict[str, Any] = {}
    if options.from_image is not None:
        options, choices = _as_drawn(options, options.from_image)
    _check_early(options)
    lines: list[dict[str, Any]] = [{"prompt": text} for text in options.prompt]
    if options.prompts is not None:
        lines = read_prompts(options.prompts)
    jobs = [_job(options, line, k) for line in lines for k in range(options.num_images)]
    jobs = [replace(job, index=index, **choices) for index, job in enumerate(jobs)]
    for job in jobs:
        _check_job(job)
    jobs = _with_paths(jobs, lines, options)
    for job in jobs:
        _check_file(job, options.from_image)
    return jobs, options


def _check_early(options: "Options") -> None:
    """What needs no model: better refused in the first second than after T5 has been loaded."""
    from pixart.device import check_cuda_graph, choose_device
    from pixart.sampler.schedulers import SCHEDULERS

    if options.scheduler is not None and options.scheduler not in SCHEDULERS:
        raise ValueError(
            f"scheduler must be one of {', '.join(SCHEDULERS)}, got {options.scheduler!r}"
        )
    if options.kv_compress:
        KVCompression.parse(options.kv_compress)
    check_cuda_graph(options.cuda_graph, choose_device(options.device))
    if options.dtype not in (None, "fp32", "bf16", "fp16"):  # from a picture: tyro knows
        raise ValueError(f"dtype must be fp32, bf16 or fp16, got {options.dtype!r}")


def _check_job(job: Job) -> None:
    from pixart.text.tokenizer import check_text

    check_text("prompt", job.prompt)
    check_text("negative", job.negative)
    if not job.prompt.strip():
        raise ValueError("prompt must not be empty; name what to draw")
    if job.steps is not None and job.steps < 1:
        raise ValueError(f"steps must be an integer from 1 up, got {job.steps}")
    if job.guidance is not None and not 0 <= job.guidance < math.inf:
        raise ValueError(f"guidance must be a finite number from 0 up, got {job.guidance}")
    if not 0 <= job.seed < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, got {job.seed}")


def _check_file(job: Job, source: Path | None) -> None:
    if source is not None and job.path.resolve() == source.resolve():
        raise ValueError(f"--output must not be the picture to draw again, got {job.path}")
    size = len(carried(job).encode())
    if job.path.suffix.lower() != ".png" and size > EXIF_LIMIT:
        raise ValueError(
            f"prompt must fit into {EXIF_LIMIT} bytes of a {job.path.suffix} file, got {size}; "
            "use --format png"
        )


def _job(options: "Options", line: dict[str, Any], k: int) -> Job:
    first = options.seed or 0
    return Job(
        index=0,
        prompt=line["prompt"],
        negative=line.get("negative", options.negative or ""),
        seed=int(line.get("seed", first)) + k,
        steps=line.get("steps", options.steps),
        guidance=line.get("guidance", options.guidance),
        guidance_interval=options.guidance_interval or (0.0, 1.0),
        scheduler=options.scheduler,
        size=line.get("size", options.size),
        aspect=None if "size" in line else options.aspect,
        resolution=None if "size" in line else options.resolution,
        model={name: _lasting(name, getattr(options, name)) for name in MODEL_OPTIONS},
        path=Path(),
    )


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
    """A path that is there, from the root; anything else is a hub id."""
    path = Path(place).expanduser()
    return os.path.abspath(path) if path.exists() else str(place)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The lines of a .txt or .jsonl file as {"prompt": ..., ...}; empty lines are passed over."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    # Not splitlines, which also cuts where JSON allows it, at U+2028.
    numbered = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path}: holds no prompt")
    if path.suffix.lower() == ".json":
        raise ValueError(f"{path}: must be text, a prompt a line, or .jsonl, an object a line")
    if path.suffix.lower() == ".jsonl":
        return [_read_line(path, number, line) for number, line in numbered]
    return [{"prompt": line} for _, line in numbered]


_LINE_TYPES: dict[str, tuple[type, ...]] = {
    "prompt": (str,), "negative": (str,), "name": (str,), "size": (str, int), "seed": (int,),
    "steps": (int,), "guidance": (int, float),
}  # fmt: skip


def _read_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: is not JSON ({error})") from error
    if not isinstance(values, dict) or not values.get("prompt"):
        raise ValueError(f'{path}, line {number}: must be an object with a "prompt"')
    for key, value in values.items():
        if key not in _LINE_TYPES:
            raise ValueError(f"{path}, line {number}: knows {', '.join(_LINE_TYPES)}, got {key!r}")
        if not isinstance(value, _LINE_TYPES[key]) or isinstance(value, bool):
            raise ValueError(f"{path}, line {number}: {key} has the wrong type, got {value!r}")
    return values


def _with_paths(jobs: list[Job], lines: list[dict[str, Any]], options: "Options") -> list[Job]:
    """Give every job its file. Names are unique within a run and the same in the next one."""
    template = _template(options, len(jobs))
    placed: list[Job] = []
    seen: set[Path] = set()
    for job in jobs:
        line = lines[job.index // options.num_images]
        path = _fill(template, job, line.get("name"))
        while path in seen:  # the same prompt and seed twice
            path = path.with_name(f"{path.stem}-{job.index}{path.suffix}")
        seen.add(path)
        placed.append(replace(job, path=path))
    return placed


def _template(options: "Options", count: int) -> str:
    output = options.output or Path("outputs")
    suffix = output.suffix.lower()
    if suffix in _OTHER_PICTURES and not output.is_dir():
        raise ValueError(
            f"--output must end in .png, .jpg or .webp, or name a folder, got {output}"
        )
    if suffix in SUFFIXES and options.format not in (None, SUFFIXES[suffix]):
        raise ValueError(f"--output must end in .{options.format}, got {output}")
    if "{" in str(output):
        _check_template(str(output))
        return str(output) if suffix in SUFFIXES else f"{output}.{options.format or 'png'}"
    if suffix not in SUFFIXES:
        return str(output / f"{{name}}.{options.format or 'png'}")
    return str(output.with_name(f"{output.stem}-{{index}}{output.suffix}") if count > 1 else output)


_FIELDS = ("name", "prompt", "seed", "index")


def _check_template(template: str) -> None:
    unknown = [name for name in re.findall(r"{([^}]*)}", template) if name not in _FIELDS]
    if unknown:
        raise ValueError(
            f"--output knows {', '.join('{' + f + '}' for f in _FIELDS)}, got {{{unknown[0]}}}"
        )


def _fill(template: str, job: Job, name: str | None) -> Path:
    slug = safe_name(job.prompt)
    name = safe_name(name) if name else f"{slug}-{job.seed}"
    values = {"name": name, "prompt": slug, "seed": job.seed, "index": f"{job.index:04d}"}
    for key, value in values.items():
        template = template.replace("{" + key + "}", str(value))
    return Path(template)


def safe_name(text: str, length: int = 60) -> str:
    """A file name that any system takes, whatever the prompt: letters, digits and dashes.

    Where letters were lost, a digest keeps apart what would be one name.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if len(slug) > length or not text.isascii() or not slug:
        digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]
        slug = f"{slug[: length - 9].strip('-') or 'image'}-{digest}"
    return slug


def _as_drawn(options: "Options", path: Path) -> "tuple[Options, dict[str, Any]]":
    """The options under which a picture was drawn, overridden by those given now, and the choices
    that were made from free memory, unless what is given now could ask for others."""
    request = read_request(path)
    settings = {**request, **request["model"], "prompt": (request["prompt"],)}
    settings["config"] = settings["config"] and Path(settings["config"])
    defaults = type(options)()
    given = {
        f.name for f in fields(options) if getattr(options, f.name) != getattr(defaults, f.name)
    }
    sizes = {"size", "aspect", "resolution"}
    if given & sizes:
        settings |= dict.fromkeys(sizes)
    if "device" in given:  # which may record no graphs
        del settings["cuda_graph"]
    if "output" not in given:
        kind = f".{options.format}" if options.format else path.suffix
        settings["output"] = path.with_name(f"{path.stem}-again{kind}")
    taken: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if name in {f.name for f in fields(options)} and name not in given
    }
    chosen_anew = given & (sizes | set(MODEL_OPTIONS))
    choices = {} if chosen_anew else {name: request[name] for name in CHOICES}
    return replace(options, **taken), choices
