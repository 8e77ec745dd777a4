"""The pipeline that the options of a run name, and what it makes of requests and of words."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pixart.config import EMBEDDED
from pixart.generation.console import Console
from pixart.generation.drafts import OWN, Job, kind_of, without_own
from pixart.generation.options import Options
from pixart.generation.prompts import naming
from pixart.generation.report import Report
from pixart.pipeline.metadata import CUDA_GRAPH
from pixart.pipeline.request import Request
from pixart.preprocess import parse_places

if TYPE_CHECKING:
    from pixart.pipeline.text_to_image import Pipeline


def resolved(pipe: "Pipeline", jobs: Sequence[Job]) -> list[Request]:
    """The requests with what the model takes. ValueError names the file and line of one that it cannot
    draw."""
    known: dict[tuple[Any, ...], Request] = {}
    found = []
    for job in jobs:
        kind = kind_of(job.request)
        if kind not in known:
            with naming(job.place):
                known[kind] = pipe.resolve(without_own(job.request))
        found.append(replace(known[kind], **{name: getattr(job.request, name) for name in OWN}))
    return found


def remarks_on(pipe: "Pipeline", requests: Iterable[Request]) -> list[str]:
    """What the model and its plan have to say of resolved requests, once of each kind."""
    from pixart.pipeline.fast import remarks_on as remarks_of_plan

    kinds = {(kind_of(one), bool(one.negative)): one for one in requests}
    said = [
        remark
        for one in kinds.values()
        for remark in (*pipe.remarks(one), *remarks_of_plan(one, pipe.plan))
    ]
    return list(dict.fromkeys(said))


def open_pipeline(
    options: Options, report: Report, console: Console, *, sizes_only: bool = False
) -> "Pipeline":
    """The pipeline that the options name. sizes_only: to plan with alone. Raises what
    `Pipeline.from_pretrained` raises."""
    import torch

    from pixart.checkpoint.load import read_config
    from pixart.config import KVCompression
    from pixart.lora.adapters import parse_lora
    from pixart.pipeline.text_to_image import OPENING, Pipeline

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    encoder, places = options.text_encoder_dtype, options.preprocessor_weights
    with report.timed("load"), console.bar("load", OPENING) as bar:
        pipe = Pipeline.from_pretrained(
            options.model or EMBEDDED,
            transformer=options.transformer,
            lora=[parse_lora(text) for text in options.lora],
            control=options.control,
            preprocessors=parse_places(places),
            config=read_config(options.config) if options.config else None,
            device=options.device,
            dtype=dtypes[options.dtype] if options.dtype else None,
            text_encoder=options.text_encoder,
            text_encoder_memory=options.text_encoder_memory,
            text_encoder_dtype=dtypes.get(encoder, encoder) if encoder else None,  # type: ignore[arg-type]
            kv_compression=KVCompression.parse(options.kv_compress)
            if options.kv_compress
            else None,
            variant=options.variant,
            ema=options.ema,
            null_caption=options.null_caption,
            cuda_graph=CUDA_GRAPH[options.cuda_graph],
            attention=options.attention,
            quantize=options.quantize,
            plan=options.fast,
            cache_dir=None if options.cache is False else "auto",
            progress=bar.advance,
            sizes_only=sizes_only,
        )
    pipe.is_silent = True  # see remarks_on
    if pipe.plan is not None:
        from pixart.pipeline.fast import note_of

        console.remark(f"--fast {options.fast}: {note_of(pipe.plan)}")
    return pipe


def warn_of_unknown_words(
    options: Options, texts: Iterable[str], console: Console, said: set[str] | None = None
) -> None:
    """The embedded model knows a hundred words: say so, instead of drawing nonsense silently. said: words of
    which that was said, to which these are added."""
    if options.model not in (None, EMBEDDED):
        return
    from pixart.shapes.caption import WORDS, unknown_words

    said = set() if said is None else said
    words = (word for text in texts for word in unknown_words(text) if word not in said)
    unknown = dict.fromkeys(words)
    said.update(unknown)
    if unknown:
        console.remark(
            f"the embedded model does not know: {', '.join(unknown)}. "
            f"It knows: {' '.join(sorted(WORDS))}"
        )
