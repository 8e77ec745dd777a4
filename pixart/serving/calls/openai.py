"""OpenAI's calls for pictures, as its clients make them: generations, edits and models.

What this model does not do is refused. What changes nothing here is taken, since clients send it
unasked, and named in the answer under `ignored`.
"""

import base64
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from pixart.pictures import upright
from pixart.pipeline.limits import ALPHA
from pixart.serving.calls.documents import REFUSALS
from pixart.serving.calls.events import ALIVE, KIND, Events, event, follow
from pixart.serving.calls.forms import body_of, values_of
from pixart.serving.calls.openai_fields import (
    BESIDE,
    EXAMPLES,
    FORMATS,
    IGNORED,
    Drawn,
    Edit,
    Generation,
    InputTokens,
    Model,
    ModelList,
    OutputFormat,
    Pictures,
    Usage,
)
from pixart.serving.calls.schemas import open_sent, ours, settings_of, submit
from pixart.serving.guarding.clients import owner_of
from pixart.serving.orders import Job, Preview, Result
from pixart.serving.refusal import Refusal
from pixart.serving.service import Service

if TYPE_CHECKING:
    from PIL.Image import Image

_LOOK = 0.5  # seconds between two looks at whether the client is still there
_STREAMED = "Where stream is true: events `{0}.partial_image` and `{0}.completed`, or an `error`."
_NO_RETRY = {"X-Should-Retry": "false"}  # OpenAI's clients would ask for the same twice more


def router(service: Service) -> APIRouter:
    """`/v1/images/generations`, `/v1/images/edits` and `/v1/models`."""
    routes = APIRouter(prefix="/v1", tags=["openai"], responses=REFUSALS)
    offer, begun = service.offer, int(time.time())
    Owner = Annotated[str, Depends(owner_of)]

    @routes.post("/images/generations", summary="Draw pictures", **_told(Generation))
    async def generate(request: Request, owner: Owner) -> Any:
        """Further fields: every setting of a picture, also under the names of diffusers."""
        return await _answer(request, owner, service, Generation)

    @routes.post("/images/edits", summary="Draw a picture anew, or a part of it", **_told(Edit))
    async def edit(request: Request, owner: Owner) -> Any:
        """Takes a form with files, or JSON."""
        return await _answer(request, owner, service, Edit)

    def model() -> Model:
        return Model(
            id=offer.model, created=begun, native=offer.native, multiple=offer.multiple,
            loras=list(offer.loras), controls=list(offer.controls), fast=offer.fast,
        )  # fmt: skip

    @routes.get("/models", summary="The model, and what may be chosen beside it")
    def models() -> ModelList:
        return ModelList(data=[model()])

    @routes.get("/models/{id:path}", summary="The model")
    def model_of(id: Annotated[str, Path(description="Its name.")]) -> Model:
        _check_model(id, service)
        return model()

    return routes


@dataclass(frozen=True)
class _Asked:
    """What answers repeat of a request. name: what its events begin with."""

    name: str
    output_format: OutputFormat
    ignored: Sequence[str]
    is_streamed: bool
    partial_images: int


def _told(model: type[BaseModel]) -> dict[str, Any]:
    """What the document has of a call that draws."""
    stream = {KIND: {"schema": {"type": "string"}}}
    description = f"The pictures. {_STREAMED.format(_name(model))}"
    return {
        "response_model": Pictures,
        "responses": {200: {"description": description, "content": stream}},
        "openapi_extra": body_of(model, EXAMPLES[model], form=model is Edit),
    }


def _name(model: type[BaseModel]) -> str:
    return "image_edit" if model is Edit else "image_generation"


async def _answer(
    request: Request, owner: str, service: Service, model: type[BaseModel]
) -> Events | Pictures:
    values = ours(await values_of(request, model, service.limits.body))
    given = {name: value for name, value in values.items() if value is not None}
    asked = _asked(given, _name(model))
    job = await run_in_threadpool(_submit, given, asked, service, owner)
    if asked.is_streamed:
        return Events(_events(service, job, asked), lambda: _forget(service, job))
    try:
        return _pictures(await _ended(request, service, job), asked, service)
    finally:  # it has all in the answer; of a client that has gone, nobody waits for it
        _forget(service, job)


def _asked(given: dict[str, Any], name: str) -> _Asked:
    stream, partial = given.get("stream", False), given.get("partial_images", 0)
    if partial and not stream:
        reason = "partial_images must be given with stream, which shows them"
        raise Refusal(400, reason, code="invalid_value", field="partial_images")
    ignored = [one for one in IGNORED if given.get(one, "auto") != "auto"]
    return _Asked(name, given.get("output_format", "png"), ignored, stream, partial)


def _submit(given: dict[str, Any], asked: _Asked, service: Service, owner: str) -> Job:
    if "model" in given:
        _check_model(given["model"], service)
    settings = {name: value for name, value in given.items() if name not in BESIDE}
    if settings.get("size") == "auto":
        del settings["size"]
    _open_pictures(settings, service)
    return submit(
        settings, service, owner, format=FORMATS[asked.output_format], quality=_quality(given, asked),
        preview_every=_preview_every(settings, asked),
    )  # fmt: skip


def _check_model(id: str, service: Service) -> None:
    if id != service.offer.model:
        reason = f"model {id[:100]!r} is not here; this service draws with {service.offer.model!r}"
        raise Refusal(404, reason, code="model_not_found", field="model")


def _quality(given: dict[str, Any], asked: _Asked) -> int | None:
    compression = given.get("output_compression")
    if asked.output_format != "png" or compression is None:
        return None if compression is None else max(1, compression)
    if compression != 100:  # what clients send for the best there is, and png is that
        reason = (
            f"output_compression must be left out for png, which loses nothing, got {compression}"
        )
        raise Refusal(400, reason, code="invalid_value", field="output_compression")
    return None


def _preview_every(settings: dict[str, Any], asked: _Asked) -> int:
    """As often as they are shown, where the steps are known by now."""
    if not asked.partial_images:
        return 0
    return max(1, settings.get("steps", 0) // (asked.partial_images + 1))


def _open_pictures(settings: dict[str, Any], service: Service) -> None:
    """The picture and the mask as an order has them: what is white is drawn anew."""
    sent = settings.get("image")
    if isinstance(sent, list):
        if len(sent) != 1:
            reason = f"image must be one picture, from which this model draws, got {len(sent)}"
            raise Refusal(400, reason, code="invalid_value", field="image")
        sent = sent[0]
    if sent is not None:
        settings["image"] = open_sent("image", sent, service)
        _keep_size(settings)
    if settings.get("mask", ALPHA) != ALPHA:
        settings["mask"] = _white_for_transparent(open_sent("mask", settings["mask"], service))


def _keep_size(settings: dict[str, Any]) -> None:
    """Clients send the picture's own size along, which is to say that it stays as it is."""
    width, height = upright(settings["image"]).size
    if settings.get("size") == f"{width}x{height}" and "fit" not in settings:
        del settings["size"]
        settings["fit"] = "exact"


def _white_for_transparent(mask: "Image") -> "Image":
    from PIL import ImageChops

    if not mask.has_transparency_data:
        return mask
    return ImageChops.invert(upright(mask).convert("RGBA").getchannel("A"))


async def _ended(request: Request, service: Service, job: Job) -> Job:
    """As soon as it has. ClientDisconnect if its client leaves before."""
    async for now in follow(service.queue, job, job.owner, _LOOK):
        if await request.is_disconnected():
            raise ClientDisconnect
        job = now or job
    return job


def _forget(service: Service, job: Job) -> None:
    with suppress(Refusal):  # it has been let go of already
        service.queue.delete(job.id, job.owner)


def _check_done(job: Job, pictures: int) -> None:
    """Refusal unless all of a job's pictures are there."""
    if job.state == "failed":
        reason = job.error or "the picture could not be drawn"
        raise Refusal(500, reason, code="failed", further=_NO_RETRY)
    if job.state == "cancelled":
        raise Refusal(409, "the order was cancelled", code="cancelled", further=_NO_RETRY)
    if pictures < len(job.order.requests):
        reason = "the pictures take more than is kept; ask for fewer at once"
        raise Refusal(500, reason, code="not_kept", further=_NO_RETRY)


def _pictures(job: Job, asked: _Asked, service: Service) -> Pictures:
    _check_done(job, len(job.results))
    first = job.results[0]
    return Pictures(
        created=int(job.created), model=service.offer.model, data=list(map(_drawn, job.results)),
        output_format=asked.output_format, size=f"{first.width}x{first.height}",
        usage=_usage(job.results, service), ignored=list(asked.ignored), remarks=job.remarks,
    )  # fmt: skip


def _drawn(result: Result) -> Drawn:
    return Drawn(
        b64_json=_text(result.content), seed=result.request.seed, settings=settings_of(result.request),
        seconds=dict(result.seconds),
    )  # fmt: skip


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _usage(results: Sequence[Result], service: Service) -> Usage:
    def tokens(result: Result) -> int:
        return -(-result.width // service.offer.multiple) * -(
            -result.height // service.offer.multiple
        )

    text = sum(result.text_tokens for result in results)
    begun = sum(tokens(result) for result in results if result.request.image is not None)
    drawn = sum(map(tokens, results))
    return Usage(
        input_tokens=text + begun,
        input_tokens_details=InputTokens(text_tokens=text, image_tokens=begun),
        output_tokens=drawn,
        total_tokens=text + begun + drawn,
    )


async def _events(service: Service, job: Job, asked: _Asked) -> AsyncGenerator[bytes, None]:
    shown, finished = _Shown(asked.partial_images), 0
    try:
        async for now in follow(service.queue, job, job.owner):
            if now is None:
                yield ALIVE
                continue
            if (index := shown.index_of(now)) is not None and now.preview is not None:
                yield _partial(now.preview, index, asked)
            for result in now.results[finished:]:
                finished += 1
                yield _completed(result, asked, service)
            if now.has_ended:
                _check_done(now, finished)
    except Refusal as refusal:
        yield event("error", refusal.content("/v1"))


class _Shown:
    """Which previews of a job are shown, so that they are spread over its steps."""

    def __init__(self, wanted: int) -> None:
        self._wanted, self._picture, self._count = wanted, 0, 0

    def index_of(self, job: Job) -> int | None:
        """Of the job's latest preview among those of its picture; None for one that is not shown."""
        latest = job.preview
        if latest is None or latest.picture != job.picture or not job.steps or job.has_ended:
            return None
        if latest.picture != self._picture:
            self._picture, self._count = latest.picture, 0
        every = max(1, job.steps // (self._wanted + 1))  # as `_preview_every` has it
        is_due = latest.step >= every * (self._count + 1)
        if self._count >= self._wanted or not is_due or latest.step >= job.steps:
            return None
        self._count += 1
        return self._count - 1


def _partial(preview: Preview, index: int, asked: _Asked) -> bytes:
    return _event(
        f"{asked.name}.partial_image", preview.content, (preview.width, preview.height), "jpeg",
        partial_image_index=index, picture=preview.picture,
    )  # fmt: skip


def _completed(result: Result, asked: _Asked, service: Service) -> bytes:
    more = _drawn(result).model_dump(exclude={"b64_json"})
    return _event(
        f"{asked.name}.completed", result.content, (result.width, result.height), asked.output_format,
        usage=_usage([result], service).model_dump(), ignored=list(asked.ignored),
        remarks=list(result.remarks), **more,
    )  # fmt: skip


def _event(
    name: str, content: bytes, size: tuple[int, int], output_format: OutputFormat, **more: Any
) -> bytes:
    return event(
        name,
        {
            "type": name, "b64_json": _text(content), "created_at": int(time.time()),
            "size": f"{size[0]}x{size[1]}", "quality": "auto", "background": "opaque",
            "output_format": output_format, **more,
        },
    )  # fmt: skip
