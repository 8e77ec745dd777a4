"""Draws the pictures of a protocol: images/ID/0000.png, each with the request that drew it.

Any number of processes share the work, at any time and in any order, and each may be killed: pictures
are drawn in fixed groups, so that each has the same bits whoever draws it, and written whole.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart import process
from pixart.evaluation.options import Model
from pixart.evaluation.prompt_sets.files import check_size
from pixart.evaluation.protocols.protocol import Protocol
from pixart.evaluation.protocols.published import kv_words
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.locks import claimed
from pixart.pipeline.metadata import MODEL_OPTIONS, Metadata, opened_with
from pixart.pipeline.pictures import write_picture
from pixart.pipeline.request import Request
from pixart.progress import Bar

if TYPE_CHECKING:
    from pixart.pipeline.text_to_image import Pipeline

BLOCK = 256  # prompts that are encoded before they are drawn: T5 is loaded once for them
SMALL = 50_000_000  # parameters, up to which one thread draws as fast as several
_NOT_IN_ID = ("device", "fast")  # what is resolved says what a plan would have set
_END = b"\0\0\0\0IEND\xaeB`\x82"  # what a whole PNG ends with


def _is_count(text: str) -> bool:
    """Whether `int` takes it: not every digit is one of a number, and thousands of them are refused."""
    return text.isascii() and text.isdigit() and len(text) <= 9


def speaks() -> bool:
    """Whether this process prints what was done: of those that torchrun started the first."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    others = _is_count(rank) and _is_count(world) and 0 < int(rank) < int(world)
    return not others


@dataclass(frozen=True)
class Shard:
    """Which part of the work is begun with. number: from 0. is_all: whether the others' is left to them."""

    number: int = 0
    of: int = 1
    is_all: bool = False

    @classmethod
    def parse(cls, text: str | None) -> "Shard":
        """Of `--shard 3/8`, or of the RANK and WORLD_SIZE that torchrun gives. ValueError for anything else."""
        if text is None:
            rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
            if _is_count(rank) and _is_count(world) and int(rank) < int(world):
                return cls(int(rank), int(world))
            raise ValueError(
                f"RANK must be a number below WORLD_SIZE, got {rank[:20]!r} and {world[:20]!r}"
            )
        number, between, of = text.partition("/")
        is_pair = bool(between) and _is_count(number) and _is_count(of)
        if is_pair and 1 <= int(number) <= int(of):
            return cls(int(number) - 1, int(of), is_all=True)
        raise ValueError(f"--shard must be K/N with K from 1 to N, such as 3/8, got {text[:40]!r}")

    def order(self, count: int) -> list[int]:
        """The groups to draw: the own ones, then those of others that may be behind."""
        own = [k for k in range(count) if k % self.of == self.number]
        return own if self.is_all else own + [k for k in range(count) if k % self.of != self.number]


def open_pipeline(model: Model) -> "Pipeline":
    """Open what draws. ValueError for what cannot be opened."""
    import torch

    from pixart.config import KVCompression
    from pixart.lora.adapters import parse_lora
    from pixart.pipeline.text_to_image import Pipeline

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    encoder = model.text_encoder_dtype
    compression = KVCompression.parse(model.kv_compress) if model.kv_compress else None
    device = model.device
    if device is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return Pipeline.from_pretrained(
        model.model,
        transformer=model.transformer,
        lora=[parse_lora(text) for text in model.lora],
        device=device,
        dtype=dtypes[model.dtype] if model.dtype else None,
        text_encoder_dtype=dtypes.get(encoder, encoder) if encoder else None,  # type: ignore[arg-type]
        kv_compression=compression,
        variant=model.variant,
        ema=model.ema,
        attention=model.attention,
        cuda_graph=False,  # its bits may differ by rounding, and it depends on what is free
        cache_dir=None,  # 30,000 prompts of T5 are 70 GB
    )


@dataclass(frozen=True)
class Group:
    """Pictures that are denoised together."""

    entries: tuple[Entry, ...]
    requests: tuple[Request, ...]


class Drawing:
    """The pictures of a protocol's prompts by an open pipeline, into the folder `images`."""

    def __init__(
        self,
        pipe: "Pipeline",
        model: Model,
        protocol: Protocol,
        prompts: Sequence[Prompt],
        images: Path,
    ) -> None:
        self.pipe, self.model, self.protocol, self.images = pipe, model, protocol, images
        pairs = [
            (Entry(prompt, sample, images / prompt.id / f"{sample:04d}.png"), seed)
            for prompt, sample, seed in protocol.seeds(prompts)
        ]
        self.groups = _grouped([(entry, self._request(entry, seed)) for entry, seed in pairs])

    @property
    def entries(self) -> list[Entry]:
        return [entry for group in self.groups for entry in group.entries]

    def facts(self) -> dict[str, Any]:
        """What the model took where the protocol leaves it open, and how it was opened: part of the
        protocol's id. The device is not: it decides bits by rounding alone."""
        pipe, first = self.pipe, self.pipe.resolve(self.groups[0].requests[0])
        opened = {
            name: value for name, value in opened_with(pipe).items() if name not in _NOT_IN_ID
        }
        resolved = {name: getattr(first, name) for name in ("scheduler", "steps", "guidance")}
        resolved["guidance_interval"] = list(first.guidance_interval or (0.0, 1.0))
        options = {"attention": self.model.attention, "ema": self.model.ema}
        return {
            "resolved": {**resolved, "size": f"{first.width}x{first.height}"},
            "kv_compress": kv_words(pipe.opened.config.kv_compression),
            "model_options": {**opened, **options, "variant": self.model.variant},
        }

    def missing(self) -> int:
        """How many pictures are not drawn yet."""
        return sum(not is_whole(entry.path) for entry in self.entries)

    def run(self, shard: Shard, locks: Path) -> int:
        """Draw what is not there, beside others that do the same; returns how many this process drew."""
        order = shard.order(len(self.groups))
        total = sum(len(self.groups[number].entries) for number in order)
        waiting = [number for number in order if self._left(number)]
        drawn = 0
        with Bar("draw", total) as bar, _steady(self.pipe):
            bar.reach(total - sum(len(self.groups[number].entries) for number in waiting))
            for wait in (False, True):
                for block in self._blocks(list(waiting)):
                    for number in block:
                        with claimed(locks / f"draw-{number:06d}.lock", wait=wait) as is_ours:
                            if not is_ours:
                                continue
                            drawn += self._draw(self.groups[number])
                            waiting.remove(number)
                            bar.advance(len(self.groups[number].entries))
                            with suppress(OSError):  # Windows removes no file that is open
                                (locks / f"draw-{number:06d}.lock").unlink()
        return drawn

    def _request(self, entry: Entry, seed: int) -> Request:
        sampling = self.protocol.sampling
        request = Request(
            entry.prompt.prompt,
            sampling.negative,
            seed,
            size=entry.prompt.size or self.protocol.size,
            steps=sampling.steps,
            guidance=sampling.guidance,
            guidance_interval=sampling.guidance_interval,
            scheduler=sampling.scheduler,
        )
        size = self.pipe.size_of(request)
        # Not as memory is free: all processes must draw the same.
        fits = size.height * size.width <= 1024**2
        return replace(
            request, size=f"{size.width}x{size.height}", batched=fits, tile=False if fits else 512
        )

    def _left(self, number: int) -> list[Entry]:
        return [entry for entry in self.groups[number].entries if not is_whole(entry.path)]

    def _blocks(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Groups whose prompts are encoded together."""
        block: list[int] = []
        count = 0
        for number in numbers:
            block.append(number)
            count += len(self.groups[number].requests)
            if count >= BLOCK or number == numbers[-1]:
                left = [k for k in block if self._left(k)]
                texts = [r for k in left for r in self.groups[k].requests]
                self.pipe.prepare([text for one in texts for text in (one.prompt, one.negative)])
                yield block
                self.pipe.forget_prompts()
                block, count = [], 0

    def _draw(self, group: Group) -> int:
        """Draw a group whole, for the same bits every time, and write what is not there of it."""
        left = {entry.key for entry in group.entries if not is_whole(entry.path)}
        if not left:
            return 0
        asked_model = _asked(self.model)
        pictures = self.pipe.draw_many(group.requests, batch=len(group.requests))
        for entry, request, drawn in zip(group.entries, group.requests, pictures, strict=True):
            if entry.key in left:
                for half in entry.path.parent.glob(f".{entry.path.name}.*"):  # of a killed process
                    shutil.rmtree(half, ignore_errors=True)
                metadata = Metadata.of(drawn, self.pipe, request, asked_model)
                with process.Whole():
                    write_picture(drawn.image, entry.path, metadata)
        return len(left)


def is_whole(path: Path) -> bool:
    """Whether a picture is there to its end; its pixels are not read."""
    try:
        if not path.is_file():  # to open a named pipe may take for ever
            return False
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - len(_END)))
            return file.read() == _END
    except OSError:
        return False


def _grouped(pairs: Sequence[tuple[Entry, Request]]) -> list[Group]:
    """Pictures that follow each other and agree in size, as many as are quicker together than alone and fit
    into memory everywhere."""
    groups: list[list[tuple[Entry, Request]]] = []
    for entry, request in pairs:
        before = groups[-1][-1][1] if groups else None
        fits = before is not None and before.size == request.size
        if not fits or len(groups[-1]) >= _batch(request):
            groups.append([])
        groups[-1].append((entry, request))
    return [Group(tuple(e for e, _ in one), tuple(r for _, r in one)) for one in groups]


def _batch(request: Request) -> int:
    width, height = check_size("size", str(request.size))
    area = width * height
    return 8 if area <= 256**2 else 4 if area <= 512**2 else 1


def _asked(model: Model) -> dict[str, Any]:
    """As pictures say how the model was opened."""
    given: dict[str, Any] = {name: getattr(model, name, None) for name in MODEL_OPTIONS}
    for name in ("model", "transformer"):
        if (path := given[name]) is not None and os.path.exists(path):
            given[name] = os.path.abspath(path)
    return {
        **given,
        "lora": list(model.lora),
        "control": [],
        "preprocessor_weights": [],
        "cuda_graph": "off",
    }


@contextmanager
def _steady(pipe: "Pipeline") -> Iterator[None]:
    """On a CPU a small model draws with one thread: sums of several are rounded otherwise with each number
    of cores, and cost more than they save. Several processes use several cores."""
    import torch

    before = torch.get_num_threads()
    is_small = sum(one.numel() for one in pipe.transformer.parameters()) <= SMALL
    if pipe.device.type == "cpu" and is_small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shown_name(model: Model) -> str:
    """What the model is called in results: no path of this machine."""
    parts = [model.model, *filter(None, (model.transformer,)), *model.lora]
    return " + ".join(Path(part).name if Path(part).exists() else part for part in parts)
