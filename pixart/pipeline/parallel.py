"""How several processes share pictures: each draws its own, or all draw each of them together."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import distributed

from pixart.config import KVCompression, PixArtConfig
from pixart.distributed import rank
from pixart.model.exchange import received_bytes, rows_together, split_rows
from pixart.pipeline.request import Parallel, Request
from pixart.pipeline.stages import stages_of
from pixart.plans.schedule import KVSchedule

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

    @property
    def name(self) -> Parallel:
        """The choice of it by hand."""
        if self.guidance == 1:
            return "sequence" if self.tokens > 1 else "pictures"
        return "guidance+sequence" if self.tokens > 1 else "guidance"


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
    if any(request.reuse_blocks for request in requests):
        return "pictures that reuse blocks are each drawn by one process"
    if layout.guidance > 1 and not all(_is_guided(stage.guidance) for stage in stages):
        return "a picture without guidance has no two halves"
    heads = pipe.opened.config.num_heads
    if layout.tokens > heads:
        return (
            f"{layout.tokens} processes for the tokens are more than the {heads} heads of attention"
        )
    configs = [pipe.opened.config, *(one.config for one in pipe.controls.opened)]
    further = [ratio for request in requests for ratio in _ratios(request)]
    together = rows_together((config.kv_compression for config in configs), further)
    try:
        for stage in stages:
            split_rows(stage.seen[0] // pipe.multiple, layout.tokens, together)
    except ValueError as error:
        return str(error)
    return None


def _ratios(request: Request) -> set[int]:
    """What a schedule merges at one timestep or another."""
    if request.kv_schedule is None:
        return set()
    return {rule.ratio for rule in KVSchedule.parse(request.kv_schedule).rules}


def _is_guided(guidance: Any) -> bool:
    start, end = guidance.interval
    return bool(guidance.scale > 1 and start < end)


def step_bytes(
    pipe: "Pipeline",
    request: Request,
    layout: Layout,
    pictures: int,
    ratios: Mapping[tuple[int, ...], int] | None = None,
) -> float:
    """Bytes that each process receives, on average, in a guided step of a pass of so many pictures: computed
    from the sizes. Of what the transformer sees at once, where it sees a picture in windows or sizes. ratios:
    what the blocks merge by a schedule, and how often; () and None for what the model has."""
    if not layout.is_together:
        return 0.0
    model, stages = pipe.opened.config, stages_of(request, pipe.multiple)
    largest = max(stages, key=lambda stage: math.prod(stage.seen))
    grid = (largest.seen[0] // pipe.multiple, largest.seen[1] // pipe.multiple)
    item = pipe.transformer.dtype.itemsize
    prediction = math.prod(grid) * model.patch_size**2 * model.out_channels * item
    received = 0.0
    if layout.tokens > 1:
        ratios = ratios or {(): 1}
        layers = [
            (_merging(model, layer, merged), layer, count / sum(ratios.values()))
            for merged, count in ratios.items()
            for layer in range(model.depth)
        ]
        if request.control_image:
            opened = pipe.controls.opened
            layers += [(one.config, layer, 1.0) for one in opened for layer in range(one.copies)]
        of_layers = (
            share * received_bytes(config, layer, grid, layout.tokens, item)
            for config, layer, share in layers
        )
        # At the end all are given the whole prediction.
        of_one = sum(of_layers) + prediction * (layout.tokens - 1) / layout.tokens
        halves = 2 if _is_guided(largest.guidance) and layout.guidance == 1 else 1
        received += halves * pictures * of_one
    if layout.guidance > 1:
        received += pictures * prediction
    return received


def _merging(config: PixArtConfig, layer: int, ratios: tuple[int, ...]) -> PixArtConfig:
    """The configuration where this block merges as a schedule says."""
    if not ratios:
        return config
    compression = KVCompression((layer,), ratios[layer]) if ratios[layer] > 1 else None
    return replace(config, kv_compression=compression)


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
