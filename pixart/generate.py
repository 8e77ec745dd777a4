"""`python -m pixart.generate "a red circle left of a blue square"`: prompts to picture files.

Every picture carries the request that made it, so `--from-image` draws it again and a list of
prompts can be taken up where it stopped. Exit codes: 0 done, 2 bad input, 1 failure, 130 cancelled.
"""

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from pixart.outputs import Job
    from pixart.pipeline import Pipeline

BAD_INPUT, FAILURE, CANCELLED = 2, 1, 130


@dataclass(frozen=True)
class Options:
    """Draw pictures from text with PixArt-Σ or -α."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to draw; several prompts give several pictures."""
    prompts: Path | None = None
    """A file of prompts: .txt, one a line, or .jsonl with prompt, negative, seed, size, steps,
    guidance, name. Pictures that are already there are not drawn again."""
    from_image: Path | None = None
    """Draw a picture again from what its file says; other options change single settings."""
    model: str = "shapes"
    """A pipeline directory, a hub id, or the embedded model "shapes"."""
    transformer: str | None = None
    """A transformer to use in the pipeline: official .pth, .safetensors or diffusers directory."""
    output: Path = Path("outputs")
    """A file, a directory, or a template with {prompt}, {seed}, {index}, {name}."""
    format: Literal["png", "jpg", "webp"] | None = None
    """File format; by default that of --output, or png."""
    num_images: int = 1
    """Pictures per prompt, with seeds from --seed upwards."""
    seed: int | None = None
    """Seed of the first picture. Default 0."""
    size: str | None = None
    """Exact size in pixels, WIDTHxHEIGHT or one number for a square."""
    aspect: str | None = None
    """Aspect ratio WIDTH:HEIGHT; the nearest bucket of --resolution is taken."""
    resolution: str | None = None
    """256, 512, 1k, 2k, 2880, 4k or pixels of the square of the same area."""
    negative: str | None = None
    """What not to draw."""
    steps: int | None = None
    """Denoising steps. Default 20 (sa-solver 25, lcm 4)."""
    guidance: float | None = None
    """Classifier-free guidance scale. Default 4.5 (lcm 1, none)."""
    guidance_interval: tuple[float, float] | None = None
    """Part of the trajectory that is guided, from 0 (noise) to 1 (image). Default 0 1."""
    scheduler: str | None = None
    """dpm-solver++, sa-solver, ddim, euler, unipc or lcm. Default: the pipeline's own."""
    kv_compress: str | None = None
    """Open a dense transformer compressed: LAYERS:RATIO[:SAMPLING], such as 14-27:2."""
    null_caption: Literal["own-mask", "prompt-mask"] | None = None
    """How guidance sees the empty caption: as diffusers does, or as the reference code does."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of transformer and VAE. Default bf16 on CUDA, fp32 on a CPU."""
    text_encoder_dtype: Literal["fp32", "bf16", "fp16", "8bit", "4bit"] | None = None
    """Of T5. Default bf16 if it is large, else that of the rest. 8bit and 4bit need CUDA."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    cuda_graph: bool = False
    """Record a denoising step once per size and replay it: quicker up to 512 px. CUDA only."""
    cache: bool = True
    """Keep prompt embeddings on disk, so that T5 need not be loaded again for the same text."""
    json: bool = False
    """Print the result as JSON: files, seeds, seconds by stage, peak memory."""
    quiet: bool = False
    """No progress bars and no remarks."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(tyro.cli(Options, prog="python -m pixart.generate", args=arguments))


def run(options: Options) -> int:
    from pixart.checkpoint import CheckpointWriteError

    try:
        result = generate(options)
    except KeyboardInterrupt:
        return _complain("cancelled; finished pictures are kept", CANCELLED)
    except (CheckpointWriteError, MemoryError) as error:
        return _complain(str(error) or "out of memory", FAILURE)
    except (ValueError, FileNotFoundError, NotADirectoryError, ModuleNotFoundError) as error:
        return _complain(str(error), BAD_INPUT)
    except (OSError, RuntimeError) as error:
        return _complain(str(error), FAILURE)
    if options.json:
        print(json.dumps(result, indent=2))
    return 0


def _complain(message: str, code: int) -> int:
    print(f"pixart.generate: {' '.join(message.split())}", file=sys.stderr)
    return code


def generate(options: Options) -> dict[str, Any]:
    """Draw what the options ask for. Returns files, seeds, seconds by stage and peak memory."""
    say = _Voice(options.quiet)
    with _voiced(say):
        return _generate(options, say)


def _generate(options: Options, say: "_Voice") -> dict[str, Any]:
    from pixart.outputs import check_writable, is_drawn, plan, write_picture

    jobs, options = plan(options)
    left = [job for job in jobs if not (options.prompts and is_drawn(job))]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} pictures are there already")
    seconds = {"load": 0.0, "text": 0.0, "denoise": 0.0, "decode": 0.0, "write": 0.0}
    check_writable([job.path for job in left])
    if left:
        started = time.perf_counter()
        pipe = _open(options)
        seconds["load"] = time.perf_counter() - started
        sized = [_checked(job.sized(pipe), pipe) for job in left]
        for note in dict.fromkeys(job.note for job in sized):
            say(note)
        _warn_of_unknown_words(options, left, say)
        started = time.perf_counter()
        texts = [text for job in left for text in (job.prompt, job.negative)]
        with say.bar("text", len(set(texts))) as advance:
            pipe.prepare(texts, lambda _: advance())
        seconds["text"] = time.perf_counter() - started
        for job in sized:
            drawn = _draw(pipe, job, say)
            for stage, spent in drawn.seconds.items():
                seconds[stage] += spent
            started = time.perf_counter()
            write_picture(drawn.image, job)
            seconds["write"] += time.perf_counter() - started
            say(str(job.path))
    return {
        "images": [{"file": str(j.path), "prompt": j.prompt, "seed": j.seed} for j in jobs],
        "drawn": len(left),
        "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
        "peak_memory_bytes": _peak_memory(),
    }


def _open(options: Options) -> "Pipeline":
    import torch

    from pixart.config import KVCompression
    from pixart.pipeline import Pipeline

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    encoder = options.text_encoder_dtype
    return Pipeline.from_pretrained(
        options.model,
        transformer=options.transformer,
        device=options.device,
        dtype=dtypes[options.dtype] if options.dtype else None,
        text_encoder_dtype=dtypes.get(encoder, encoder) if encoder else None,  # type: ignore[arg-type]
        kv_compression=KVCompression.parse(options.kv_compress) if options.kv_compress else None,
        null_caption=options.null_caption,
        cuda_graph=options.cuda_graph,
        cache_dir="auto" if options.cache else None,
    )


def _checked(job: "Job", pipe: "Pipeline") -> "Job":
    """Refuse what this model cannot sample before T5 has run for minutes."""
    from pixart.sampler import check_sampling, make_scheduler

    solver = make_scheduler(job.scheduler, pipe.scheduler_config)
    check_sampling(solver, job.steps, job.guidance, job.guidance_interval)
    return job


def _draw(pipe: "Pipeline", job: "Job", say: "_Voice") -> Any:
    from pixart.sampler import default_steps, make_scheduler

    steps = job.steps or default_steps(make_scheduler(job.scheduler, pipe.scheduler_config))
    with say.bar(f"denoise {job.index + 1}", steps) as advance:
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
            callback=lambda _: advance(),
        )


def _warn_of_unknown_words(options: Options, jobs: "list[Job]", say: "_Voice") -> None:
    """The embedded model knows a hundred words: say so, instead of drawing nonsense silently."""
    if options.model != "shapes":
        return
    from pixart.shapes.caption import WORDS, unknown_words

    unknown = dict.fromkeys(word for job in jobs for word in unknown_words(job.prompt))
    if unknown:
        say(
            f"the embedded model does not know: {', '.join(unknown)}. "
            f"It knows: {' '.join(sorted(WORDS))}"
        )


class _Voice:
    """Remarks and progress bars on standard error; silent when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, text: str) -> None:
        if not self.quiet:
            from tqdm import tqdm

            tqdm.write(" ".join(text.split()), file=sys.stderr)  # above a bar, not into it

    def bar(self, stage: str, total: int) -> "_Bar":
        return _Bar(stage, total, self.quiet)


class _Remarks(logging.Handler):
    def __init__(self, say: _Voice) -> None:
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())


@contextmanager
def _voiced(say: _Voice) -> Iterator[None]:
    """Let warnings and the notes of our own modules speak with one voice, a line each."""

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if category is UserWarning:  # others are for programmers
            say(f"warning: {message}")

    logger, handler = logging.getLogger("pixart"), _Remarks(say)
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before[0])
            logger.propagate = before[1]


class _Bar:
    def __init__(self, stage: str, total: int, quiet: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=stage, disable=quiet, leave=False, file=sys.stderr)

    def __enter__(self) -> Callable[[], object]:
        return self._bar.update

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _peak_memory() -> int:
    """Bytes: of the CUDA allocator where it was used, else of the process (0 on Windows)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.exit(main())
