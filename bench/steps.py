"""The part of bench.gpu that is about the whole model: one denoising and one training step.

Ours and diffusers' have the same random weights; one sample, a caption of full length. A denoising
step is what each library's pipeline runs per step: ours has made the caption's keys and values once
per prompt before. "compiled" means every block by itself, as diffusers advises; "graph" a CUDA graph.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import shapes, timing
from bench.parts import failed, measured
from bench.peers import Unavailable, compile_options
from bench.worker import Case, Context
from pixart.checkpoint_config import config_to_diffusers
from pixart.checkpoint_names import to_diffusers
from pixart.config import KVCompression, PixArtConfig
from pixart.denoiser import CudaGraphs
from pixart.diffusion import training_loss
from pixart.model import PixArt

Denoise = Callable[[Tensor, Tensor], Tensor]  # latents, timesteps: the model's output
CHECKPOINTED = ("2k", "2880", "4k")  # training there keeps no activations inside of blocks


def steps(tiny: bool) -> list[Case]:
    """One denoising step and one training step per resolution, against diffusers' model."""
    denoising = (shapes.TINY,) if tiny else ("4k", "1k", "512", "2k")
    training = (shapes.TINY,) if tiny else ("1k", "512", "2k", "4k")
    cases = [Case(f"denoise/{size}", partial(_denoise, size)) for size in denoising]
    return cases + [Case(f"train/{size}", partial(_train, size)) for size in training]


def _config(resolution: str, compressed: bool) -> PixArtConfig:
    sizes, pixels = shapes.model(resolution), shapes.PIXELS[resolution]
    return PixArtConfig(
        input_size=pixels // 8,
        hidden_size=sizes.hidden_size,
        depth=sizes.depth,
        num_heads=sizes.heads,
        caption_channels=sizes.caption_channels,
        model_max_length=sizes.text_tokens,
        pe_interpolation=pixels / 512,
        kv_compression=KVCompression(tuple(sizes.compressed_layers)) if compressed else None,
    )


@torch.no_grad()
def _ours(resolution: str, device: torch.device, compressed: bool) -> PixArt:
    """Random weights everywhere: a new model returns zeros. The same seed gives the same model."""
    with device:
        model = PixArt(_config(resolution, compressed))
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".attn.sr." not in name and ".attn.norm." not in name:
            parameter.normal_(std=0.02, generator=generator)
    return model


def _theirs(resolution: str, device: torch.device) -> nn.Module:
    try:
        from diffusers import PixArtTransformer2DModel
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from None
    config = config_to_diffusers(_config(resolution, False))
    with device:
        model = PixArtTransformer2DModel.from_config(config)
    weights = to_diffusers(_ours(resolution, device, False).state_dict())
    missing = set(model.state_dict()) - set(weights) - {"pos_embed.pos_embed"}
    if missing:
        raise RuntimeError(f"weights for diffusers' model are missing: {sorted(missing)[:4]}")
    model.load_state_dict(weights, strict=False)
    return model


def _caption(resolution: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    sizes = shapes.model(resolution)
    generator = torch.Generator(device).manual_seed(1)
    size = (1, sizes.text_tokens, sizes.caption_channels)
    return torch.randn(size, generator=generator, device=device).to(dtype)


def _latents(resolution: str, device: torch.device, seed: int = 2) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    side = shapes.PIXELS[resolution] // 8
    return torch.randn(1, 4, side, side, generator=generator, device=device)


def _call_ours(model: nn.Module, caption: Any, latents: Tensor, timesteps: Tensor) -> Tensor:
    return model(latents, timesteps, caption)


def _call_theirs(model: nn.Module, caption: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
    unused = {"resolution": None, "aspect_ratio": None}
    return model(
        latents.to(caption.dtype),
        encoder_hidden_states=caption,
        timestep=timesteps,
        added_cond_kwargs=unused,
        return_dict=False,
    )[0]


def _compile_blocks(model: nn.Module, device: torch.device) -> None:
    blocks: Any = model.blocks if isinstance(model, PixArt) else model.transformer_blocks
    for block in blocks:
        block.compile(**compile_options(device))


def _accelerate(model: nn.Module, device: torch.device) -> None:
    try:
        from pixart.patch import accelerate
    except ImportError as error:
        raise Unavailable(f"not there yet: {error}") from None
    accelerate(model)


def _nothing(model: nn.Module, device: torch.device) -> None:
    pass


# Whose model, with compressed keys or not, and what is done to it.
Recipe = tuple[str, bool, Callable[[nn.Module, torch.device], None]]
RECIPES: dict[str, Recipe] = {
    "ours": ("ours", False, _nothing),
    "ours compressed": ("ours", True, _nothing),
    "diffusers": ("diffusers", False, _nothing),
    "diffusers compiled": ("diffusers", False, _compile_blocks),
    "diffusers accelerated": ("diffusers", False, _accelerate),
    "ours compiled": ("ours", False, _compile_blocks),
}
TRAINED = ("ours", "ours compressed", "diffusers", "diffusers compiled", "diffusers accelerated")


def _build(recipe: Recipe, resolution: str, device: torch.device) -> tuple[nn.Module, Any]:
    """A model in fp32, and how it is called."""
    whose, compressed, change = recipe
    if whose == "ours":
        model: nn.Module = _ours(resolution, device, compressed)
    else:
        model = _theirs(resolution, device)
    change(model, device)
    return model, _call_ours if whose == "ours" else _call_theirs


def _denoise(resolution: str, context: Context) -> None:
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        name: partial(_denoiser, recipe, resolution, context.device, False)
        for name, recipe in RECIPES.items()
    }
    if context.device.type == "cuda" and resolution != "4k":
        for name in ("ours", "ours compressed"):
            makers[f"{name} graph"] = partial(
                _denoiser, RECIPES[name], resolution, context.device, True
            )
    _time_steps("denoise", resolution, makers, context)


@torch.no_grad()
def _denoiser(
    recipe: Recipe, resolution: str, device: torch.device, graph: bool
) -> Callable[[], Tensor]:
    model, call = _build(recipe, resolution, device)
    model = model.bfloat16().eval()
    caption: Any = _caption(resolution, device, torch.bfloat16)
    latents, timesteps = _latents(resolution, device), torch.tensor([500], device=device)
    if isinstance(model, PixArt):
        caption = model.encode_caption(caption)
        if graph:
            return partial(CudaGraphs(), model, latents, timesteps, caption, ())
    return torch.no_grad()(partial(call, model, caption, latents, timesteps))


def _train(resolution: str, context: Context) -> None:
    makers = {
        name: partial(_trainer, RECIPES[name], resolution, context.device) for name in TRAINED
    }
    _time_steps("train", resolution, makers, context)


def _trainer(recipe: Recipe, resolution: str, device: torch.device) -> Callable[[], Tensor]:
    """fp32 weights under bf16 autocast, the training loss, AdamW."""
    model, call = _build(recipe, resolution, device)
    model.train()
    if resolution in CHECKPOINTED and isinstance(model, PixArt):
        model.gradient_checkpointing = 1
    elif resolution in CHECKPOINTED:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    denoise = partial(call, model, _caption(resolution, device, torch.bfloat16))
    latents, noise = _latents(resolution, device), _latents(resolution, device, seed=3)
    timesteps = torch.tensor([500], device=device)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = training_loss(denoise, latents, timesteps, noise).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _time_steps(
    step: str,
    resolution: str,
    makers: Mapping[str, Callable[[], Callable[[], Tensor]]],
    context: Context,
) -> None:
    begin = time.time()
    calls: dict[str, list[timing.Call]] = {}
    statuses: dict[str, str | None] = {}
    seen: dict[str, dict[str, Any]] = {}
    outputs: dict[str, Tensor] = {}
    for name, make in makers.items():
        statuses[name] = context.crashed(name)
        if statuses[name]:
            continue
        context.announce(name)
        try:
            call, outputs[name], seen[name] = _first_step(make, context.device)
            calls[name] = [call]
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
    clocks = context.clocks.since(begin)
    for name, status in statuses.items():
        compressed = "compressed" in name
        flops = shapes.step_flops(resolution, 1, compressed) * (3 if step == "train" else 1)
        row: dict[str, Any] = {"step": step, "resolution": resolution, "variant": name}
        row |= {"shape": {"batch": 1, "tokens": shapes.tokens(resolution)}, "dtype": "bfloat16"}
        row |= {"difference_from_diffusers": _difference(name, outputs), **seen.get(name, {})}
        row |= {"checkpointing": step == "train" and resolution in CHECKPOINTED}
        context.row(**row, **measured(status or times[name], context, flops, 0, clocks=clocks))


def _first_step(
    make: Callable[[], Callable[[], Tensor]], device: torch.device
) -> tuple[timing.Call, Tensor, dict[str, Any]]:
    """The second call tells its peak memory, when compiling and tuning are over."""
    before = _allocated(device)
    call = make()
    call()
    resident = _allocated(device) - before
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    base = _allocated(device)
    out = call().clone()
    if device.type != "cuda":
        return call, out, {}
    timing.synchronize(device)
    extra = torch.cuda.max_memory_allocated(device) - base
    return call, out, {"resident_bytes": resident, "peak_bytes": resident + extra}


def _allocated(device: torch.device) -> int:
    timing.synchronize(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _difference(name: str, outputs: Mapping[str, Tensor]) -> float | None:
    """Relative, of a denoising step: all dense models have the same weights."""
    if name not in outputs or "diffusers" not in outputs or "compressed" in name:
        return None
    ours, theirs = outputs[name].double(), outputs["diffusers"].double()
    return float((ours - theirs).norm() / theirs.norm())
