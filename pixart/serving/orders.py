"""What is asked of the queue, and what it tells of it. Everything here is frozen: any thread may hold it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from pixart.pipeline.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

State = Literal["waiting", "drawing", "done", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")
Format = Literal["png", "jpg", "webp"]
MEDIA_TYPES: Mapping[Format, str] = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "webp": "image/webp",
}


@dataclass(frozen=True)
class Order:
    """Pictures that one client wants, drawn one after the other.

    requests: one for each picture. pictures: what the requests name as image, mask or control_image; a
    request names no file. loras: names of the service's list, with weights. controls: names of the
    service's list, in the order of the requests' control images. preview_every: steps from one preview to
    the next, 0 for none. quality: of jpg and webp, 1 to 100. fast: whether by the service's plan, if it has one.
    """

    requests: tuple[Request, ...]
    pictures: "Mapping[str, Image]" = field(default_factory=dict)
    loras: tuple[tuple[str, float], ...] = ()
    controls: tuple[str, ...] = ()
    preview_every: int = 0
    format: Format = "png"
    quality: int | None = None
    fast: bool = True


@dataclass(frozen=True)
class Preview:
    """The picture so far. content: a JPEG. picture: its number in the order, from 0. step: after which."""

    content: bytes
    width: int
    height: int
    picture: int
    step: int


@dataclass(frozen=True)
class Result:
    """A finished picture. content: a file with the metadata that draws it again. request: as drawn, nothing
    left open. parameters: the lines of gallery tools. seconds: by stage. text_tokens: of the prompt, as the
    transformer has seen it. remarks: sentences on a picture that is hardly what was meant."""

    content: bytes
    format: Format
    width: int
    height: int
    request: Request
    parameters: str
    seconds: Mapping[str, float]
    text_tokens: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def media_type(self) -> str:
        return MEDIA_TYPES[self.format]


@dataclass(frozen=True)
class Job:
    """An order as it stands at one moment; the queue gives another one for another moment.

    order: without its pictures once it has ended. version: raised by every change, so that whoever has seen
    one can wait for the next. position: orders that come before it, 0 for the next one and for one that is
    drawn. picture, step, steps: of the picture that is drawn, or that was the last. stage: "waiting", also
    between two pictures while others have their turn, "load", "text", "denoise", "decode", "write" or an end
    of State. created, started, ended: seconds since 1970, None for what has not come. error: why it failed,
    one line. results: of the pictures finished so far, those of an order that failed or was cancelled too;
    () when they are not kept any longer, and `is_kept` says so.
    """

    id: str
    owner: str
    order: Order
    version: int
    state: State
    created: float
    position: int = 0
    picture: int = 0
    step: int = 0
    steps: int = 0
    stage: str = "waiting"
    started: float | None = None
    ended: float | None = None
    preview: Preview | None = None
    results: tuple[Result, ...] = ()
    error: str | None = None
    is_kept: bool = True

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def remarks(self) -> list[str]:
        """Of all its pictures so far, each once."""
        return list(dict.fromkeys(one for result in self.results for one in result.remarks))

    @property
    def progress(self) -> float:
        """From 0 to 1, by pictures and steps."""
        if self.state == "done":
            return 1.0
        share = self.step / self.steps if self.steps else 0.0
        return (len(self.results) + min(share, 1.0)) / max(len(self.order.requests), 1)


@dataclass(frozen=True)
class Figures:
    """What a queue has to do, and has done since it was made.

    is_alive: whether orders are taken and drawn. waiting: orders that are neither drawn at this moment nor
    ended. is_drawing: whether a picture is drawn. kept_jobs, kept_bytes: of what has ended. ended: orders by
    how they did. refused: for want of room. pictures: finished. seconds: that these took, by stage.
    """

    is_alive: bool
    waiting: int
    is_drawing: bool
    kept_jobs: int
    kept_bytes: int
    ended: Mapping[State, int]
    refused: int
    pictures: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Hooks:
    """What a painter calls while it draws a picture. stage: with a stage of `Job`. step: with the step, all
    steps, and a preview where one is due. cancel: whether to stop, asked before each step."""

    stage: Callable[[str], object]
    step: Callable[[int, int, Preview | None], object]
    cancel: Callable[[], bool]


class Painter(Protocol):
    """Who draws. `check` may be called from any thread, the others from the queue's one thread alone."""

    def check(self, order: Order) -> tuple[Request, ...]:
        """The requests with what the model takes where they leave something open. ValueError, one line,
        for what it cannot draw."""

    def prepare(self, orders: tuple[Order, ...], cancel: Callable[[], bool]) -> None:
        """Encode the prompts of orders ahead, in one pass of the text encoder."""

    def draw(self, order: Order, number: int, hooks: Hooks) -> Result:
        """The picture of that number. Raises pixart.sampler.loop.Cancelled when `hooks.cancel` says so."""

    def close(self) -> None:
        """Let go of the models."""


class JobQueue(Protocol):
    """Orders of all clients, drawn by one thread, a picture at a time in turn among the clients that wait.

    A client sees its own jobs alone: an id of another's is refused as one that is not there. All methods
    may be called from any thread; `wait` from any event loop.
    """

    def submit(self, order: Order, owner: str) -> Job:
        """Take an order. ValueError for what cannot be drawn; Refusal (429, with retry_after) where the
        queue is full, (503) while the service ends. Pictures are looked at: not for an event loop."""

    def get(self, id: str, owner: str) -> Job:
        """Refusal (404) for an id that is not there, or another client's."""

    def list(self, owner: str) -> list[Job]:
        """All jobs of a client that are kept, the oldest first."""

    def cancel(self, id: str, owner: str) -> Job:
        """End it: what is returned has ended, and drawing stops within a step. What had ended before stays
        as it was. Refusal as `get`."""

    def delete(self, id: str, owner: str) -> None:
        """Cancel it and forget its pictures. Refusal as `get`."""

    async def wait(self, id: str, owner: str, version: int, seconds: float) -> Job:
        """As soon as it has another version than this one or has ended, or after so many seconds. Refusal
        as `get`."""

    def figures(self) -> Figures:
        """Of all clients together."""

    def close(self) -> None:
        """Cancel what is drawn, refuse what comes, and end the thread."""
