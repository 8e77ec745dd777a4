"""The guard around a small application, and clients of it."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

import httpx
from fastapi import Depends, FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse

from pixart.serving.guarding.clients import Clients, owner_of
from pixart.serving.guarding.guard import Guard
from pixart.serving.guarding.hosts import Hosts
from pixart.serving.limits import Limits
from pixart.serving.refusal import Refusal
from pixart.serving.service import Service

ANN, BOB = "ann's-token-0123456789", "bob's-token-0123456789"
TOKENS = {"ann": ANN, "bob": BOB}
PAGE = "<html><script>first()</script><script type='module' src='/a.js'></script><script data-x>\n2\n</script>"
BASE = "http://127.0.0.1:7860"


def small_app() -> FastAPI:
    app = FastAPI()

    @app.get("/v1/me")
    @app.post("/v1/me")
    def me(request: Request, owner: str = Depends(owner_of)) -> dict[str, Any]:
        return {"owner": owner, "headers": dict(request.headers), "url": str(request.url)}

    @app.post("/v1/size")
    @app.post("/v1/images/edits")
    async def size(request: Request) -> int:
        return len(await request.body())

    @app.get("/v1/refused")
    @app.get("/sdapi/v1/refused")
    def refused() -> None:
        raise Refusal(
            429, "the queue\n is \x1b[31mfull", code="queue_full", field="n", retry_after=2.4
        )

    @app.get("/v1/broken")
    def broken() -> None:
        raise KeyError("a secret of the inside")

    @app.get("/v1/page-of-others")
    def page_of_others() -> PlainTextResponse:
        return PlainTextResponse("Traceback: a secret", status_code=500)

    @app.get("/v1/own-error")
    def own_error() -> JSONResponse:
        return JSONResponse({"error": "said on purpose"}, status_code=500)

    @app.get("/v1/gone")
    def gone() -> None:
        raise ClientDisconnect

    @app.get("/v1/stream")
    def stream() -> StreamingResponse:
        def parts() -> Iterator[str]:
            yield "data: 1\n\n"
            raise RuntimeError("broke off")

        return StreamingResponse(parts(), media_type="text/event-stream")

    @app.get("/")
    def page(request: Request) -> HTMLResponse:
        headers = {
            "Access-Control-Allow-Origin": "*", "Server": "x", "Cache-Control": "public, max-age=9",
            "Content-Security-Policy": "default-src *",
        }  # fmt: skip
        assert "accept-encoding" not in request.headers  # the guard reads what it finds in the page
        return HTMLResponse(PAGE, headers=headers)

    @app.get("/assets/a.js")
    def asset() -> PlainTextResponse:
        return PlainTextResponse("1", headers={"Cache-Control": "max-age=9"})

    @app.get("/healthz")
    def health(owner: str = Depends(owner_of)) -> dict[str, str]:
        return {"owner": owner}

    return app


def guard(
    tokens: dict[str, str] | None = None, *, hosts: Hosts | None = None, **limits: Any
) -> Guard:
    service: Any = Service(
        None,
        None,
        Clients(tokens),
        Limits(**limits),
        hosts=hosts or Hosts(),  # type: ignore[arg-type]
    )
    return Guard(small_app(), service=service)


Asked = Callable[..., httpx.Response]


def asking(guarded: Guard, base: str = BASE) -> Asked:
    """A client that keeps cookies."""
    cookies = httpx.Cookies()

    def ask(method: str, path: str, **options: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(guarded, raise_app_exceptions=True)
            async with httpx.AsyncClient(
                transport=transport, base_url=base, cookies=cookies
            ) as client:
                answer = await client.request(method, path, **options)
                cookies.update(client.cookies)
                return answer

        return asyncio.run(once())

    return ask


def reason_of(answer: httpx.Response) -> str:
    """What an error says, which is one line of JSON."""
    assert answer.status_code >= 400 and "\n" not in answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


async def raw(
    guarded: Guard,
    parts: Iterable[Any],
    headers: dict[str, str],
    method: str = "POST",
    path: str = "/v1/size",
    *,
    more: Iterable[tuple[bytes, bytes]] = (),
    query: bytes = b"",
) -> tuple[int, bytes]:  # fmt: skip
    """Status and body of a request whose body comes in parts: ... is no more for ever, None a client that
    leaves. more: headers that are given again."""
    left = list(parts)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not left or left[0] is ...:
            await asyncio.Event().wait()
        part = left.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"host": "127.0.0.1:7860", "content-type": "application/json", **headers}
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in given.items()]
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query,
        "headers": [*pairs, *more], "scheme": "http", "http_version": "1.1", "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 7860),
    }  # fmt: skip
    await guarded(scope, receive, send)
    if not sent:
        return 0, b""
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)
