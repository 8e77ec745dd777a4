"""Before everything that is served: who may ask, how much, and how the answers leave.

A pure ASGI application around another one, which sees requests with their whole body and with
`scope["state"]["owner"]`, and may raise `Refusal` anywhere.
"""

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from pixart.command import one_line
from pixart.process import write_line
from pixart.serving.guarding import login
from pixart.serving.guarding.answers import PAGE, Answer
from pixart.serving.guarding.bodies import Bodies, Gone
from pixart.serving.guarding.clients import LOCAL, token_of
from pixart.serving.guarding.heads import Head, check, heard
from pixart.serving.guarding.rates import Crowd, Rates
from pixart.serving.refusal import Refusal
from pixart.serving.service import Service

AT_ONCE, ALL_AT_ONCE = 128, 384  # requests of one client and of all, streams of events among them
STRANGERS_RATE = 60  # requests a minute without a token that is ours, of one address
FOR_EVERYBODY = "/healthz"  # says nothing of anybody
_WEBSOCKET_REFUSED = 1008


class Guard:
    """app: what is guarded."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self._app, self._clients, self._hosts = app, service.clients, service.hosts
        self._bodies, self._forms = Bodies(service.limits.body), Bodies(login.MOST_FORM, 10.0)
        self._rates, self._strangers = Rates(service.limits.rate), Rates(STRANGERS_RATE)
        self._crowd, self._door = Crowd(AT_ONCE, ALL_AT_ONCE), login.Door(service.clients)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:  # nothing here speaks by sockets
            await send({"type": "websocket.close", "code": _WEBSOCKET_REFUSED})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = Answer(send, scope["method"], scope["path"])
        try:
            head = Head.of(scope)
            check(head, self._hosts)
            if head.path in (login.LOGIN, login.LOGOUT):
                await self._open_door(head, receive, answer)
            else:
                await self._let_in(head, scope, receive, answer)
            await answer.end()
        except Refusal as refusal:
            await answer.refuse(refusal)
        except (Gone, ClientDisconnect, ConnectionError):
            return
        except Exception as error:
            write_line(one_line(f"pixart.serve: {scope['path']}: {type(error).__name__}: {error}"))
            await answer.fail()

    async def _let_in(self, head: Head, scope: Scope, receive: Receive, answer: Answer) -> None:
        if head.is_visit and head.comes_from_elsewhere:
            await self._reply(login.once_more(), head, answer)
            return
        owner = "" if head.path == FOR_EVERYBODY else self._owner(head, answer)
        if owner is None:
            await self._refuse_stranger(head, answer)
            return
        if head.changes_something:
            self._count(owner, head)
        with self._crowd.entered(owner or head.address) as has_room:
            if not has_room:
                reason = f"at most {AT_ONCE} requests of one client are answered at once, and fewer while many ask"
                raise Refusal(429, reason, code="too_many", retry_after=1)
            async with self._bodies.whole(head, receive) as whole:
                await self._app(self._scope(scope, owner), whole, answer)

    def _owner(self, head: Head, answer: Answer) -> str | None:
        """None for a stranger."""
        authorization = head.get("authorization")
        if self._clients.has_tokens:
            if authorization:
                return self._clients.named(token_of(authorization) or "")
            return self._clients.session(head.cookie(self._cookie(head)))
        if authorization:
            return self._clients.bearer(authorization)
        visitor = self._clients.visitor(head.cookie(self._cookie(head)))
        if visitor is None and head.is_visit:
            cookie = self._clients.new_visitor()
            self._keep(cookie, head, answer)
            return self._clients.visitor(cookie)
        return visitor or LOCAL

    async def _refuse_stranger(self, head: Head, answer: Answer) -> None:
        if head.is_visit and not head.get("authorization"):
            await self._reply(login.Reply(303, headers={"Location": login.LOGIN}), head, answer)
            return
        if wait := self._strangers.take(head.address):
            raise Refusal(
                429,
                "too many requests without a token of ours",
                code="rate_limit",
                retry_after=wait,
            )
        raise Refusal(
            401,
            "a token must be given, as `Authorization: Bearer TOKEN` or as the password of Basic",
            code="no_token",
            further={"WWW-Authenticate": 'Bearer realm="pixart"'},
        )

    def _count(self, owner: str, head: Head) -> None:
        # Where anybody may give himself a name, new names are counted by where they come from.
        is_new = not self._clients.has_tokens and not self._rates.knows(owner)
        wait = self._rates.take(f"new at {head.address}") if is_new else 0.0
        if wait := wait or self._rates.take(owner):
            reason = "too many requests a minute; /v1/jobs/{id}/events tells of progress without asking again"
            raise Refusal(429, reason, code="rate_limit", retry_after=wait)

    async def _open_door(self, head: Head, receive: Receive, answer: Answer) -> None:
        body = b""
        if head.changes_something:
            async with self._forms.whole(head, receive) as whole:
                body = (await whole())["body"]
        await self._reply(
            self._door.answer(head, head.cookie(self._cookie(head)), body), head, answer
        )

    async def _reply(self, reply: login.Reply, head: Head, answer: Answer) -> None:
        if reply.cookie is not None:
            self._keep(reply.cookie, head, answer)
        kind = "text/html; charset=utf-8"
        await answer.whole(reply.status, reply.content, kind, reply.headers, login.POLICY)

    def _keep(self, cookie: str, head: Head, answer: Answer) -> None:
        is_secure = self._is_secure(head)
        answer.cookies = [login.cookie_line(self._cookie(head), cookie, is_secure=is_secure)]

    def _cookie(self, head: Head) -> str:
        """The name of ours. Cookies know no ports: each server of a machine needs a name of its own."""
        return f"{'__Host-' if self._is_secure(head) else ''}pixart-{head.reached[1] or 0}"

    def _is_secure(self, head: Head) -> bool:
        return self._hosts.https or head.scheme == "https"

    def _scope(self, scope: Scope, owner: str) -> Scope:
        return {
            **scope,
            "scheme": "https" if self._hosts.https else scope.get("scheme", "http"),
            "headers": heard(scope, is_packed=scope["path"] != PAGE),
            "state": {**scope.get("state", {}), "owner": owner},
        }
