"""What to draw and how: every sampling setting, spelt once.

The options of the command line are made of these fields, and a line of JSON, the metadata of a picture
and a request over the network are their `to_dict`. Importing this module imports no torch.
"""

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from itertools import groupby
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from pixart.files import check_text

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 6  # other fields, another number; pixart.pipeline.metadata reads what 1 to 5 wrote
EXACT_SIZE = ("size", "height", "width")
BUCKET = ("aspect", "resolution")
MAX_SIDE = 8192  # pixels, as pixart.resolution has it, which imports torch


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Request:
    """One picture to draw. What is None is left to the model: `Pipeline.resolve` says what it takes.

    Sizes are pixels. Raises ValueError for a value that no model could draw with.
    """

    prompt: str
    negative: str = _setting("", "What not to draw.")
    seed: int = _setting(0, "Seed of the first picture. Default 0.")
    size: str | None = _setting(
        None, "Exact size in pixels, WIDTHxHEIGHT or one number for a square."
    )
    aspect: str | None = _setting(
        None, "Aspect ratio WIDTH:HEIGHT; the nearest bucket of --resolution is taken."
    )
    resolution: str | None = _setting(
        None, "256, 512, 1k, 2k, 2880, 4k or pixels of the square of the same area."
    )
    height: int | None = _setting(None, "Exact height, in the place of a size.")
    width: int | None = _setting(None, "Exact width, in the place of a size.")
    steps: int | None = _setting(
        None, "Denoising steps. Default: the pipeline's own, or 20 (sa-solver 25, lcm 4, dmd 1)."
    )
    guidance: float | None = _setting(
        None,
        "Classifier-free guidance scale. Default: the pipeline's own, or 4.5 (lcm and dmd 1, none).",
    )
    guidance_interval: tuple[float, float] | None = _setting(
        None,
        "Part of the trajectory that is guided, from 0 (noise) to 1 (image). Default: the pipeline's "
        "own, or 0 1.",
    )
    scheduler: str | None = _setting(
        None,
        "dpm-solver++, sa-solver, ddim, euler, euler-a, heun, unipc, lcm or dmd; with -karras after "
        "dpm-solver++, sa-solver, euler, heun or unipc, noise levels as in EDM. Default: the pipeline's "
        "own.",
    )
    batched: bool | None = _setting(
        None,
        "Both halves of guidance in one call of the transformer. Default: if memory is free for it.",
    )
    tile: int | bool | None = _setting(
        None,
        "Side in pixels of the tiles that the VAE decodes, True for 512, False for none. Default: as "
        "memory is free.",
    )

    def __post_init__(self) -> None:
        if type(self.size) is int:
            object.__setattr__(self, "size", str(self.size))
        if isinstance(self.guidance_interval, list):
            object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        for one in fields(self):
            _check_type(one.name, getattr(self, one.name), one.type)
        _check_values(self)

    def to_dict(self) -> dict[str, Any]:
        """Values that json.dumps takes and `from_dict` returns to an equal request."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.guidance_interval is not None:
            values["guidance_interval"] = list(self.guidance_interval)
        return {"version": VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Request":
        """The inverse of `to_dict`; a setting that is left out has its default.

        ValueError says in one line which key is unknown, and which one is near, or which value is of
        the wrong kind.
        """
        settings = dict(values)
        version = settings.pop("version", VERSION)
        if version not in (4, 5, VERSION):  # they had the same fields
            raise ValueError(f"version must be {VERSION}, got {version!r}")
        check_keys(settings, SETTINGS)
        if "prompt" not in settings:
            raise ValueError("prompt must be given")
        return cls(**settings)


@dataclass(frozen=True)
class Drawn:
    """One finished picture. request: with every setting that drew it, those that free memory decided
    among them; drawn alone again, it makes the same bits. seconds: by stage ("text", "load", "denoise",
    "decode"). batch: how many pictures were denoised in one pass; above 1, bits may differ by rounding.
    cuda_graph: whether recorded steps were replayed; bits may differ by rounding from those without.
    """

    image: "Image"
    request: Request
    seconds: dict[str, float]
    batch: int = 1
    cuda_graph: bool = False


def passes(requests: list[Request], batch: int) -> Iterator[list[Request]]:
    """Runs of requests that differ in nothing but prompts and seed, `batch` at most of each."""
    for _, run in groupby(requests, lambda one: replace(one, prompt="", negative="", seed=0)):
        group = list(run)
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


SETTINGS = tuple(one.name for one in fields(Request))


def as_options(names: Iterable[str]) -> Any:
    """A frozen dataclass of these settings as options of a command line, None until they are given."""
    import tyro

    named = {one.name: one for one in fields(Request)}
    options = []
    for name in names:
        help = tyro.conf.arg(help=named[name].metadata["help"])
        options.append((name, Annotated[named[name].type | None, help], None))  # type: ignore[operator]
    return make_dataclass("Sampling", options, frozen=True)


def check_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """ValueError for the first key that is not known, with the nearest of those that are."""
    known = tuple(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            way_out = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"unknown setting {key!r}; {way_out}")


_KINDS: dict[Any, str] = {
    str: "text", int: "an integer", float: "a number", bool: "true or false",
    tuple[float, float]: "two numbers", type(None): "none",
}  # fmt: skip


def _check_type(name: str, value: object, kind: Any) -> None:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if not any(_is_of(value, one) for one in kinds):
        wanted = " or ".join(_KINDS[one] for one in kinds)
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _is_of(value: object, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return (
            isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_of, value, parts))
        )
    if kind in (int, float):
        number = int if kind is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)


def _check_values(request: Request) -> None:
    for name in ("prompt", "negative"):
        check_text(name, getattr(request, name))
    if not 0 <= request.seed < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, got {request.seed}")
    if request.steps is not None and request.steps < 1:
        raise ValueError(f"steps must be an integer from 1 up, got {request.steps}")
    if request.guidance is not None and not 0 <= request.guidance <= sys.float_info.max:
        raise ValueError(f"guidance must be a finite number from 0 up, got {request.guidance}")
    start, end = request.guidance_interval or (0.0, 1.0)
    if not 0 <= start <= end <= 1:
        raise ValueError(f"guidance_interval must be 0 <= start <= end <= 1, got {start}, {end}")
    if type(request.tile) is int and request.tile < 16:
        raise ValueError(
            f"tile must be True, False, None or at least 16 pixels, got {request.tile}"
        )
    if type(request.tile) is int and request.tile > MAX_SIDE:
        raise ValueError(f"tile must be at most {MAX_SIDE} pixels, got {request.tile}")
    for name in ("height", "width"):
        if (side := getattr(request, name)) is not None and not 1 <= side <= MAX_SIDE:
            raise ValueError(f"{name} must be 1 to {MAX_SIDE} pixels, got {side}")
    buckets = [name for name in BUCKET if getattr(request, name) is not None]
    if request.size is not None and buckets:
        raise ValueError(
            f"size must be given without aspect and resolution, got {request.size} and "
            f"{' and '.join(f'{name} {getattr(request, name)}' for name in buckets)}"
        )
    sides = [name for name in ("height", "width") if getattr(request, name) is not None]
    others = [name for name in ("size", *BUCKET) if getattr(request, name) is not None]
    if sides and others:
        raise ValueError(
            f"{others[0]} must be given without {' and '.join(sides)}, got both; give one of them"
        )
