"""What `python -m pixart.generate` does: jobs in, files and a report out."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pixart import process
from pixart.config import EMBEDDED
from pixart.generation.console import Console, StageBar

if TYPE_CHECKING:
    from pixart.generation.jobs import Job
    from pixart.generation.options import Options
    from pixart.pipeline.metadata import Metadata
    from pixart.pipeline.request import Drawn
    from pixart.pipeline.text_to_image import Pipeline
    from pixart.sampler.loop import Progress

STAGES = ("load", "text", "denoise", "decode", "write")


@dataclass
class Report:
    """What is finished, also when it ends early. images: by the job's index. peak_memory: measures the
    bytes used; nothing is imported for a report, which may follow on a lack of memory."""

    images: dict[int, dict[str, Any]] = field(default_factory=dict)
    drawn: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    peak_memory: Callable[[], int] = lambda: 0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started

    def add(self, job: "Job", width: int, height: int, note: str) -> None:
        self.images[job.index] = {
            "file": str(job.path),
            "prompt": job.request.prompt,
            "seed": job.request.seed,
            "width": width,
            "height": height,
            "note": note,
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": [self.images[index] for index in sorted(self.images)],
            "drawn": self.drawn,
            "seconds": {stage: round(spent, 3) for stage, spent in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory(),
        }


def generate(options: "Options", report: Report) -> None:
    """Draw what the options ask for, and keep the report of files, sizes and seconds by stage."""
    console = Console(options.quiet)
    with console.with_libraries():  # before anything slow is imported: libraries log as they are
        from pixart.device import peak_memory

        report.peak_memory = peak_memory
        peak_memory()  # what it imports is imported now
        _generate(options, report, console)


def _generate(options: "Options", report: Report, console: Console) -> None:
    from pixart.generation.jobs import plan
    from pixart.generation.pictures import check_writable, find_drawn

    jobs, options = plan(options)
    left = []
    for job in jobs:
        size = find_drawn(job.path, job.asked, job.asked_model) if options.prompts else None
        if size is None:
            left.append(job)
        else:
            report.add(job, *size, note=f"{size[0]}x{size[1]}, there already")
    if len(left) < len(jobs):
        console.remark(f"{len(jobs) - len(left)} of {len(jobs)} pictures are there already")
    check_writable([job.path for job in left])
    if not left:
        return
    pipe = _open(options, report, console)
    process.at_work()
    notes = [pipe.size_of(job.request).note for job in left]
    for note in dict.fromkeys(notes):
        console.remark(note)
    _warn_of_unknown_words(options, left, console)
    with StageBar(console) as bar:
        pictures = _draw(pipe, left, options.batch, bar)
        for job, note, drawn in zip(left, notes, pictures, strict=True):
            for stage, spent in drawn.seconds.items():
                report.seconds[stage] += spent
            with report.timed("write"):
                metadata = _write(pipe, job, drawn, bar)
            bar.close()
            report.add(job, *drawn.image.size, note=note)
            report.drawn += 1
            console.remark(str(job.path))
            _compare(metadata, options, console)


def _open(options: "Options", report: Report, console: Console) -> "Pipeline":
    import torch

    from pixart.checkpoint.load import read_config
    from pixart.config import KVCompression
    from pixart.lora.adapters import parse_lora
    from pixart.pipeline.text_to_image import OPENING, Pipeline

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    encoder = options.text_encoder_dtype
    with report.timed("load"), console.bar("load", OPENING) as bar:
        return Pipeline.from_pretrained(
            options.model or EMBEDDED,
            transformer=options.transformer,
            lora=[parse_lora(text) for text in options.lora],
            config=read_config(options.config) if options.config else None,
            device=options.device,
            dtype=dtypes[options.dtype] if options.dtype else None,
            text_encoder_dtype=dtypes.get(encoder, encoder) if encoder else None,  # type: ignore[arg-type]
            kv_compression=KVCompression.parse(options.kv_compress)
            if options.kv_compress
            else None,
            variant=options.variant,
            ema=options.ema,
            null_caption=options.null_caption,
            cuda_graph=options.cuda_graph,
            cache_dir="auto" if options.cache else None,
            progress=bar.update,
        )


def _draw(pipe: "Pipeline", jobs: "list[Job]", batch: int, bar: StageBar) -> "Iterator[Drawn]":
    """The pictures, with a bar for each stage: T5 first, then the transformer; they need not fit
    together."""
    texts = len({text for job in jobs for text in (job.request.prompt, job.request.negative)})
    encoded = 0

    def encoding(_: str) -> None:
        nonlocal encoded
        encoded += 1
        bar.reach("text", encoded, texts)
        if encoded == texts:
            bar.reach("load transformer", 0, 1)

    def step(progress: "Progress") -> None:
        bar.reach(f"denoise {number}", progress.step, progress.total)

    def decoding(done: int, total: int) -> None:
        bar.reach(f"decode {number}", done, total)

    number = jobs[0].index + 1
    requests = [job.request for job in jobs]
    pictures = pipe.draw_many(
        requests, batch=batch, callback=step, encoding=encoding, decoding=decoding
    )
    for drawn, following in zip(pictures, [*jobs[1:], jobs[-1]], strict=True):
        yield drawn
        number = following.index + 1


def _write(pipe: "Pipeline", job: "Job", drawn: "Drawn", bar: StageBar) -> "Metadata":
    from pixart.generation.pictures import write_picture
    from pixart.pipeline.metadata import Metadata

    stage = f"write {job.index + 1}"
    bar.reach(stage, 0, 1)
    metadata = Metadata.of(drawn, pipe, job.asked, job.asked_model)
    write_picture(drawn.image, job.path, metadata)
    bar.reach(stage, 1, 1)
    return metadata


def _compare(metadata: "Metadata", options: "Options", console: Console) -> None:
    """Say what keeps a picture that is drawn again from having the bits of the one before."""
    if options.from_image is None:
        return
    from pixart.generation.pictures import read_metadata

    before = read_metadata(options.from_image)
    if dict(before.model) == dict(metadata.model):
        other = [
            part
            for part, digest in before.weights.items()
            if metadata.weights.get(part, digest) != digest
        ]
        if other:
            console.remark(
                f"{options.from_image} was drawn with other weights of {', '.join(other)}: this is "
                "another picture"
            )
    if before.batch != metadata.batch:
        console.remark(
            f"{options.from_image} was drawn in a pass of {before.batch} pictures, this one of "
            f"{metadata.batch}: bits may differ by rounding"
        )


def _warn_of_unknown_words(options: "Options", jobs: "list[Job]", console: Console) -> None:
    """The embedded model knows a hundred words: say so, instead of drawing nonsense silently."""
    if options.model not in (None, EMBEDDED):
        return
    from pixart.shapes.caption import WORDS, unknown_words

    unknown = dict.fromkeys(word for job in jobs for word in unknown_words(job.request.prompt))
    if unknown:
        console.remark(
            f"the embedded model does not know: {', '.join(unknown)}. "
            f"It knows: {' '.join(sorted(WORDS))}"
        )
