"""What `python -m pixart.generate` does: jobs in, files and a report out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pixart.config import EMBEDDED
from pixart.generation.console import Voice, voiced

if TYPE_CHECKING:
    from pixart.generation.jobs import Job
    from pixart.generation.options import Options
    from pixart.pipeline.text_to_image import Drawn, Pipeline

STAGES = ("load", "text", "denoise", "decode", "write")


@dataclass
class Report:
    """What is finished, also when it ends early. images: by the job's index."""

    images: dict[int, dict[str, Any]] = field(default_factory=dict)
    drawn: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started

    def add(self, job: "Job") -> None:
        self.images[job.index] = {
            "file": str(job.path),
            "prompt": job.prompt,
            "seed": job.seed,
            "width": job.width,
            "height": job.height,
            "note": job.note,
        }

    def to_dict(self) -> dict[str, Any]:
        from pixart.device import peak_memory

        return {
            "images": [self.images[index] for index in sorted(self.images)],
            "drawn": self.drawn,
            "seconds": {stage: round(spent, 3) for stage, spent in self.seconds.items()},
            "peak_memory_bytes": peak_memory(),
        }


def generate(options: "Options", report: Report) -> None:
    """Draw what the options ask for, and keep the report of files, sizes and seconds by stage."""
    say = Voice(options.quiet)
    with voiced(say):
        _generate(options, report, say)


def _generate(options: "Options", report: Report, say: Voice) -> None:
    from pixart.generation.jobs import plan
    from pixart.generation.pictures import check_writable, find_drawn, write_picture

    jobs, options = plan(options)
    there = [find_drawn(job) if options.prompts else None for job in jobs]
    left = [job for job, found in zip(jobs, there, strict=True) if found is None]
    for found in filter(None, there):
        report.add(found)
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} pictures are there already")
    check_writable([job.path for job in left])
    if not left:
        return
    pipe = _open(options, report, say)
    sized = [_checked(job.sized(pipe), pipe) for job in left]
    for note in dict.fromkeys(job.note for job in sized):
        say(note)
    _warn_of_unknown_words(options, left, say)
    _encode(pipe, left, report, say)
    for job in sized:
        drawn = _draw(pipe, job, say)
        for stage, spent in drawn.seconds.items():
            report.seconds[stage] += spent
        with report.timed("write"), say.bar(f"write {job.index + 1}", 1) as bar:
            write_picture(drawn.image, replace(job, batched=drawn.batched, tile=drawn.tile))
            bar.advance()
        report.add(job)
        report.drawn += 1
        say(str(job.path))


def _open(options: "Options", report: Report, say: Voice) -> "Pipeline":
    import torch

    from pixart.checkpoint.load import read_config
    from pixart.config import KVCompression
    from pixart.lora.adapters import parse_lora
    from pixart.pipeline.text_to_image import OPENING, Pipeline

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    encoder = options.text_encoder_dtype
    with report.timed("load"), say.bar("load", OPENING) as bar:
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
            progress=bar.advance,
        )


def _encode(pipe: "Pipeline", jobs: "list[Job]", report: Report, say: Voice) -> None:
    """T5 first, then the transformer: they need not fit together."""
    texts = [text for job in jobs for text in (job.prompt, job.negative)]
    with report.timed("text"), say.bar("text", len(set(texts))) as bar:
        pipe.prepare(texts, bar.advance)
    with report.timed("load"), say.bar("load transformer", 1) as bar:
        pipe.opened.load(pipe.device)
        bar.advance()


def _checked(job: "Job", pipe: "Pipeline") -> "Job":
    """Refuse what this model cannot sample before T5 has run for minutes."""
    from pixart.sampler.loop import check_sampling
    from pixart.sampler.schedulers import make_scheduler

    solver = make_scheduler(job.scheduler, pipe.scheduler_config)
    check_sampling(solver, job.steps, job.guidance, job.guidance_interval)
    return job


def _draw(pipe: "Pipeline", job: "Job", say: Voice) -> "Drawn":
    from pixart.sampler.schedulers import default_steps, make_scheduler

    steps = job.steps or default_steps(make_scheduler(job.scheduler, pipe.scheduler_config))
    number = job.index + 1
    with say.bar(f"denoise {number}", steps) as bar, say.bar(f"decode {number}") as tiles:

        def decoded(done: int, total: int) -> None:
            bar.close()  # one bar at a time, on one line
            tiles.reach(done, total)

        return pipe.draw(
            job.prompt,
            negative=job.negative,
            height=job.height,
            width=job.width,
            steps=job.steps,
            guidance=job.guidance,
            guidance_interval=job.guidance_interval,
            seed=job.seed,
            scheduler=job.scheduler,
            batched=job.batched,
            tile=job.tile,
            callback=bar.advance,
            decoding=decoded,
        )


def _warn_of_unknown_words(options: "Options", jobs: "list[Job]", say: Voice) -> None:
    """The embedded model knows a hundred words: say so, instead of drawing nonsense silently."""
    if options.model not in (None, EMBEDDED):
        return
    from pixart.shapes.caption import WORDS, unknown_words

    unknown = dict.fromkeys(word for job in jobs for word in unknown_words(job.prompt))
    if unknown:
        say(
            f"the embedded model does not know: {', '.join(unknown)}. "
            f"It knows: {' '.join(sorted(WORDS))}"
        )
