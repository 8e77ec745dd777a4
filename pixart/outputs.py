"""From options to jobs, from jobs to files: what generate draws, where it goes, what a file says."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.config import KVCompression

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.generate import Options
    from pixart.pipeline import Pipeline

KEY = "pixart"  # of the PNG text chunk; JPEG and WebP carry the same text as an EXIF description
_EXIF_DESCRIPTION = 0x010E
_EXIF_LIMIT = 60_000  # bytes; JPEG holds 64 KiB of EXIF, WebP writers no more
_SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
# Options that decide a picture's bits beside the job itself, and are written into its file.
_MODEL_OPTIONS = (
    "model", "transformer", "kv_compress", "null_caption", "dtype", "text_encoder_dtype", "device",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One picture to draw. height and width are 0 until `sized`."""

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
    model: dict[str, str | None]
    path: Path
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
    if options.from_image is not None:
        options = _as_drawn(options, options.from_image)
    _check_early(options)
    lines: list[dict[str, Any]] = [{"prompt": text} for text in options.prompt]
    if options.prompts is not None:
        lines = read_prompts(options.prompts)
    jobs = [_job(options, line, k) for line in lines for k in range(options.num_images)]
    jobs = [replace(job, index=index) for index, job in enumerate(jobs)]
    for job in jobs:
        _check_job(job)
    jobs = _with_paths(jobs, lines, options)
    for job in jobs:
        _check_file(job, options.from_image)
    return jobs, options


def _check_early(options: "Options") -> None:
    """What needs no model: better refused in the first second than after T5 has been loaded."""
    from pixart.pipeline import check_cuda_graph, choose_device
    from pixart.sampler import SCHEDULERS

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
    size = len(_carried(job).encode())
    if job.path.suffix.lower() != ".png" and size > _EXIF_LIMIT:
        raise ValueError(
            f"prompt must fit into {_EXIF_LIMIT} bytes of a {job.path.suffix} file, got {size}; "
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
        model={name: getattr(options, name) for name in _MODEL_OPTIONS},
        path=Path(),
    )


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
    output, suffix = options.output, options.output.suffix.lower()
    if suffix in _SUFFIXES and options.format not in (None, _SUFFIXES[suffix]):
        raise ValueError(f"--output must end in .{options.format}, got {output}")
    if "{" in str(output):
        _check_template(str(output))
        return str(output) if suffix in _SUFFIXES else f"{output}.{options.format or 'png'}"
    if suffix not in _SUFFIXES:
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


def write_picture(image: "Image", job: Job) -> None:
    """Write a picture beside its final name and rename it, with the request that made it."""
    from PIL import Image as PILImage
    from PIL.PngImagePlugin import PngInfo

    text = _carried(job)
    kind = _SUFFIXES[job.path.suffix.lower()]
    aside = _aside(job.path.parent)
    try:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            if kind == "png":
                info = PngInfo()
                info.add_itxt(KEY, text)
                image.save(file, "PNG", pnginfo=info)
            else:
                exif = PILImage.Exif()
                exif[_EXIF_DESCRIPTION] = text
                image.save(file, "JPEG" if kind == "jpg" else "WEBP", quality=95, exif=exif)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, job.path)
    except OSError as error:
        raise _write_error(job.path, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _carried(job: Job) -> str:
    return json.dumps({"version": 1, **job.request()})


def _aside(folder: Path) -> Path:
    return folder / f".pixart-{os.getpid()}.tmp"


def _write_error(path: Path, error: OSError) -> Exception:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return RuntimeError(f"{path}: cannot be written ({reason}); finished pictures are kept")
    return ValueError(f"{path}: cannot be written ({reason}); choose another --output")


def check_writable(paths: list[Path]) -> None:
    """Raise ValueError when pictures could not be put where they are to go. Leaves no folder."""
    for path in paths:
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        except OSError as error:
            raise _write_error(path, error) from error
    for folder in dict.fromkeys(path.parent for path in paths):
        try:
            probe = _aside(next(place for place in (folder, *folder.parents) if place.exists()))
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise _write_error(folder, error) from error


def read_request(path: Path) -> dict[str, Any]:
    """The request that a picture of ours carries."""
    from PIL import Image as PILImage
    from PIL import UnidentifiedImageError

    try:
        with PILImage.open(path) as image:
            image.load()  # half a picture is none
            text = image.info.get(KEY) or image.getexif().get(_EXIF_DESCRIPTION)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: is not a picture") from error
    except (OSError, SyntaxError, PILImage.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read ({reason})") from error
    try:
        request = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        request = None
    if not isinstance(request, dict) or not _is_request(request):
        raise ValueError(f"{path}: carries no request of pixart.generate; it was not drawn by it")
    return request


_REQUEST_TYPES: dict[str, Any] = {
    "version": int, "prompt": str, "negative": str, "seed": int, "steps": int | None,
    "guidance": int | float | None, "guidance_interval": list, "scheduler": str | None,
    "size": str | int | None, "aspect": str | None, "resolution": str | None, "model": dict,
}  # fmt: skip


def _is_request(values: dict[str, Any]) -> bool:
    """Pictures come from anywhere: what is not of the kind that we write is not ours."""
    if values.keys() != _REQUEST_TYPES.keys() or values["version"] != 1:
        return False
    if any(not isinstance(values[key], kind) for key, kind in _REQUEST_TYPES.items()):
        return False
    model, interval = values["model"], values["guidance_interval"]
    return (
        model.keys() == set(_MODEL_OPTIONS)
        and all(isinstance(value, str | None) for value in model.values())
        and len(interval) == 2
        and all(isinstance(end, int | float) for end in interval)
    )


def is_drawn(job: Job) -> bool:
    """Whether the job's file is there and was made by this very request."""
    try:
        request = read_request(job.path)
    except ValueError:
        return False
    request.pop("version", None)
    return request == json.loads(json.dumps(job.request()))


def _as_drawn(options: "Options", path: Path) -> "Options":
    """The options under which a picture was drawn, overridden by those given now."""
    request = read_request(path)
    settings = {**request, **request["model"], "prompt": (request["prompt"],)}
    defaults = type(options)()
    given = {
        f.name for f in fields(options) if getattr(options, f.name) != getattr(defaults, f.name)
    }
    if given & {"size", "aspect", "resolution"}:
        settings |= {"size": None, "aspect": None, "resolution": None}
    taken: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if name in {f.name for f in fields(options)} and name not in given
    }
    return replace(options, **taken)
