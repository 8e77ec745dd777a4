"""Jobs over HTTP: send an order, hear how far it is, fetch its pictures, stop it."""

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from pixart.serving.calls.documents import REFUSALS, content, pictures
from pixart.serving.calls.events import ALIVE, KIND, Events, event, follow
from pixart.serving.calls.forms import body_of, values_of
from pixart.serving.calls.schemas import ordering, settings_model, settings_of, submit
from pixart.serving.guarding.clients import owner_of
from pixart.serving.orders import MEDIA_TYPES, Format, Job, JobQueue, Result, State
from pixart.serving.refusal import Refusal
from pixart.serving.service import Service

JobOrder = settings_model(
    "JobOrder",
    **ordering(),
    format=(Format, Field("png", description="Of the pictures' files.")),
    quality=(int | None, Field(None, ge=1, le=100, description="Of jpg and webp. Default 95.")),
    preview_every=(
        int,
        Field(0, ge=0, description="Steps from one preview to the next, 0 for none."),
    ),
)
_EXAMPLE = {"prompt": "a red circle on black", "n": 2, "seed": 1, "steps": 4, "preview_every": 2}
_Id = Annotated[str, Path(description="Of a job, as it was answered.")]
_Owner = Annotated[str, Depends(owner_of)]
_Number = Annotated[int, Path(ge=0, le=2**31, description="Of a picture in its order, from 0.")]


class Picture(BaseModel):
    """url: where it is. settings: with which it is drawn again, its pictures sent along. parameters: the
    lines of gallery tools. seconds: that it took, by stage."""

    url: str
    media_type: str
    width: int
    height: int
    bytes: int
    seed: int
    settings: dict[str, Any]
    parameters: str
    seconds: dict[str, float]


class JobAnswer(BaseModel):
    """A job as it stands. position: orders before it. progress: from 0 to 1. picture, step, steps: of the
    picture that is drawn. stage: waiting, load, text, denoise, decode, write or the state at the end.
    created, started, ended: seconds since 1970. settings: of each picture, as it was drawn, or as it was
    asked for until then. pictures: those that are finished and kept. preview: where the latest one is. remarks:
    sentences on pictures that are hardly what was meant.
    """

    id: str
    object: Literal["job"] = "job"
    version: int
    state: State
    position: int
    progress: float = Field(ge=0, le=1)
    picture: int
    step: int
    steps: int
    stage: str
    created: float
    started: float | None
    ended: float | None
    error: str | None
    loras: dict[str, float]
    controls: list[str]
    settings: list[dict[str, Any]]
    pictures: list[Picture]
    preview: str | None
    remarks: list[str]
    is_kept: bool


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobAnswer]


def answer_of(job: Job) -> JobAnswer:
    """What a client is told of its job."""
    requests = [result.request for result in job.results]
    requests += job.order.requests[len(requests) :]
    return JobAnswer(
        id=job.id, version=job.version, state=job.state, position=job.position, progress=job.progress,
        picture=job.picture, step=job.step, steps=job.steps, stage=job.stage, created=job.created,
        started=job.started, ended=job.ended, error=job.error, loras=dict(job.order.loras),
        controls=list(job.order.controls), settings=list(map(settings_of, requests)),
        pictures=[_picture(job, number, one) for number, one in enumerate(job.results)],
        preview=_preview_url(job), remarks=job.remarks, is_kept=job.is_kept,
    )  # fmt: skip


def _picture(job: Job, number: int, result: Result) -> Picture:
    return Picture(
        url=f"/v1/jobs/{job.id}/images/{number}", media_type=result.media_type, width=result.width,
        height=result.height, bytes=len(result.content), seed=result.request.seed,
        settings=settings_of(result.request), parameters=result.parameters,
        seconds=dict(result.seconds),
    )  # fmt: skip


def _preview_url(job: Job) -> str | None:
    if job.preview is None or job.has_ended:
        return None
    # With the step, so that no browser shows the one before.
    return f"/v1/jobs/{job.id}/preview?step={job.preview.picture}-{job.preview.step}"


def router(service: Service) -> APIRouter:
    """`/v1/jobs` and what is below."""
    routes = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=REFUSALS)
    _add_orders(routes, service)
    _add_pictures(routes, service.queue)
    _add_ends(routes, service.queue)
    return routes


def _add_orders(routes: APIRouter, service: Service) -> None:
    queue = service.queue

    @routes.post(
        "",
        status_code=202,
        summary="Order pictures",
        responses={202: {"headers": {"Location": {"schema": {"type": "string"}}}}},
        openapi_extra=body_of(JobOrder, _EXAMPLE, form=True),
    )
    async def order(request: Request, response: Response, owner: _Owner) -> JobAnswer:
        """Takes JSON, or a form whose pictures are files. The answer comes at once; `events` tells more."""
        values = await values_of(request, JobOrder, service.limits.body)
        job = await run_in_threadpool(_submit, values, service, owner)
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        return answer_of(job)

    @routes.get("", summary="Your jobs that are kept, the oldest first")
    def list_jobs(owner: _Owner) -> JobList:
        return JobList(data=[answer_of(job) for job in queue.list(owner)])

    @routes.get("/{id}", summary="A job as it stands")
    def get(id: _Id, owner: _Owner) -> JobAnswer:
        return answer_of(queue.get(id, owner))

    @routes.get(
        "/{id}/events",
        summary="How far a job is, as it goes on",
        response_class=Response,
        responses={
            200: content(
                KIND, "Events `job`, each with the whole job; the last one is `end`, or `error`."
            ),
            204: {
                "description": "It had ended by the event that the client saw last: come no more."
            },
        },
    )
    async def events(
        id: _Id,
        owner: _Owner,
        last_event_id: Annotated[
            str | None, Header(description="The id of the last event that was seen.")
        ] = None,
    ) -> Response:
        job, seen = queue.get(id, owner), _seen(last_event_id)
        if job.has_ended and job.version == seen:
            return Response(status_code=204)
        return Events(_events(service, job, owner, seen))


def _add_pictures(routes: APIRouter, queue: JobQueue) -> None:
    @routes.get(
        "/{id}/images/{number}",
        summary="A finished picture's file",
        response_class=Response,
        responses={
            200: pictures("The file, with the metadata to draw it again.", *MEDIA_TYPES.values())
        },
    )
    def image(
        id: _Id,
        number: _Number,
        owner: _Owner,
        download: Annotated[bool, Query(description="As a file to save.")] = False,
    ) -> Response:
        job = queue.get(id, owner)
        result = _result(job, number)
        name = f"{job.id[:8]}-{number}-{result.request.seed}.{result.format}"
        way = "attachment" if download else "inline"
        headers = {"Content-Disposition": f'{way}; filename="{name}"'}
        return Response(result.content, media_type=result.media_type, headers=headers)

    @routes.get(
        "/{id}/preview",
        summary="The picture so far",
        response_class=Response,
        responses={200: pictures("What the steps so far come to, small.", "image/jpeg")},
    )
    def preview(id: _Id, owner: _Owner) -> Response:
        latest = queue.get(id, owner).preview
        if latest is None:
            reason = (
                "there is no preview yet; preview_every of the order says how often there is one"
            )
            raise Refusal(404, reason, code="not_found")
        return Response(latest.content, media_type="image/jpeg")


def _add_ends(routes: APIRouter, queue: JobQueue) -> None:
    @routes.post("/{id}/cancel", summary="Stop a job; what is finished stays")
    def cancel(id: _Id, owner: _Owner) -> JobAnswer:
        return answer_of(queue.cancel(id, owner))

    @routes.delete(
        "/{id}",
        status_code=204,
        response_class=Response,
        summary="Stop a job and forget its pictures",
    )
    def delete(id: _Id, owner: _Owner) -> Response:
        queue.delete(id, owner)
        return Response(status_code=204)


def _submit(values: dict[str, Any], service: Service, owner: str) -> Job:
    how = {
        name: values.pop(name) for name in ("format", "quality", "preview_every") if name in values
    }
    return submit(values, service, owner, **how)


def _seen(text: str | None) -> int | None:
    """The version that the client has; None where it names none of ours."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 10 else None


async def _events(
    service: Service, job: Job, owner: str, seen: int | None
) -> AsyncGenerator[bytes, None]:
    try:
        async for now in follow(service.queue, job, owner):
            if now is None:
                yield ALIVE
            elif now.version != seen or now.has_ended:
                name = "end" if now.has_ended else "job"
                yield event(name, answer_of(now).model_dump(), now.version)
    except Refusal as refusal:  # it has been deleted while the client was slow to listen
        yield event("error", refusal.content("/v1"))


def _result(job: Job, number: int) -> Result:
    if number < len(job.results):
        return job.results[number]
    if not job.is_kept:
        raise Refusal(410, "the pictures of this job are not kept any longer", code="gone")
    reason = f"picture {number} is not there: {len(job.results)} of {len(job.order.requests)} are finished"
    raise Refusal(404, reason, code="not_found", field="number")
