"""Key/value compression inside the model; the operator itself is in test_operators.py."""

from typing import Any

import pytest
import torch
from small_model import SMALL, build, inputs, relative_error
from torch import Tensor

from pixart.config import KVCompression, PixArtConfig
from pixart.model.compression import add_merging, initial_values
from pixart.model.transformer import PixArt

PARITY_TOLERANCE = 1e-5  # of the norm, in fp32
WIDTH = 144  # hidden_size of SMALL
SAMPLINGS = ["conv", "average", "uniform", "uniform_every"]


@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_compression_runs_on_any_grid_and_matters(sampling: str, ratio: int) -> None:
    dense = build()
    model = build(kv_compression=KVCompression((1,), ratio, sampling, "none"))
    model.load_state_dict(dense.state_dict(), strict=False)
    arguments = inputs(height=10, width=14)  # 5 × 7 tokens
    error = relative_error(model(*arguments), dense(*arguments))
    assert (error == 0) if ratio == 1 else (error > 1e-3)


@pytest.mark.parametrize(("sampling", "keys"), list(zip(SAMPLINGS, [8, 8, 8, 12], strict=True)))
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_compressed_attention_sees_the_rounded_up_number_of_keys(
    sampling: str, keys: int, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pixart.model.blocks

    seen = []
    attention = pixart.model.blocks.flash_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q.shape[1], k.shape[1]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(pixart.model.blocks, "flash_attention", spy)
    ratio = 3 if sampling == "uniform_every" else 2
    model = build(kv_compression=KVCompression((1,), ratio, sampling, norm))
    model(*inputs(height=8, width=18 if sampling == "uniform_every" else 14))
    tokens = 36 if sampling == "uniform_every" else 28
    assert seen[0] == (tokens, tokens)
    assert seen[2] == (tokens, keys)
    names = set(model.state_dict())
    assert ("blocks.1.attn.norm.weight" in names) == (norm == "layer")
    assert ("blocks.1.attn.sr.weight" in names) == (sampling == "conv")
    assert "blocks.0.attn.sr.weight" not in names


def test_uniform_sampling_takes_the_top_left_token_of_each_patch() -> None:
    # With weights that pick that token, the learned merge must do the same.
    uniform = build(kv_compression=KVCompression((0, 1), 3, "uniform"))
    conv = build(kv_compression=KVCompression((0, 1), 3, "conv", "none"))
    conv.load_state_dict(uniform.state_dict(), strict=False)
    for block in conv.blocks:
        block.attn.sr.weight.data.zero_()[..., 0, 0] = 1
        block.attn.sr.bias.data.zero_()
    assert relative_error(uniform(*inputs()), conv(*inputs())) < PARITY_TOLERANCE


def test_uniform_every_counts_tokens_along_the_flat_sequence() -> None:
    every = build(kv_compression=KVCompression((0, 1), 3, "uniform_every"))
    uniform = build(kv_compression=KVCompression((0, 1), 3, "uniform"))
    one_row, two_rows = inputs(height=2, width=14), inputs(height=4, width=14)
    assert torch.equal(every(*one_row), uniform(*one_row))
    assert not torch.equal(every(*two_rows), uniform(*two_rows))


def test_a_new_learned_merge_is_the_average() -> None:
    average = build(kv_compression=KVCompression((0, 1), 2, "average"))
    conv = PixArt(PixArtConfig(**SMALL, kv_compression=KVCompression((0, 1), 2, norm="none")))
    conv.load_state_dict(average.state_dict(), strict=False)
    assert relative_error(average(*inputs()), conv.eval()(*inputs())) < PARITY_TOLERANCE


@pytest.mark.parametrize("sampling", ["conv", "average"])
@pytest.mark.parametrize("ratio", [2, 4])
def test_without_gradients_projection_and_merging_are_one_product(
    sampling: str, ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixart.model.folding import FoldedProjection

    monkeypatch.setattr("pixart.model.folding.FOLDED_TOKENS", 2 * 8 * 12 // ratio**2)
    model = build(kv_compression=KVCompression((0, 1), ratio, sampling))
    latents, timesteps, caption = inputs(height=16, width=24)
    expected = model(latents, timesteps, caption)
    folded = FoldedProjection.project
    calls = []
    monkeypatch.setattr(FoldedProjection, "project", lambda *a: calls.append(a) or folded(*a))
    with torch.no_grad():
        assert relative_error(model(latents, timesteps, caption), expected) < 1e-5
        assert len(calls) == 2
        model.blocks[0].attn.qkv.weight.mul_(1.5)  # type: ignore[union-attr, operator]
        changed = model(latents, timesteps, caption)
        model(*inputs(height=10, width=14))  # 5 × 7 tokens: patches are completed
        model(*inputs(height=16, width=16))  # too few to repay it
        assert len(calls) == 4
    assert relative_error(changed, model(latents, timesteps, caption)) < 1e-5
    assert relative_error(changed, expected) > 1e-3


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("ratio", [1, 3])
def test_every_way_to_compression_starts_from_the_same_values(
    ratio: int, sampling: str, norm: str
) -> None:
    compression = KVCompression((1,), ratio, sampling, norm)
    new = PixArt(PixArtConfig(**SMALL, kv_compression=compression)).blocks[1].attn
    dense = PixArt(PixArtConfig(**SMALL)).blocks[1].attn
    names = set(dense.state_dict())
    generator = torch.get_rng_state()
    add_merging(dense, compression, WIDTH, torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), generator)
    values = initial_values(compression, WIDTH)
    assert set(new.state_dict()) - names == set(dense.state_dict()) - names == set(values)
    for name, (shape, value) in values.items():
        expected = torch.full(shape, value)
        assert torch.equal(new.state_dict()[name], expected)
        assert torch.equal(dense.state_dict()[name], expected)
