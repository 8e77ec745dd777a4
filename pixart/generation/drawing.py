"""What `python -m pixart.generate` does: jobs in, files and a report out."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pixart import process
from pixart.generation.console import Console, RunBar
from pixart.generation.drafts import Job
from pixart.generation.dry_run import check_options as check_dry_run
from pixart.generation.dry_run import forecast_run, tell
from pixart.generation.jobs import needs_model, placed, plan
from pixart.generation.names import Places
from pixart.generation.opening import open_pipeline, remarks_on, resolved, warn_of_unknown_words
from pixart.generation.options import Options
from pixart.generation.previews import Previews
from pixart.generation.previews import check_options as check_previews
from pixart.generation.prompts import naming
from pixart.generation.report import Report
from pixart.generation.sheet import Cell, write_sheet
from pixart.generation.team import Team
from pixart.pipeline.metadata import Metadata
from pixart.pipeline.pictures import (
    check_writable,
    find_drawn,
    read_metadata,
    write_error,
    write_picture,
)
from pixart.pipeline.request import Drawn, passes

if TYPE_CHECKING:
    from pixart.pipeline.text_to_image import Pipeline
    from pixart.sampler.loop import Progress


def generate(options: Options, report: Report) -> None:
    """Draw what the options ask for, and keep the report of files, sizes and seconds by stage."""
    team = Team.of(options)
    options = team.options(options)
    console = Console(options.quiet)
    with console.with_libraries():  # before anything slow is imported: libraries log as they are
        from pixart.device import peak_memory

        report.peak_memory = peak_memory
        peak_memory()  # what it imports is imported now
        # What a picture says may be wrong in ways that are only found on the way.
        with naming("" if options.from_image is None else str(options.from_image)):
            team.meet(options)
            _generate(options, report, console, team)


def _generate(options: Options, report: Report, console: Console, team: Team) -> None:
    if options.seed == "random":
        options = replace(options, seed=int(team.said(str(secrets.randbelow(2**32)))))
        console.remark(f"seed {options.seed}")
    run = team.agreed(lambda: _planned(options, report, console, team))
    first = team.said(run.digest)
    team.agreed(lambda: _check_same(run.digest, first))
    if options.dry_run:
        _forecast(run, report, team)
        return
    jobs, cells = run.jobs, run.cells
    if run.pipe is not None and run.left:
        process.at_work()
        cells |= _draw_all(run.pipe, run, report, console, team)
    if run.options.grid and team.rank == 0:
        process.at_work()
        with report.timed("write"):
            sheet = write_sheet([cells[job.index] for job in jobs], run.options)
        report.grid = str(sheet)
        console.remark(report.grid)


@dataclass(frozen=True)
class _Run:
    """What is to be drawn. cells: what is there already. left: what is not. before: of the picture that is
    drawn again. pipe: None where nothing needs it."""

    jobs: list[Job]
    left: list[Job]
    cells: dict[int, Cell]
    options: Options
    before: Metadata | None
    pipe: "Pipeline | None"

    @property
    def digest(self) -> str:
        """Of all jobs and files: processes that share them must agree."""
        known = [
            (job.index, str(job.path), job.there is None, str(job.request)) for job in self.jobs
        ]
        return hashlib.sha256(repr(known).encode()).hexdigest()


def _forecast(run: _Run, report: Report, team: Team) -> None:
    """For --dry-run."""
    left = [] if run.pipe is None else resolved(run.pipe, run.left)
    there, load = len(run.jobs) - len(run.left), report.seconds["load"]
    found = forecast_run(run.pipe, there, left, run.options, team, load)
    tell(found, run.options, team, report)


def _check_same(digest: str, first: str) -> None:
    if digest != first:
        raise ValueError("output must be a folder that all processes see, got one that differs")


def _planned(options: Options, report: Report, console: Console, team: Team) -> _Run:
    check_previews(options)
    check_dry_run(options, team.count)
    if options.dry_run:
        options = replace(options, cache=False)  # which would be written
    jobs, options = plan(options)
    before = None if options.from_image is None else read_metadata(options.from_image)
    pipe = None
    if needs_model(jobs, options):
        pipe = open_pipeline(options, report, console)
        jobs = placed(jobs, options, resolved(pipe, jobs))
    left = [job for job in jobs if job.there is None]
    cells = _those_there(jobs, report, console)
    check_writable([job.path for job in left])
    if left:
        pipe = pipe or open_pipeline(options, report, console)
        team.choose(pipe, left, resolved(pipe, left), options)
    return _Run(jobs, left, cells, options, before, pipe)


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
    pipe: "Pipeline", run: _Run, report: Report, console: Console, team: Team
) -> dict[int, Cell]:
    """Draw and write each picture that is left; returns what is in which file."""
    options, jobs = run.options, iter(run.left)
    requests = resolved(pipe, run.left)
    passes_of_all = passes(requests, options.batch)
    groups = team.own([next(jobs) for _ in group] for group in passes_of_all)
    own = [job for group in groups for job in group]
    notes = [pipe.size_of(job.request).note for job in own]
    if any((job.request.mask or job.request.outpaint) and job.path.suffix != ".png" for job in own):
        console.remark(
            "pixels that are kept stay as they are in .png alone; jpg and webp lose some"
        )
    for note in dict.fromkeys([*notes, *remarks_on(pipe, requests)]):
        console.remark(note)
    texts = dict.fromkeys(t for job in run.left for t in (job.request.prompt, job.request.negative))
    warn_of_unknown_words(options, texts, console)
    cells = {}
    previews = Previews.of(pipe, [job.path for job in own], options, console)
    passed = [len(group) for group in groups]
    with RunBar(console, len(texts), passed, len(run.cells)) as bar, previews:
        if not team.is_alone:
            team.share(pipe)
            _share_prompts(pipe, list(texts), own, bar, report)
        # Others' pictures between two passes would be missing where they are put together anew.
        together = [own] if team.is_alone else groups
        encoding = bar.encode if team.is_alone else None
        pictures = _draw(pipe, together, options.batch, bar, previews, encoding)
        for job, note, drawn in zip(own, notes, pictures, strict=True):
            if not team.writes:
                continue
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
            if run.before is not None:
                _compare(run.before, metadata, str(options.from_image), console)
    found = team.collect(report, cells)
    for index in sorted(found.keys() - cells.keys()):
        console.remark(str(found[index].path))
    return found


def _share_prompts(
    pipe: "Pipeline", texts: list[str], own: Sequence[Job], bar: RunBar, report: Report
) -> None:
    """T5 is loaded by the first process only."""
    from pixart.pipeline.parallel import share_prompts

    needed = {text for job in own for text in (job.request.prompt, job.request.negative)}
    with report.timed("text"):
        share_prompts(pipe, texts, needed, bar.encode)


def _draw(
    pipe: "Pipeline",
    groups: Sequence[Sequence[Job]],
    batch: int,
    bar: RunBar,
    previews: Previews,
    encode: Callable[[], object] | None,
) -> Iterator[Drawn]:
    """The pictures: T5 first, then the transformer; they need not fit together."""

    def step(progress: "Progress") -> None:
        bar.denoise(progress.step, progress.total)
        previews.step(progress)

    def decoding(done: int, total: int) -> None:
        bar.note(f"decode {done}/{total}")

    for jobs in groups:
        yield from pipe.draw_many(
            [job.request for job in jobs],
            batch=batch,
            callback=step,
            encoding=None if encode is None else lambda _: encode(),
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
