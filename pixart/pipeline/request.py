"""What to draw and how: every sampling setting, spelt once.

The options of the command line are made of these fields, and a line of JSON, the metadata of a picture
and a request over the network are their `to_dict`. Importing this module imports no torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from itertools import groupby
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pixart.files import near
from pixart.pipeline.limits import check_value, check_values

if TYPE_CHECKING:
    from PIL.Image import Image

# How processes share pictures: see pixart.pipeline.parallel.
Parallel = Literal["auto", "pictures", "guidance", "sequence", "guidance+sequence"]
VERSION = 8  # other fields, another number; pixart.pipeline.metadata reads what 1 to 7 wrote


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Request:
    """One picture to draw. What is None is left to the model: `Pipeline.resolve` says what it takes.

    Sizes are pixels. Pictures are named by their files, or by names that `Pipeline.draw_many` is given
    pictures for. Raises ValueError for a value that no model could draw with.
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
        None,
        "Denoising steps. Default: the model's or the pipeline's own, or 20 (sa-solver 25, lcm 4, dmd 1).",
    )
    timesteps: tuple[int, ...] | None = _setting(
        None,
        "The timesteps to evaluate, in the place of --steps: falling, from 999 (noise) to 0, such as "
        "999,749,499,249, for dpm-solver++, ddim, euler, heun, lcm and, one of them, dmd. With --strength, "
        "those up to 1000 times it. Default: those that the model was distilled for, else the scheduler's own.",
    )
    guidance: float | None = _setting(
        None,
        "Classifier-free guidance scale. Default: the model's or the pipeline's own, or 4.5 (lcm and dmd 1, "
        "none).",
    )
    guidance_interval: tuple[float, float] | None = _setting(
        None,
        "Part of the trajectory that is guided, from 0 (noise) to 1 (image). Default: the pipeline's "
        "own, or 0 1.",
    )
    scheduler: str | None = _setting(
        None,
        "dpm-solver++, sa-solver, ddim, euler, euler-a, heun, unipc, lcm or dmd; with -karras after "
        "dpm-solver++, sa-solver, euler, heun or unipc, noise levels as in EDM. Default: what the model was "
        "distilled for, or the pipeline's own.",
    )
    image: str | None = _setting(
        None,
        "A picture to begin with, in the place of noise alone: a file. With --upscale alone it is the one "
        "that is made larger.",
    )
    strength: float | None = _setting(
        None,
        "How much of --image is drawn anew, above 0 and up to 1, all of it. Default 0.6, with --mask or "
        "--outpaint 1.",
    )
    fit: str | None = _setting(
        None,
        "How --image meets the size: crop, scaled and cut about its middle to the size asked for or to the "
        "nearest bucket; exact, its own size to the pixel. Default exact with --mask, with --outpaint and "
        "where --upscale makes the picture itself larger, else crop.",
    )
    mask: str | None = _setting(
        None,
        "What of --image to draw anew, white in a file of the same size; all else stays to the bit. "
        "alpha: where the picture itself is transparent.",
    )
    invert_mask: bool | None = _setting(None, "Draw anew what is black in --mask.")
    mask_blur: int | None = _setting(
        None, "Pixels over which --mask fades, into what is drawn anew. Default 0."
    )
    outpaint: str | None = _setting(
        None,
        "Pixels to add to --image: LEFT,TOP,RIGHT,BOTTOM. The picture itself stays to the bit.",
    )
    upscale: str | None = _setting(
        None,
        "Then draw it larger: 2k, 4k, pixels of the square of the same area, a factor such as 2x, or "
        "WIDTHxHEIGHT.",
    )
    upscale_strength: float | None = _setting(
        None, "How much of the enlarged picture is drawn anew, above 0 and up to 1. Default 0.35."
    )
    upscale_guidance: float | None = _setting(
        None,
        "Guidance of the enlarged picture, with --apg, --pag and the like above 1. Default 1, none: little "
        "noise is left to guide, and it would cost twice the time.",
    )
    tiles: int | None = _setting(
        None,
        "With --image or --upscale: denoise in overlapping windows of this side in pixels, for sizes that "
        "the model was not trained for. Default: the whole picture at once.",
    )
    guidance_rescale: float | None = _setting(
        None,
        "From 0 to 1: how much of the contrast that guidance adds is taken back (arXiv:2305.08891). "
        "Default 0.",
    )
    apg: bool | None = _setting(
        None,
        "Adaptive projected guidance (arXiv:2410.02416): high guidance without its glaring colours.",
    )
    apg_eta: float | None = _setting(
        None, "Of --apg: share of the part along the prediction that is kept. Default 0."
    )
    apg_momentum: float | None = _setting(
        None, "Of --apg: what of the last step's direction is added. Default -0.5."
    )
    apg_norm: float | None = _setting(
        None, "Of --apg: longest difference of both predictions, 0 for any. Default 15."
    )
    pag: float | None = _setting(
        None,
        "Perturbed-attention guidance (arXiv:2403.17377): its scale, such as 3. A further evaluation a "
        "step. Default 0, none.",
    )
    pag_blocks: str | None = _setting(
        None,
        "Of --pag: blocks whose attention is perturbed, such as 14 or 12-14,20. Default: the middle one.",
    )
    control_image: tuple[str, ...] | None = _setting(
        None, "What --control goes by, a picture for each: a file."
    )
    control_preprocessor: tuple[str, ...] | None = _setting(
        None,
        "What is made of a --control-image first: none, canny, hed, depth or pose. One for all or one for "
        "each. Default none.",
    )
    control_scale: tuple[float, ...] | None = _setting(
        None, "How strong --control is, one for all or one for each. Default 1."
    )
    control_interval: tuple[tuple[float, float], ...] | None = _setting(
        None,
        "Part of the trajectory that is controlled, from 0 (noise) to 1 (image), one for all or one for "
        "each. Default 0 1.",
    )
    kv_schedule: str | None = _setting(
        None,
        "Merge keys and values of self-attention without training, block by block and by timestep: "
        "BLOCKS:RATIO[@HIGH-LOW], several with ; between, such as 14-27:2; 0-13:2@1000-600. Default: what "
        "the model was trained to merge.",
    )
    reuse_blocks: str | None = _setting(
        None,
        "At some steps compute the first blocks alone, and add what the others added before: FIRST:STEPS, steps "
        "counted from 1, such as 1:3,5,7-9, or 1:3-19/2 for every second one. For more than 8 steps and "
        "schedulers that add no noise. Default: all are computed.",
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
        for one in fields(self):
            value = _in_one_form(one.name, getattr(self, one.name))
            object.__setattr__(self, one.name, value)
            _check_type(one.name, value)
        check_values(self)

    def to_dict(self) -> dict[str, Any]:
        """Values that json.dumps takes and `from_dict` returns to an equal request."""
        values = {one.name: _as_lists(getattr(self, one.name)) for one in fields(self)}
        return {"version": VERSION, **values}

    @property
    def schedule(self) -> int | tuple[int, ...] | None:
        """What the sampler takes for its steps: their number, or the timesteps themselves."""
        return self.steps if self.timesteps is None else self.timesteps

    @property
    def only_enlarges(self) -> bool:
        """Whether --upscale begins with the picture itself: nothing is drawn before, from no prompt even."""
        return self.image is not None and self.upscale is not None and self.strength is None

    @property
    def final_size(self) -> tuple[int, int]:
        """Height and width of the finished picture, of a request that a model has resolved. ValueError
        for one that leaves them open."""
        if self.upscale is not None and re.fullmatch(r"\d+x\d+", self.upscale):
            width, height = map(int, self.upscale.split("x"))
            return height, width
        if self.upscale is not None or self.height is None or self.width is None:
            raise ValueError("size must be known; Pipeline.resolve says what a request comes to")
        return self.height, self.width

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Request":
        """The inverse of `to_dict`; a setting that is left out has its default.

        ValueError says in one line which key is unknown, and which one is near, or which value is of
        the wrong kind.
        """
        settings = dict(values)
        version = settings.pop("version", VERSION)
        if version not in (4, 5, 6, 7, VERSION):  # they had fewer fields
            raise ValueError(f"version must be {VERSION}, got {version!r}")
        check_keys(settings, SETTINGS)
        if "prompt" not in settings:
            raise ValueError("prompt must be given")
        return cls(**settings)


@dataclass(frozen=True)
class Drawn:
    """One finished picture. request: with every setting that drew it, those that free memory decided
    among them; drawn alone again, it makes the same bits. seconds: by stage ("text", "load", "encode",
    "denoise", "decode"). batch: how many pictures were denoised in one pass; above 1, bits may differ by
    rounding. cuda_graph: whether recorded steps were replayed; bits may differ by rounding from those
    without. inputs: a sha256 of each picture that the request names.
    """

    image: "Image"
    request: Request
    seconds: dict[str, float]
    batch: int = 1
    cuda_graph: bool = False
    inputs: Mapping[str, str] = field(default_factory=dict)


def passes(requests: list[Request], batch: int) -> Iterator[list[Request]]:
    """Runs of requests that differ in nothing but prompts and seed, `batch` at most of each."""
    for _, run in groupby(requests, lambda one: replace(one, prompt="", negative="", seed=0)):
        group = list(run)
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


SETTINGS = tuple(one.name for one in fields(Request))


def as_options(names: Iterable[str], title: str = "") -> Any:
    """A frozen dataclass of these settings as options of a command line, None until they are given. What
    is one for each --control-image is given again for each, and () until then. title: what help calls them.
    """
    import tyro

    helps = {one.name: one.metadata.get("help", "") for one in fields(Request)}
    options: list[tuple[str, Any, Any]] = []
    for name in names:
        said: dict[str, Any] = {"help": helps[name]}
        if is_flag(name):
            said |= {"aliases": [f"--no-{name.replace('_', '-')}"], "metavar": ""}
        kind = kinds_of(name)[0] if name in PER_CONTROL else _TYPES[name] | None
        if name == "timesteps":  # with commas, of which `Request` makes numbers
            kind = str | None
            said["metavar"] = "T,T,..."
        kind = Annotated[kind, tyro.conf.arg(**said)]
        if name in PER_CONTROL:
            options.append((name, tyro.conf.UseAppendAction[kind], ()))  # type: ignore[valid-type,misc]
        else:
            options.append((name, kind, None))
    made = make_dataclass("Settings", options, frozen=True)
    made.__doc__ = title
    return made


def is_flag(name: str) -> bool:
    """Whether a setting is true, false, or left open."""
    return set(kinds_of(name)) == {bool, type(None)}


def check_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """ValueError for the first key that is not known, with the nearest of those that are."""
    known = tuple(known)
    for key in keys:
        if key not in known:
            elsewhere = OF_DIFFUSERS.get(str(key))
            meant = elsewhere if elsewhere in known else near(str(key), known)
            way_out = f"did you mean {meant!r}?" if meant else f"known are {', '.join(known)}"
            raise ValueError(f"unknown setting {key!r}; {way_out}")


def checked(name: str, value: Any) -> Any:
    """A value of one setting in the form in which a request keeps it. ValueError if no request takes it,
    whatever else it has."""
    value = _in_one_form(name, value)
    _check_type(name, value)
    if value is not None:
        check_value(name, value)
    return value


def kinds_of(name: str) -> tuple[Any, ...]:
    """The types that a setting's value may have."""
    kind = _TYPES[name]
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


_TYPES: dict[str, Any] = {one.name: one.type for one in fields(Request)}
_KINDS: dict[Any, str] = {
    str: "text", int: "an integer", float: "a number", bool: "true or false",
    tuple[float, float]: "two numbers", tuple[str, ...]: "texts", tuple[float, ...]: "numbers",
    tuple[int, ...]: "whole numbers",
    tuple[tuple[float, float], ...]: "pairs of numbers", type(None): "none",
}  # fmt: skip
# What diffusers' pipelines call them: often far from ours, or nearer to another.
OF_DIFFUSERS = {
    "num_inference_steps": "steps", "guidance_scale": "guidance", "negative_prompt": "negative",
    "mask_image": "mask", "generator": "seed", "pag_scale": "pag",
    "controlnet_conditioning_scale": "control_scale",
}  # fmt: skip
_LONGEST_TIMESTEPS = 10_000  # characters: 1,000 of them have fewer
PER_CONTROL = ("control_image", "control_preprocessor", "control_scale", "control_interval")


def _in_one_form(name: str, value: Any) -> Any:
    """What may be written in more than one way, in the one in which it is kept."""
    if name in ("size", "upscale", "pag_blocks") and type(value) is int:
        return str(value)
    if name == "timesteps":
        return _as_timesteps(value)
    value = _as_tuples(value)
    if name in ("outpaint", "pag_blocks") and isinstance(value, tuple):
        return ",".join(map(str, value))
    if name == "control_interval" and _is_of(value, tuple[float, float]):
        return (value,)
    if name in PER_CONTROL and value is not None and not isinstance(value, tuple):
        return (value,)
    return value


def _as_timesteps(value: Any) -> Any:
    """999,749 as (999, 749); what is nothing of the kind stays, to be refused."""
    if type(value) is int:
        return (value,)
    if isinstance(value, str):
        words = [word.strip() for word in value[: _LONGEST_TIMESTEPS + 1].split(",")]
        if len(value) > _LONGEST_TIMESTEPS or not all(
            re.fullmatch(r"-?[0-9]{1,9}", word) for word in words
        ):
            raise ValueError(f"timesteps must be such as 999,749,499,249, got {value!r:.80}")
        return tuple(map(int, words))
    return _as_tuples(value)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _as_lists(value: Any) -> Any:
    return [_as_lists(one) for one in value] if isinstance(value, tuple) else value


def _check_type(name: str, value: object) -> None:
    kinds = kinds_of(name)
    if not any(_is_of(value, one) for one in kinds):
        wanted = " or ".join(_KINDS[one] for one in kinds)
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _is_of(value: object, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        parts = get_args(kind)
        if parts[-1] is ...:
            parts = (parts[0],) * len(value)
        return len(value) == len(parts) and all(map(_is_of, value, parts))
    if kind in (int, float):
        number = int if kind is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)
