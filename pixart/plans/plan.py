"""A plan: how a model is drawn with less work than by default, and what that was measured to cost.

A plan belongs to the weights that it was measured with. What no weights decide, fewer steps and guidance in a
part of the trajectory, is a plan of any model, which nobody measured. Imports no torch.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pixart.config import PixArtConfig
from pixart.files import (
    CheckpointError,
    check_text,
    near,
    parse_json,
    read_bounded,
    short,
    write_json,
)
from pixart.plans.reuse import BlockReuse
from pixart.plans.schedule import KVSchedule

VERSION = 1
FEWEST_STEPS = 8  # with so many or fewer there is nothing left to leave out
MOST_STEPS = 1000
MOST_BYTES = 1 << 20
FOLDER = "plans"  # of a pipeline's directory: plans/balanced.json and plans/fast.json
NAMES = ("balanced", "fast")
OFF = "off"
# What draws another picture of the same weights.
_SHAPING = (
    "input_size", "patch_size", "hidden_size", "depth", "num_heads", "pe_interpolation", "qk_norm",
    "kv_compression",
)  # fmt: skip
_SETS = (
    "scheduler",
    "steps",
    "guidance",
    "guidance_interval",
    "kv_schedule",
    "reuse_blocks",
)  # of a request
_PARTS = ("transformer", "lora")  # of `Pipeline.weights`


@dataclass(frozen=True)
class Identity:
    """The model that a plan is of. weights: a sha256 of each part's files, and of a LoRA of how much of it
    there is too. config: of what else decides what it computes. name: for people."""

    weights: Mapping[str, str]
    config: str
    name: str = field(default="", compare=False)

    @classmethod
    def of(
        cls,
        weights: Mapping[str, str],
        config: PixArtConfig,
        name: str,
        lora_weights: Sequence[float] = (),
    ) -> "Identity":
        """weights: those of all parts of a pipeline. lora_weights: what each LoRA is times."""
        values = config.to_dict()
        shaping = json.dumps({key: values[key] for key in _SHAPING}, sort_keys=True)
        own = {part: weights[part] for part in _PARTS if part in weights}
        if "lora" in own:
            own["lora"] = _sha256(json.dumps([own["lora"], *map(float, lora_weights)]))
        return cls(own, _sha256(shaping), name)

    def differs(self, other: "Identity") -> str:
        """In what another model is another one, "" if it is the same."""
        parts = [part for part in _PARTS if self.weights.get(part) != other.weights.get(part)]
        parts += ["configuration"] if self.config != other.config else []
        return " and ".join(parts)


@dataclass(frozen=True)
class Plan:
    """model: None for a plan of any model. scheduler, guidance: None for the model's own, in no file. measured:
    see MEASURED, {} for a plan that was not measured."""

    model: Identity | None
    steps: int
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance: float | None = None
    scheduler: str | None = None
    kv_schedule: KVSchedule | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    reuse_blocks: BlockReuse | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads. ValueError for a plan of any model, which no file holds."""
        if self.model is None:
            raise ValueError("model must be known, got a plan of any model")
        model = {
            "name": self.model.name,
            "weights": dict(self.model.weights),
            "config": self.model.config,
        }
        return {
            "version": VERSION, "model": model, "scheduler": self.scheduler, "steps": self.steps,
            "guidance": self.guidance, "guidance_interval": [*self.guidance_interval],
            "kv_schedule": None if self.kv_schedule is None else str(self.kv_schedule),
            "reuse_blocks": None if self.reuse_blocks is None else str(self.reuse_blocks),
            "measured": dict(self.measured),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: object) -> "Plan":
        """ValueError for what is not a plan as `to_dict` writes it."""
        if isinstance(values, Mapping) and values.get("version") != VERSION:
            raise ValueError(f"version must be {VERSION}, got {short(values.get('version'))}")
        _table("a plan", values)
        assert isinstance(values, Mapping)
        values = _fields("a plan", {"reuse_blocks": None, **values}, _PLAN)
        model = _fields("model", values["model"], _MODEL)
        measured = _fields("measured", values["measured"], MEASURED, needs_all=False)
        weights = _fields("weights", model["weights"], _WEIGHTS, needs_all=False)
        text, reused = values["kv_schedule"], values["reuse_blocks"]
        start, end = map(float, values["guidance_interval"])
        return cls(
            Identity(weights, model["config"], model["name"]),
            values["steps"], (start, end), values["guidance"], values["scheduler"],
            None if text is None else KVSchedule.parse(text), measured,
            None if reused is None else _reuse(reused, values["steps"]),
        )  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """CheckpointError for a file that is no plan, OSError for one that cannot be read."""
        content = read_bounded(path, MOST_BYTES)
        try:
            return cls.from_dict(parse_json(content, "the file", MOST_BYTES, unique=True))
        except ValueError as error:
            raise CheckpointError(f"{path}: is no plan ({error})") from error

    def digest(self) -> str:
        """Of what it sets, whatever was measured and of which model."""
        values = self.to_dict()
        return _sha256(json.dumps([values[name] for name in _SETS]))

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        write_json(path, self.to_dict(), indent=2)

    def check(self, model: Identity) -> None:
        """ValueError unless it is a plan of this model, or of any."""
        if self.model is not None and (other := self.model.differs(model)):
            raise ValueError(
                f"was measured with another model ({short(self.model.name)}, other {other}); make one of "
                f"this model with python -m pixart.calibrate"
            )


# Without weights that it could be of: see the README of the package for where the numbers come from. T-GATE's own
# default for PixArt is to guide 10 of 25 steps, too (arXiv:2404.02747).
OF_ANY_MODEL: Mapping[str, Plan] = MappingProxyType(
    {
        "balanced": Plan(None, 13, (0.0, 0.4)),
        "fast": Plan(None, 12, (0.0, 0.4)),
    }
)

Check = Callable[[str, Any], object]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError(f"{name} must be a text of up to 1000 characters, got {short(value)}")
    check_text(name, value)


def _digest(name: str, value: Any) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"{name} must be a sha256, got {short(value)}")


def _scheduler(name: str, value: Any) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[a-z+-]{1,40}", value):
        raise ValueError(f"{name} must be the name of a scheduler, got {short(value)}")


def _schedule(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be text or null, got {short(value)}")


def _reuse(text: str, steps: int) -> BlockReuse:
    found = BlockReuse.parse(text)
    if found.steps[-1] > steps:
        raise ValueError(f"reuse_blocks must be of the {steps} steps, got {found.steps[-1]}")
    return found


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise ValueError(f"{name} must be a finite number, got {short(value)}")


def _from_zero(name: str, value: Any) -> None:
    _number(name, value)
    if value < 0:
        raise ValueError(f"{name} must be from 0 up, got {short(value)}")


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number from 0 up, got {short(value)}")


def _steps(name: str, value: Any) -> None:
    _count(name, value)
    if not FEWEST_STEPS < value <= MOST_STEPS:
        raise ValueError(
            f"{name} must be from {FEWEST_STEPS + 1} to {MOST_STEPS}, got {value}: with fewer there is "
            "nothing left to leave out"
        )


def _interval(name: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers, got {short(value)}")
    for one in value:
        _number(name, one)
    if not 0 <= value[0] <= value[1] <= 1:
        raise ValueError(f"{name} must be 0 <= start <= end <= 1, got {short(value)}")


def _share(name: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{name} must be [right, of], got {short(value)}")
    for one in value:
        _count(name, one)
    if value[0] > value[1]:
        raise ValueError(f"{name} must be [right, of], got {short(value)}")


def _table(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object, got {short(value)}")


_PLAN: dict[str, Check] = {
    "version": _count, "model": _table, "scheduler": _scheduler, "steps": _steps, "guidance": _from_zero,
    "guidance_interval": _interval, "kv_schedule": _schedule, "reuse_blocks": _schedule, "measured": _table,
}  # fmt: skip
_MODEL: dict[str, Check] = {"name": _text, "weights": _table, "config": _digest}
_WEIGHTS: dict[str, Check] = dict.fromkeys(_PARTS, _digest)
# What is measured of a plan. cost: its FLOPs, as a share of those by default. schedule_error: relative error of
# its latents beside those without the KV schedule; budget: what that was allowed to be. error: beside those by
# default, other steps and guidance. psnr (dB), ssim: of pictures beside those by default. accuracy,
# accuracy_by_default: captions that are all true, [right, of]. seconds, seconds_by_default: of denoising one
# picture. images, seed, size: what was drawn.
MEASURED: dict[str, Check] = {
    "cost": _from_zero, "budget": _from_zero, "schedule_error": _from_zero, "error": _from_zero,
    "psnr": _number, "ssim": _number, "accuracy": _share, "accuracy_by_default": _share,
    "seconds": _from_zero, "seconds_by_default": _from_zero, "images": _count, "seed": _count,
    "size": _text, "commit": _text, "machine": _text,
}  # fmt: skip


def _fields(
    what: str, values: object, known: Mapping[str, Check], needs_all: bool = True
) -> dict[str, Any]:
    """The values, of the known keys and kinds alone."""
    _table(what, values)
    assert isinstance(values, Mapping)
    for key in values:
        if key not in known:
            meant = near(str(key), known)
            way_out = f"did you mean {meant!r}?" if meant else f"known are {', '.join(known)}"
            raise ValueError(f"unknown key {short(key)} in {what}; {way_out}")
    if needs_all and (missing := [key for key in known if key not in values]):
        raise ValueError(f"{what} must have {', '.join(missing)}")
    for key, value in values.items():
        known[key](key, value)
    return dict(values)
