"""The whole model: one denoising and one training step of ours and of diffusers', with the same weights.

Random weights, one sample, a caption of full length. A denoising step is what each library's pipeline
runs per step: ours has made the caption's keys and values once per prompt before; "caption inside"
makes them in the step, as diffusers does. "compiled" means every block by itself, as diffusers
advises; "graph" a CUDA graph; "checkpointed" keeps no activations inside of blocks for the backward
pass.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from itertools import cycle
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bench.measure import memory, timing
from bench.measure.case import Case, Context, Ready, Unavailable, Verdict, time_variants
from bench.measure.results import Row
from bench.workloads import agreement, sizes
from bench.workloads.operators.workload import compile_options
from bench.workloads.sizes import Compression
from pixart import cost
from pixart.config import PixArtConfig
from pixart.diffusion import training_loss
from pixart.model.transformer import PixArt

CHECKPOINTED = ("2k", "2880", "4k")  # training there does not fit with all activations kept
# Relative, between models of the same weights: three times what another order of rounding makes
# in 28 blocks (0.015 and 9e-7; in two blocks 0.007 and 5e-7, of the gradients 0.008), where the first
# self-attention left out makes 0.5, the last 0.16.
SAME = {torch.bfloat16: 0.05, torch.float32: 3e-6}
# Bytes per parameter that a step moves at least: a denoising step reads it once; a training step
# reads and writes it in fp32 with its two averages in AdamW.
MOVED = {"denoise": 2, "train": 2 * 3 * 4}
OURS, THEIRS = "ours", "diffusers"


@torch.no_grad()
def build_ours(config: PixArtConfig, device: torch.device) -> PixArt:
    """Random weights everywhere, the same at every call: a new model returns zeros.

    Layers keep the size of what they get; shifts, scales and gates have that size as well: with
    nearly closed gates nobody would see what a branch computes.
    """
    with device:
        model = PixArt(config)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        inputs = 1 if name.endswith("scale_shift_table") else parameter[0].numel()
        parameter.normal_(std=inputs**-0.5, generator=generator)
    return model


def build_theirs(config: PixArtConfig, device: torch.device) -> Any:
    """diffusers' model, with the weights that ours has."""
    try:
        from diffusers import PixArtTransformer2DModel
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from None
    from pixart.checkpoint.config import config_to_diffusers
    from pixart.checkpoint.names import to_diffusers

    with device:
        model: Any = PixArtTransformer2DModel.from_config(config_to_diffusers(config))
    weights = to_diffusers(build_ours(config, device).state_dict())
    missing = set(model.state_dict()) - set(weights) - {"pos_embed.pos_embed"}
    if missing:
        raise RuntimeError(f"weights for diffusers' model are missing: {sorted(missing)[:4]}")
    model.load_state_dict(weights, strict=False)
    return model


def random_caption(resolution: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    config = sizes.config(resolution)
    generator = torch.Generator(device).manual_seed(1)
    size = (1, config.model_max_length, config.caption_channels)
    return torch.randn(size, generator=generator, device=device).to(dtype)


def random_latents(resolution: str, device: torch.device, seed: int = 2) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    side = sizes.PIXELS[resolution] // 8
    return torch.randn(1, 4, side, side, generator=generator, device=device)


def _call_ours(model: nn.Module, caption: Any, latents: Tensor, timesteps: Tensor) -> Tensor:
    return model(latents, timesteps, caption)


def _call_theirs(model: nn.Module, caption: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
    return model(
        latents.to(caption.dtype),
        encoder_hidden_states=caption,
        timestep=timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
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
    """Whose model, which of its keys are compressed, what is done to it, how its steps run. encoded:
    whether the caption's keys and values are made before a denoising step."""

    whose: str = OURS
    compression: Compression | None = None
    change: Callable[[nn.Module, str], None] = _nothing
    graph: bool = False
    checkpointed: bool = False
    encoded: bool = True


COMPRESSIONS = (Compression(), Compression(ratio=4), Compression(everywhere=True))
MERGED = {one.variant: Recipe(compression=one) for one in COMPRESSIONS}
RECIPES: dict[str, Recipe] = {
    OURS: Recipe(),
    **MERGED,
    THEIRS: Recipe(THEIRS),
    "diffusers compiled": Recipe(THEIRS, change=_compile_blocks),
    "diffusers accelerated": Recipe(THEIRS, change=_accelerate),
    "ours compiled": Recipe(change=_compile_blocks),
}
GRAPHS = {
    f"{name} graph": RECIPES[name]._replace(graph=True) for name in (OURS, Compression().variant)
}
CHECKPOINTS = {
    f"{name} checkpointed": RECIPES[name]._replace(checkpointed=True)
    for name in (OURS, Compression().variant, THEIRS)
}
FORWARD = {
    "ours, caption encoded": Recipe(),
    "ours": Recipe(encoded=False),
    THEIRS: Recipe(THEIRS),
}
COMPILED = {name: RECIPES[name] for name in (OURS, "ours compiled")}
# bench.gpu has minutes for everything.
IN_ONE_RUN = [name for name in RECIPES if name not in [one.variant for one in COMPRESSIONS[1:]]]


def steps(order: Iterable[tuple[str, str]]) -> list[Case]:
    """One step each, ("denoise", size) or ("train", size), against diffusers' model: of bench.gpu, the
    most important first."""
    return [_step(step, size) for step, size in order]


def _step(step: str, size: str) -> Case:
    if step == "train":
        return train(size, IN_ONE_RUN, both_ways=False)
    return denoise(size, IN_ONE_RUN, graphs=size not in ("4k", sizes.TINY))


def denoise(resolution: str, names: Iterable[str] = RECIPES, *, graphs: bool = False) -> Case:
    """One denoising step of the recipes."""
    recipes = {name: RECIPES[name] for name in names} | (GRAPHS if graphs else {})
    return case(f"denoise/{resolution}", "denoise", "denoising step", resolution, recipes)


def train(resolution: str, names: Iterable[str] = RECIPES, *, both_ways: bool = True) -> Case:
    """One training step of the recipes, all checkpointed where the size calls for it; elsewhere
    both_ways adds some that are beside those that keep all activations."""
    kept = resolution not in CHECKPOINTED
    what = "training step" if kept else "training step, checkpointed"
    names = [name for name in names if name != "ours compiled"]
    recipes = {name: RECIPES[name]._replace(checkpointed=not kept) for name in names}
    recipes |= CHECKPOINTS if kept and both_ways else {}
    return case(f"train/{resolution}", "train", what, resolution, recipes)


def case(name: str, step: str, what: str, resolution: str, recipes: Mapping[str, Recipe]) -> Case:
    def run(context: Context) -> None:
        for variant, row in rows(step, what, resolution, recipes, context).items():
            context.row(variant, **row)

    return Case(name, run, tuple(recipes))


def rows(
    step: str,
    what: str,
    resolution: str,
    recipes: Mapping[str, Recipe],
    context: Context,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Row]:
    """Of each variant that was asked for. step: "denoise" or "train". A model in fp32 takes its steps
    in fp32; training in bf16 is autocast."""
    device = context.device
    makers = {
        name: partial(MAKERS[step], recipe, resolution, device, dtype)
        for name, recipe in recipes.items()
    }

    def build(name: str, make: Callable[[], Callable[[], Iterable[Tensor]]]) -> Ready:
        call, result, held = _first_step(make, device)
        work = step_flops(step, resolution, recipes[name])
        moved = MOVED[step] * dtype.itemsize // 2 * _parameters(resolution)
        return Ready([call], work, moved, result, held)

    def judge(ready: Mapping[str, Ready]) -> dict[str, Verdict]:
        eager = cache(partial(_eager, step, resolution, device, dtype))
        truth = partial(_truth, ready=ready, recipes=recipes, eager=eager)
        return agreement.compare(ready, truth, _unchanged(recipes), SAME[dtype])

    builders = {name: partial(build, name, make) for name, make in makers.items()}
    found = time_variants(
        context,
        builders,
        judge,
        dtype=dtype,
        with_host=True,
        least_rounds=3,
        compiling=[name for name, one in recipes.items() if one.change is _compile_blocks],
    )
    shape = {"size": resolution, "batch": 1, "tokens": sizes.tokens(resolution)}
    shared = {"what": what, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
    for row in found.values():
        if step == "train" and "seconds" in row:
            row["images_per_second"] = 1 / row["seconds"]["median"]
    return {name: shared | row for name, row in found.items()}


def step_flops(step: str, resolution: str, recipe: Recipe) -> int:
    encoded = step == "denoise" and recipe.whose == OURS and recipe.encoded
    config = sizes.config(resolution, recipe.compression)
    once = cost.forward_flops(config, sizes.grid(resolution), encoded=encoded)
    return once * (3 if step == "train" else 1)


def _truth(
    name: str,
    ready: Mapping[str, Ready],
    recipes: Mapping[str, Recipe],
    eager: Callable[[Compression | None], Tensor | None],
) -> tuple[str, Tensor | None]:
    """What a variant must compute, and whose that is: diffusers' where it is there, which has no
    compressed keys and values; for all others what our model computes without our kernels."""
    if recipes[name].compression is None and THEIRS in ready:
        return THEIRS, ready[THEIRS].result
    return "eager operators", eager(recipes[name].compression)


def _unchanged(recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """By variant that was compiled, recorded or patched: the same model as it is built."""
    built = {recipe: name for name, recipe in recipes.items()}
    plain = {name: one._replace(change=_nothing, graph=False) for name, one in recipes.items()}
    return {name: built[one] for name, one in plain.items() if built.get(one, name) != name}


def _build(recipe: Recipe, resolution: str, device: torch.device) -> tuple[nn.Module, Any]:
    """A model in fp32, and how it is called."""
    config = sizes.config(resolution, recipe.compression)
    model = (build_ours if recipe.whose == OURS else build_theirs)(config, device)
    recipe.change(model, resolution)
    return model, _call_ours if recipe.whose == OURS else _call_theirs


@torch.no_grad()
def make_denoiser(
    recipe: Recipe, resolution: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], Tensor]:
    """Each call takes the other one of two latents: a recording that reads what it was recorded with
    gives the wrong one's result."""
    model, call = _build(recipe, resolution, device)
    model = model.to(dtype).eval()
    caption: Any = random_caption(resolution, device, dtype)
    latents = cycle([random_latents(resolution, device, seed) for seed in (2, 4)])
    timesteps = torch.tensor([500], device=device)
    if isinstance(model, PixArt) and recipe.encoded:
        caption = model.encode_caption(caption)
        if recipe.graph:
            from pixart.sampler.cuda_graphs import CudaGraphs

            replay = partial(CudaGraphs(), model)

            def replayed() -> Any:
                return replay(next(latents), timesteps, caption, ())

            replayed(), replayed()  # a first call is plain, the second is recorded
            return replayed
    return torch.no_grad()(lambda: call(model, caption, next(latents), timesteps))


def make_trainer(
    recipe: Recipe, resolution: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
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
    predict = partial(call, model, random_caption(resolution, device, dtype))
    latents, noise = random_latents(resolution, device), random_latents(resolution, device, seed=3)
    timesteps = torch.tensor([500], device=device)
    telling = [
        parameter
        for name, parameter in model.named_parameters()
        if "blocks." in name and name.endswith(("scale_shift_table", ".sr.weight"))
    ]

    def step() -> list[Tensor]:
        with torch.autocast(device.type, dtype):
            loss = training_loss(predict, latents, timesteps, noise).loss.mean()
        loss.backward()
        gradients = [cast(Tensor, parameter.grad) for parameter in telling]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return gradients

    return step


MAKERS: dict[str, Callable[..., Callable[[], Iterable[Tensor]]]] = {
    "denoise": make_denoiser,
    "train": make_trainer,
}


def _first_step(
    make: Callable[[], Callable[[], Iterable[Tensor]]], device: torch.device
) -> tuple[timing.Call, Tensor, Row]:
    """The second call tells its peak memory, when compiling and tuning are over, and its results,
    as one vector."""
    meter = memory.Meter(device)
    call = make()
    began = time.perf_counter()
    call()
    timing.synchronize(device)
    facts: Row = {"seconds_of_first_call": time.perf_counter() - began}
    held = meter.held()
    out, extra = memory.of(lambda: torch.cat([one.flatten() for one in call()]), device)
    facts |= {} if extra is None else {"held_bytes": held, "peak_bytes": extra}
    return call, out, facts


@cache
def _parameters(resolution: str) -> int:
    """Of the dense model; compression adds a ten-thousandth."""
    with torch.device("meta"):
        model = PixArt(sizes.config(resolution))
    return sum(parameter.numel() for parameter in model.parameters())


def _eager(
    step: str,
    resolution: str,
    device: torch.device,
    dtype: torch.dtype,
    compression: Compression | None,
) -> Tensor | None:
    """What our model computes without our kernels; None where the memory does not suffice."""
    recipe = Recipe(OURS, compression, checkpointed=True)
    try:
        with agreement.eager_operators():
            return _first_step(partial(MAKERS[step], recipe, resolution, device, dtype), device)[1]
    except torch.OutOfMemoryError as error:
        timing.survive(error, device)
        return None
