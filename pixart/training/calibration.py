"""The calibrated start of KV compression: the norm set from measured keys and values.

Compressed attention sees LayerNorm(mean of a patch), and one norm serves keys and values alike. As
published it starts plain: every merged token, key or value, loud or quiet, gets the same length,
which moves a dense model more than the merging does. Fitting weight and bias by least squares mends
part of it at best, since keys, values and tokens differ in length and share one weight per channel.
What mends it is the convolution's bias b. Let b be A·√C·r on one channel i, r being the root mean
square of keys and values x, and on all others the same small number that makes its mean 0. Then

    LayerNorm(x + b) = weight · (x + b - m) / s + bias,    s = A·r·(1 + O(1/A²)) for every token,

and weight = s gives x - m back on the other channels, m being a token's mean over its channels.
Lost are m and channel i, two directions of C, so i is the quietest channel. Its weight is 0: no
rounding of a large number reaches the output, whatever the dtype. The norm's bias restores the mean
of the values. Keys need none: what all keys have in common adds the same to every score of a query,
and softmax does not see it.

Axis letters: T sampled tokens, C channels.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart.config import KVCompression
from pixart.model.blocks import SelfAttention
from pixart.model.compression import compress_tokens
from pixart.model.transformer import PixArt

DOMINANCE = 16.0  # A: tokens of the usual length then pass within 1/(2A²) = 0.2 % of their length
TOKENS = 1024  # merged tokens kept of each block and batch: enough for means over channels

Arguments = Sequence[Any] | Mapping[str, Any]  # of a model's forward


class NormStart(NamedTuple):
    """Values for attn.sr.bias, attn.norm.weight and attn.norm.bias, (C,) each, fp32."""

    offset: Tensor
    weight: Tensor
    bias: Tensor


def measure(
    model: PixArt, compression: KVCompression, batches: Iterable[Arguments]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of a dense model's blocks as averaging would merge them: (T, C) fp32 each.

    batches: arguments of the model's forward, noised latents first. The model is left as it was.
    """
    found: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in compression.layers}

    def watch(layer: int) -> Any:
        def hook(attention: SelfAttention, arguments: tuple[Any, ...]) -> None:
            x, grid = arguments[:2]  # behind which stands whether it is perturbed
            found[layer].append(_merged(attention, x, grid, compression.ratio))

        return cast(Any, model.blocks[layer]).attn.register_forward_pre_hook(hook)

    was_training = model.training
    handles = [watch(layer) for layer in compression.layers]
    try:
        model.eval()  # no caption is dropped
        with torch.no_grad():
            for batch in batches:
                _ = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if not all(found.values()):
        raise ValueError("batches must hold at least one batch to calibrate by, got none")
    return {
        layer: (torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs]))
        for layer, pairs in found.items()
    }


def _merged(
    attention: SelfAttention, x: Tensor, grid: tuple[int, int], ratio: int
) -> tuple[Tensor, Tensor]:
    _, k, v = attention.qkv(x).chunk(3, dim=-1)
    if attention.k_norm is not None:
        k = attention.k_norm(k)
    mean = KVCompression((), ratio, "average")
    merged = compress_tokens(k.float(), v.float(), grid, mean, None, None)
    count = merged[0].shape[:2].numel()
    kept = torch.linspace(0, count - 1, min(count, TOKENS)).long().to(k.device)
    k, v = (tokens.flatten(0, 1)[kept] for tokens in merged)
    return k, v


def fit_norm(keys: Tensor, values: Tensor, eps: float = 1e-5) -> NormStart:
    """What makes the shared norm pass merged keys and values, (T, C) fp32 each, nearly unchanged."""
    power = torch.stack([keys.square().mean(), values.square().mean()]).max()
    if not (power.isfinite() and power > 0):
        raise ValueError(f"keys and values must be finite and not all zero, got power {power}")
    quietest = _quietest_channel(keys, values)
    channels = keys.shape[1]
    height = DOMINANCE * (channels * power).sqrt()
    offset = (-height / (channels - 1)).expand(channels).clone()
    offset[quietest] = height
    lengths = [(x + offset).var(dim=1, correction=0).add(eps).rsqrt() for x in (keys, values)]
    weight = torch.full_like(offset, 2 / (lengths[0].mean() + lengths[1].mean()).item())
    weight[quietest] = 0
    normed = F.layer_norm(values + offset, (channels,), eps=eps)
    return NormStart(offset, weight, values.mean(dim=0) - weight * normed.mean(dim=0))


def _quietest_channel(keys: Tensor, values: Tensor) -> int:
    """The one that tells tokens apart the least, among keys and among values together."""
    variances = [tokens.var(dim=0, correction=0) for tokens in (keys, values)]
    shares = sum(v / v.mean().clamp(min=torch.finfo(v.dtype).tiny) for v in variances)
    return int(cast(Tensor, shares).argmin())
