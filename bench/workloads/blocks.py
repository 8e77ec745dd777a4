"""One block of the full-size model by itself: what it takes, and which operation takes how much.

28 of these are the model but for its ends, which read and write a picture: less than a hundredth of
the work from 1K on. At 4K a CPU takes minutes for the whole model; a block can still be measured.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from bench.measure import memory, timing
from bench.measure.case import Context, Ready, time_variants
from bench.measure.results import Row
from bench.workloads import sizes
from bench.workloads.models import OURS, THEIRS, build_ours, build_theirs
from bench.workloads.operators.modulation import elementwise_bytes
from bench.workloads.sizes import Compression
from pixart import cost
from pixart.config import KVCompression, PixArtConfig

SELF, CROSS, PROJECTIONS, MLP, MERGING = cost.block_flops(PixArtConfig(), 0, 1)
ELEMENTWISE = "element-wise"
FAMILIES = (SELF, CROSS, PROJECTIONS, MLP, MERGING, ELEMENTWISE)
_PRODUCTS = ("aten::linear", "aten::_addmm_activation", "mkldnn::_linear_pointwise")


def config(size: str, compression: Compression | None) -> PixArtConfig:
    """Of a model of this one block."""
    merged = None if compression is None else KVCompression((0,), compression.ratio)
    return replace(sizes.config(size), depth=1, kv_compression=merged)


@torch.no_grad()
def ours(
    size: str,
    compression: Compression | None,
    device: torch.device,
    dtype: torch.dtype,
    text: int | None = None,
) -> timing.Call:
    """A block's forward pass over random tokens, the caption's keys and values being made.

    text: how many tokens of the caption count, None for all.
    """
    own = config(size, compression)
    block: Any = build_ours(own, device).to(dtype).eval().blocks[0]
    random = _random(device)
    width, count = own.hidden_size, sizes.tokens(size)
    x, modulated = (random(1, count, width).to(dtype) for _ in range(2))
    rows, following = ([random(1, width) for _ in range(n)] for n in (4, 2))
    caption = block.cross_attn.keys_values(random(1, own.model_max_length, width).to(dtype))
    lengths = None if text is None else torch.tensor([text], dtype=torch.int32, device=device)
    inputs = (x, modulated, tuple(rows), tuple(following), caption, lengths)
    return torch.no_grad()(partial(block, *inputs, sizes.grid(size)))


@torch.no_grad()
def theirs(size: str, device: torch.device, dtype: torch.dtype) -> timing.Call:
    """The same of diffusers' model, which makes the caption's keys and values at every step."""
    own = config(size, None)
    block = build_theirs(own, device).to(dtype).eval().transformer_blocks[0]
    random = _random(device)
    x = random(1, sizes.tokens(size), own.hidden_size).to(dtype)
    call = partial(
        block,
        x,
        encoder_hidden_states=random(1, own.model_max_length, own.hidden_size).to(dtype),
        timestep=random(1, 6 * own.hidden_size).to(dtype),
    )
    return torch.no_grad()(call)


def _random(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return partial(torch.randn, generator=generator, device=device)


def rows(
    size: str,
    compressions: Iterable[Compression],
    context: Context,
    dtype: torch.dtype,
) -> dict[str, Row]:
    """Of a dense block of ours, of compressed ones and of diffusers'."""
    device = context.device
    makers: dict[str, Callable[[], timing.Call]] = {
        OURS: lambda: ours(size, None, device, dtype),
        **{one.variant: partial(ours, size, one, device, dtype) for one in compressions},
        THEIRS: lambda: theirs(size, device, dtype),
    }
    merged = {one.variant: one for one in compressions}

    def build(name: str, make: Callable[[], timing.Call]) -> Ready:
        call = make()
        _, peak = memory.of_next(call, device)  # beyond the weights and the inputs
        return Ready(
            [call], sum(flops(size, merged.get(name)).values()), 0, None, {"peak_bytes": peak}
        )

    builders = {name: partial(build, name, make) for name, make in makers.items()}
    found = time_variants(context, builders, dtype=dtype, with_host=True, least_rounds=3)
    return {name: describe(size, dtype) | row for name, row in found.items()}


def describe(size: str, dtype: torch.dtype) -> Row:
    shape = {"size": size, "batch": 1, "tokens": sizes.tokens(size)}
    return {"what": "block", "shape": shape, "dtype": str(dtype).removeprefix("torch.")}


def flops(size: str, compression: Compression | None) -> dict[str, int]:
    """Useful work of a block of ours, by family; element-wise work counts nothing."""
    work = cost.block_flops(config(size, compression), 0, sizes.grid(size))
    return work | {ELEMENTWISE: 0}


def floors(size: str, compression: Compression | None) -> list[tuple[int, int]]:
    """FLOPs and bytes, in 16 bits, of each operation of a block of ours."""
    own, grid = config(size, compression), sizes.grid(size)
    width, count, text = own.hidden_size, grid[0] * grid[1], own.model_max_length
    # Inputs and outputs of products, in widths: qkv, its output, query and output of the
    # cross-attention, the two layers of the MLP.
    work = [
        (
            cost.product_flops(count, before * width, after * width),
            cost.product_bytes(count, before * width, after * width, 2),
        )
        for before, after in ((1, 3), (1, 1), (1, 1), (1, 1), (1, 4), (4, 1))
    ]
    merged = own.kv_compression
    keys = count if merged is None else cost.merged_keys(merged, grid)
    for m in (keys, text):
        work.append(
            (cost.attention_flops(count, m, width), cost.attention_bytes(count, m, width, 2))
        )
    for kernel in (
        ("gate_add", ""),
        ("gate_add_modulate", "plain"),
        ("gate_add_modulate", "gated"),
    ):
        work.append((0, elementwise_bytes(*kernel, count, width, 2, backward=False)))
    if merged is not None:
        merging = cost.merging_flops(merged, keys, width)
        work.append((merging, cost.merging_bytes(grid, merged.ratio, width, 2)))
    return work


def operations(
    calls: Mapping[str, timing.Call], size: str, device: torch.device, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Seconds of each family of operations in each block of ours, in `rounds` passes in turn.

    Read from a profile of the block as it runs: what PyTorch's dispatcher met first, with all below.
    On a GPU the seconds are those of the kernels that were launched.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            found[name].append(_profile(calls[name], sizes.config(size).hidden_size, device))
        order.reverse()  # nobody always comes after the same neighbour
    return found


def _profile(call: timing.Call, width: int, device: torch.device) -> dict[str, float]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        call()
        timing.synchronize(device)
    first = [
        event
        for event in profile.events()
        if event.cpu_parent is None and event.device_type == DeviceType.CPU
    ]
    took = "device_time_total" if device.type == "cuda" else "cpu_time_total"
    seconds = dict.fromkeys(FAMILIES, 0.0)
    for family, event in zip(_families(first, width), _ordered(first), strict=True):
        seconds[family] += 1e-6 * getattr(event, took)
    return seconds


def _ordered(events: Iterable[Any]) -> list[Any]:
    return sorted(events, key=lambda event: event.time_range.start)


def _families(events: Iterable[Any], width: int) -> Iterable[str]:
    """Of operations in the order of a block: attention to the image comes before that to the text."""
    attentions = 0
    for event in _ordered(events):
        if event.name == "pixart::flash_attention":
            attentions += 1
            yield SELF if attentions == 1 else CROSS
        elif event.name in _PRODUCTS:
            yield MLP if _is_mlp(event.input_shapes, width) else PROJECTIONS
        elif event.name.startswith("pixart::") and event.name != "pixart::compress_kv":
            yield ELEMENTWISE
        else:  # before attention to the image, copies and norms are what compression needs
            yield ELEMENTWISE if attentions else MERGING


def _is_mlp(input_shapes: Iterable[Any], width: int) -> bool:
    """By the weight: a folded projection has inputs of 4 times the width as well."""
    return any(sorted(shape) == [width, 4 * width] for shape in input_shapes)
