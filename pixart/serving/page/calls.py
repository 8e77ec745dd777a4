"""`draw`, for programs that speak to Gradio: gradio_client, and what is made with it."""

import base64
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr

from pixart.pipeline.request import SETTINGS, kinds_of
from pixart.serving.orders import Job
from pixart.serving.page.actions import Actions
from pixart.serving.page.form import Asked
from pixart.serving.refusal import Refusal

DESCRIPTION = (
    "Draw pictures. The parameters are the fields of a request; what is left out is the model's own. image, "
    "mask and control_image are base64 of a file, or data URLs. loras: lists of a name and a weight. "
    "controls: names, one for each control image. count: of pictures, with seeds from seed upwards. format: "
    "png, jpg or webp. fast: by the service's plan, if it has one. Gives for each picture its address under "
    "/v1/jobs, seed, width, height, remarks, and its file as a data URL."
)
_KINDS: dict[Any, Any] = {tuple: list[Any]}
_MORE: dict[str, tuple[Any, Any]] = {
    "loras": (list[list[str | float]], []), "controls": (list[str], []), "count": (int, 1), "format": (str, "png"),
    "fast": (bool, True),
}  # fmt: skip


def draw(actions: Actions) -> Callable[..., Awaitable[list[dict[str, Any]]]]:
    """A function with all settings as its parameters, which Gradio makes its document of."""
    names = [*SETTINGS, *_MORE]

    async def draw(request: gr.Request, *values: Any) -> list[dict[str, Any]]:
        given = dict(zip(names, values, strict=True))
        settings = {name: given[name] for name in SETTINGS if given[name] is not None}
        try:
            asked = Asked(
                settings, _pairs(given["loras"]), tuple(_list("controls", given["controls"])),
                given["count"], given["format"], bool(given["fast"]),
            )  # fmt: skip
            job = await actions.draw(asked, str(request.state.owner))
        except Refusal as refusal:
            raise gr.Error(refusal.reason, print_exception=False) from refusal
        return [_told(job, number) for number in range(len(job.results))]

    kinds = {
        **{name: _kind(name) for name in SETTINGS},
        **{name: one for name, (one, _) in _MORE.items()},
    }
    defaults = {**dict.fromkeys(SETTINGS), "prompt": inspect.Parameter.empty}
    defaults |= {name: default for name, (_, default) in _MORE.items()}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("request", kind, annotation=gr.Request)]
    parameters += [
        inspect.Parameter(name, kind, default=defaults[name], annotation=kinds[name])
        for name in names
    ]
    draw.__signature__ = inspect.Signature(parameters, return_annotation=list[dict[str, Any]])  # type: ignore[attr-defined]
    draw.__annotations__ = {"request": gr.Request, **kinds, "return": list[dict[str, Any]]}
    return draw


def _pairs(loras: Any) -> tuple[tuple[str, float], ...]:
    pairs = _list("loras", loras)
    if not all(isinstance(one, list) and len(one) == 2 for one in pairs):
        raise Refusal(400, "loras must be pairs of a name and a weight", field="loras")
    return tuple((name, weight) for name, weight in pairs)


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list | None):
        raise Refusal(400, f"{name} must be a list", field=name)
    return value or []


def _kind(name: str) -> Any:
    kinds = [one for one in kinds_of(name) if one is not type(None)]
    plain: list[Any] = [
        one if isinstance(one, type) and one in (str, int, float, bool) else list[Any]
        for one in kinds
    ]
    kind = plain[0]
    for one in plain[1:]:
        kind = kind | one
    return kind if name == "prompt" else kind | None


def _told(job: Job, number: int) -> dict[str, Any]:
    result = job.results[number]
    content = base64.b64encode(result.content).decode("ascii")
    return {
        "url": f"/v1/jobs/{job.id}/images/{number}", "seed": result.request.seed, "width": result.width,
        "height": result.height, "parameters": result.parameters, "remarks": [*result.remarks],
        "picture": f"data:{result.media_type};base64,{content}",
    }  # fmt: skip
