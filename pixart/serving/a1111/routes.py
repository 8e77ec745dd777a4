"""The calls that A1111's clients make: SillyTavern, Open WebUI, plug-ins of painting programs.

    POST /sdapi/v1/txt2img  {"prompt": "a large red circle on white", "steps": 20}

Progress and interrupt are about the caller's own pictures alone. What a client asks for at its start, and
what is not here, is answered by empty lists.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from pixart.pipeline.metadata import SAMPLERS
from pixart.serving.a1111.answers import Images, PngInfo, Progress, Refused, images_of, progress_of
from pixart.serving.a1111.fields import Picture, Text
from pixart.serving.a1111.infotext import infotext
from pixart.serving.a1111.reading import (
    ENLARGERS,
    SCHEDULES,
    VAES,
    check_options,
    order_from,
)
from pixart.serving.calls.documents import REFUSALS
from pixart.serving.calls.schemas import refusal_of
from pixart.serving.calls.sent_pictures import bytes_of_text
from pixart.serving.guarding.clients import owner_of
from pixart.serving.orders import Job
from pixart.serving.refusal import Refusal
from pixart.serving.service import Service

Owner = Annotated[str, Depends(owner_of)]
LOOK_SECONDS = 1.0  # between two looks at whether a client is still there
KARRAS = "-karras"
_REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Refused, "description": "Refused, in one line that names the field."},
    "5XX": {"model": Refused, "description": "Failed, or no room now."},
}
# What there is none of here, and clients ask for.
_EMPTY_LISTS = (
    "sd-vae", "sd-modules", "prompt-styles", "hypernetworks", "face-restorers", "realesrgan-models",
    "script-info", "extensions",
)  # fmt: skip


class Sent(BaseModel):
    model_config = ConfigDict(extra="forbid")
    image: str = Field(description="base64 of a picture's file, or a data URL.")


def router(service: Service) -> APIRouter:
    """All routes under /sdapi/v1, and the lists of ControlNet."""
    routes = APIRouter(tags=["A1111"])
    calls = APIRouter(prefix="/sdapi/v1", responses=_REFUSED)
    _add_drawing(calls, _Calls(service))
    _add_lists(calls, service)
    _add_options(calls, service)
    routes.include_router(calls)
    routes.include_router(_controlnet(service))
    return routes


class _Calls:
    """Pictures that clients wait for at this moment, by client: what progress and interrupt are about."""

    def __init__(self, service: Service) -> None:
        self.service, self._ids = service, dict[str, list[str]]()

    async def draw(self, body: Text, owner: str, request: Request) -> Images:
        """Order it and wait; a client that goes away wants no picture any more."""
        queue = self.service.queue
        job = await run_in_threadpool(self._submit, body, owner)
        self._ids.setdefault(owner, []).append(job.id)
        try:
            while not job.has_ended and not await request.is_disconnected():
                job = await queue.wait(job.id, owner, job.version, LOOK_SECONDS)
        finally:
            if not job.has_ended:
                queue.cancel(job.id, owner)
            self._forget(job.id, owner)
        if job.state == "failed":
            raise Refusal(500, job.error or "the picture failed", code="failed")
        if not job.is_kept:
            raise Refusal(507, "the pictures take more room than is kept here; ask for fewer")
        return images_of(job, body, self.service.offer.model)

    def current(self, owner: str) -> Job | None:
        """The one that is drawn or comes next."""
        ids = self._ids.get(owner, ())
        jobs = [
            job for job in self.service.queue.list(owner) if job.id in ids and not job.has_ended
        ]
        return min(jobs, key=lambda job: (job.state != "drawing", job.created), default=None)

    def waiting(self, owner: str) -> int:
        return len(self._ids.get(owner, ()))

    def interrupt(self, owner: str) -> None:
        if (job := self.current(owner)) is not None:
            self.service.queue.cancel(job.id, owner)

    def skip(self, owner: str) -> None:
        """Of several pictures none can be left out: the rest would be other ones."""
        job = self.current(owner)
        if job is not None and job.picture + 1 < len(job.order.requests):
            raise Refusal(
                409, "skip must be of the last picture of a batch; /sdapi/v1/interrupt ends it all",
                code="not_possible",
            )  # fmt: skip
        self.interrupt(owner)

    def _submit(self, body: Text, owner: str) -> Job:
        order = order_from(body, self.service)
        try:
            return self.service.queue.submit(order, owner)
        except ValueError as error:
            raise refusal_of(error) from error

    def _forget(self, id: str, owner: str) -> None:
        self._ids[owner].remove(id)
        if not self._ids[owner]:
            del self._ids[owner]


def _add_drawing(routes: APIRouter, calls: _Calls) -> None:
    @routes.post("/txt2img")
    async def txt2img(body: Text, owner: Owner, request: Request) -> Images:
        """Pictures from text. Answers when they are drawn, or interrupted: with those that are finished."""
        return await calls.draw(body, owner, request)

    @routes.post("/img2img")
    async def img2img(body: Picture, owner: Owner, request: Request) -> Images:
        """Pictures from a picture, or in a part of it."""
        return await calls.draw(body, owner, request)

    @routes.get("/progress")
    async def progress(owner: Owner, skip_current_image: bool = False) -> Progress:
        """Of the caller's own picture that is drawn, or else waits."""
        return progress_of(calls.current(owner), calls.waiting(owner), not skip_current_image)

    @routes.post("/interrupt")
    async def interrupt(owner: Owner) -> dict[str, Any]:
        """End the caller's own picture that is drawn or comes next, within a step."""
        calls.interrupt(owner)
        return {}

    @routes.post("/skip")
    async def skip(owner: Owner) -> dict[str, Any]:
        """The same for a single picture."""
        calls.skip(owner)
        return {}

    @routes.post("/png-info")
    async def png_info(body: Sent) -> PngInfo:
        """What a picture says about how it was drawn."""
        return await run_in_threadpool(_png_info, body.image)


def _add_options(routes: APIRouter, service: Service) -> None:
    @routes.get("/options")
    async def options() -> dict[str, Any]:
        """Those that clients read."""
        return {
            "sd_model_checkpoint": service.offer.model,
            "sd_checkpoint_hash": "",
            "sd_vae": VAES[0],
            "CLIP_stop_at_last_layers": 1,
            "samples_format": "png",
        }

    @routes.post("/options")
    async def set_options(values: Annotated[dict[str, Any], Body()]) -> None:
        """Taken where they change nothing: all clients draw with one model."""
        check_options(values, service)


def _add_lists(routes: APIRouter, service: Service) -> None:
    offer = service.offer
    lists: dict[str, Any] = {
        "sd-models": [_model(offer.model)],
        "samplers": _samplers(),
        "schedulers": [
            {"name": name, "label": label, "aliases": None, "default_rho": -1, "need_inner_model": False}
            for name, label in SCHEDULES.items()
        ],
        "upscalers": [_enlarger(name) for name in ("None", ENLARGERS[0])],
        "latent-upscale-modes": [{"name": name} for name in ENLARGERS[1:]],
        "loras": [{"name": n, "alias": n, "path": n, "metadata": {}} for n in offer.loras],
        "embeddings": {"loaded": {}, "skipped": {}},
        "scripts": {"txt2img": ["controlnet"], "img2img": ["controlnet"]},
        "memory": {"ram": {}, "cuda": {}},
        "cmd-flags": {"api": True},
        **{name: [] for name in _EMPTY_LISTS},
    }  # fmt: skip
    for name, answer in lists.items():
        _add_constant(routes, f"/{name}", answer)
    for name in ("checkpoints", "loras", "vae"):
        _add_constant(routes, f"/refresh-{name}", None, "POST")


def _controlnet(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/controlnet", responses=REFUSALS)
    modules = ["none", "canny", "softedge_hed", "depth", "openpose"]
    _add_constant(routes, "/model_list", {"model_list": [*service.offer.controls]})
    _add_constant(routes, "/module_list", {"module_list": modules, "module_detail": {}})
    _add_constant(routes, "/version", {"version": 2})
    return routes


def _add_constant(routes: APIRouter, path: str, answer: Any, method: str = "GET") -> None:
    kind: Any = list[dict[str, Any]] if isinstance(answer, list) else dict[str, Any] | None

    async def constant() -> Any:
        return answer

    name = path.rpartition("/")[2]
    routes.add_api_route(
        path, constant, methods=[method], name=name, response_model=kind, summary=name
    )


def _model(name: str) -> dict[str, Any]:
    return {
        "title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None,
    }  # fmt: skip


def _samplers() -> list[dict[str, Any]]:
    """Those with Karras' noise levels are there under A1111's older names too."""
    return [
        {
            "name": name,
            "aliases": [ours],
            "options": {"scheduler": "karras"} if ours.endswith(KARRAS) else {},
        }
        for ours, name in SAMPLERS.items()
    ]


def _enlarger(name: str) -> dict[str, Any]:
    return {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4}


def _png_info(image: str) -> PngInfo:
    text, parameters = infotext(bytes_of_text(image, "image"))
    return PngInfo(info=text, items={"parameters": text} if text else {}, parameters=parameters)
