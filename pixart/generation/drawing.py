"""What `python -m pixart.generate` does: jobs in, files and a report out."""

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pixart import process
from pixart.config import EMBEDDED
from pixart.generation.console import Console, RunBar
from pixart.generation.jobs import Job, needs_model, placed, plan
from pixart.generation.names import Places
from pixart.generation.options import Options
from pixart.generation.previews import Previews
from pixart.generation.previews import check_options as check_previews
from pixart.generation.prompts import naming
from pixart.generation.report import Report
from pixart.generation.sheet import Cell, write_sheet
from pixart.pipeline.metadata import CUDA_GRAPH, Metadata
from pixart.pipeline.pictures import (
    check_writable,
    find_drawn,
    read_metadata,
    write_error,
    write_picture,
)
from pixart.pipeline.request import Drawn, Request, passes
from pixart.preprocess import parse_places

if TYPE_CHECKING:
    from pixart.pipeline.text_to_image import Pipeline
    from pixart.sampler.loop import Progress


def generate(options: Options, report: Report) -> None:
    """Draw what the options ask for, and keep the report of files, sizes and seconds by stage."""
    console = Console(options.quiet)
    with console.with_libraries():  # before anything slow is imported: libraries log as they are
        from pixart.device import peak_memory

        report.peak_memory = peak_memory
        peak_memory()  # what it imports is imported now
        # What a picture says may be wrong in ways that are only found on the way.
        with naming("" if options.from_image is None else str(options.from_image)):
            _generate(options, report, console)


def _generate(options: Options, report: Report, console: Console) -> None:
    check_previews(options)
    if options.seed == "random":
        options = replace(options, seed=secrets.randbelow(2**32))
        console.remark(f"seed {options.seed}")
    jobs, options = plan(options)
    before = None if options.from_image is None else read_metadata(options.from_image)
    pipe = None
    if needs_model(jobs, options):
        pipe = _open(options, report, console)
        jobs = placed(jobs, options, _resolved(pipe, jobs))
    left = [job for job in jobs if job.there is None]
    cells = _those_there(jobs, report, console)
    check_writable([job.path for job in left])
    if left:
        pipe = pipe or _open(options, report, console)
        process.at_work()
        cells |= _draw_all(pipe, left, len(cells), options, before, report, console)
    if options.grid:
        process.at_work()
        with report.timed("write"):
            sheet = write_sheet([cells[job.index] for job in jobs], options)
        report.grid = str(sheet)
        console.remark(report.grid)


def _those_there(jobs: Sequence[Job], report: Report, console: Console) -> dict[int, Cell]:
    cells = {}
    for job in jobs:
        if job.there is not None:
            width, height = job.there.size
            note = f"{width}x{height}, there already"
            report.add(job, job.there.metadata, job.there.size, note)
            cells[job.index] = Cell(job.path, job.there.metadata.request, job.swept)
    if cells:
        only = f" ({jobs[0].path})" if len(jobs) == 1 else ""
        console.remark(
            f"{len(cells)} of {len(jobs)} pictures are there already{only}; "
            "--overwrite draws them again"
        )
    return cells


def _draw_all(
    pipe: "Pipeline",
    jobs: Sequence[Job],
    done: int,
    options: Options,
    before: Metadata | None,
    report: Report,
    console: Console,
) -> dict[int, Cell]:
    """Draw and write each picture; returns what is in which file. done: pictures that are there. before:
    of the picture that is drawn again."""
    passed = [len(group) for group in passes(_resolved(pipe, jobs), options.batch)]
    notes = [pipe.size_of(job.request).note for job in jobs]
    for note in dict.fromkeys(notes):
        console.remark(note)
    _warn_of_unknown_words(options, jobs, console)
    texts = len({text for job in jobs for text in (job.request.prompt, job.request.negative)})
    cells = {}
    previews = Previews.of(pipe, [job.path for job in jobs], options, console)
    with RunBar(console, texts, passed, done) as bar, previews:
        pictures = _draw(pipe, jobs, options.batch, bar, previews)
        for job, note, drawn in zip(jobs, notes, pictures, strict=True):
            metadata = Metadata.of(drawn, pipe, job.asked, job.asked_model)
            bar.note("write")
            with process.Whole():  # a picture that is there is in the report
                with report.timed("write") as spent:
                    job, is_ours = _write(job, drawn, metadata, options)
                    previews.finish()
                seconds = drawn.seconds | {"write": spent()}
                report.add(job, metadata, drawn.image.size, note, seconds)
                report.count(drawn.seconds)
            bar.finish()
            cells[job.index] = Cell(job.path, metadata.request, job.swept)
            console.remark(str(job.path) + ("" if is_ours else " was drawn elsewhere meanwhile"))
            if before is not None:
                _compare(before, metadata, str(options.from_image), console)
    return cells


def _resolved(pipe: "Pipeline", jobs: Sequence[Job]) -> list[Request]:
    """The requests with what the model takes. ValueError names the file and line of one that it cannot
    draw."""
    known: dict[Request, Request] = {}
    found = []
    for job in jobs:
        own = {name: getattr(job.request, name) for name in ("prompt", "negative", "seed")}
        like = replace(job.request, prompt="", negative="", seed=0)
        if like not in known:
            with naming(job.place):
                known[like] = pipe.resolve(like)
        found.append(replace(known[like], **own))
    return found


def _open(options: Options, report: Report, console: Console) -> "Pipeline":
    import torch

    from pixart.checkpoint.load import read_config
    from pixart.config import KVCompression
    from pixart.lora.adapters import parse_lora
    from pixart.pipeline.text_to_image import OPENING, Pipeline

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    encoder, places = options.text_encoder_dtype, options.preprocessor_weights
    with report.timed("load"), console.bar("load", OPENING) as bar:
        return Pipeline.from_pretrained(
            options.model or EMBEDDED,
            transformer=options.transformer,
            lora=[parse_lora(text) for text in options.lora],
            control=options.control,
            preprocessors=parse_places(places),
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
            cuda_graph=CUDA_GRAPH[options.cuda_graph],
            attention=options.attention,
            cache_dir="auto" if options.cache else None,
            progress=bar.advance,
        )


def _draw(
    pipe: "Pipeline", jobs: Sequence[Job], batch: int, bar: RunBar, previews: Previews
) -> Iterator[Drawn]:
    """The pictures: T5 first, then the transformer; they need not fit together."""

    def step(progress: "Progress") -> None:
        bar.denoise(progress.step, progress.total)
        previews.step(progress)

    def decoding(done: int, total: int) -> None:
        bar.note(f"decode {done}/{total}")

    yield from pipe.draw_many(
        [job.request for job in jobs],
        batch=batch,
        callback=step,
        encoding=lambda _: bar.encode(),
        decoding=decoding,
    )


def _write(job: Job, drawn: Drawn, metadata: Metadata, options: Options) -> tuple[Job, bool]:
    """Write a picture, under another name if another process has taken its own; returns the job with its
    file, and whether it is this picture: the same may have been drawn there."""
    wanted = job.path
    while True:
        try:
            quality, replaces = options.quality, options.overwrite
            write_picture(drawn.image, job.path, metadata, quality=quality, replace=replaces)
            return job, True
        except FileExistsError as error:
            if not os.path.lexists(job.path):  # what exists is a file where a folder should be
                raise write_error(job.path, error) from error
            if find_drawn(job.path, job.asked, job.asked_model, job.inputs):
                return job, False
            job = replace(job, path=Places().free(wanted))


def _compare(before: Metadata, metadata: Metadata, source: str, console: Console) -> None:
    """Say what keeps a picture that is drawn again from having the bits of the one before."""
    if dict(before.model) == dict(metadata.model):
        other = [
            part
            for part, digest in before.weights.items()
            if metadata.weights.get(part, digest) != digest
        ]
        if other:
            console.remark(
                f"{source} was drawn with other weights of {', '.join(other)}: this is another picture"
            )
    if before.batch != metadata.batch:
        console.remark(
            f"{source} was drawn in a pass of {before.batch} pictures, this one of {metadata.batch}: "
            "bits may differ by rounding"
        )


def _warn_of_unknown_words(options: Options, jobs: Sequence[Job], console: Console) -> None:
    """The embedded model knows a hundred words: say so, instead of drawing nonsense silently."""
    if options.model not in (None, EMBEDDED):
        return
    from pixart.shapes.caption import WORDS, unknown_words

    texts = dict.fromkeys(t for job in jobs for t in (job.request.prompt, job.request.negative))
    unknown = dict.fromkeys(word for text in texts for word in unknown_words(text))
    if unknown:
        console.remark(
            f"the embedded model does not know: {', '.join(unknown)}. "
            f"It knows: {' '.join(sorted(WORDS))}"
        )
