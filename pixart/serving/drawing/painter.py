"""Who draws the service's pictures: a pipeline, one picture at a time."""

import io
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from pixart.pictures import enlarged
from pixart.pipeline.decoding import NotFinitePicture
from pixart.pipeline.inputs import named_in
from pixart.pipeline.metadata import Metadata
from pixart.pipeline.pictures import check_room, encode_picture
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.sampler.loop import Cancelled, Progress
from pixart.serving.drawing.models import Models
from pixart.serving.options import Options
from pixart.serving.orders import Hooks, Order, Preview, Result

AT_ONCE = 64  # prompts that are encoded ahead in one pass of T5
MOST_HELD = 256  # prompts whose features are kept, 2.4 MB each of T5-XXL
PREVIEW_QUALITY = 80  # of JPEG

Done = TypeVar("Done")


class PipelinePainter:
    """A `Painter` of `models`. A picture is drawn in a pass of its own, whatever else waits, so that its bits
    are those of `Pipeline.draw`."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._encoded: set[str] = set()  # prompts that need T5 no more
        self._spent_on_text = 0.0  # seconds since the last picture

    @classmethod
    def open(
        cls, options: Options, loras: Mapping[str, Path], controls: Mapping[str, str]
    ) -> "PipelinePainter":
        """loras, controls: places by the names that orders choose them by. Raises what `Models` does."""
        return cls(Models(options, loras, controls))

    @property
    def native(self) -> int:
        """See `Pipeline.native`."""
        return self._models.plain.native

    @property
    def multiple(self) -> int:
        """See `Pipeline.multiple`."""
        return self._models.plain.multiple

    @property
    def fast(self) -> str | None:
        """See `Offer.fast`."""
        return self._models.fast

    def check(self, order: Order) -> tuple[Request, ...]:
        """See `Painter`."""
        self._models.check(order.loras, order.controls)
        for request in order.requests:
            _check_pictures(request, order)
        pipe = self._models.checker(order.loras, order.controls)
        known: dict[Request, Request] = {}
        found = []
        for asked in order.requests:
            # The networks of preprocessors are opened by whoever draws, not by whoever asks.
            like = replace(asked, prompt="", negative="", seed=0, control_preprocessor=None)
            self._models.settle_plan(pipe, order.loras, like, order.fast)
            model = self._asked_model(order, pipe)
            if like not in known:
                known[like] = pipe.resolve(like, pictures=order.pictures)
            own = {name: getattr(asked, name) for name in ("prompt", "negative", "seed")}
            kinds = asked.control_preprocessor or known[like].control_preprocessor
            request = replace(known[like], **own, control_preprocessor=kinds)
            check_room(Path(f"picture.{order.format}"), Metadata(request, model, asked, model))
            found.append(request)
        return tuple(found)

    def prepare(self, orders: tuple[Order, ...], cancel: Callable[[], bool]) -> None:
        """See `Painter`. Encodes nothing unless the first order needs it, then so many for the others that
        AT_ONCE are encoded."""
        own = _texts(orders[:1])
        if self._encoded.issuperset(own):
            return
        others = [text for text in _texts(orders) if text not in own]
        texts = [*own, *others[: max(0, AT_ONCE - len(own))]]
        if len(self._encoded.union(texts)) > MOST_HELD:
            self._forget()
        started = time.perf_counter()
        pipe = self._models.drawing
        with warnings.catch_warnings():
            # It shows the prompt, and what people ask for is nobody else's to read.
            warnings.filterwarnings("ignore", "the prompt is longer than", UserWarning)
            self._with_memory(lambda: pipe.prepare(texts, self._encoded.add, cancel))
        self._spent_on_text += time.perf_counter() - started

    def draw(self, order: Order, number: int, hooks: Hooks) -> Result:
        """See `Painter`."""
        return self._with_memory(lambda: self._draw(order, number, hooks))

    def close(self) -> None:
        """See `Painter`."""
        self._forget()
        self._models.let_go()

    def _draw(self, order: Order, number: int, hooks: Hooks) -> Result:
        asked = order.requests[number]
        hooks.stage("load")
        if hooks.cancel():
            raise Cancelled("cancelled before a model was loaded")
        started = time.perf_counter()
        pipe = self._models.take(order.loras, order.controls)
        remarks = self._models.settle_plan(pipe, order.loras, asked, order.fast)
        pipe.transformer.to(pipe.device)
        before = {"text": self._spent_on_text, "load": time.perf_counter() - started}
        self._spent_on_text = 0.0
        hooks.stage("denoise")

        def step(progress: Progress) -> None:
            hooks.step(progress.step, progress.total, self._preview(order, number, progress))
            if progress.step == progress.total:
                hooks.stage("decode")

        try:
            drawn = pipe.draw(asked, pictures=order.pictures, callback=step, cancel=hooks.cancel)
        except NotFinitePicture as error:
            raise ValueError(str(error)) from error
        hooks.stage("write")
        started = time.perf_counter()
        metadata = Metadata.of(drawn, pipe, asked, self._asked_model(order, pipe))
        content = encode_picture(drawn.image, metadata, order.format, order.quality)
        parameters, size = metadata.to_parameters(), drawn.image.size
        seconds = _sum(before, drawn.seconds, {"write": time.perf_counter() - started})
        tokens, _ = pipe.caption_tokens(asked.prompt, asked.negative)
        remarks += pipe.remarks(drawn.request)
        return Result(
            content, order.format, *size, drawn.request, parameters, seconds, tokens, tuple(remarks)
        )

    def _asked_model(self, order: Order, pipe: Pipeline) -> dict[str, object]:
        is_planned = pipe.plan is not None
        return self._models.asked(order.loras, order.controls, is_planned=is_planned)

    def _preview(self, order: Order, number: int, progress: Progress) -> Preview | None:
        every = order.preview_every
        if not every or progress.step % every and progress.step != progress.total:
            return None
        pipe, content = self._models.plain, io.BytesIO()
        [small] = pipe.preview(progress.predicted)
        image = enlarged(small, pipe.vae.downsample)
        image.save(content, "JPEG", quality=PREVIEW_QUALITY)
        return Preview(content.getvalue(), *image.size, picture=number, step=progress.step)

    def _forget(self) -> None:
        self._encoded.clear()
        self._models.plain.forget_prompts()

    def _with_memory(self, work: Callable[[], Done]) -> Done:
        """Where memory runs out, MemoryError, after all that can be had again has been let go of."""
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not _is_of_memory(error):
                raise
        # Outside of the handler, which holds all tensors of what failed.
        self._encoded.clear()
        self._models.let_go()
        raise MemoryError


def _is_of_memory(error: Exception) -> bool:
    """PyTorch has no kind of its own for the memory of a CPU."""
    is_of_torch = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_of_torch or "DefaultCPUAllocator" in str(error)


def _texts(orders: Iterable[Order]) -> list[str]:
    """Of all prompts, each once."""
    requests = [request for order in orders for request in order.requests]
    return list(dict.fromkeys(text for one in requests for text in (one.prompt, one.negative)))


def _check_pictures(request: Request, order: Order) -> None:
    """ValueError for a picture that did not come with the order: what a name leads to on this machine is
    nothing to clients. And for controls with nothing to go by."""
    for name in named_in(request):
        if name not in order.pictures:
            raise ValueError(f"pictures must come with the order, got the name {name[:100]!r}")
    if order.controls and request.control_image is None:
        raise ValueError(
            f"controls must come with a control_image each, got none for {', '.join(order.controls)}"
        )


def _sum(*parts: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage."""
    total: dict[str, float] = {}
    for part in parts:
        for stage, seconds in part.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total
