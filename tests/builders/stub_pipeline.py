"""A pipeline that draws a flat colour at once, for tests of what is done around a drawing."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from pixart.files import sha256_of
from pixart.pipeline.request import Drawn, Request, passes
from pixart.resolution import Resolved
from pixart.sampler.loop import Progress

SIDE = 32


@dataclass
class StubPipeline:
    """drawn: what it was asked for. stop: raised before the picture of that number."""

    drawn: list[Request] = field(default_factory=list)
    stop: dict[int, BaseException] = field(default_factory=dict)
    opened: int = 0

    scheduler_config: ClassVar[dict[str, Any]] = {}
    weights: ClassVar[dict[str, str]] = {}
    plan = None
    shown_null_caption = "own-mask"
    device = torch.device("cpu")
    transformer = SimpleNamespace(dtype=torch.float32)
    text_encoder = SimpleNamespace(quantization=None, dtype=torch.float32)

    def weights_of(self, request: Request) -> dict[str, str]:
        return self.weights

    def size_of(self, request: Request) -> Resolved:
        side = int(request.size or SIDE)
        if side % 16:
            raise ValueError(f"size must be a multiple of 16, got {side}")
        return Resolved(side, side, "the model's own size")

    def remarks(self, request: Request) -> list[str]:
        return []

    def resolve(self, request: Request) -> Request:
        size, editing = self.size_of(request), {}
        if request.image is not None and not request.only_enlarges:
            editing |= {"strength": request.strength or 0.6, "fit": request.fit or "crop"}
        if request.upscale is not None:
            editing |= {"upscale": "96x64", "upscale_strength": request.upscale_strength or 0.35}
        if request.control_image is not None:
            scale = {"control_scale": request.control_scale or (1.0,)}
            editing |= {**scale, "control_interval": request.control_interval or ((0.0, 1.0),)}
        return replace(
            request, **editing, size=None, aspect=None, resolution=None, height=request.height or size.height,
            width=request.width or size.width, steps=request.steps or 20,
            guidance=4.5 if request.guidance is None else request.guidance,
            guidance_interval=request.guidance_interval or (0.0, 1.0),
            scheduler=request.scheduler or "dpm-solver++",
        )  # fmt: skip

    def forget_prompts(self) -> None:
        pass

    def draw_many(
        self, requests: list[Request], *, batch: int, callback: Any, encoding: Any, decoding: Any
    ) -> Iterator[Drawn]:
        for text in dict.fromkeys(t for one in requests for t in (one.prompt, one.negative)):
            encoding(text)
        for group in passes([self.resolve(one) for one in requests], batch):
            none = torch.zeros(1)
            is_twice = group[0].upscale is not None and not group[0].only_enlarges
            steps = 4 if is_twice else 2
            for step in range(1, steps + 1):
                callback(Progress(step, steps, 0.0, none, none))
            for request in group:
                if len(self.drawn) in self.stop:
                    raise self.stop[len(self.drawn)]
                self.drawn.append(request)
                decoding(1, 1)
                assert request.height and request.width
                colour = (hash((request.seed, request.guidance)) % 256, 99, 200)
                image = Image.new("RGB", request.final_size[::-1], colour)
                inputs = {name: sha256_of(Path(name)) for name in named(request)}
                settled = replace(request, batched=True, tile=False)
                seconds = {"text": 0.5, "load": 0.0, "denoise": 1.0, "decode": 0.25}
                seconds |= {"encode": 0.125} if request.image is not None else {}
                yield Drawn(image, settled, seconds, len(group), inputs=inputs)


def named(request: Request) -> list[str]:
    """The files of the pictures that a request is drawn from."""
    mask = None if request.mask == "alpha" else request.mask
    return [one for one in (request.image, mask, *(request.control_image or ())) if one]


def opened(monkeypatch: pytest.MonkeyPatch) -> StubPipeline:
    """What generate opens from now on."""
    stub = StubPipeline()

    def from_pretrained(*_: Any, **__: Any) -> StubPipeline:
        stub.opened += 1
        return stub

    monkeypatch.setattr(
        "pixart.pipeline.text_to_image.Pipeline.from_pretrained", staticmethod(from_pretrained)
    )
    return stub
