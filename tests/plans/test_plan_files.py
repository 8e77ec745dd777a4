"""plan.json: what is written is read, what is hostile or of another model is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixart.config import KVCompression, PixArtConfig
from pixart.files import CheckpointError
from pixart.plans.plan import MEASURED, OF_ANY_MODEL, Identity, Plan
from pixart.plans.schedule import KVSchedule

CONFIG = PixArtConfig(input_size=16, hidden_size=144, depth=4, num_heads=2)
WEIGHTS = {"transformer": "ab" * 32, "vae": "cd" * 32}
MODEL = Identity.of(WEIGHTS, CONFIG, "mine")
MEASUREMENTS = {
    "cost": 0.5, "budget": 0.05, "schedule_error": 0.04, "error": 0.2, "psnr": 30.0, "ssim": 0.9,
    "accuracy": [29, 30], "accuracy_by_default": [30, 30], "seconds": 1.0, "seconds_by_default": 2.0,
    "images": 30, "seed": 0, "size": "128x128", "commit": "", "machine": "a CPU",
}  # fmt: skip
PLAN = Plan(
    MODEL, 14, (0.0, 0.7), 4.5, "dpm-solver++", KVSchedule.parse("0-3:2@1000-500"), MEASUREMENTS
)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert set(MEASUREMENTS) == set(MEASURED)
    PLAN.write(tmp_path / "plan.json")
    read = Plan.read(tmp_path / "plan.json")
    assert read == PLAN and read.model is not None and read.model.name == "mine"
    with pytest.raises(ValueError, match="plan of any model"):
        OF_ANY_MODEL["fast"].write(tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("weights", "config", "said"),
    [
        ({"transformer": "00" * 32}, {}, "other transformer"),
        ({**WEIGHTS, "lora": "00" * 32}, {}, "other lora"),
        (WEIGHTS, {"kv_compression": KVCompression((1,), 2)}, "other configuration"),
        (WEIGHTS, {"pe_interpolation": 2.0}, "other configuration"),
    ],
)
def test_a_plan_of_another_model_is_refused(weights: Any, config: Any, said: str) -> None:
    other = PixArtConfig(**{**CONFIG.to_dict(), **config})
    with pytest.raises(ValueError, match=f"another model .'mine', {said}"):
        PLAN.check(Identity.of(weights, other, "yours"))
    PLAN.check(
        Identity.of({**WEIGHTS, "vae": "00" * 32}, CONFIG, "moved")
    )  # it draws the same latents
    OF_ANY_MODEL["balanced"].check(Identity.of(weights, other, "yours"))


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(plan: dict[str, Any]) -> None:
        for key in path[:-1]:
            plan = plan[key]
        plan[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("version", value=2), "version must be 1, got 2"),
        (_set("stepps", value=2), "unknown key 'stepps' in a plan; did you mean 'steps'?"),
        (_set("measured", "fid", value=2), "unknown key 'fid' in measured"),
        (_set("model", "path", value="x"), "unknown key 'path' in model"),
        (_set("model", "weights", "unet", value="x"), "unknown key 'unet' in weights"),
        (_set("model", "config", value="x"), "config must be a sha256"),
        (_set("model", "weights", value=[]), "weights must be an object"),
        (_set("steps", value=8), "steps must be from 9 to 1000, got 8"),
        (_set("steps", value=10**400), "steps must be"),
        (_set("steps", value=14.0), "steps must be a whole number"),
        (_set("steps", value=True), "steps must be a whole number"),
        (_set("guidance", value=float("nan")), "guidance must be a finite number"),
        (_set("guidance", value=-1), "guidance must be from 0 up"),
        (_set("guidance_interval", value=[0.7, 0.2]), "guidance_interval must be 0 <= start <= end"),
        (_set("guidance_interval", value=0.7), "guidance_interval must be two numbers"),
        (_set("scheduler", value="../x"), "scheduler must be the name"),
        (_set("scheduler", value=None), "scheduler must be the name"),
        (_set("kv_schedule", value=[1]), "kv_schedule must be text or null"),
        (_set("kv_schedule", value="0:9"), "ratios of 1, 2, 3 or 4"),
        (_set("measured", "accuracy", value=[2, 1]), "accuracy must be"),
        (_set("measured", "cost", value="\n\x1b[31m" * 99), "cost must be a finite number"),
        (lambda plan: plan.pop("model"), "a plan must have model"),
    ],
)  # fmt: skip
def test_a_hostile_plan_is_one_line_that_names_the_file(
    change: Any, said: str, tmp_path: Path
) -> None:
    values = PLAN.to_dict()
    change(values)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as error:
        Plan.read(file)
    line = str(error.value)
    assert line.startswith(f"{file}: ") and said in line and "\n" not in line and "\x1b" not in line


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b"[" * 9999, b" " * (1 << 21), b'{"version": 1}']
)
def test_a_file_that_is_no_plan_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="plan.json: "):
        Plan.read(tmp_path / "plan.json")
