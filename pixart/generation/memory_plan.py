"""`--plan`: what memory a run takes, stage by stage, and what would make it fit. No weights are read."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pixart import process
from pixart.generation.console import Console
from pixart.generation.drafts import Job
from pixart.generation.jobs import plan
from pixart.generation.opening import open_pipeline, resolved
from pixart.generation.options import Options
from pixart.generation.prompts import naming
from pixart.generation.report import Report
from pixart.pipeline.metadata import short_dtype
from pixart.pipeline.request import Request, passes

if TYPE_CHECKING:
    from pixart.pipeline.memory.plan import MemoryPlan
    from pixart.pipeline.memory.survey import StageMemory
    from pixart.pipeline.text_to_image import Pipeline

_GIB, _MIB = 2**30, 2**20
_UNITS = {
    "KiB": 2**10,
    "MiB": _MIB,
    "GiB": _GIB,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_COUNTED = 256  # texts whose tokens are counted; of more each is taken for the longest
_KINDS = 12  # of pictures that are planned for: of more those with the most pixels
_TILES = (256, 128)
_LEAST_SIDE = 256  # pixels, of a size that is proposed
_BUSES = {"PCIe 4.0 x16, 25 GB/s": 25e9, "PCIe 3.0 x16, 12 GB/s": 12e9}


def check_options(options: Options) -> None:
    """ValueError for what says nothing with or without --plan."""
    if not options.plan:
        if options.memory is not None:
            raise ValueError(
                f"--memory must be given with --plan, which plans for so much, got {options.memory}; a run takes "
                "what is free"
            )
        return
    if options.dry_run:
        raise ValueError(
            "--plan must be given without --dry-run, got both: the one reads no weights and says what memory is "
            "needed, the other opens the model and measures how long it takes"
        )
    if process.is_one_of_many():
        raise ValueError("--plan must be asked of one process, and not under torchrun")
    if options.processes is not None:
        raise ValueError(
            f"--processes must be left out with --plan, which is of one process, got {options.processes}; of "
            "several on a machine each takes as much"
        )
    if options.memory is not None:
        parse_memory(options.memory)


def parse_memory(text: str) -> int:
    """Bytes of 8GiB, 8G, 512MiB and the like. ValueError for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(i?b)?\s*", text, re.IGNORECASE | re.ASCII)
    if not found or not 0 < float(found[1]) < 1e6:
        raise ValueError(f"--memory must be a size such as 8GiB or 512MiB, got {text!r}")
    decimal = (found[3] or "ib").lower() == "b"
    unit = found[2].upper() + ("B" if decimal else "iB")
    return round(float(found[1]) * _UNITS[unit])


def tell_memory(options: Options, report: Report) -> None:
    """Print the plan of what the options ask for, or put it into the report. Nothing is written or downloaded."""
    from pixart.weights import without_downloads

    console = Console(options.quiet)
    place = "" if options.from_image is None else str(options.from_image)
    with console.with_libraries(), naming(place), without_downloads():
        found = _found(options, report, console)
    if options.json:
        report.forecast = found.to_dict()
    else:
        print(found.to_text())


@dataclass(frozen=True)
class Step:
    """An option that was tried, after those before it, and what the peak is with it."""

    words: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Found:
    """plan: of the kind that takes most, of so many. device, dtype: of transformer and VAE. is_here: whether free
    is what the device has now. steps: what would make it fit, one after the other."""

    plan: "MemoryPlan"
    kinds: int
    pictures: int
    device: str
    dtype: str
    is_here: bool
    steps: list[Step]

    def to_dict(self) -> dict[str, Any]:
        plan, request = self.plan, self.plan.request
        height, width = request.final_size
        streamed = plan.streamed
        return {
            "plan": True,
            "device": self.device,
            "dtype": self.dtype,
            "free_bytes": plan.free,
            "free_is_measured": self.is_here,
            "peak_bytes": plan.peak,
            "peak_in": plan.largest.name,
            "fits": plan.fits,
            "kinds": self.kinds,
            "pictures": self.pictures,
            "width": width,
            "height": height,
            "pictures_of_a_pass": plan.pictures,
            "batched": request.batched,
            "stages": [_stage_dict(stage) for stage in plan.stages],
            "text_encoder_streams": None
            if streamed is None
            else {
                "bytes_of_a_pass": streamed.bytes,
                "passes": streamed.passes,
                "predicted_seconds": _bus_seconds(streamed.bytes * streamed.passes)
                if self.device != "cpu"
                else None,
            },
            "would_fit": [
                {"option": one.words, "peak_bytes": one.peak, "fits": one.fits}
                for one in self.steps
            ],
        }

    def to_text(self) -> str:
        plan, request = self.plan, self.plan.request
        height, width = request.final_size
        guidance = (
            "both halves of guidance together"
            if request.batched
            else "one half of guidance at a time"
        )
        of = f", the largest of {self.kinds} kinds" if self.kinds > 1 else ""
        together = f", {plan.pictures} pictures a pass" if plan.pictures > 1 else ""
        lines = [
            f"memory of {width}x{height}{of}{together}, on {self.device} in {self.dtype}, {guidance}"
        ]
        lines += [line for stage in plan.stages for line in _lines_of(stage)]
        origin = "free now" if self.is_here else "free, as --memory says"
        verdict = "fits" if plan.fits else "does not fit"
        lines.append(
            f"peak {_size(plan.peak)} in {plan.largest.name}, {_size(plan.free)} {origin}: {verdict}"
        )
        if plan.streamed is not None:
            lines.append(self._said_of_stream())
        if not plan.fits:
            lines += self._said_of_steps()
        return "\n".join([*lines, self._origin()])

    def _said_of_stream(self) -> str:
        streamed = self.plan.streamed
        assert streamed is not None
        passes = f"{streamed.passes} passes" if streamed.passes > 1 else "one pass"
        line = f"T5 is streamed: {_size(streamed.bytes)} from the disk in {passes} for all prompts"
        if self.device == "cpu":
            return line
        times = ", ".join(
            f"{spent:.2g} s by {bus}"
            for bus, spent in _bus_seconds(streamed.bytes * streamed.passes).items()
        )
        return f"{line}; predicted, not measured: {times}"

    def _said_of_steps(self) -> list[str]:
        if not self.steps:
            return [
                "no option makes it fit: it takes a device with more memory, or a smaller model"
            ]
        tried = [f"  {one.words}: peak {_size(one.peak)}" for one in self.steps]
        # Of an option that was tried twice, such as --size, the last.
        words = " ".join({one.words.split()[0]: one.words for one in self.steps}.values())
        end = f"to make it fit: {words}" if self.steps[-1].fits else f"not even with {words}"
        return ["options, one after the other:", *tried, end]

    def _origin(self) -> str:
        beside = (
            "libraries and the interpreter come"
            if self.device == "cpu"
            else "the CUDA context comes"
        )
        return f"counted from the headers of the files, no weights were read; {beside} on top"


def _stage_dict(stage: "StageMemory") -> dict[str, Any]:
    height, width = stage.size or (None, None)
    return {
        "stage": stage.name,
        "width": width,
        "height": height,
        "resident_bytes": dict(stage.resident),
        "activation_bytes": stage.activations,
        "largest_temporary_bytes": stage.largest,
        "kept_by_allocator_bytes": stage.kept,
        "host_bytes": stage.host,
        "tile": stage.tile,
        "total_bytes": stage.total,
    }


def _lines_of(stage: "StageMemory") -> list[str]:
    size = "" if stage.size is None else f" {stage.size[1]}x{stage.size[0]}"
    tile = f", in tiles of {stage.tile} px" if stage.tile else ""
    parts = ", ".join(f"{name} {_size(count)}" for name, count in stage.resident.items())
    more = f"temporary {_size(stage.activations)}, of which one tensor is {_size(stage.largest)}"
    if stage.note:
        more = stage.note
    if stage.kept:
        more += f"; kept by glibc, or lost in holes, {_size(stage.kept)}"
    if stage.host:
        more += f"; in host memory {_size(stage.host)}"
    return [f"{stage.name}{size}{tile}: {_size(stage.total)}", f"  {parts}", f"  {more}"]


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / _MIB:.1f} MiB"


def _bus_seconds(count: int) -> dict[str, float]:
    return {bus: round(count / speed, 3) for bus, speed in _BUSES.items()}


def _found(options: Options, report: Report, console: Console) -> Found:
    """Of the kind of picture that takes most."""
    jobs, options = _jobs(options)
    pipe = _opened(options, report, console)
    requests = resolved(pipe, jobs)
    groups = _kinds(list(passes(requests, options.batch)))
    if options.shard_size is not None or _writes_tars(options):
        groups = [group[:1] * options.batch for group in groups]
    tokens = _tokens(pipe, requests)
    free, is_here = _free(options, pipe)
    tried = _Tried(options, pipe, tokens, free, report, console)
    plans = [tried.plan(group) for group in groups]
    place = max(range(len(plans)), key=lambda one: plans[one].peak)
    steps = [] if plans[place].fits else list(tried.steps(groups[place], plans[place]))
    dtype = short_dtype(pipe.opened.dtype)
    return Found(plans[place], len(groups), len(requests), pipe.device.type, dtype, is_here, steps)


def _jobs(options: Options) -> tuple[list[Job], Options]:
    """Of tars one of each kind that the lines ask for."""
    if not _writes_tars(options):
        return plan(options)
    from pixart.generation.shards.plan import plan_shards

    return list(plan_shards(options).examples()), options


def _writes_tars(options: Options) -> bool:
    from pixart.generation.shards.place import writes_shards

    return writes_shards(options)


def _opened(options: Options, report: Report, console: Console) -> "Pipeline":
    return open_pipeline(options, report, console, sizes_only=True)


def _kinds(groups: list[list[Request]]) -> list[list[Request]]:
    """The largest pass of each kind that memory tells apart, those with the most pixels."""
    found: dict[Any, list[Request]] = {}
    for group in groups:
        kind = _kind_of(group[0])
        if kind not in found or len(group) > len(found[kind]):
            found[kind] = group
    largest = sorted(found.values(), key=lambda group: -_pixels(group[0]) * len(group))
    return largest[:_KINDS]


def _kind_of(request: Request) -> tuple[Any, ...]:
    names = (
        "height",
        "width",
        "upscale",
        "tiles",
        "strength",
        "guidance_interval",
        "kv_schedule",
        "reuse_blocks",
        "batched",
        "tile",
    )
    return (
        *(getattr(request, name) for name in names),
        (request.guidance or 0) > 1, (request.upscale_guidance or 0) > 1, bool(request.pag),
        request.image is not None, request.mask is not None, len(request.control_image or ()),
    )  # fmt: skip


def _pixels(request: Request) -> int:
    height, width = request.final_size
    return height * width


def _tokens(pipe: "Pipeline", requests: list[Request]) -> dict[str, int]:
    texts = list(dict.fromkeys(text for one in requests for text in (one.prompt, one.negative)))
    if len(texts) <= _COUNTED:
        return {text: pipe.captions.tokens_of(text) for text in texts}
    return dict.fromkeys(texts, pipe.text_encoder.max_length)


def _free(options: Options, pipe: "Pipeline") -> tuple[int, bool]:
    """Bytes, and whether they are free now."""
    from pixart.pipeline.memory.survey import free_on

    if options.memory is not None:
        return parse_memory(options.memory), False
    free = free_on(pipe.device)
    if free is None:
        raise ValueError(
            f"--memory must be given for --device {pipe.device}, which is not here: how much it has free, such as "
            "8GiB"
        )
    return free, True


@dataclass
class _Tried:
    """Plans with other options than those that were given."""

    options: Options
    pipe: "Pipeline"
    tokens: dict[str, int]
    free: int
    report: Report
    console: Console
    encoder_memory: str | None = None

    def plan(self, group: list[Request]) -> "MemoryPlan":
        from pixart.pipeline.memory.plan import plan_memory

        return plan_memory(self.pipe, group, self.tokens, self.free, self.encoder_memory)

    def steps(self, group: list[Request], before: "MemoryPlan") -> Iterator[Step]:
        """What lowers the peak, until it fits."""
        while not before.fits:
            for words, change in self._ways(group, before):
                kept = self.pipe, self.encoder_memory
                found, changed = None, change()
                found = self.plan(changed)
                if found.peak < 0.97 * before.peak:
                    group, before = changed, found
                    yield Step(words, found.peak, found.fits)
                    break
                self.pipe, self.encoder_memory = kept
            else:
                return

    def _ways(self, group: list[Request], before: "MemoryPlan") -> Iterator[tuple[str, Any]]:
        """Options to try, with what they make of the group; least first of what they cost."""
        stage, request = before.largest, before.request
        if stage.name == "text":
            if self.encoder_memory != "stream" and before.streamed is None:
                yield "--text-encoder-memory stream", lambda: self._streaming(group)
            return
        if stage.name in ("decode", "encode"):
            for side in _TILES:
                if stage.tile is None or stage.tile > side:
                    yield (
                        f"--tile {side}",
                        lambda side=side: [replace(one, tile=side) for one in group],
                    )
        elif request.batched:
            yield "--no-batched", lambda: [replace(one, batched=False) for one in group]
        if len(group) > 1:
            yield "--batch 1", lambda: group[:1]
        if str(self.pipe.opened.dtype) == "torch.float32":
            yield "--dtype bf16", lambda: self._narrower(group)
        smaller = _smaller(request, self.pipe.multiple)
        if smaller is not None:
            height, width = smaller
            yield (
                f"--size {width}x{height}",
                lambda: [replace(one, height=height, width=width) for one in group],
            )

    def _streaming(self, group: list[Request]) -> list[Request]:
        self.encoder_memory = "stream"
        return group

    def _narrower(self, group: list[Request]) -> list[Request]:
        options = replace(self.options, dtype="bf16")
        self.pipe = open_pipeline(options, self.report, Console(True), sizes_only=True)
        return group


def _smaller(request: Request, multiple: int) -> tuple[int, int] | None:
    """Half of the sides, where the size is the request's to choose."""
    if request.image is not None or request.upscale is not None:
        return None
    assert request.height and request.width
    height, width = (
        round(side / 2 / multiple) * multiple for side in (request.height, request.width)
    )
    return (height, width) if min(height, width) >= _LEAST_SIDE else None
