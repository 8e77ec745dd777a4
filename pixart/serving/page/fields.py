"""The fields of the page, by the names that pixart.serving.page.form knows, in the groups that are shown."""

import gradio as gr

from pixart.pipeline.limits import FITS
from pixart.preprocess import PREPROCESSORS
from pixart.resolution import RESOLUTIONS
from pixart.sampler import SCHEDULERS
from pixart.serving.page.editor import picture_editor
from pixart.serving.service import Service

Fields = dict[str, gr.components.Component]
OWN = "auto"
_ASPECTS = (
    "1:1",
    "5:4",
    "4:3",
    "3:2",
    "16:9",
    "2:1",
    "3:1",
    "4:5",
    "3:4",
    "2:3",
    "9:16",
    "1:2",
    "1:3",
)
_ENLARGED = ("2x", "3x", "4x", "2k", "4k")
_RANDOM = "by chance"


def prompts() -> Fields:
    return {
        "prompt": gr.Textbox(
            label="Prompt", lines=3, max_lines=8, placeholder="What to draw", elem_id="prompt",
        ),
        "negative": gr.Textbox(
            label="Negative prompt", lines=1, max_lines=6, placeholder="What not to draw", elem_id="negative"
        ),
    }  # fmt: skip


def sizes(service: Service) -> Fields:
    sides = {name: side for name, side in RESOLUTIONS.items() if side**2 <= service.limits.pixels}
    own = (f"{OWN} ({service.offer.native})", "")
    with gr.Row():
        fields: Fields = {
            "aspect": gr.Dropdown(
                [(OWN, ""), *((_shape(one), one) for one in _ASPECTS)], value="",
                label="Shape", elem_id="aspect", min_width=140,
            ),
            "resolution": gr.Dropdown(
                [own, *((_of_side(name, side), name) for name, side in sides.items())],
                value="", label="Resolution", elem_id="resolution", min_width=140,
            ),
            "size": gr.Textbox(
                label="Exact size", placeholder="1344x768", max_lines=1, elem_id="size",
                min_width=140,
            ),
        }  # fmt: skip
    return fields


def _shape(aspect: str) -> str:
    width, height = map(int, aspect.split(":"))
    return f"{aspect} {'square' if width == height else 'wide' if width > height else 'tall'}"


def _of_side(name: str, side: int) -> str:
    return f"{name} ({side})" if name != str(side) else name


def sampling(service: Service) -> Fields:
    with gr.Row(elem_classes="seeds"):
        fields: Fields = {
            "seed": gr.Textbox(
                label="Seed", placeholder=_RANDOM, max_lines=1, elem_id="seed", min_width=120
            ),
        }
        gr.Button("Roll", elem_id="die", min_width=80, scale=0)
        fields["count"] = _number("count", "Pictures", "1", whole=True)
    with gr.Row():
        fields["steps"] = _number("steps", "Steps", OWN, whole=True)
        fields["guidance"] = _number("guidance", "Guidance", OWN)
        fields["scheduler"] = gr.Dropdown(
            [(OWN, ""), *((name, name) for name in SCHEDULERS)], value="", label="Scheduler",
            elem_id="scheduler", min_width=140,
        )  # fmt: skip
    if service.offer.fast is not None:
        fields["without_plan"] = gr.Checkbox(
            label=f"Without the plan ({service.offer.fast}): all of the model's work",
            elem_id="without_plan",
        )
    return fields


def beginning() -> Fields:
    fields: Fields = {"begin": picture_editor("begin", "picture to begin with", has_mask=True)}
    with gr.Row():
        fields["strength"] = _number(
            "strength", "How much of it is drawn anew (0 to 1)", "0.6",
        )  # fmt: skip
        fields["outpaint"] = gr.Textbox(
            label="Beyond its edges: left, top, right, bottom", placeholder="0,0,128,0", max_lines=1,
            elem_id="outpaint", min_width=140,
        )  # fmt: skip
    fields["upscale"] = gr.Dropdown(
        [("no", ""), *((one, one) for one in _ENLARGED)], value="", allow_custom_value=True,
        label="Then draw it larger (any size may be typed)", elem_id="upscale",
    )  # fmt: skip
    return fields


def control(service: Service) -> Fields:
    """Only where there is any."""
    with gr.Row():
        fields: Fields = {
            "control": gr.Dropdown(
                [("none", ""), *((one, one) for one in service.offer.controls)], value="",
                label="Control", elem_id="control", min_width=140,
            ),
            "control_preprocessor": gr.Dropdown(
                [("nothing", ""), *((one, one) for one in PREPROCESSORS if one != "none")],
                value="", label="The picture is prepared by", elem_id="control_preprocessor",
                min_width=140,
            ),
            "control_scale": _number("control_scale", "How strong", "1"),
        }  # fmt: skip
    fields["control_picture"] = picture_editor(
        "control_picture", "picture to go by", has_mask=False
    )
    fields |= _interval("control_start", "control_end", "Controlled")
    return fields


def loras(service: Service) -> Fields:
    """Only where there are any."""
    with gr.Row():
        return {
            "loras": gr.Dropdown(
                list(service.offer.loras), value=[], multiselect=True, label="LoRAs", elem_id="loras"
            ),
            "weights": gr.Textbox(
                label="Their weights", placeholder="1, or one for each: 0.8, 0.5", max_lines=1,
                elem_id="weights",
            ),
        }  # fmt: skip


def advanced() -> Fields:
    fields = _interval("guidance_start", "guidance_end", "Guided")
    fields["timesteps"] = gr.Textbox(
        label="Timesteps, in the place of steps", placeholder="999,749,499,249", max_lines=1,
        elem_id="timesteps",
    )  # fmt: skip
    with gr.Row():
        fields["guidance_rescale"] = _number(
            "guidance_rescale", "Contrast taken back (0 to 1)", "0"
        )
        fields["pag"] = _number("pag", "Perturbed-attention guidance", "0, none")
        fields["pag_blocks"] = gr.Textbox(
            label="Its blocks", placeholder="the middle one", max_lines=1, elem_id="pag_blocks",
            min_width=140,
        )  # fmt: skip
    fields["apg"] = gr.Checkbox(
        label="Adaptive projected guidance: high guidance without glaring colours", elem_id="apg"
    )
    with gr.Row():
        fields["apg_eta"] = _number("apg_eta", "Its eta", "0")
        fields["apg_momentum"] = _number("apg_momentum", "Its momentum", "-0.5")
        fields["apg_norm"] = _number("apg_norm", "Its norm", "15")
    fields |= _pictures()
    fields["format"] = gr.Dropdown(
        [("PNG", "png"), ("JPEG", "jpg"), ("WebP", "webp")], value="png", label="File format",
        elem_id="format",
    )  # fmt: skip
    return fields


def _pictures() -> Fields:
    with gr.Row():
        fields: Fields = {
            "upscale_strength": _number(
                "upscale_strength", "Enlarging: how much is drawn anew", "0.35",
            ),
            "upscale_guidance": _number(
                "upscale_guidance", "Enlarging: guidance", "1, none"
            ),
            "tiles": _number("tiles", "Windows, side in pixels", "none", whole=True),
        }  # fmt: skip
    with gr.Row():
        fields["fit"] = gr.Dropdown(
            [("as it needs", ""), *((one, one) for one in FITS)], value="",
            label="How the picture meets the size", elem_id="fit", min_width=140,
        )  # fmt: skip
        fields["mask_blur"] = _number("mask_blur", "Mask fades over pixels", "0", whole=True)
    fields["invert_mask"] = gr.Checkbox(
        label="Draw anew what is not painted", elem_id="invert_mask"
    )
    return fields


def _interval(start: str, end: str, what: str) -> Fields:
    with gr.Row():
        return {
            start: _number(start, f"{what} from (0 is noise)", "0"),
            end: _number(end, f"{what} to (1 is the picture)", "1"),
        }


def _number(id: str, label: str, default: str, *, whole: bool = False) -> gr.Textbox:
    """Text, as Gradio's numbers cannot be empty: empty is what the model takes, which `default` tells."""
    keys = (
        "numeric" if whole else "decimal"
    )  # of a phone's keyboard, which the page's script asks for
    return gr.Textbox(
        label=label,
        placeholder=default,
        elem_id=id,
        min_width=120,
        max_lines=1,
        elem_classes=keys,
    )
