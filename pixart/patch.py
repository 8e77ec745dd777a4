"""Put the operators into somebody else's diffusers pipeline, and take them out again.

    accelerate(pipe)  # or accelerate(pipe.transformer)
    image = pipe("a cactus with a happy face").images[0]
    restore(pipe)

What changes in a PixArtTransformer2DModel, in place:

- A block does its element-wise work in four passes: modulate; + gate·attention; + cross-attention,
  modulate; + gate·MLP. The rows of the adaLN tables are summed in fp32.
- Attention runs through flash_attention. A caption mask (B, L), which diffusers takes as keep or
  discard, is honoured by moving the kept tokens to the front, once per forward: attention does not
  see their order. A bias in its place (B, 1, L), and any mask of the image tokens, may hold any
  number: such attention goes through the processor that was there before.
- With kv_compression, the chosen blocks merge keys and values, which diffusers itself cannot do.

Linear layers are called and never read, so LoRA or quantised layers in their place and offloading
hooks work as before. Attention processors that are not diffusers' plain ones stay where they are.
"""

import inspect
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pixart.config import KVCompression
from pixart.device import kernel_obstacle
from pixart.graphs.forward import GraphedForward, unwrap, wrap
from pixart.libraries import importing
from pixart.model.compression import add_merging, compress_tokens
from pixart_kernels import flash_attention, gate_add, gate_add_modulate, modulate
from pixart_kernels.attention.operator import MAX_HEAD_DIM
from pixart_kernels.dispatch.registration import INTERPRETED

T = TypeVar("T")
_STATE = "_pixart_state"  # attribute of an accelerated transformer
_CALL = "pixart_call"  # in cross_attention_kwargs, which diffusers hands from forward to processor
_FUSED = "FusedAttnProcessor2_0"  # what fuse_qkv_projections() sets
_PLAIN = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")

logger = logging.getLogger("pixart")
_left_alone: "WeakSet[nn.Module]" = WeakSet()  # accelerate() had nothing to change in these


class _Call(NamedTuple):
    """What one forward tells its attention. An argument and no state: checkpointing repeats it."""

    grid: tuple[int, int]
    lengths: Tensor | None  # kept tokens of each caption; they come first


@dataclass
class _State:
    """What restore() cannot read off the transformer."""

    blocks: list[Any]
    config: Any
    hook: RemovableHandle
    has_graphs: bool


def accelerate(
    pipe_or_transformer: T,
    *,
    kv_compression: KVCompression | None = None,
    cuda_graph: bool = False,
) -> T:
    """Run a diffusers PixArt pipeline or transformer on the kernels. Returns the same object.

    Outputs and gradients stay the same within the rounding of the dtype, and so do the names in the
    state dict. Where there is no GPU, or no Triton, nothing changes and a warning says why. LoRA,
    offloading, gradient checkpointing and torch.compile may come before it or after.

    kv_compression: merge the keys and values of these blocks, on any device. The new tensors
    (attn1.sr, attn1.norm) start as the mean and a plain LayerNorm, trainable. They are called what
    pixart.checkpoint calls them: load_state_dict takes them from a compressed checkpoint, and
    load_transformer opens what save_pretrained writes.

    cuda_graph: record the forward once per combination of inputs and replay it from the second call on, for
    small pictures, whose steps the CPU launches more slowly than a GPU computes them. Calls that record
    gradients or are compiled are plain ones. Weights or adapters that are swapped are noticed. GraphError
    is raised where a forward cannot be recorded, as with hooks in the blocks, or offloading in parts.
    """
    if not isinstance(cuda_graph, bool):
        raise ValueError(f"cuda_graph must be True or False, got {cuda_graph!r}")
    transformer = _find_transformer(pipe_or_transformer)
    if hasattr(transformer, _STATE) or transformer in _left_alone:
        raise ValueError("pipe_or_transformer must be restored first, got one already accelerated")
    _check_transformer(transformer, kv_compression)
    obstacle = _obstacle()
    if cuda_graph and obstacle is not None:
        raise ValueError(f"cuda_graph must be False, got {cuda_graph!r}: {obstacle}; leave it out")
    if obstacle is None or kv_compression is not None:
        _install(transformer, kv_compression, cuda_graph)
    else:
        _left_alone.add(transformer)
        warnings.warn(f"accelerate() changes nothing: {obstacle}", stacklevel=2)
    return pipe_or_transformer


def restore(pipe_or_transformer: T) -> T:
    """Undo accelerate(). Returns the same object.

    Attention processors that somebody has set since stay. The tensors of a compression go: save
    them before, if they were trained.
    """
    transformer = _find_transformer(pipe_or_transformer)
    if transformer in _left_alone:
        _left_alone.remove(transformer)
        return pipe_or_transformer
    state: _State | None = getattr(transformer, _STATE, None)
    if state is None:
        raise ValueError("pipe_or_transformer must be accelerated, got one that is not")
    slots = [_block_slot(block, _block_forward) for block in state.blocks]
    if state.has_graphs:
        unwrap(transformer, *_forward_slot(transformer))
    for block, (holder, name) in zip(state.blocks, slots, strict=True):
        # Deleted, so that the class's own is found again; where a hook keeps it, put back.
        if holder is vars(block) and name == "forward":
            del holder[name]
        else:
            holder[name] = MethodType(type(block).forward, block)
        for attention in (block.attn1, block.attn2):
            if isinstance(attention.processor, _Processor):
                attention.set_processor(attention.processor.original)
        for name in ("sr", "norm", "kv_compression"):
            if hasattr(block.attn1, name):
                delattr(block.attn1, name)
    state.hook.remove()
    transformer._internal_dict = state.config
    delattr(transformer, _STATE)
    return pipe_or_transformer


def _obstacle() -> str | None:
    """Why the kernels cannot run in this process, None if they can."""
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "the kernels need a GPU, and torch.cuda.is_available() is False"
    return kernel_obstacle(torch.device("cuda"))


def _find_transformer(pipe_or_transformer: object) -> Any:
    """The transformer itself, a pipeline's, or the one in a wrapper (PEFT, DDP, compiled)."""
    with importing():
        from diffusers import PixArtTransformer2DModel

    root: Any = pipe_or_transformer
    if not isinstance(root, nn.Module):
        root = getattr(root, "transformer", None)
    for module in root.modules() if isinstance(root, nn.Module) else ():
        if isinstance(module, PixArtTransformer2DModel):
            return module
    raise ValueError(
        "pipe_or_transformer must be or hold a diffusers PixArtTransformer2DModel, "
        f"got {type(pipe_or_transformer).__name__}"
    )


def _check_transformer(transformer: Any, kv_compression: KVCompression | None) -> None:
    with importing():
        from diffusers.models.attention import BasicTransformerBlock

    config, blocks = transformer.config, transformer.transformer_blocks
    head_dim = config.attention_head_dim
    if config.norm_elementwise_affine:
        raise ValueError("norm_elementwise_affine must be False, got True")
    if config.attention_type not in (None, "default"):
        raise ValueError(f'attention_type must be "default", got {config.attention_type!r}')
    if config.cross_attention_dim is None:
        raise ValueError("cross_attention_dim must be a width, got None")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"attention_head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}")
    for layer, block in enumerate(blocks):
        if not isinstance(block, BasicTransformerBlock):
            raise ValueError(
                f"transformer_blocks.{layer} must be a BasicTransformerBlock, "
                f"got {type(block).__name__}; wrap blocks after accelerate()"
            )
        _block_slot(block, type(block).forward)
    if kv_compression is not None:
        _check_compression(kv_compression, blocks)


def _check_compression(kv_compression: KVCompression, blocks: Any) -> None:
    if not isinstance(kv_compression, KVCompression):
        raise ValueError(f"kv_compression must be a KVCompression or None, got {kv_compression!r}")
    if kv_compression.layers and kv_compression.layers[-1] >= len(blocks):
        raise ValueError(
            f"kv_compression.layers must be below {len(blocks)}, got {kv_compression.layers[-1]}"
        )
    for layer, block in enumerate(blocks):
        if kv_compression.applies_to(layer):
            name = f"transformer_blocks.{layer}.attn1.processor"
            processor, table = block.attn1.processor, block.scale_shift_table
            if not _is_plain(processor):
                raise ValueError(
                    f"{name} must be a plain one to compress, got {type(processor).__name__}"
                )
            # Offloaded weights are on the meta device, where new tensors would have no numbers.
            if table.device.type == "meta":
                raise ValueError("kv_compression must be added before the weights are offloaded")


def _is_plain(processor: object) -> bool:
    with importing():
        from diffusers.models import attention_processor

    names = (*_PLAIN, _FUSED)
    return type(processor) in [getattr(attention_processor, name, None) for name in names]


def _block_slot(block: Any, function: Callable[..., Any]) -> tuple[dict[str, Any], str]:
    """Where a block keeps its forward, which must be this function."""
    holder, name = _forward_slot(block)
    found = holder.get(name, block.forward)
    if not _is_bound(found, function):
        raise ValueError(
            f"a block's forward must not have been replaced by somebody else, got {found}"
        )
    return holder, name


def _forward_slot(module: Any) -> tuple[dict[str, Any], str]:
    """Where a module keeps its forward if anywhere: hooks move it when they wrap it."""
    holder, name = vars(module), "forward"
    registry = holder.get("_diffusers_hook")  # group offloading, caches
    if "_old_forward" in holder:  # sequential offloading
        name = "_old_forward"
    elif registry is not None and registry._fn_refs:
        holder = vars(registry._fn_refs[0])
        name = "forward" if holder["original_forward"] is None else "original_forward"
    return holder, name


def _is_bound(found: Any, function: Callable[..., Any]) -> bool:
    bound = found.func if isinstance(found, partial) else getattr(found, "__func__", None)
    return bound is function


def _install(transformer: Any, kv_compression: KVCompression | None, cuda_graph: bool) -> None:
    config, blocks = transformer._internal_dict, list(transformer.transformer_blocks)
    for layer, block in enumerate(blocks):
        if kv_compression is not None and kv_compression.applies_to(layer):
            _add_compression(block, kv_compression)
        for name, attention in (("attn1", block.attn1), ("attn2", block.attn2)):
            if _is_plain(attention.processor):
                attention.set_processor(_Processor(attention.processor))
            else:
                kept = type(attention.processor).__name__
                logger.info("transformer_blocks.%d.%s.processor stays: %s", layer, name, kept)
        holder, name = _block_slot(block, type(block).forward)
        # No method: one is pickled as an attribute of that name, which the block's class has not.
        holder[name] = partial(_block_forward, block)
    if kv_compression is not None:
        values = asdict(kv_compression) | {"layers": list(kv_compression.layers)}
        transformer.register_to_config(kv_compression=values)  # save_pretrained writes it
    # Of the class: a hook may have replaced the instance's own forward.
    names = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
    hook = transformer.register_forward_pre_hook(partial(_prepare, names), with_kwargs=True)
    if cuda_graph:
        wrap(transformer, *_forward_slot(transformer))
    setattr(transformer, _STATE, _State(blocks, config, hook, cuda_graph))


def _add_compression(block: Any, compression: KVCompression) -> None:
    attention, table = block.attn1, block.scale_shift_table  # quantisation leaves the table alone
    attention.kv_compression = compression
    add_merging(attention, compression, table.shape[1], table.device, table.dtype)


def _prepare(
    names: tuple[str, ...], transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the transformer's forward: pack the captions, and tell the blocks the token grid."""
    if not _hands_on(transformer):
        return args, kwargs
    values = dict(zip(names, args, strict=False)) | kwargs
    caption: Any = values.get("encoder_hidden_states")
    mask: Any = values.get("encoder_attention_mask")
    lengths = None
    if mask is not None and mask.dim() == 2 and mask.shape == caption.shape[:-1]:
        caption, mask, lengths = _pack(caption, mask)
        values |= {"encoder_hidden_states": caption, "encoder_attention_mask": mask}
    side = transformer.config.patch_size
    rows, cols = (size // side for size in values["hidden_states"].shape[-2:])
    extra = values.get("cross_attention_kwargs") or {}
    values["cross_attention_kwargs"] = {**extra, _CALL: _Call((rows, cols), lengths)}
    return (), values


def _hands_on(transformer: Any) -> bool:
    """Whether forward gives its cross_attention_kwargs to the blocks: diffusers' own, or another that
    names them. What was compiled ahead of time takes what it was compiled for and nothing else."""
    holder, name = _forward_slot(transformer)
    found = holder.get(name)
    if isinstance(found, GraphedForward):
        found = found.original
    if found is None or _is_bound(found, type(transformer).forward):
        return True
    try:
        return "cross_attention_kwargs" in inspect.signature(found).parameters
    except (TypeError, ValueError):
        return False


def _pack(caption: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kept tokens first. Returns caption, mask and lengths, without waiting for their values."""
    kept = mask == 1
    kept = kept | ~kept.any(dim=1, keepdim=True)  # diffusers' bias cancels where it is everywhere
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True).to(caption.device)
    caption = caption.gather(1, order.unsqueeze(2).expand_as(caption))
    lengths = kept.sum(dim=1, dtype=torch.int32)
    first = torch.arange(mask.shape[1], device=mask.device) < lengths.unsqueeze(1)
    return caption, first.to(mask.dtype), lengths.to(caption.device)


def _block_forward(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """BasicTransformerBlock.forward for norm_type "ada_norm_single", with its arguments."""
    table, extra = block.scale_shift_table, cross_attention_kwargs or {}
    t = timestep.unflatten(1, (6, -1))  # (B, 6, C)
    rows = t.to(torch.promote_types(t.dtype, torch.float32)) + table
    shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = rows.unbind(
        1
    )
    # Under autocast, diffusers' sums with fp32 rows make the residual stream fp32.
    dtype = torch.promote_types(t.dtype, table.dtype)
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, dtype))
    modulated = modulate(x, shift_attention, scale_attention, eps=block.norm1.eps)
    branch = _attend(block.attn1, modulated, extra, attention_mask=attention_mask)
    x = gate_add(x, branch, gate_attention)
    branch = _attend(
        block.attn2,
        x,
        extra,
        encoder_hidden_states=encoder_hidden_states,
        attention_mask=encoder_attention_mask,
    )
    x, modulated = gate_add_modulate(x, branch, None, shift_mlp, scale_mlp, eps=block.norm2.eps)
    return gate_add(x, block.ff(modulated), gate_mlp)


def _attend(attention: Any, x: Tensor, extra: dict[str, Any], **inputs: Any) -> Tensor:
    if not isinstance(attention.processor, _Processor):
        if hasattr(attention, "kv_compression"):
            raise ValueError(
                "the processor of a compressed block must be accelerate()'s, "
                f"got {type(attention.processor).__name__}"
            )
        extra = {name: value for name, value in extra.items() if name != _CALL}
    return attention(x, **inputs, **extra)


class _Processor:
    """The attention processor of accelerated blocks. original: the one in whose place it stands."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.is_fused = type(original).__name__ == _FUSED

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        pixart_call: _Call | None = None,
    ) -> Tensor:
        compression = getattr(attn, "kv_compression", None)
        lengths = None
        if pixart_call is not None and encoder_hidden_states is not None:
            lengths = pixart_call.lengths
        if attention_mask is not None and lengths is None:
            if compression is not None:
                raise ValueError("attention_mask must be None in a compressed block, got a mask")
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask)
        q, k, v = self._project(attn, hidden_states, encoder_hidden_states)
        if compression is not None:
            k, v = _compress(attn, k, v, compression, pixart_call)
        out = flash_attention(q, k, v, kv_lengths=lengths).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))

    def _project(self, attn: Any, x: Tensor, caption: Tensor | None) -> tuple[Tensor, ...]:
        """q, k and v: (B, tokens, H, D) each."""
        heads = (attn.heads, -1)
        if self.is_fused and caption is None:
            return attn.to_qkv(x).unflatten(2, (3, *heads)).unbind(2)
        q = attn.to_q(x).unflatten(2, heads)
        if self.is_fused:
            return q, *attn.to_kv(caption).unflatten(2, (2, *heads)).unbind(2)
        source = x if caption is None else caption
        return q, attn.to_k(source).unflatten(2, heads), attn.to_v(source).unflatten(2, heads)


def _compress(
    attn: Any, k: Tensor, v: Tensor, compression: KVCompression, call: _Call | None
) -> tuple[Tensor, ...]:
    """k, v: (B, N, H, D). Returns (B, M, H, D) each."""
    if call is None:
        raise ValueError("the transformer must be called, not its blocks, for the grid of tokens")
    sr, norm = getattr(attn, "sr", None), getattr(attn, "norm", None)
    merged = compress_tokens(k.flatten(2), v.flatten(2), call.grid, compression, sr, norm)
    return tuple(tokens.unflatten(2, (attn.heads, -1)) for tokens in merged)
