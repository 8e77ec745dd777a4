"""The names of picture files: templates, names that any system takes, and which of them are free."""

import difflib
import hashlib
import os
import re
import string
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixart.generation.options import Options
from pixart.pipeline.limits import PICTURES, is_off
from pixart.pipeline.pictures import SUFFIXES
from pixart.pipeline.request import SETTINGS, Request

FIELDS = tuple(dict.fromkeys(("name", "prompt", "seed", "index", *SETTINGS)))
_OTHER_PICTURES = (
    ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".jfif", ".jpe",
    ".svg", ".ico", ".ppm", ".tga", ".exr", ".pdf",
)  # fmt: skip
# Widths of two digits, as a longer one would fill memory; no `c`, which makes a slash of 47.
_FORMAT = re.compile(r"[<>=^]?[-+]?0?\d{0,2}(\.\d{1,2})?[deEfFgGxXs%]?", re.ASCII)
_LEFT_OPEN = ("aspect", "resolution", "batched", "tile")  # of a request that a model resolved, too
_RESERVED = {  # on Windows, whatever the suffix
    "con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
}  # fmt: skip


@dataclass(frozen=True)
class Template:
    """A path with fields in braces, each a name of FIELDS and, after a colon, a format.

    parts: what stands before a field, its name or None at the end, and its format.
    """

    text: str
    parts: tuple[tuple[str, str | None, str], ...]

    @classmethod
    def parse(cls, text: str) -> "Template":
        """ValueError for another field, and for whatever else Python's templates could reach."""
        try:
            found = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(
                f"--output must be a template such as {{seed}}-{{prompt}}.png, got {text} ({error}); "
                "a brace in a name is written twice"
            ) from error
        _check_fields([name for _, name, _, _ in found if name is not None])
        for _, name, form, conversion in found:
            if conversion or not _FORMAT.fullmatch(form or ""):
                wrong = f"!{conversion}" if conversion else form
                raise ValueError(
                    f"--output must format {{{name}}} as in {{guidance:.1f}} or {{index:03d}}, got "
                    f"{wrong!r}"
                )
        return cls(text, tuple((before, name, form or "") for before, name, form, _ in found))

    @property
    def fields(self) -> set[str]:
        return {name for _, name, _ in self.parts if name is not None}

    def is_open(self, request: Request) -> bool:
        """Whether a field is left to the model by this request, and known when that has resolved it."""
        values = _values(request)
        named = self.fields & {*SETTINGS} - {*_LEFT_OPEN}
        return any(values[name] is None for name in named)

    def fill(self, request: Request, index: int, name: str) -> Path:
        """The path of a picture; what fills a field is letters, digits and `.+=_-`, no folder."""
        values = _values(request) | {"name": name, "index": index}
        texts = (before + _formatted(values, field, form) for before, field, form in self.parts)
        return Path("".join(texts))


def _check_fields(named: Iterable[str]) -> None:
    unknown = [name for name in dict.fromkeys(named) if name not in FIELDS]
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in FIELDS)
        near = difflib.get_close_matches(unknown[0], FIELDS, 1)
        hint = f"; did you mean {{{near[0]}}}?" if near else ""
        got = ", ".join(f"{{{name}}}" for name in unknown)
        raise ValueError(f"--output knows {known}, got {got}{hint}")


def _values(request: Request) -> dict[str, Any]:
    values = {n: "none" if is_off(request, n) else getattr(request, n) for n in SETTINGS}
    if request.size is not None:
        size = request.size.lower().replace("×", "x")
        values["size"] = size if "x" in size else f"{size}x{size}"
    elif request.height is not None and request.width is not None:
        values["size"] = f"{request.width}x{request.height}"
    return values


def _formatted(values: Mapping[str, Any], name: str | None, form: str) -> str:
    if name is None:
        return ""
    value = values[name]
    if name in ("prompt", "negative"):
        value = safe_name(value) if value.strip() else "none"
    elif value is None:
        value = "auto"
    elif isinstance(value, bool):
        value = str(value).lower()
    several = [*_parts(value)]
    if name in PICTURES:
        several = [stem_of(one) for one in several]
    form = form or ("04d" if name == "index" else "")
    try:
        text = "-".join(format(one, form) for one in several)
    except ValueError as error:
        raise ValueError(f"--output: {{{name}:{form}}} cannot be made of {value!r}") from error
    return re.sub(r"[^A-Za-z0-9.+=_-]+", "-", text)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for one in value:
            yield from _parts(one)
    else:
        yield value


def stem_of(picture: str) -> str:
    """The name of a picture's file without its folder and suffix, as one that any system takes."""
    return safe_name(Path(picture).stem)


def template_of(options: Options, count: int) -> Template:
    """The template of an --output that is a file, a folder or a template, for so many pictures."""
    output = options.output or Path("outputs")
    suffix = output.suffix.lower()
    if suffix in _OTHER_PICTURES and not output.is_dir():
        raise ValueError(
            f"--output must end in .png, .jpg or .webp, or name a folder, got {output}"
        )
    if suffix in SUFFIXES and options.format not in (None, SUFFIXES[suffix]):
        raise ValueError(f"--output must end in .{options.format}, got {output}")
    ending = options.format or "png"
    if "{" in str(output):
        return Template.parse(str(output) if suffix in SUFFIXES else f"{output}.{ending}")
    plain = Path(str(output).replace("}", "}}"))
    if suffix not in SUFFIXES:
        return Template.parse(str(plain / f"{{name}}.{ending}"))
    if count > 1:
        return Template.parse(str(plain.with_name(f"{plain.stem}-{{index}}{plain.suffix}")))
    return Template.parse(str(plain))


def picture_name(request: Request, name: str | None, swept: Mapping[str, Any]) -> str:
    """{name} of a template: what a line of .jsonl says, or prompt and seed, or without a prompt the name
    of the picture that is made larger and the seed; then what is swept."""
    said, subject = {"prompt", "seed"}, request.prompt
    if not subject.strip():
        said, subject = {"image", "seed"}, Path(request.image or "").stem
    parts = [safe_name(name)] if name else [safe_name(subject), str(request.seed)]
    for setting, value in swept.items():
        if setting not in said:
            text = _formatted({setting: value}, setting, "")
            parts.append(f"{setting.replace('_', '-')}-{text}")
    return "-".join(parts)


def safe_name(text: str, length: int = 60) -> str:
    """A file name that any system takes, whatever the prompt: letters, digits and dashes.

    Where letters were lost, a digest keeps apart what would be one name.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if len(slug) > length or not text.isascii() or not slug or slug in _RESERVED:
        digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]
        slug = f"{slug[: length - 9].strip('-') or 'image'}-{digest}"
    return slug


@dataclass
class Places:
    """Which names are free, beside the files that are there and the names that a run has given.

    Names that differ in nothing but case, or in how an accent is written, are one name, as many disks
    have it.
    """

    _taken: set[str] = field(default_factory=set)
    _files: dict[Path, dict[str, list[Path]]] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)

    def there(self, path: Path) -> list[Path]:
        """The files under this name, and under it with -2, -3 ..., that the run has not taken."""
        found = self._listing(path.parent).get(_key(path.name), [])
        return [other for other in found if self._key_of(other) not in self._taken]

    def take(self, path: Path) -> None:
        self._taken.add(self._key_of(path))

    def free(self, path: Path, *, beside: bool = True) -> Path:
        """The first of NAME, NAME-2, NAME-3 ... that the run has not taken. beside: and no file has."""
        start = self._key_of(path)
        for number in range(self._numbers.get(start, 1), 2**31):
            other = path.with_stem(f"{path.stem}-{number}") if number > 1 else path
            if self._key_of(other) not in self._taken and not (beside and self._is_there(other)):
                self._numbers[start] = number
                return other
        raise ValueError(f"{path}: has no free name left; choose another --output")

    def _is_there(self, path: Path) -> bool:
        listed = self._listing(path.parent).get(_key(path.name), [])
        return any(_key(other.name) == _key(path.name) for other in listed) or os.path.lexists(path)

    def _listing(self, folder: Path) -> dict[str, list[Path]]:
        """The files of a folder by their name, and by their name without a number at its end."""
        if folder not in self._files:
            found: dict[str, list[Path]] = {}
            for name in _names_in(folder):
                plain = re.sub(r"-\d+(?=(\.[^.]*)?$)", "", name, flags=re.ASCII)
                for key in {_key(name), _key(plain)}:
                    found.setdefault(key, []).append(folder / name)
            self._files[folder] = found
        return self._files[folder]

    @staticmethod
    def _key_of(path: Path) -> str:
        return _key(os.path.abspath(path))


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _names_in(folder: Path) -> Collection[str]:
    try:
        return sorted(os.listdir(folder), key=lambda name: (len(name), name))
    except OSError:  # none yet; where it cannot be read, what writes there finds out
        return ()
