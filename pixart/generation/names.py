"""The names of picture files: templates, and names that any system takes."""

import hashlib
import re
from pathlib import Path

from pixart.generation.options import Options
from pixart.generation.pictures import SUFFIXES
from pixart.pipeline.request import Request

_OTHER_PICTURES = (
    ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".jfif", ".jpe",
    ".svg", ".ico", ".ppm", ".tga", ".exr", ".pdf",
)  # fmt: skip


def template_of(options: Options, count: int) -> str:
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


def fill(template: str, request: Request, index: int, name: str | None) -> Path:
    slug, seed = safe_name(request.prompt), request.seed
    name = safe_name(name) if name else f"{slug}-{seed}"
    values = {"name": name, "prompt": slug, "seed": seed, "index": f"{index:04d}"}
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
