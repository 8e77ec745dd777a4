"""Pictures as files: written whole or not at all, each with the request that draws it again."""

import contextlib
import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.generation.jobs import Job

VERSION = 3  # of a request: other keys, another number
KEY = "pixart"  # of the PNG text chunk; JPEG and WebP carry the same text as an EXIF description
EXIF_LIMIT = 60_000  # bytes; JPEG holds 64 KiB of EXIF, WebP writers no more
SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
_EXIF_DESCRIPTION = 0x010E
# Options that decide a picture's bits beside the job itself, and are written into its file.
MODEL_OPTIONS = (
    "model", "transformer", "lora", "config", "variant", "ema", "kv_compress", "null_caption", "dtype",
    "text_encoder_dtype", "device", "cuda_graph",
)  # fmt: skip
CHOICES = ("batched", "tile")  # made from free memory; they decide bits, but nobody asked for them


def write_picture(image: "Image", job: "Job") -> None:
    """Write a picture beside its final name and rename it, with the request that made it."""
    from PIL import Image as PILImage
    from PIL.PngImagePlugin import PngInfo

    text = carried(job)
    kind = SUFFIXES[job.path.suffix.lower()]
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


def carried(job: "Job") -> str:
    return json.dumps({"version": VERSION, **job.request()})


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
        request = _renewed(json.loads(text)) if isinstance(text, str) else None
    except ValueError:
        request = None
    if not isinstance(request, dict) or not _is_request(request):
        raise ValueError(f"{path}: carries no request of pixart.generate; it was not drawn by it")
    return request


_REQUEST_TYPES: dict[str, Any] = {
    "version": int, "prompt": str, "negative": str, "seed": int, "steps": int | None,
    "guidance": int | float | None, "guidance_interval": list, "scheduler": str | None,
    "size": str | int | None, "aspect": str | None, "resolution": str | None, "model": dict,
    "batched": bool, "tile": int,
}  # fmt: skip
_MODEL_TYPES: dict[str, Any] = {
    **dict.fromkeys(MODEL_OPTIONS, str | None), "model": str, "lora": list, "ema": bool,
    "cuda_graph": bool,
}  # fmt: skip


def _renewed(values: Any) -> Any:
    """Pictures of version 2 were drawn before there was --lora."""
    model = values.get("model") if isinstance(values, dict) else None
    if isinstance(model, dict) and values.get("version") == 2:
        return values | {"version": 3, "model": {"lora": []} | model}
    return values


def _is_request(values: dict[str, Any]) -> bool:
    """Pictures come from anywhere: what is not of the kind that we write is not ours."""
    if not _are(values, _REQUEST_TYPES) or values["version"] != VERSION:
        return False
    interval = values["guidance_interval"]
    return (
        _are(values["model"], _MODEL_TYPES)
        and len(interval) == 2
        and all(isinstance(end, int | float) for end in interval)
        and all(isinstance(one, str) for one in values["model"]["lora"])
    )


def _are(values: dict[str, Any], kinds: dict[str, Any]) -> bool:
    return values.keys() == kinds.keys() and all(
        isinstance(values[key], kind) for key, kind in kinds.items()
    )


def find_drawn(job: "Job") -> "Job | None":
    """The job with the size of its picture, if its file is there and made by this very request."""
    try:
        request = read_request(job.path)
    except ValueError:
        return None
    wanted = json.loads(carried(job))
    if any(
        request[key] != wanted[key]
        for key in wanted
        if wanted[key] is not None or key not in CHOICES
    ):
        return None
    from PIL import Image as PILImage

    with PILImage.open(job.path) as image:
        width, height = image.size
    note = f"{width}x{height}, there already"
    return replace(job, width=width, height=height, note=note)
