"""The application: all routes, the page and the guard before them, around one service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from pixart import __version__
from pixart.serving import page
from pixart.serving.a1111 import routes as a1111
from pixart.serving.calls import health, jobs, openai
from pixart.serving.guarding.guard import Guard
from pixart.serving.refusal import Refusal
from pixart.serving.service import Service
from pixart.serving.temporary import private_folder

TITLE = "PixArt"
DESCRIPTION = (
    "Pictures from text. OpenAI's calls for pictures, those of A1111 that its clients make, and jobs with "
    "progress and previews; all of them go through one queue."
)


def make_app(service: Service, *, ui: bool, closes: bool = False) -> FastAPI:
    """What uvicorn runs. ui: with the page, which needs Gradio. closes: temporary files are its own and the
    queue ends with it, for other people's servers; ours closes it earlier, while streams are still open."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not closes:
            yield
            return
        with private_folder():
            try:
                yield
            finally:  # before the folder goes, which those that are drawn may use
                service.queue.close()

    app = FastAPI(
        lifespan=lifespan,
        title=TITLE,
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        exception_handlers={HTTPException: _refuse, RequestValidationError: _refuse_values},
    )
    for part in (openai, jobs, a1111, health):
        app.include_router(part.router(service))
    if ui:  # last: it answers for every path that is left
        page.mount(app, service)
    app.add_middleware(Guard, service=service)
    return app


async def _refuse(_: Request, error: Exception) -> Response:
    """No such path, or no such method there: in the one form that all refusals have."""
    assert isinstance(error, HTTPException)
    reason = f"{error.detail}; /openapi.json tells what there is"
    code = error.detail.lower().replace(" ", "_")
    raise Refusal(error.status_code, reason, code=code, further=error.headers)


async def _refuse_values(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = str(first["loc"][-1])
    raise Refusal(400, f"{field} {_said(first['msg'])}", field=field)


def _said(message: str) -> str:
    """pydantic's sentence, after the name of the field."""
    return message.removeprefix("Input ").removeprefix("Field ")
