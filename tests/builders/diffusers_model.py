"""Diffusers' model, small and random, and inputs that fit it."""

import copy
from typing import Any

import pytest
import torch
from small_model import inputs, sizes
from torch import Tensor, nn

import pixart.patch

TOLERANCE = 2e-5  # of the norm, in fp32


@pytest.fixture(autouse=True)
def kernels_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU, but on the eager references (or in the interpreter)."""
    monkeypatch.setattr(pixart.patch, "_obstacle", lambda: None)


def diffusers_model(micro_condition: bool = False, **changes: Any) -> Any:
    """Diffusers' model of small_model's shape in eval mode, every tensor random."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        **{
            "sample_size": 16,
            "num_layers": 2,
            "attention_head_dim": 72,
            "num_attention_heads": 2,
            "cross_attention_dim": 144,
            "caption_channels": 48,
            "interpolation_scale": 1,
            "use_additional_conditions": micro_condition,
        }
        | changes
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def arguments(micro_condition: bool = False, batch: int = 2) -> dict[str, Any]:
    latents, timesteps, caption = inputs(batch)
    conditions = sizes(batch) if micro_condition else {"image_size": None, "aspect_ratio": None}
    return {
        "hidden_states": latents,
        "encoder_hidden_states": caption,
        "timestep": timesteps,
        "added_cond_kwargs": {
            "resolution": conditions["image_size"],
            "aspect_ratio": conditions["aspect_ratio"],
        },
    }


def masks() -> dict[str, Tensor | None]:
    prefix = (torch.arange(12) < torch.tensor([[7], [3]])).float()
    scattered = torch.zeros(2, 12, dtype=torch.int64)
    scattered[0, [1, 3, 4, 9]] = 1
    scattered[1, 11] = 1
    none_kept = prefix.clone()
    none_kept[1] = 0
    bias = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(5))
    return {
        "no mask": None,
        "prefix": prefix,
        "boolean": prefix.bool(),
        "scattered": scattered,
        "all kept": torch.ones(2, 12),
        "none kept": none_kept,
        "bias": bias,
    }


def run(model: Any, mask: Tensor | None = None, **changes: Any) -> Tensor:
    values = arguments(model.config.use_additional_conditions) | changes
    return model(**values, encoder_attention_mask=mask, return_dict=False)[0]


def in_float64(model: Any, mask: Tensor | None, **changes: Any) -> Tensor:
    values = arguments(model.config.use_additional_conditions) | changes
    tensors = {name: values[name].double() for name in ("hidden_states", "encoder_hidden_states")}
    return run(copy.deepcopy(model).double(), mask, **(values | tensors))


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Grows by the keyword arguments of each call of an operator."""
    calls: list[Any] = []
    operator = getattr(pixart.patch, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return operator(*args, **kwargs)

    monkeypatch.setattr(pixart.patch, name, spy)
    return calls


def snapshot(model: Any) -> dict[str, Any]:
    """Everything of a model that accelerate() could touch, compared by identity."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            entries = dict(value) if isinstance(value, dict) else value
            found[f"{name}.{key}"] = entries
    return found
