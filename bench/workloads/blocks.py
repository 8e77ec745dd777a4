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

from bench.measure import timing
from bench.workloads import models
from bench.workloads import sizes as shapes
from pixart.checkpoint.config import config_to_diffusers
from pixart.config import KVCompression, PixArtConfig
from pixart.model.blocks import Block

SELF, CROSS = "self-attention", "cross-attention"
PROJECTIONS, MLP = "projections", "MLP"
MERGING, ELEMENTWISE = "merging keys and values", "element-wise"
FAMILIES = (SELF, CROSS, PROJECTIONS, MLP, MERGING, ELEMENTWISE)
_PRODUCTS = ("aten::linear", "aten::_addmm_activation", "mkldnn::_linear_pointwise")
_OURS = ("pixart::modulate", "pixart::gate_add", "pixart::gate_add_modulate")


def config(resolution: str, ratio: int) -> PixArtConfig:
    """Of a model of this one block. ratio: 1 for a dense block."""
    compression = KVCompression((0,), ratio) if ratio > 1 else None
    return replace(models.model_config(resolution, None), depth=1, kv_compression=compression)


@torch.no_grad()
def ours(
    resolution: str, ratio: int, device: torch.device, dtype: torch.dtype, text: int | None = None
) -> timing.Call:
    """A block's forward pass over random tokens, the caption's keys and values being made.

    ratio: 1 for a dense block. text: how many tokens of the caption count, None for all.
    """
    own = config(resolution, ratio)
    with device:
        block = Block(own, 0)
    random = _randomise(block, device)
    block = block.to(dtype).eval()
    width, count = own.hidden_size, shapes.tokens(resolution)
    x, modulated = (random(1, count, width).to(dtype) for _ in range(2))
    rows, following = ([random(1, width) for _ in range(n)] for n in (4, 2))
    caption = block.cross_attn.keys_values(random(1, own.model_max_length, width).to(dtype))
    lengths = None if text is None else torch.tensor([text], dtype=torch.int32, device=device)
    inputs = (x, modulated, tuple(rows), tuple(following), caption, lengths)
    return torch.no_grad()(partial(block, *inputs, shapes.grid(resolution)))


@torch.no_grad()
def theirs(resolution: str, device: torch.device, dtype: torch.dtype) -> timing.Call:
    """The same of diffusers' model, which makes the caption's keys and values at every step."""
    from diffusers import PixArtTransformer2DModel

    own = config(resolution, 1)
    with device:
        model: Any = PixArtTransformer2DModel.from_config(config_to_diffusers(own))
    block = model.transformer_blocks[0]
    random = _randomise(block, device)
    block = block.to(dtype).eval()
    x = random(1, shapes.tokens(resolution), own.hidden_size).to(dtype)
    call = partial(
        block,
        x,
        encoder_hidden_states=random(1, own.model_max_length, own.hidden_size).to(dtype),
        timestep=random(1, 6 * own.hidden_size).to(dtype),
    )
    return torch.no_grad()(call)


def _randomise(block: torch.nn.Module, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    for parameter in block.parameters():
        parameter.normal_(std=0.02, generator=generator)
    return partial(torch.randn, generator=generator, device=device)


def flops(resolution: str, ratio: int) -> dict[str, int]:
    """Useful work of a block, by family; merging and element-wise work count nothing."""
    sizes, count = shapes.model(resolution), shapes.tokens(resolution)
    width, one = sizes.hidden_size, 2 * count * sizes.hidden_size**2
    attend = partial(shapes.attention_flops, 1, count, channels=width, backward=False)
    return {
        SELF: attend(keys=shapes.tokens(resolution, ratio)),
        CROSS: attend(keys=sizes.text_tokens),
        PROJECTIONS: one * (3 + 1 + 2),
        MLP: one * 8,
        MERGING: 0,
        ELEMENTWISE: 0,
    }


def operations(
    calls: Mapping[str, timing.Call], resolution: str, device: torch.device, rounds: int
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
            found[name].append(_profile(calls[name], shapes.model(resolution).hidden_size, device))
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
        elif event.name in _OURS:
            yield ELEMENTWISE
        else:  # before attention to the image, copies and norms are what compression needs
            yield ELEMENTWISE if attentions else MERGING


def _is_mlp(input_shapes: Iterable[Any], width: int) -> bool:
    """By the weight: a folded projection has inputs of 4 times the width as well."""
    return any(sorted(shape) == [width, 4 * width] for shape in input_shapes)
