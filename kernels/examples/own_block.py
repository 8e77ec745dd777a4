"""The operators in a DiT block of your own: `python kernels/examples/own_block.py`.

The block is the one of PixArt-Σ without its captions: adaLN-single modulation, self-attention to keys
and values that are merged two by two, an MLP. It is compared with the same formulas in plain
PyTorch, outputs and gradients. With a GPU the operators are Triton kernels, without one eager PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart_kernels import compress_kv, flash_attention, gate_add, gate_add_modulate, modulate

RATIO = 2


class Block(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.randn(6, channels) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.merge = nn.Conv2d(channels, channels, RATIO, stride=RATIO, groups=channels)
        self.norm = nn.LayerNorm(channels)  # of merged keys and values
        self.project = nn.Linear(channels, channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor, time: Tensor, grid: tuple[int, int]) -> Tensor:
        """x: (B, N, C) tokens of a grid of rows and columns; time: (B, 6, C), shared by all blocks."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.table + time).unbind(1)
        q, k, v = self.qkv(modulate(x, shift, scale)).chunk(3, dim=-1)  # views: nothing is copied
        weights = self.merge.weight, self.merge.bias, self.norm.weight, self.norm.bias
        k, v = compress_kv(k, v, *weights, grid=grid, ratio=RATIO)  # (B, N / R², C)
        q, k, v = (tokens.unflatten(-1, (self.heads, -1)) for tokens in (q, k, v))  # (B, N, H, D)
        attended = self.project(flash_attention(q, k, v).flatten(2))
        x, modulated = gate_add_modulate(x, attended, gate, mlp_shift, mlp_scale)
        return gate_add(x, self.mlp(modulated), mlp_gate)


def plain(block: Block, x: Tensor, time: Tensor, grid: tuple[int, int]) -> Tensor:
    """The same without the operators."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (block.table + time).unsqueeze(2).unbind(1)

    def merged(tokens: Tensor) -> Tensor:
        image = tokens.transpose(1, 2).unflatten(2, grid)
        return block.norm(block.merge(image).flatten(2).transpose(1, 2))

    q, k, v = block.qkv(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (block.heads, -1)) for t in (q, merged(k), merged(v)))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    attended = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)
    x = x + gate * block.project(attended)
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x + mlp_gate * block.mlp(normed * (1 + mlp_scale) + mlp_shift)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = (16, 12)
    block = Block(channels=144, heads=2).to(device)  # 72 channels a head, as PixArt has
    x = torch.randn(2, grid[0] * grid[1], 144, device=device, requires_grad=True)
    time = torch.randn(2, 6, 144, device=device)
    out, expected = block(x, time, grid), plain(block, x, time, grid)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected)]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    print(f"on {device}: {x.shape[1]} queries see {x.shape[1] // RATIO**2} merged keys")
    print(f"output differs by {(out - expected).abs().max():.1e} at most")
    print(f"gradient of x differs by {(gradients[0] - gradients[1]).abs().max():.1e} at most")


if __name__ == "__main__":
    main()
