import pytest
import torch
from small_model import PARITY_TOLERANCE, build, inputs, relative_error
from torch import Tensor

from pixart.config import KVCompression
from pixart.model.blocks import SelfAttention


def attention_of(compression: KVCompression | None = None, **changes: object) -> SelfAttention:
    attention = build(kv_compression=compression, **changes).blocks[0].attn
    assert isinstance(attention, SelfAttention)
    return attention


TOKENS = torch.randn(2, 48, 144, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_perturbed_attention_is_the_identity(qk_norm: bool) -> None:
    """As softmax(QKᵀ) with a 1 for each token's own key and 0 for all others."""
    attention = attention_of(qk_norm=qk_norm)
    weights = torch.eye(48).expand(2, 48, 48)
    v = attention.qkv(TOKENS)[..., 288:]
    expected = attention.proj(weights @ v)
    assert relative_error(attention(TOKENS, (6, 8), True), expected) < PARITY_TOLERANCE
    assert relative_error(attention(TOKENS, (6, 8)), expected) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("sampling", ["conv", "average", "uniform", "uniform_every"])
def test_in_a_compressed_block_each_token_has_the_value_of_a_patch_of_its_like(
    sampling: str,
) -> None:
    """Where every token is alike, attention gives that value whatever its map: so does the identity."""
    attention = attention_of(KVCompression((0,), 2, sampling))
    alike = TOKENS[:, :1].repeat(1, 48, 1)
    assert relative_error(attention(alike, (6, 8), True), attention(alike, (6, 8))) < 1e-5
    assert attention(TOKENS, (6, 8), True).shape == TOKENS.shape


@torch.no_grad()
def test_only_the_listed_blocks_are_perturbed() -> None:
    model = build(depth=3)
    met: list[bool] = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, given: met.append(given[2]))
    perturbed: Tensor = model(*inputs(), perturbed=[1])
    assert met == [False, True, False]
    assert not torch.equal(perturbed, model(*inputs()))
    assert torch.equal(model(*inputs(), perturbed=()), model(*inputs()))


@pytest.mark.parametrize("layer", [-1, 3, 14])
def test_a_block_beyond_the_depth_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"from 0 to 2, got {layer}"):
        build(depth=3)(*inputs(), perturbed=[1, layer])
