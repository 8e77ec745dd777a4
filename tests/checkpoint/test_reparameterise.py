import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dit_model import DEPTH, SIDE, WIDTH, dit
from torch import Tensor

from pixart.checkpoint.dit import dit_config, open_dit, reparameterise
from pixart.files import CheckpointError
from pixart.model.transformer import PixArt

SIZES = {"caption_channels": 48, "max_length": 12}


def timestep_embedding(state: dict[str, Tensor], t: float) -> Tensor:
    angles = t * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    hidden = F.linear(
        torch.cat([angles.cos(), angles.sin()]),
        state["t_embedder.mlp.0.weight"],
        state["t_embedder.mlp.0.bias"],
    )
    return F.linear(
        F.silu(hidden), state["t_embedder.mlp.2.weight"], state["t_embedder.mlp.2.bias"]
    )


def modulation(state: dict[str, Tensor], prefix: str, t: float) -> Tensor:
    name = f"{prefix}.adaLN_modulation.1"
    activated = F.silu(timestep_embedding(state, t))
    return F.linear(activated, state[f"{name}.weight"], state[f"{name}.bias"])


def dit_forward(state: dict[str, Tensor], latents: Tensor, t: float) -> Tensor:
    """DiT without its class term, written out from the paper; latents (B, 4, h, h)."""
    patches = F.conv2d(latents, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], 2)
    x = patches.flatten(2).transpose(1, 2) + state["pos_embed"]
    for layer in range(DEPTH):
        block = f"blocks.{layer}"
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(state, block, t).chunk(6)

        def linear(x: Tensor, name: str, block: str = block) -> Tensor:
            return F.linear(x, state[f"{block}.{name}.weight"], state[f"{block}.{name}.bias"])

        normed = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = linear(normed, "attn.qkv").unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * linear(attended, "attn.proj")
        normed = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale2) + shift2
        hidden = F.gelu(linear(normed, "mlp.fc1"), approximate="tanh")
        x = x + gate2 * linear(hidden, "mlp.fc2")
    shift, scale = modulation(state, "final_layer", t).chunk(2)
    x = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift
    x = F.linear(x, state["final_layer.linear.weight"], state["final_layer.linear.bias"])
    side = latents.shape[2] // 2
    return x.view(-1, side, side, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def rebuilt(state: dict[str, Tensor]) -> PixArt:
    model = PixArt(dit_config(state, **SIZES))
    model.load_official(reparameterise(state, **SIZES))
    return model.eval()


def latents() -> Tensor:
    return torch.randn(2, 4, 2 * SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_at_timestep_500_the_new_model_computes_what_dit_does_without_a_class() -> None:
    state = dit()
    caption = torch.randn(2, 12, 48)  # not seen: the cross-attention has an output of zero
    actual = rebuilt(state)(latents(), torch.tensor(500.0), caption)
    torch.testing.assert_close(actual, dit_forward(state, latents(), 500.0), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_at_other_timesteps_the_mean_of_the_blocks_maps_is_nearer_than_any_one_of_them() -> None:
    state = dit()
    model = rebuilt(state)

    def error(t: float, weight: Tensor, bias: Tensor) -> float:
        """Of all blocks' modulations if t_block were this map, with tables exact at 500."""
        shared, exact = (
            F.linear(F.silu(timestep_embedding(state, s)), weight, bias) for s in (t, 500.0)
        )
        return sum(
            (modulation(state, f"blocks.{i}", t) - modulation(state, f"blocks.{i}", 500.0))
            .sub(shared - exact)
            .square()
            .sum()
            .item()
            for i in range(DEPTH)
        )

    for t in (50.0, 950.0):
        own = error(t, model.t_block[1].weight, model.t_block[1].bias)
        name = "adaLN_modulation.1"
        for i in range(DEPTH):
            one = (state[f"blocks.{i}.{name}.weight"], state[f"blocks.{i}.{name}.bias"])
            assert own < 0.9 * error(t, *one)
        assert own < 0.9 * error(t, torch.zeros(6 * WIDTH, WIDTH), torch.zeros(6 * WIDTH))


def test_what_reads_captions_has_the_published_initialisation() -> None:
    state = dit()
    result = reparameterise(state, **SIZES)
    for layer in range(DEPTH):
        block = f"blocks.{layer}"
        assert not result[f"{block}.cross_attn.proj.weight"].any()
        assert not result[f"{block}.cross_attn.proj.bias"].any()
        assert result[f"{block}.cross_attn.q_linear.weight"].std() > 0.05
        assert torch.equal(result[f"{block}.attn.qkv.weight"], state[f"{block}.attn.qkv.weight"])
    assert result["y_embedder.y_embedding"].shape == (12, 48)
    assert result["y_embedder.y_proj.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_the_configuration_follows_from_the_tensors() -> None:
    config = dit_config(dit())
    assert (config.input_size, config.pe_interpolation, config.base_size) == (16, 1.0, 8)
    assert (config.hidden_size, config.num_heads, config.depth) == (144, 2, 3)
    assert (config.caption_channels, config.model_max_length) == (4096, 120)
    assert config.pred_sigma and not config.micro_condition
    assert dit_config(dit(), num_heads=6).num_heads == 6
    half = {name: t.half() for name, t in dit().items()}
    assert {t.dtype for t in reparameterise(half, **SIZES).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"blocks.1.mlp.fc2.bias": None}, "missing blocks.1.mlp.fc2.bias"),
        ({"blocks.2.adaLN_modulation.1.bias": torch.zeros(5)}, "another shape blocks.2.adaLN"),
        ({"blocks.0.attn.rotary": torch.zeros(5)}, "unexpected blocks.0.attn.rotary"),
        ({"x_embedder.proj.weight": None}, "none of x_embedder.proj.weight"),
    ],
)
def test_what_is_no_dit_is_refused_by_name(change: dict[str, Tensor | None], reason: str) -> None:
    state = {name: tensor for name, tensor in (dit() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=reason):
        reparameterise(state, **SIZES)


@torch.no_grad()
def test_published_files_and_those_of_the_trainer_open(tmp_path: Path) -> None:
    state, path = dit(), tmp_path / "DiT.pt"
    expected = dit_forward(state, latents(), 500.0)
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for content in (state, {"model": other, "ema": state, "opt": {"step": 3}}):
        torch.save(content, path)
        model = open_dit(path, **SIZES)
        actual = model(latents(), torch.tensor(500.0), torch.randn(2, 12, 48))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        assert not model.training


def test_other_files_are_refused_with_their_path(tmp_path: Path) -> None:
    path = tmp_path / "DiT.pt"
    with pytest.raises(CheckpointError, match=r"DiT\.pt: no such file"):
        open_dit(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=r"DiT\.pt: holds a list, not a state dict"):
        open_dit(path)
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"DiT\.pt: state_dict must be a DiT's"):
        open_dit(path)
