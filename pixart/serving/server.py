"""uvicorn, as this service runs it: bounded, silent but for what goes wrong, and ended by signals."""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socket import socket
from time import monotonic
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pixart import process
from pixart.command import one_line
from pixart.serving.listening import Port, refused

HEAD_SECONDS = 30  # for the head of a request, however it trickles in
HEAD_BYTES = 32 * 1024
KEEP_ALIVE_SECONDS = 30
CONNECTIONS = 400  # streams of events and pages that stay open among them
END_SECONDS = 1  # for answers that are under way; a page's open stream would never end


class Server(uvicorn.Server):
    """close: called before the last answers are waited for, so that streams of events come to their end;
    may take as long as a step."""

    def __init__(self, app: Any, port: Port, close: Callable[[], object]) -> None:
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=Connection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=END_SECONDS,
            h11_max_incomplete_event_size=HEAD_BYTES,
        )
        super().__init__(config)
        self._port, self._close = port, close

    def serve_forever(self) -> None:
        """Until a signal. ValueError for a port that another process has begun to listen at."""
        with _lines_of_uvicorn():
            self.run([self._port.socket])

    async def startup(self, sockets: list[socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:
            raise refused(self._port.host, self._port.number, error) from error
        print(f"{self._port.address}  (Ctrl-C ends)", flush=True)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(
            logging.CRITICAL
        )  # what is cut off is meant to be
        await asyncio.to_thread(self._close)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """From here on a signal asks for the end, and raises nothing amidst of others' answers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._end)
            for name in ("SIGINT", "SIGTERM", "SIGHUP")
            if (number := getattr(signal, name, None)) is not None
            and signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, _: FrameType | None) -> None:
        if not self.should_exit:
            self._asked = monotonic()
            process.ENDING.note(number)
            self.should_exit = True
        elif monotonic() - self._asked > process.TWICE_SECONDS:
            process.ENDING.leave()  # whoever asks again has waited long enough


class Connection(H11Protocol):
    """Closes itself where the head of a request does not come: uvicorn waits for ever for the first. Where
    there are too many, the one on which nothing has been asked for the longest time makes room."""

    _since = 0.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._make_room()
        self._deadline = self.loop.call_later(HEAD_SECONDS, transport.close)

    @property
    def is_idle(self) -> bool:
        """Whether no request is answered or sent, but for the beginning of its head."""
        return self.conn.their_state is h11.IDLE and (
            self.cycle is None or self.cycle.response_complete
        )

    def _make_room(self) -> None:
        connections = [
            one
            for one in self.connections
            if isinstance(one, Connection) and not one.transport.is_closing()
        ]
        if len(connections) >= CONNECTIONS:  # this one is idle at least
            idle = (one for one in connections if one.is_idle)
            min(idle, key=lambda one: one._since).transport.close()

    def data_received(self, data: bytes) -> None:
        self._since = self.loop.time()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


@contextmanager
def _lines_of_uvicorn() -> Iterator[None]:
    """Its errors, a line each; what it remarks about requests is of no use to anybody."""
    logger, handler = logging.getLogger("uvicorn"), _Lines(logging.ERROR)
    before = logger.propagate
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        reason = f": {type(error).__name__}: {error}" if error is not None else ""
        process.write_line(one_line(f"pixart.serve: {record.getMessage()}{reason}"))
