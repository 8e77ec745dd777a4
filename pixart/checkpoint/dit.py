"""A class-conditional DiT (arXiv 2212.09748) as the PixArt that it becomes (PixArt-α, section 2.3).

Every DiT block i modulates with its own linear map of SiLU(t + class). PixArt shares one map, t_block,
and gives each block a table. Without its class term, at timestep 500, the model modulates as before:

    table_i = W_i SiLU(t_500) + b_i - t_block(t_500)        final table = W SiLU(t_500) + b - t_500

t_block is the mean of all W_i and b_i: among shared maps it is, by least squares, the nearest to the
blocks' own at every other timestep too. Cross-attention starts with an output of zero, and what reads
captions with the published random weights; everything else is taken as it is.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart.checkpoint.config import shape_of, side_of_positions
from pixart.checkpoint.load import empty_model
from pixart.checkpoint.names import POSITIONS, check_depth, recognise
from pixart.checkpoint.positions import solve_interpolation
from pixart.checkpoint.read import unpacked, widened
from pixart.config import MAX_LENGTH, PixArtConfig
from pixart.files import CheckpointError, listed
from pixart.model.transformer import PixArt
from pixart.tensors import check_plain, container, read_safetensors, read_torch
from pixart.weights import check_finite

TIMESTEP = 500
CLASSES = "y_embedder.embedding_table.weight"
MODULATION = "adaLN_modulation.1"
_HEAD_DIMS = (72, 64)  # of XL; of S, B and L
_T5_WIDTH = 4096
# PixArt's tensors that DiT has none of: tables of the modulation, and what reads captions.
_NEW = re.compile(r".*(scale_shift_table|cross_attn\..*)|t_block\..*|y_embedder\..*")


def open_dit(
    path: str | Path, *, caption_channels: int = _T5_WIDTH, max_length: int = MAX_LENGTH["alpha"]
) -> PixArt:
    """Open a DiT checkpoint with the published names, reparameterised, in eval mode.

    path: a state dict in .pt or .safetensors, or what DiT's trainer saved, whose average is taken.
    Raises CheckpointError, in one line with the path.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    kind = container(path)
    tensors = read_safetensors(path)[0] if kind == "safetensors" else read_torch(path, kind)
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: holds a {type(tensors).__name__}, not a state dict")
    tensors, _ = unpacked(tensors, ema=True)
    check_plain(path, tensors)
    try:
        if any(name.endswith(f".{CLASSES}") for name in tensors):
            tensors, _, _ = recognise(tensors)  # out of a wrapper
        tensors = widened(tensors, None, [])
        sizes: dict[str, int] = {"caption_channels": caption_channels, "max_length": max_length}
        state = reparameterise(tensors, **sizes)
        check_finite(tensors, str(path))
        model = PixArt(dit_config(tensors, **sizes))
        model.load_official(state)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model.eval()


def dit_config(
    dit: Mapping[str, Tensor],
    *,
    caption_channels: int = _T5_WIDTH,
    max_length: int = MAX_LENGTH["alpha"],
    num_heads: int | None = None,
) -> PixArtConfig:
    """The configuration of the PixArt that a DiT's state dict becomes: its size, its positions.

    num_heads: leaves no trace in the tensors; None takes that of the published DiT of this width.
    """
    names = ("x_embedder.proj.weight", "blocks.0.mlp.fc1.weight", "final_layer.linear.weight")
    absent = [name for name in names if name not in dit]
    if absent:
        raise ValueError(f"state_dict must be a DiT's, got none of {listed(absent)}")
    hidden, channels, patch, _ = shape_of(dit, names[0], 4)
    (mlp_hidden, _), (outputs, _) = (shape_of(dit, name, 2) for name in names[1:])
    if num_heads is None:
        head_dim = next((size for size in _HEAD_DIMS if hidden % size == 0), None)
        if head_dim is None:
            raise ValueError(f"width must be a multiple of 72 or 64 to tell heads, got {hidden}")
        num_heads = hidden // head_dim
    side, scale = 16, 1.0
    if POSITIONS in dit:
        side = side_of_positions(dit)
        scale = solve_interpolation(dit[POSITIONS][0], side) or scale
    blocks = [int(m[1]) for m in (re.match(r"blocks\.(\d{1,3})\.", name) for name in dit) if m]
    return PixArtConfig(
        input_size=side * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=max(blocks) + 1,
        num_heads=num_heads,
        mlp_ratio=mlp_hidden / hidden,
        caption_channels=caption_channels,
        model_max_length=max_length,
        pe_interpolation=scale,
        pred_sigma=outputs == 2 * channels * patch**2,
    )


@torch.no_grad()
def reparameterise(
    dit_state_dict: Mapping[str, Tensor],
    *,
    caption_channels: int = _T5_WIDTH,
    max_length: int = MAX_LENGTH["alpha"],
) -> dict[str, Tensor]:
    """The state dict of a PixArt, under its published names, from that of a class-conditional DiT.

    Tensors keep their dtype; the class embeddings are left out and pos_embed is recomputed by the
    model. The rest of the arguments is what reads captions. Raises ValueError for what is missing,
    unknown or of another shape.
    """
    dit = dict(dit_state_dict)
    sizes: dict[str, int] = {"caption_channels": caption_channels, "max_length": max_length}
    # No tensor depends on the number of heads; heads of 8 exist at every width.
    rows = dit["x_embedder.proj.weight"].shape[:1] if "x_embedder.proj.weight" in dit else ()
    config = dit_config(dit, **sizes, num_heads=max(sum(rows) // 8, 1))
    check_depth(config.depth, dit, "official")
    _check(dit, empty_model(config))
    model = PixArt(config)
    state = model.state_dict()
    dtype = dit["x_embedder.proj.weight"].dtype
    result = {name: dit[name].detach() if name in dit else state[name] for name in state}
    # In fp32 whatever the file has: tables are differences of large sums, which rounding spoils.
    model.t_embedder.load_state_dict(
        {name: result[f"t_embedder.{name}"].float() for name in model.t_embedder.state_dict()}
    )
    t = model.t_embedder(torch.tensor([float(TIMESTEP)]))
    result |= _modulation(dit, config, t[0])
    return {name: tensor.to(dtype) for name, tensor in result.items()}


def _modulation(dit: Mapping[str, Tensor], config: PixArtConfig, t: Tensor) -> dict[str, Tensor]:
    """t_block and all tables; t: the embedding (C,) of the timestep at which they are exact."""

    def linear(prefix: str) -> tuple[Tensor, Tensor]:
        name = f"{prefix}.{MODULATION}"
        return dit[f"{name}.weight"].float(), dit[f"{name}.bias"].float()

    shared_weight, shared_bias = torch.zeros(6 * len(t), len(t)), torch.zeros(6 * len(t))
    for layer in range(config.depth):  # one by one: XL/2 has 0.9 GB of them
        weight, bias = linear(f"blocks.{layer}")
        shared_weight += weight / config.depth
        shared_bias += bias / config.depth
    activated = F.silu(t)
    shared = F.linear(activated, shared_weight, shared_bias)
    found = {"t_block.1.weight": shared_weight, "t_block.1.bias": shared_bias}
    for layer in range(config.depth):
        own = F.linear(activated, *linear(f"blocks.{layer}"))
        found[f"blocks.{layer}.scale_shift_table"] = (own - shared).view(6, -1)
    last = F.linear(activated, *linear("final_layer")).view(2, -1)
    found["final_layer.scale_shift_table"] = last - t
    return found


def _check(dit: Mapping[str, Tensor], model: PixArt) -> None:
    """Raise ValueError unless dit is, in names and sizes, the DiT of this size."""
    width = model.config.hidden_size
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items() if not _NEW.fullmatch(n)}
    for layer in range(model.config.depth):
        expected[f"blocks.{layer}.{MODULATION}.weight"] = (6 * width, width)
        expected[f"blocks.{layer}.{MODULATION}.bias"] = (6 * width,)
    expected[f"final_layer.{MODULATION}.weight"] = (2 * width, width)
    expected[f"final_layer.{MODULATION}.bias"] = (2 * width,)
    missing = [name for name in expected if name not in dit]
    unknown = [name for name in dit if name not in expected and name not in (CLASSES, POSITIONS)]
    misshapen = [n for n, shape in expected.items() if n in dit and tuple(dit[n].shape) != shape]
    kinds = (("missing", missing), ("unexpected", unknown), ("of another shape", misshapen))
    problems = "; ".join(f"{what} {listed(names)}" for what, names in kinds if names)
    if problems:
        raise ValueError(f"state_dict must be a class-conditional DiT's, got {problems}")
