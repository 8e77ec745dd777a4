"""How several processes share pictures: each draws its own, or all draw each of them together."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import distributed

from pixart.distributed import rank
from pixart.model.exchange import rows_together, split_rows
from pixart.pipeline.request import Parallel, Request
from pixart.pipeline.stages import stages_of

if TYPE_CHECKING:
    from pixart.pipeline.text_to_image import Pipeline


@dataclass(frozen=True)
class Layout:
    """How a picture is shared: see pixart.sampler.mesh.Mesh. Of 1 by 1, each process draws its own."""

    guidance: int = 1
    tokens: int = 1

    @property
    def is_together(self) -> bool:
        return self.guidance * self.tokens > 1


def choose_layout(
    wanted: Parallel, processes: int, passes: int, pipe: "Pipeline", requests: Sequence[Request]
) -> Layout:
    """The layout of resolved requests that alone would be drawn in so many passes.

    auto: a pass for each process where there are enough; or else guidance beside itself if all pictures are
    guided and the processes even in number, and the tokens shared among the rest. ValueError for what cannot
    be shared like that.
    """
    if wanted == "pictures" or (wanted == "auto" and passes >= processes):
        return Layout()
    layouts = {
        "guidance": [Layout(2, 1)],
        "sequence": [Layout(1, processes)],
        "guidance+sequence": [Layout(2, max(2, processes // 2))],
        "auto": [Layout(2, processes // 2), Layout(1, processes)],
    }[wanted]
    faults = [_fault(layout, processes, pipe, requests) for layout in layouts]
    for layout, fault in zip(layouts, faults, strict=True):
        if fault is None:
            return layout
    raise ValueError(
        f"parallel must be what {processes} processes can do, got {wanted}: "
        f"{'; '.join(fault for fault in faults if fault)}"
    )


def _fault(
    layout: Layout, processes: int, pipe: "Pipeline", requests: Sequence[Request]
) -> str | None:
    """Why pictures cannot be shared like that."""
    stages = [stage for request in requests for stage in stages_of(request, pipe.multiple)]
    if layout.guidance * layout.tokens != processes:
        return f"halves of guidance are for 2 processes, beside tokens for 4, 6, 8 ..., not {processes}"
    if layout.guidance > 1 and not all(_is_guided(stage.guidance) for stage in stages):
        return "a picture without guidance has no two halves"
    heads = pipe.opened.config.num_heads
    if layout.tokens > heads:
        return (
            f"{layout.tokens} processes for the tokens are more than the {heads} heads of attention"
        )
    configs = [pipe.opened.config, *(one.config for one in pipe.controls.opened)]
    together = rows_together(config.kv_compression for config in configs)
    try:
        for stage in stages:
            split_rows(stage.seen[0] // pipe.multiple, layout.tokens, together)
    except ValueError as error:
        return str(error)
    return None


def _is_guided(guidance: Any) -> bool:
    start, end = guidance.interval
    return bool(guidance.scale > 1 and start < end)


def share_prompts(
    pipe: "Pipeline",
    texts: Sequence[str],
    needed: Collection[str],
    progress: Callable[[], object] | None = None,
) -> None:
    """Encode prompts in the first process, where T5 is loaded, and send each to all others, which keep those
    that they need. All must call it with the same texts. progress: called for each."""
    store, texts = pipe.captions, list(dict.fromkeys(texts))
    try:
        for text in texts:
            if rank() == 0:
                store.ensure(text)
            sent: list[Any] = [store.encoded(text) if rank() == 0 else None]
            distributed.broadcast_object_list(sent, 0)
            if rank() != 0 and text in needed:
                store.held.update(sent[0])
            if progress is not None:
                progress()
    finally:
        pipe.text_encoder.release()
