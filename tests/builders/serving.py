"""A painter of flat colours, and the whole service running on a free port around one."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from pixart.config import EMBEDDED
from pixart.pipeline.metadata import MODEL_OPTIONS, Metadata
from pixart.pipeline.pictures import encode_picture
from pixart.pipeline.request import Request
from pixart.resolution import resolve_size
from pixart.serving.drawing.queue import Queue
from pixart.serving.guarding.clients import Clients
from pixart.serving.limits import Limits
from pixart.serving.orders import Hooks, Order, Preview, Result
from pixart.serving.service import Offer, Service

SIDE = 128  # pixels, where a request leaves the size open
STEPS = 4
REMARK = "drawn without the plan"
SOON = 30.0  # seconds after which a test gives up waiting for what takes none
MODEL: dict[str, Any] = {
    **dict.fromkeys(MODEL_OPTIONS), "model": EMBEDDED, "lora": [], "control": [],
    "preprocessor_weights": [], "ema": False, "cuda_graph": "auto",
}  # fmt: skip


@dataclass
class StubPainter:
    """Draws each picture in a flat colour of its seed, at once, or step by step while it is held.

    drawn: (prompt, seed) of the pictures that were begun. prepared: the prompts of each call of `prepare`.
    faults: what is raised in the place of the picture of a prompt. unprepared: prompts over which `prepare`
    fails. An order without the plan is remarked upon.
    """

    drawn: list[tuple[str, int]] = field(default_factory=list)
    prepared: list[list[str]] = field(default_factory=list)
    faults: dict[str, BaseException] = field(default_factory=dict)
    unprepared: set[str] = field(default_factory=set)
    is_closed: bool = False

    def __post_init__(self) -> None:
        self._free, self._may_step = threading.Event(), threading.Semaphore(0)
        self._free.set()

    def hold(self) -> None:
        """Stop before the next step, until `release` or `let_step`."""
        self._free.clear()
        self._may_step = threading.Semaphore(0)

    def release(self) -> None:
        self._free.set()

    def let_step(self, steps: int = 1) -> None:
        """So many steps more, while it is held."""
        self._may_step.release(steps)

    def check(self, order: Order) -> tuple[Request, ...]:
        return tuple(map(_resolved, order.requests))

    def prepare(self, orders: tuple[Order, ...], cancel: Callable[[], bool]) -> None:
        prompts = [request.prompt for order in orders for request in order.requests]
        self.prepared.append(prompts)
        if failing := self.unprepared & {*prompts}:
            raise RuntimeError(f"no words for {failing}")

    def draw(self, order: Order, number: int, hooks: Hooks) -> Result:
        asked = order.requests[number]
        request = _resolved(asked)
        assert request.steps is not None
        self.drawn.append((request.prompt, request.seed))
        hooks.stage("load")
        hooks.stage("denoise")
        image = _flat(request)
        for step in range(1, request.steps + 1):
            self._wait(hooks)
            every = order.preview_every
            is_due = every and (step % every == 0 or step == request.steps)
            hooks.step(step, request.steps, _preview(image, number, step) if is_due else None)
        if request.prompt in self.faults:
            raise self.faults[request.prompt]
        hooks.stage("decode")
        hooks.stage("write")
        metadata = Metadata(request, MODEL, asked, MODEL)
        content = encode_picture(image, metadata, order.format, order.quality)
        seconds = {"text": 0.5, "denoise": 1.0, "decode": 0.25}
        size = image.width, image.height
        remarks = () if order.fast else (REMARK,)
        return Result(
            content,
            order.format,
            *size,
            request,
            metadata.to_parameters(),
            seconds,
            remarks=remarks,
        )

    def close(self) -> None:
        self.is_closed = True

    def _wait(self, hooks: Hooks) -> None:
        """Until the next step may be taken."""
        from pixart.sampler.loop import Cancelled

        while not hooks.cancel():
            if self._free.is_set() or self._may_step.acquire(timeout=0.005):
                return
        raise Cancelled("cancelled")


def _resolved(request: Request) -> Request:
    asked = request.size, request.aspect, request.resolution
    size = resolve_size(*asked, native=SIDE, multiple=16)
    return replace(
        request, size=None, aspect=None, resolution=None, height=request.height or size.height,
        width=request.width or size.width, steps=request.steps or STEPS,
        guidance=4.5 if request.guidance is None else request.guidance,
        guidance_interval=request.guidance_interval or (0.0, 1.0),
        scheduler=request.scheduler or "dpm-solver++", batched=True, tile=False,
    )  # fmt: skip


def _flat(request: Request) -> Image.Image:
    assert request.height and request.width
    colour = (request.seed % 256, request.seed // 256 % 256, len(request.prompt) % 256)
    return Image.new("RGB", (request.width, request.height), colour)


def _preview(image: Image.Image, picture: int, step: int) -> Preview:
    import io

    content = io.BytesIO()
    image.save(content, "JPEG")
    return Preview(content.getvalue(), image.width, image.height, picture, step)


def order(*prompts: str, count: int = 1, **changes: Any) -> Order:
    """So many pictures of each prompt."""
    requests = [Request(prompt, seed=seed) for prompt in prompts for seed in range(count)]
    return Order(tuple(requests), **changes)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does. AssertionError if it does not."""
    until = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < until, "did not come to pass"
        time.sleep(0.005)


@dataclass(frozen=True)
class Running:
    """url: of the service, without a path. service: to look behind it."""

    url: str
    service: Service
    painter: Any


@contextlib.contextmanager
def running_service(
    painter: Any = None,
    *,
    offer: Offer | None = None,
    clients: Clients | None = None,
    limits: Limits | None = None,
    ui: bool = False,
    **parts: Any,
) -> Iterator[Running]:
    """The real application under uvicorn, in a thread, on a free port of this machine.

    painter: a StubPainter by default. clients: without tokens by default. parts: further fields of Service.
    """
    import uvicorn

    from pixart.serving.app import make_app

    painter = painter or StubPainter()
    limits = limits or Limits()
    queue = Queue(painter, limits)
    offer = offer or Offer(EMBEDDED, native=SIDE, multiple=16)
    service = Service(queue, offer, clients or Clients(), limits, **parts)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(
            make_app(service, ui=ui), log_level="warning", lifespan="on", proxy_headers=False,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            eventually(lambda: server.started or not thread.is_alive())
            assert server.started, "the service did not start"
            yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", service, painter)
        finally:
            if isinstance(painter, StubPainter):
                painter.release()
            queue.close()
            server.should_exit = True
            thread.join(SOON)
