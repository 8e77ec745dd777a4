"""How a picture was drawn, as its file says it: JSON that draws it again, and the line of gallery tools.

Version 8 holds what was drawn with (`request` and `model`, nothing left open; `inputs`, the pictures that
the request names, each with a digest) and, where that was not asked for but chosen, what was asked for.
Version 7 knew no timesteps, no plans, no KV schedules, no reused blocks, no quantised weights and no file in
the place of the text encoder's. Version 6 knew no pictures but from text. Version 5 knew no attention in 8
bits. In version 4 the guided part of the trajectory could not be left open. Versions 1 to 3 held what was asked
for alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart import __version__
from pixart.config import EMBEDDED
from pixart.files import parse_json
from pixart.pipeline.request import VERSION, Drawn, Request, check_keys

if TYPE_CHECKING:
    from pixart.pipeline.text_to_image import Pipeline

# Options of the command line that decide a picture's bits beside the request itself.
MODEL_OPTIONS = (
    "model", "transformer", "lora", "control", "preprocessor_weights", "config", "variant", "ema",
    "kv_compress", "null_caption", "dtype", "text_encoder", "text_encoder_dtype", "device", "cuda_graph",
    "attention", "quantize", "fast",
)  # fmt: skip
_MODEL_TYPES: dict[str, Any] = {
    **dict.fromkeys(MODEL_OPTIONS, str | None), "model": str, "lora": list,
    "control": list, "preprocessor_weights": list, "ema": bool, "cuda_graph": str,
}  # fmt: skip
# As the command line says it, and as `Pipeline` takes it. A picture says "on" or "off", and which of the
# three was asked for; pictures of before said true or false, and false where nothing was asked for too.
CUDA_GRAPH: dict[str, Any] = {"auto": "auto", "on": True, "off": False}
CHOICES = ("batched", "tile")  # made from free memory; they decide bits, but nobody asked for them
SAMPLERS = {  # as gallery tools call them
    "dpm-solver++": "DPM++ 2M", "sa-solver": "SA-Solver", "ddim": "DDIM", "euler": "Euler",
    "unipc": "UniPC", "lcm": "LCM", "dmd": "DMD", "euler-a": "Euler a", "heun": "Heun",
    "dpm-solver++-karras": "DPM++ 2M Karras", "sa-solver-karras": "SA-Solver Karras",
    "euler-karras": "Euler Karras", "heun-karras": "Heun Karras", "unipc-karras": "UniPC Karras",
}  # fmt: skip


DISTILLED = ("lcm", "dmd")  # drawn without guidance, which they have inside


class NewerVersionError(ValueError):
    """Written by a later version of the library."""


@dataclass(frozen=True)
class Metadata:
    """request, model: as drawn; model has MODEL_OPTIONS. asked, asked_model: as they were asked for,
    None where the choice was left open. weights: `Pipeline.weights_of` the request. sampler: the
    scheduler, for people. batch: pictures denoised in one pass. inputs: `Drawn.inputs`. version: of the text
    it was read from."""

    request: Request
    model: Mapping[str, Any]
    asked: Request
    asked_model: Mapping[str, Any]
    weights: Mapping[str, str] = field(default_factory=dict)
    sampler: str = ""
    batch: int = 1
    inputs: Mapping[str, str] = field(default_factory=dict)
    library: str = f"pixart {__version__}"
    version: int = VERSION

    @classmethod
    def of(
        cls, drawn: Drawn, pipe: "Pipeline", asked: Request, asked_model: Mapping[str, Any]
    ) -> "Metadata":
        """Of a picture that `pipe` drew. asked_model: the options that it was opened with."""
        own = str(pipe.scheduler_config.get("_class_name", ""))
        return cls(
            drawn.request,
            {**asked_model, **opened_with(pipe), "cuda_graph": "on" if drawn.cuda_graph else "off"},
            asked,
            asked_model,
            pipe.weights_of(drawn.request),
            SAMPLERS.get(drawn.request.scheduler or "", own),
            drawn.batch,
            drawn.inputs,
        )

    def to_text(self) -> str:
        request, model = self.request.to_dict(), dict(self.model)
        del request["version"]
        asked = {**self.asked.to_dict(), **self.asked_model}
        used = {**request, **model}
        left_open = {name: asked[name] for name, value in used.items() if asked[name] != value}
        return json.dumps(
            {
                "version": VERSION, "library": self.library, "request": request, "model": model,
                "asked": left_open, "weights": dict(self.weights), "sampler": self.sampler,
                "batch": self.batch, "inputs": dict(self.inputs),
            }
        )  # fmt: skip

    @classmethod
    def from_text(cls, text: str) -> "Metadata":
        """Of any version. ValueError for what is not ours, NewerVersionError for what is not known yet."""
        values = parse_json(text, "metadata")
        version = values.get("version") if isinstance(values, dict) else None
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError("has no version")
        if version > VERSION:
            raise NewerVersionError(
                f"was drawn by a newer pixart (version {version} of its metadata, this one reads 1 to "
                f"{VERSION}); update pixart"
            )
        return _read(version, values) if version > 3 else _read_older(version, values)

    def to_parameters(self) -> str:
        """The prompts and settings as web interfaces for diffusion models write them.

        A prompt is one line there, whatever it is; the JSON has it as it was given.
        """
        request = self.request
        settings = {
            "Steps": request.steps,
            "Sampler": self.sampler,
            "CFG scale": None if request.guidance is None else f"{request.guidance:g}",
            "Seed": request.seed,
            "Size": _size(request),
            "Denoising strength": _denoising(request),
            "Mask blur": request.mask_blur if request.mask is not None else None,
            **_controls(request, self.model.get("control") or ()),
            "Model hash": self.weights.get("transformer", "")[:10],
            "Model": _model_name(str(self.model["transformer"] or self.model["model"])),
            "Version": self.library,
        }
        known = {name: value for name, value in settings.items() if value not in (None, "")}
        lines = [_one_line(request.prompt)]
        if negative := _one_line(request.negative):
            lines.append(f"Negative prompt: {negative}")
        lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in known.items()))
        text = "\n".join(lines)
        return text.encode("utf-8", "replace").decode()  # a folder's name may be no UTF-8


def _size(request: Request) -> str:
    """Of the finished picture."""
    try:
        height, width = request.final_size
    except ValueError:  # of a picture that an older version drew
        height, width = request.height or 0, request.width or 0
    return f"{width}x{height}" if height and width else ""


def _denoising(request: Request) -> str:
    """How much of a picture was drawn anew, that of --upscale where it began with none."""
    strength = request.upscale_strength if request.strength is None else request.strength
    return "" if strength is None else f"{strength:g}"


def _controls(request: Request, files: Sequence[str]) -> dict[str, str]:
    count = len(request.control_image or ())

    def each(values: tuple[Any, ...] | None, default: Any) -> tuple[Any, ...]:
        values = values or (default,)
        return values * count if len(values) == 1 else values

    kinds, scales = each(request.control_preprocessor, "none"), each(request.control_scale, 1.0)
    intervals = each(request.control_interval, (0.0, 1.0))
    found = {}
    for place, file in enumerate(files[:count]):
        start, end = intervals[place]
        found[f"ControlNet {place}"] = (
            f"Module: {kinds[place]}, Model: {_model_name(file)}, Weight: {scales[place]:g}, "
            f"Guidance Start: {start:g}, Guidance End: {end:g}"
        )
    return found


def opened_with(pipe: "Pipeline") -> dict[str, str | None]:
    """What `Pipeline.from_pretrained` takes for the options that are left to it."""
    encoder = pipe.text_encoder
    return {
        "dtype": short_dtype(pipe.transformer.dtype),
        "text_encoder_dtype": encoder.quantization or short_dtype(encoder.dtype),
        "null_caption": pipe.shown_null_caption,
        "device": pipe.device.type,
        "fast": None,  # the request has what a plan has set
    }


def short_dtype(dtype: object) -> str:
    """bf16 of torch.bfloat16."""
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)


def _model_name(source: str) -> str:
    name = Path(source).name
    return Path(name).stem if name.endswith((".pth", ".pt", ".safetensors")) else name


def _one_line(text: str) -> str:
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text


def _read(version: int, values: dict[str, Any]) -> Metadata:
    kinds = {
        "version": int, "library": str, "request": dict, "model": dict, "asked": dict,
        "weights": dict, "sampler": str, "batch": int, "inputs": dict,
    }  # fmt: skip
    if version < 7:
        del kinds["inputs"]
    if "name" in values:  # of a picture in a tar, which has no file's name to say it
        kinds["name"] = str
    _check(values, kinds)
    request, asked = values["request"], values["asked"]
    model = _with_added(version, values["model"])
    check_keys(asked, (*request, *model))
    weights, inputs = values["weights"], values.get("inputs", {})
    for name, digests in (("weights", weights), ("inputs", inputs)):
        if not all(isinstance(one, str) for one in digests.values()):
            raise ValueError(f"{name} must be digests")
    first = Request.from_dict({name: asked.get(name, value) for name, value in request.items()})
    return Metadata(
        Request.from_dict(request),
        _checked_model(_in_words(model, "off")),
        _with_open_interval(first) if version == 4 else first,
        _checked_model(_in_words({name: asked.get(name, value) for name, value in model.items()}, "auto")),
        weights, values["sampler"], values["batch"], inputs, values["library"], version,
    )  # fmt: skip


def _with_open_interval(asked: Request) -> Request:
    """Up to version 4, all of the trajectory was what a request had that did not ask for a part of it."""
    is_whole = asked.guidance_interval == (0.0, 1.0)
    return replace(asked, guidance_interval=None) if is_whole else asked


_OLD_SETTINGS = (
    "prompt", "negative", "seed", "steps", "guidance", "guidance_interval", "scheduler", "size",
    "aspect", "resolution",
)  # fmt: skip
# What the versions before did not know, as they drew.
_ADDED_TO_MODEL: dict[int, dict[str, Any]] = {
    2: {"config": None, "variant": None, "ema": False, "cuda_graph": False},
    3: {"lora": []},
    6: {"attention": None},
    7: {"control": [], "preprocessor_weights": []},
    8: {"fast": None, "text_encoder": None, "quantize": None},
}


def _with_added(version: int, model: dict[str, Any]) -> dict[str, Any]:
    for later, added in _ADDED_TO_MODEL.items():
        if version < later:
            if added.keys() & model.keys():
                raise ValueError(f"version {version} has no {', '.join(added)}")
            model = model | added
    return model


def _read_older(version: int, values: dict[str, Any]) -> Metadata:
    """Version 1 did not say how free memory had decided; version 2 knew no adapters; none of them what
    the embedded model's guidance was, since a pipeline had none of its own."""
    choices = CHOICES if version > 1 else ()
    _check(values, {**dict.fromkeys(("version", *_OLD_SETTINGS, *choices), object), "model": dict})
    if any(values[name] is None for name in choices):
        raise ValueError("batched and tile must be known")
    asked = Request.from_dict({name: values[name] for name in _OLD_SETTINGS})
    model = _with_added(version, values["model"])
    opened = _checked_model(_in_words(model, "off"))
    asked_model = _checked_model(_in_words(model, "auto"))
    request = replace(asked, **{name: values[name] for name in choices})
    if (
        request.guidance is None
        and opened["model"] == EMBEDDED
        and asked.scheduler not in DISTILLED
    ):
        request = replace(request, guidance=4.5)
    asked = _with_open_interval(asked)
    return Metadata(request, opened, asked, asked_model, library="", version=version)


def _in_words(model: dict[str, Any], without: str) -> dict[str, Any]:
    """With cuda_graph in words; files of before say true or false. without: the word for false."""
    words = {True: "on", False: without}
    value = model.get("cuda_graph")
    return {**model, "cuda_graph": words[value]} if isinstance(value, bool) else model


def _checked_model(model: dict[str, Any]) -> dict[str, Any]:
    _check(model, _MODEL_TYPES)
    if model["cuda_graph"] not in CUDA_GRAPH:
        raise ValueError(f"cuda_graph must be auto, on or off, got {model['cuda_graph']!r}")
    for name in ("lora", "control", "preprocessor_weights"):
        if not all(isinstance(one, str) for one in model[name]):
            raise ValueError(f"{name} must be a list of texts")
    return model


def _check(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Pictures come from anywhere: what is not of the kind that we write is not ours."""
    if values.keys() != kinds.keys():
        raise ValueError(f"must have {', '.join(kinds)}")
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{name} must be another kind of value, got {values[name]!r}")
