"""The whole model: one denoising and one training step, in bench.gpu and in `pytest bench`.

Ours and diffusers' have the same random weights; one sample, a caption of full length. A denoising
step is what each library's pipeline runs per step: ours has made the caption's keys and values once
per prompt before. "compiled" means every block by itself, as diffusers advises; "graph" a CUDA
graph; "checkpointed" keeps no activations inside of blocks for the backward pass.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

import pixart.model.blocks
import pixart.model.transformer
import pixart_kernels
from bench.measure import memory, timing
from bench.measure.worker import Case, Context
from bench.workloads import sizes as shapes
from bench.workloads.comparisons import failed, measured
from bench.workloads.peers import Unavailable, compile_options
from pixart.checkpoint.config import config_to_diffusers
from pixart.checkpoint.names import to_diffusers
from pixart.config import KVCompression, PixArtConfig
from pixart.diffusion import training_loss
from pixart.model.transformer import PixArt
from pixart.sampler.cuda_graphs import CudaGraphs

Denoise = Callable[[Tensor, Tensor], Tensor]  # latents, timesteps: the model's output
CHECKPOINTED = ("2k", "2880", "4k")  # training there does not fit with all activations kept
# Relative, between models of the same weights: three times what another order of rounding makes
# in 28 blocks (0.015 and 9e-7; in two blocks 0.007 and 5e-7, of the gradients 0.008), where the first
# self-attention left out makes 0.5, the last 0.16.
SAME = {torch.bfloat16: 0.05, torch.float32: 3e-6}
# Bytes per parameter that a step moves at least: a denoising step reads it once; a training step
# reads and writes it in fp32 with its two averages in AdamW.
MOVED = {"denoise": 2, "train": 2 * 3 * 4}


def steps(tiny: bool) -> list[Case]:
    """One denoising step and one training step per resolution, against diffusers' model."""
    denoising = (shapes.TINY,) if tiny else ("4k", "1k", "512", "2k")
    training = (shapes.TINY,) if tiny else ("1k", "512", "2k", "4k")
    cases = [denoise(size, IN_ONE_RUN, graphs=not tiny and size != "4k") for size in denoising]
    return cases + [train(size, TRAINED_IN_ONE_RUN) for size in training]


def model_config(resolution: str, compression: shapes.Compression | None) -> PixArtConfig:
    sizes, pixels = shapes.model(resolution), shapes.PIXELS[resolution]
    return PixArtConfig(
        input_size=pixels // 8,
        hidden_size=sizes.hidden_size,
        depth=sizes.depth,
        num_heads=sizes.heads,
        caption_channels=sizes.caption_channels,
        model_max_length=sizes.text_tokens,
        pe_interpolation=pixels / 512,
        class_dropout_prob=0.0,  # all train with the same captions
        kv_compression=KVCompression(tuple(compression.layers(sizes)), compression.ratio)
        if compression
        else None,
    )


@torch.no_grad()
def build_ours(
    resolution: str, device: torch.device, compression: shapes.Compression | None
) -> PixArt:
    """Random weights everywhere, the same at every call: a new model returns zeros.

    Layers keep the size of what they get; shifts, scales and gates have that size as well: with
    nearly closed gates nobody would see what a branch computes.
    """
    with device:
        model = PixArt(model_config(resolution, compression))
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        inputs = 1 if name.endswith("scale_shift_table") else parameter[0].numel()
        parameter.normal_(std=inputs**-0.5, generator=generator)
    return model


def build_theirs(resolution: str, device: torch.device) -> nn.Module:
    try:
        from diffusers import PixArtTransformer2DModel
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from None
    config = config_to_diffusers(model_config(resolution, None))
    with device:
        model = PixArtTransformer2DModel.from_config(config)
    weights = to_diffusers(build_ours(resolution, device, None).state_dict())
    missing = set(model.state_dict()) - set(weights) - {"pos_embed.pos_embed"}
    if missing:
        raise RuntimeError(f"weights for diffusers' model are missing: {sorted(missing)[:4]}")
    model.load_state_dict(weights, strict=False)
    return model


def random_caption(resolution: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    sizes = shapes.model(resolution)
    generator = torch.Generator(device).manual_seed(1)
    size = (1, sizes.text_tokens, sizes.caption_channels)
    return torch.randn(size, generator=generator, device=device).to(dtype)


def random_latents(resolution: str, device: torch.device, seed: int = 2) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    side = shapes.PIXELS[resolution] // 8
    return torch.randn(1, 4, side, side, generator=generator, device=device)


def _call_ours(model: nn.Module, caption: Any, latents: Tensor, timesteps: Tensor) -> Tensor:
    return model(latents, timesteps, caption)


def call_theirs(model: nn.Module, caption: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
    unused = {"resolution": None, "aspect_ratio": None}
    return model(
        latents.to(caption.dtype),
        encoder_hidden_states=caption,
        timestep=timesteps,
        added_cond_kwargs=unused,
        return_dict=False,
    )[0]


def _compile_blocks(model: nn.Module, resolution: str) -> None:
    options = compile_options(resolution)
    if options["backend"] == "inductor" and next(model.parameters()).device.type == "cpu":
        _need_compiler()
    blocks: Any = model.blocks if isinstance(model, PixArt) else model.transformer_blocks
    for block in blocks:
        block.compile(**options)


def _need_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise Unavailable(f"no C++ compiler, which inductor needs on a CPU: {error}") from None


def _accelerate(model: nn.Module, resolution: str) -> None:
    if next(model.parameters()).device.type == "cpu":
        raise Unavailable("accelerate() changes nothing without a GPU")
    from pixart.patch import accelerate

    accelerate(model)


def _nothing(model: nn.Module, resolution: str) -> None:
    pass


class Recipe(NamedTuple):
    """Whose model, which of its keys are compressed, what is done to it, how its steps run."""

    whose: str
    compression: shapes.Compression | None = None
    change: Callable[[nn.Module, str], None] = _nothing
    graph: bool = False
    checkpointed: bool = False


PUBLISHED = shapes.PUBLISHED
RECIPES: dict[str, Recipe] = {
    "ours": Recipe("ours"),
    "ours compressed": Recipe("ours", PUBLISHED),
    "ours compressed r4": Recipe("ours", shapes.Compression(ratio=4)),
    "ours compressed everywhere": Recipe("ours", shapes.Compression(everywhere=True)),
    "diffusers": Recipe("diffusers"),
    "diffusers compiled": Recipe("diffusers", change=_compile_blocks),
    "diffusers accelerated": Recipe("diffusers", change=_accelerate),
    "ours compiled": Recipe("ours", change=_compile_blocks),
}
GRAPHS = {
    f"{name} graph": RECIPES[name]._replace(graph=True) for name in ("ours", "ours compressed")
}
BOTH_WAYS = {
    name + suffix: RECIPES[name]._replace(checkpointed=bool(suffix))
    for name in ("ours", "ours compressed", "diffusers")
    for suffix in ("", " checkpointed")
}
# bench.gpu has minutes for everything.
IN_ONE_RUN = [
    name for name in RECIPES if name not in ("ours compressed r4", "ours compressed everywhere")
]
TRAINED = [name for name in RECIPES if name != "ours compiled"]
TRAINED_IN_ONE_RUN = [name for name in TRAINED if name in IN_ONE_RUN]


def denoise(resolution: str, names: Iterable[str] = RECIPES, *, graphs: bool = False) -> Case:
    """One denoising step of the recipes."""
    recipes = {name: RECIPES[name] for name in names} | (GRAPHS if graphs else {})
    return _case("denoise", resolution, recipes)


def train(resolution: str, names: Iterable[str] = TRAINED) -> Case:
    """One training step of the recipes, checkpointed where the size calls for it."""
    checkpointed = resolution in CHECKPOINTED
    recipes = {name: RECIPES[name]._replace(checkpointed=checkpointed) for name in names}
    return _case("train", resolution, recipes)


def train_both_ways(resolution: str) -> Case:
    """One training step with all activations kept, and with checkpoints."""
    return _case("train", resolution, BOTH_WAYS)._replace(name=f"checkpointing/{resolution}")


def _case(step: str, resolution: str, recipes: Mapping[str, Recipe]) -> Case:
    run = partial(_time_steps, step, resolution, recipes)
    return Case(f"{step}/{resolution}", run, tuple(recipes))


def _build(recipe: Recipe, resolution: str, device: torch.device) -> tuple[nn.Module, Any]:
    """A model in fp32, and how it is called."""
    if recipe.whose == "ours":
        model: nn.Module = build_ours(resolution, device, recipe.compression)
    else:
        model = build_theirs(resolution, device)
    recipe.change(model, resolution)
    return model, _call_ours if recipe.whose == "ours" else call_theirs


@torch.no_grad()
def make_denoiser(recipe: Recipe, resolution: str, device: torch.device) -> Callable[[], Tensor]:
    model, call = _build(recipe, resolution, device)
    model = model.bfloat16().eval()
    caption: Any = random_caption(resolution, device, torch.bfloat16)
    latents, timesteps = random_latents(resolution, device), torch.tensor([500], device=device)
    if isinstance(model, PixArt):
        caption = model.encode_caption(caption)
        if recipe.graph:
            return partial(CudaGraphs(), model, latents, timesteps, caption, ())
    return torch.no_grad()(partial(call, model, caption, latents, timesteps))


def make_trainer(
    recipe: Recipe, resolution: str, device: torch.device
) -> Callable[[], list[Tensor]]:
    """fp32 weights under bf16 autocast, the training loss, AdamW.

    A step returns some gradients: few numbers that the whole of a block has a part in, forward and
    backward, and those of the convolution that compresses.
    """
    model, call = _build(recipe, resolution, device)
    model.train()
    if recipe.checkpointed and isinstance(model, PixArt):
        model.gradient_checkpointing = 1
    elif recipe.checkpointed:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    predict = partial(call, model, random_caption(resolution, device, torch.bfloat16))
    latents, noise = random_latents(resolution, device), random_latents(resolution, device, seed=3)
    timesteps = torch.tensor([500], device=device)
    telling = [
        parameter
        for name, parameter in model.named_parameters()
        if "blocks." in name and name.endswith(("scale_shift_table", ".sr.weight"))
    ]

    def step() -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            loss = training_loss(predict, latents, timesteps, noise).loss.mean()
        loss.backward()
        gradients = [cast(Tensor, parameter.grad) for parameter in telling]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return gradients

    return step


Make = Callable[[Recipe, str, torch.device], Callable[[], Iterable[Tensor]]]
MAKERS: dict[str, Make] = {"denoise": make_denoiser, "train": make_trainer}


def _time_steps(
    step: str, resolution: str, recipes: Mapping[str, Recipe], context: Context
) -> None:
    begin = time.time()
    calls: dict[str, list[timing.Call]] = {}
    statuses: dict[str, str | None] = {}
    seen: dict[str, dict[str, Any]] = {}
    outputs: dict[str, Tensor] = {}
    expected: dict[shapes.Compression | None, Tensor | None] = {}
    recipes = context.choose(recipes)
    for name, recipe in recipes.items():
        statuses[name] = context.crashed(name)
        if statuses[name]:
            continue
        context.announce(name)
        try:
            make = partial(MAKERS[step], recipe, resolution, context.device)
            call, outputs[name], seen[name] = _first_step(make, context.device)
            calls[name] = [call]
            if recipe.compression not in (None, *expected):
                expected[recipe.compression] = _eager(step, recipe, resolution, context.device)
        except Unavailable as reason:
            statuses[name] = str(reason)
        except Exception as error:  # a peer may fail in any way
            statuses[name] = failed(error)
            timing.survive(error, context.device)
    times = timing.measure(
        calls,
        context.device,
        seconds=context.seconds,
        least_rounds=3,
        with_host=True,
        announce=context.announce,
    )
    expected[None] = outputs.get("diffusers")
    clocks = context.clocks.since(begin)
    for name, status in statuses.items():
        compression, checkpointed = recipes[name].compression, recipes[name].checkpointed
        flops = shapes.step_flops(
            resolution,
            1,
            compression is not None,
            compression or PUBLISHED,
            # Ours has encoded the caption before it denoises.
            captions=step == "train" or recipes[name].whose == "diffusers",
        )
        flops *= 3 if step == "train" else 1
        moved = MOVED[step] * _parameters(resolution)
        row: dict[str, Any] = {"step": step, "resolution": resolution, "variant": name}
        row |= {"shape": {"batch": 1, "tokens": shapes.tokens(resolution)}, "dtype": "bfloat16"}
        same = _difference(outputs.get(name), expected.get(compression))
        row |= {f"difference_from_{'eager' if compression else 'diffusers'}": same}
        row |= {"agrees": same is None or same < SAME[torch.bfloat16], **seen.get(name, {})}
        row |= {"checkpointing": checkpointed}
        rates = measured(status or times[name], context, flops, moved, clocks=clocks)
        if step == "train" and rates["status"] == "measured":
            rates["images_per_second"] = 1 / rates["median"]
        context.row(**row, **rates)


def _first_step(
    make: Callable[[], Callable[[], Iterable[Tensor]]], device: torch.device
) -> tuple[timing.Call, Tensor, dict[str, Any]]:
    """The second call tells its peak memory, when compiling and tuning are over, and its results,
    as one vector."""
    meter = memory.Meter(device)
    call = make()
    call()
    resident = meter.held()
    out, extra = memory.of(lambda: torch.cat([one.flatten() for one in call()]), device)
    if resident is None or extra is None:
        return call, out, {}
    return call, out, {"resident_bytes": resident, "peak_bytes": resident + extra}


@cache
def _parameters(resolution: str) -> int:
    """Of the dense model; compression adds a ten-thousandth."""
    with torch.device("meta"):
        model = PixArt(model_config(resolution, None))
    return sum(parameter.numel() for parameter in model.parameters())


def _eager(step: str, recipe: Recipe, resolution: str, device: torch.device) -> Tensor | None:
    """What the recipe's model computes without our kernels; None where the memory does not suffice.

    Nobody else's model has compressed keys and values to compare ours with.
    """
    make = partial(MAKERS[step], recipe._replace(graph=False), resolution, device)
    try:
        with eager_operators():
            return _first_step(make, device)[1]
    except torch.OutOfMemoryError as error:
        timing.survive(error, device)
        return None


@contextmanager
def eager_operators() -> Iterator[None]:
    """Models of ours take each operator's reference, and project before they compress."""
    names = ("compress_kv", "flash_attention", "gate_add", "gate_add_modulate")
    references = {name: getattr(pixart_kernels, f"{name}_reference") for name in names}
    with (
        patch.multiple(pixart.model.blocks, **references),
        patch.object(pixart.model.transformer, "modulate", pixart_kernels.modulate_reference),
        patch.object(pixart.model.blocks.SelfAttention, "_folds", return_value=False),
    ):
        yield


def _difference(found: Tensor | None, expected: Tensor | None) -> float | None:
    """Relative, of the norm."""
    if found is None or expected is None:
        return None
    return float((found.double() - expected.double()).norm() / expected.double().norm())
