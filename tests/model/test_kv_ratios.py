"""Merging without training, in the calls that ask for it: kv_ratios of a model."""

import pytest
import torch
from small_model import build, inputs, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart import cost
from pixart.config import KVCompression, PixArtConfig
from pixart.model.compression import averaging, compress_tokens, mean_tokens
from pixart.model.transformer import PixArt

GRIDS = [(5, 7), (6, 8)]  # the first one no ratio divides


def as_trained(model: PixArt, layers: tuple[int, ...], ratio: int) -> PixArt:
    """The same weights in a model that was made to merge by the mean: what the operator does."""
    config = {**model.config.to_dict(), "kv_compression": KVCompression(layers, ratio, "average")}
    other = PixArt(PixArtConfig(**config)).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_dense_block_merges_as_one_that_was_made_to(
    grid: tuple[int, int], ratio: int, qk_norm: bool
) -> None:
    model = build(qk_norm=qk_norm)
    given = inputs(height=2 * grid[0], width=2 * grid[1])
    with torch.no_grad():
        merged = model(*given, kv_ratios=(1, ratio))
        assert relative_error(merged, as_trained(model, (1,), ratio)(*given)) < 1e-5
        assert relative_error(merged, model(*given)) > 1e-4


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("trained", [None, KVCompression((1,), 2)])
def test_none_and_a_blocks_own_ratio_are_the_same_bits(
    trained: KVCompression | None, qk_norm: bool
) -> None:
    model, given = build(kv_compression=trained, qk_norm=qk_norm), inputs()
    own = (1, 1 if trained is None else 2)
    with torch.no_grad():
        assert torch.equal(model(*given, kv_ratios=own), model(*given))


@pytest.mark.parametrize("sampling", ["conv", "average", "uniform"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_trained_block_merges_its_merged_tokens_further(
    grid: tuple[int, int], sampling: str
) -> None:
    """By the mean of each 2 × 2 of them: counted by hand on the keys that attention is given."""
    model = build(kv_compression=KVCompression((1,), 2, sampling))
    attention = model.blocks[1].attn
    x = torch.randn(2, grid[0] * grid[1], 144, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, k, v = attention._merge(x, grid, attention.compression, 1, False)
        _, coarse_k, coarse_v = attention._merge(x, grid, attention.compression, 2, False)
    left = cost.merged_grid(grid, 2)
    assert k.shape[1] == left[0] * left[1]
    for fine, coarse in ((k, coarse_k), (v, coarse_v)):
        image = fine.unflatten(1, left)
        rows, cols = (-(-side // 2) for side in left)
        assert coarse.shape[1] == rows * cols
        for row in range(rows):
            for col in range(cols):
                i = [min(2 * row + step, left[0] - 1) for step in (0, 1)]
                j = [min(2 * col + step, left[1] - 1) for step in (0, 1)]
                expected = image[:, i][:, :, j].mean((1, 2))
                assert torch.allclose(coarse[:, row * cols + col], expected, atol=1e-5)


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_the_mean_of_tokens_is_that_of_the_operator_in_any_dtype(ratio: int) -> None:
    for dtype, rounding in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        tokens = torch.randn(2, 35, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected, _ = compress_tokens(tokens, tokens, (5, 7), averaging(ratio), None, None)
        assert torch.allclose(mean_tokens(tokens, (5, 7), ratio), expected, rounding, 1e-6)
        same = torch.full_like(tokens, 0.3)
        assert torch.allclose(mean_tokens(same, (5, 7), ratio), same[:, :1])


def test_ratios_that_a_model_cannot_have_are_refused() -> None:
    model, given = build(kv_compression=KVCompression((1,), 2)), inputs()
    with pytest.raises(ValueError, match="kv_ratios must be none or 2, got 1"):
        model(*given, kv_ratios=(2,))
    for ratio in (1, 3):
        with pytest.raises(ValueError, match=f"give block 1 a multiple of 2.* got {ratio}"):
            model(*given, kv_ratios=(1, ratio))
    with pytest.raises(ValueError, match="ratios of 1, 2, 3 or 4, got 5"):
        model(*given, kv_ratios=(5, 2))
    flat = build(kv_compression=KVCompression((1,), 2, "uniform_every"))
    with pytest.raises(ValueError, match="leave block 1 its ratio 2"):
        flat(*given, kv_ratios=(1, 4))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("grid", [(6, 6), (4, 7)], ids=str)
def test_flops_are_what_torchs_counter_finds(grid: tuple[int, int], qk_norm: bool) -> None:
    config = PixArtConfig(
        input_size=8, hidden_size=48, depth=3, num_heads=4, caption_channels=20, model_max_length=12,
        qk_norm=qk_norm, kv_compression=KVCompression((2,), 2),
    )  # fmt: skip
    model = PixArt(config)
    latents = torch.randn(1, 4, 2 * grid[0], 2 * grid[1])
    for ratios in ((2, 1, 2), (3, 4, 4), (1, 1, 2)):
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter:
            model(latents, torch.tensor([500]), torch.randn(1, 5, 20), kv_ratios=ratios)
        assert counter.get_total_flops() == cost.forward_flops(config, grid, 5, kv_ratios=ratios)


def test_gradients_pass_through_merging() -> None:
    model, given = build(), inputs()
    model(*given, kv_ratios=(2, 2)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())
