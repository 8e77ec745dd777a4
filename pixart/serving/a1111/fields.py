"""The fields that A1111's clients send: those that something is done with, and those that are taken.

Every client sends fields of features that are not here, at the values that switch them off. Such a value
is taken; another is refused by the name of its field, as is a field that nobody knows, so that no client
believes in what does not happen. `IGNORED` has no effect here whatever it is: nothing is ever saved, and
what is drawn anew is drawn in the whole picture.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pixart.files import near, printable
from pixart.serving.refusal import Refusal

STRENGTH, MASK_BLUR = 0.75, 4  # A1111's, where a client leaves them out
IGNORED = {
    "save_images", "do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards",
    "comments", "include_init_images", "force_task_id", "seed_enable_extras", "image_cfg_scale",
    "distilled_cfg_scale", "inpaint_full_res", "inpaint_full_res_padding", "refiner_switch_at", "s_tmin",
    "s_tmax", "script_args", "subseed", "hr_distilled_cfg", "url", "auth", "user", "mask_blur",
    "mask_blur_x", "mask_blur_y",
}  # fmt: skip
# Of A1111, and not here.
_FEATURES = {
    "styles", "subseed_strength", "restore_faces", "tiling", "s_min_uncond", "s_churn",
    "refiner_checkpoint", "firstpass_image", "firstphase_width", "firstphase_height",
    "hr_second_pass_steps", "hr_prompt", "hr_negative_prompt", "script_name", "infotext", "latent_mask",
}  # fmt: skip


def _is_off(value: Any) -> bool:
    return value in (None, False, 0, "", "None") or value == [] or value == {}


def _among(*values: Any) -> Callable[[Any], bool]:
    return lambda value: _is_off(value) or value in values


# The values of fields without which there is nothing to do; all others must be off altogether.
_NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "eta": _among(1),
    "s_noise": _among(1),
    "initial_noise_multiplier": _among(1),
    "seed_resize_from_h": _among(-1),
    "seed_resize_from_w": _among(-1),
    "mask_round": _among(True),
    "clip_skip": _among(1),
    "hr_checkpoint_name": _among("Use same checkpoint"),
    "hr_sampler_name": _among("Use same sampler"),
    "hr_scheduler": _among("Use same scheduler"),
    "hr_additional_modules": _among(["Use same choices"]),
    "inpainting_fill": _among(1),
    "resize_mode": _among(1),
}


class Text(BaseModel):
    """A body of txt2img. What stands here is what is done; the guide lists what else is taken."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = Field(
        "", description="<lora:NAME:WEIGHT> in it draws with a LoRA of the service."
    )
    negative_prompt: str | None = None
    seed: int | None = Field(-1, description="-1: by chance.")
    steps: int | None = Field(None, description="Left out: the model's own.")
    cfg_scale: float | None = Field(None, description="Left out: the model's own.")
    width: int | None = Field(None, description="Left out or 0: the model's own square.")
    height: int | None = None
    sampler_name: str | None = Field(None, description="One of /sdapi/v1/samplers.")
    sampler_index: str | None = Field(None, description="An older name of sampler_name.")
    scheduler: str | None = Field(None, description="One of /sdapi/v1/schedulers.")
    batch_size: int | None = Field(1, description="Pictures: batch_size times n_iter.")
    n_iter: int | None = 1
    enable_hr: bool | None = Field(False, description="Then draw it larger.")
    hr_scale: float | None = 2.0
    hr_resize_x: int | None = 0
    hr_resize_y: int | None = 0
    hr_upscaler: str | None = None
    hr_cfg: float | None = Field(None, description="cfg_scale of the enlarged one.")
    denoising_strength: float | None = Field(
        None, description="With enable_hr: of the enlarged one."
    )
    send_images: bool | None = True
    disable_extra_networks: bool | None = Field(
        False, description="LoRAs of the prompt are left out."
    )
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = Field(None, description="ControlNet's units.")


class Picture(Text):
    """A body of img2img."""

    init_images: list[str] = Field(description="One picture: base64 of its file, or a data URL.")
    denoising_strength: float | None = STRENGTH
    mask: str | None = Field(None, description="White is drawn anew.")
    mask_blur: int | None = MASK_BLUR
    mask_blur_x: int | None = None
    mask_blur_y: int | None = None
    inpainting_mask_invert: int | None = 0


def invalid(field: str, must: str, got: object) -> Refusal:
    return Refusal(
        400, printable(f"{field} {must}, got {got!r}"), code="invalid_value", field=field
    )


def check_off(body: Text) -> None:
    """Refusal (400) for the first field beyond those of the model that asks for something."""
    known = {*type(body).model_fields, *_NEUTRAL, *IGNORED}
    same = {"hr_prompt": body.prompt, "hr_negative_prompt": body.negative_prompt}
    for name, value in (body.model_extra or {}).items():
        if name in IGNORED or _NEUTRAL.get(name, _is_off)(value) or same.get(name) == value:
            continue
        if name in _NEUTRAL or name in _FEATURES:
            raise invalid(name, "must be left out, there is no such feature here", value)
        meant = near(name, [*known, *_FEATURES])
        hint = f"; did you mean {meant!r}?" if meant else ""
        reason = printable(f"unknown field {name!r}{hint}")
        raise Refusal(400, reason, code="unknown_parameter", field=printable(name))
