"""LoRA: low-rank adapters on the layers of a PixArt, through peft (the extra `train`).

y = W·x + weight · alpha / rank · B·(A·x)        A: (rank, in), B: (out, rank)
"""

import copy
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pixart.checkpoint.write import whole_or_not_at_all, write_safetensors
from pixart.few_step import FewStep, agreed
from pixart.files import CheckpointError, listed
from pixart.libraries import importing
from pixart.lora.files import CONFIG, WEIGHTS, Adapter, read_adapter
from pixart.model.transformer import PixArt
from pixart.weights import check_finite, not_finite

TARGETS = (
    "attn.qkv",
    "attn.proj",
    "cross_attn.q_linear",
    "cross_attn.kv_linear",
    "cross_attn.proj",
    "mlp.fc1",
    "mlp.fc2",
)


Adaptable = TypeVar("Adaptable", bound=nn.Module)  # a PixArt, or a control of one


def parse_lora(text: str) -> tuple[str, float]:
    """PATH or PATH:WEIGHT as (path, weight); the weight is 1 unless given."""
    path, colon, weight = text.rpartition(":")
    # A path may hold a colon: what exists under the whole text has no weight behind it.
    if not colon or Path(text).expanduser().exists():
        path, weight = text, "1"
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not path or not math.isfinite(value):
        raise ValueError(f"--lora must be PATH or PATH:WEIGHT, a finite number, got {text!r}")
    return path, value


def add_lora(
    model: Adaptable, rank: int, alpha: float | None = None, targets: Sequence[str] = TARGETS
) -> Adaptable:
    """Put a new adapter on every layer whose name is, or ends in, one of `targets`. In place.

    rank: of A and B. alpha: their product is scaled by alpha / rank; None takes the rank. B starts
    at zero, so the model computes what it did; from then on only A and B (fp32) train. Raises
    ValueError for what cannot be, and leaves the model as it was.
    """
    alpha = float(rank) if alpha is None else alpha
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a positive number, got {alpha}")
    if names := _adapters(model):
        raise ValueError(f"model must have no adapter yet, got {len(names)}; merge_lora them first")
    _check_targets(model, targets)
    config = _peft().LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    _inject(model, config, "default", empty=next(model.parameters()).is_meta)
    return model


def load_lora(model: PixArt, adapters: Sequence[tuple[str | Path, float]]) -> PixArt:
    """Put the adapters of files or hub ids on the model, each times its weight; they add up. In place.

    They lie beside the weights, frozen and in fp32, until merge_lora puts them in. One of weight 0
    is checked and left out. All files are read before the model is touched. What one of them was distilled
    for is the model's `config.few_step` then. Raises CheckpointError in one line for what is missing, no
    plain LoRA, or made for another model, ValueError for two that were distilled for different things.
    """
    if not adapters:
        return model
    _peft()
    sizes = {name: layer.weight.shape for name, layer in _layers(model).items()}
    read = []
    for source, weight in adapters:
        if not math.isfinite(weight):
            raise ValueError(f"weight of {source} must be a finite number, got {weight}")
        read.append((read_adapter(source, sizes), weight))
    said = [("the model", model.config.few_step)]
    for (source, weight), (adapter, _) in zip(adapters, read, strict=True):
        said += [(str(source), adapter.few_step)] if weight else []
    model.config = replace(model.config, few_step=agreed(said))
    for adapter, weight in read:
        if weight:
            _insert(model, adapter, weight)
    for _, layer in _adapted(model):
        layer.set_adapter(_adapters(model))
        layer.requires_grad_(False)
    return model


@torch.no_grad()
def merge_lora(model: Adaptable) -> Adaptable:
    """Add all adapters to the weights beside which they lie, and take them off. In place.

    Summed in fp32 and rounded once to the weights' dtype. What is left is a plain model, all of
    which trains; where there is no adapter nothing happens. Raises ValueError for a sum that the dtype
    cannot hold; the model is of no use then.
    """
    adapted = list(_adapted(model))
    for name, layer in adapted:
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        base.weight.data = base.weight.data.to(torch.promote_types(dtype, torch.float32))
        try:
            layer.merge(safe_merge=True)  # in a copy: another model may share the weights
        except ValueError as error:  # peft's, which says not where
            raise ValueError(
                f"{name} with its adapters must be finite, got NaN or infinity; take lower weights"
            ) from error
        merged = base.weight.data.to(dtype)
        if not_finite({name: merged}):
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} with its adapters must fit into {kind}, got larger numbers")
        # A new parameter: who holds what was made of the old one must see that it is another.
        base.weight = nn.Parameter(merged)
        model.set_submodule(name, base)
    if adapted:
        del model.peft_config
        model.requires_grad_(True)
    return model


def save_lora(model: PixArt, directory: str | Path, *, few_step: FewStep | None = None) -> None:
    """Write the model's adapter as DIRECTORY/adapter_model.safetensors and adapter_config.json.

    In peft's layout under the published names, which peft.PeftModel.from_pretrained puts onto a
    PixArt too. few_step: what it was distilled for; it is drawn with that wherever it is loaded. Whole, or
    not at all (CheckpointWriteError); an adapter that is there is replaced.
    """
    directory, names = Path(directory), _adapters(model)
    if len(names) != 1:
        raise ValueError(f"model must have one adapter to save, got {len(names)}")
    _check_folder(directory)
    # A copy: the file says "frozen" while this model may go on training.
    config: Any = copy.copy(model.peft_config[names[0]])  # type: ignore[index]
    config.inference_mode = True
    state = _peft().get_peft_model_state_dict(model, adapter_name=names[0])
    tensors = {f"base_model.model.{name}": t.detach().cpu() for name, t in state.items()}
    check_finite(tensors, f"the adapter to be saved as {directory}")
    with whole_or_not_at_all(directory) as aside:
        aside.mkdir()
        metadata = {} if few_step is None else {"few_step": json.dumps(few_step.to_dict())}
        write_safetensors(aside / WEIGHTS, tensors, {"format": "pt", **metadata})
        config.save_pretrained(str(aside))


def _peft() -> ModuleType:
    try:
        with importing():
            import peft
    except ModuleNotFoundError as error:
        raise ValueError(
            "LoRA must have peft, which is not installed; pip install 'pixart-fast[lora]'"
        ) from error
    return peft


def _adapters(model: nn.Module) -> list[str]:
    """The names that peft knows them by."""
    return list(getattr(model, "peft_config", {}))


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's layers around ours, by name."""
    if _adapters(model):
        kind = _peft().tuners.lora.LoraLayer
        yield from [pair for pair in model.named_modules() if isinstance(pair[1], kind)]


def _layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """What can be adapted, by name: linear layers, and the patch embedding's convolution."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if ".lora_" not in name
        and (isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and module.groups == 1)
    }


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    names = list(_layers(model))
    # With the dot, as peft matches: "attn.proj" is no end of "cross_attn.proj".
    unknown = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    if unknown or not targets:
        there = dict.fromkeys(
            re.sub(r"^(blocks|controlnet)\.\d+\.(copied_block\.)?", "", name) for name in names
        )
        raise ValueError(
            f"targets must be among {', '.join(there)}, got {', '.join(unknown) or 'none'}"
        )


def _check_folder(directory: Path) -> None:
    """It is replaced as a whole, so it may hold nothing that is not an adapter's."""
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file, and an adapter is a folder")
    there = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if others := sorted(there - {WEIGHTS, CONFIG}):
        raise CheckpointError(
            f"{directory}: holds other files ({listed(others)}); give another path"
        )


def _inject(model: nn.Module, config: Any, name: str, empty: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # as is meant
        _peft().inject_adapter_in_model(config, model, name, low_cpu_mem_usage=empty)


def _insert(model: PixArt, adapter: Adapter, weight: float) -> None:
    peft, name = _peft(), f"lora{len(_adapters(model))}"
    ranks = {layer: len(a) for layer, (a, _) in adapter.factors.items()}
    # Escaped: peft reads names in patterns as expressions.
    config = peft.LoraConfig(
        r=max(ranks.values()),
        target_modules=list(ranks),
        rank_pattern={re.escape(layer): rank for layer, rank in ranks.items()},
        alpha_pattern={
            re.escape(layer): weight * adapter.scales[layer] * rank for layer, rank in ranks.items()
        },
        inference_mode=True,
    )
    _inject(model, config, name, empty=True)
    device = model.x_embedder.proj.weight.device
    state: dict[str, Tensor] = {}
    for layer, pair in adapter.factors.items():
        for kind, factor in zip("AB", pair, strict=True):
            state[f"{layer}.lora_{kind}.{name}.weight"] = factor.to(device)
    # Not by peft, which would round them to the dtype of the weights.
    assert not model.load_state_dict(state, strict=False, assign=True).unexpected_keys
