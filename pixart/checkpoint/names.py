"""Names of files and tensors: the official tensor names, which are ours, and diffusers'.

Functions here raise ValueError with the reason alone; load.py puts the path in front.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Size, Tensor, cat

from pixart.files import listed

CONFIG = "config.json"
SIDECAR = "pixart_buffers.safetensors"  # what diffusers has no place for; it ignores the file
CONTROL_FORMAT = "pixart-control"  # of our files, in their metadata
CONTROL_CLASS = "PixArtControlNetAdapterModel"  # of diffusers' research code
COMFYUI_FORMAT = "pixart-comfyui"  # of files for ComfyUI, in their metadata
COMFYUI_PREFIX = "pixart_kv."  # before every name of such a file that ComfyUI alone must not open
OWN_KEY = "pixart"  # our configuration beside "state_dict" in a .pth; official loaders pass over it

NOT_IN_DIFFUSERS = ("model_max_length", "class_dropout_prob")  # kept in the sidecar too

POSITIONS = "pos_embed"  # rebuilt for each image size, so a stored table only tells the native one
NULL_CAPTION = "y_embedder.y_embedding"
CAPTION_WEIGHT = "y_embedder.y_proj.fc1.weight"  # absent from a model without a caption embedding
PUBLISHED_NULL_CAPTION = "null_caption"  # in a published repository, whose class has a place for it
BUFFERS = (POSITIONS, NULL_CAPTION)  # the two tensors that a checkpoint may lack

_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.scale_shift_table": "scale_shift_table",
    "final_layer.linear": "proj_out",
}
# Several names: the official matrix is theirs stacked along its rows.
_INSIDE_BLOCK = {
    "scale_shift_table": ("scale_shift_table",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "attn.q_norm": ("attn1.q_norm",),
    "attn.k_norm": ("attn1.k_norm",),
    "attn.sr": ("attn1.sr",),
    "attn.norm": ("attn1.norm",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_OUTSIDE_BACK = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_INSIDE_BLOCK_BACK = {theirs: ours for ours, parts in _INSIDE_BLOCK.items() for theirs in parts}

_MARKERS = {
    "official": ("x_embedder.proj.weight", "t_block.1.weight", "final_layer.linear.weight"),
    "diffusers": ("pos_embed.proj.weight", "adaln_single.linear.weight", "proj_out.weight"),
}
# Wrappers put prefixes before every name, in any order; "model.diffusion_model." is ComfyUI's.
_WRAPPED = re.compile(r"(?:(?:module|model|transformer|diffusion_model|pixart_kv)\.)*")
# And these around single layers too.
INSIDE_NAMES = re.compile(
    r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)
# What single files of other programs hold beside the transformer.
_BESIDE = re.compile(
    r"(first_stage_model|cond_stage_model|conditioner|text_encoders?|vae|model_ema|ema)\..*"
)
_CONTROL = re.compile(
    r"(?:(?:module|model)\.)*(?:controlnet\.\d|(?:controlnet\.)?controlnet_blocks\.).*"
)
_SCALED = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale)")


def diffusers_names(name: str) -> tuple[str, ...]:
    """The diffusers tensors that make up an official one; empty if diffusers has no such tensor."""
    block, tail = _split_block(name, "blocks")
    module, dot, kind = tail.rpartition(".")
    if block is None:
        whole, inside = _OUTSIDE.get(tail), _OUTSIDE.get(module)
        return (whole,) if whole else (inside + dot + kind,) if inside else ()
    if tail in _INSIDE_BLOCK:
        module, ending = tail, ""
    else:
        ending = dot + kind
    return tuple(f"transformer_{block}{part}{ending}" for part in _INSIDE_BLOCK.get(module, ()))


def official_name(name: str) -> str | None:
    """The official tensor that a diffusers tensor belongs to, None if there is none."""
    block, tail = _split_block(name, "transformer_blocks")
    table = _OUTSIDE_BACK if block is None else _INSIDE_BLOCK_BACK
    prefix = "" if block is None else block.removeprefix("transformer_")
    if tail in table:
        return prefix + table[tail]
    module, _, kind = tail.rpartition(".")
    return f"{prefix}{table[module]}.{kind}" if module in table else None


def _split_block(name: str, blocks: str) -> tuple[str | None, str]:
    """("blocks.3.", "attn.qkv.weight"), or (None, name) outside the blocks."""
    match = re.match(rf"{blocks}\.\d+\.", name)
    return (match[0], name[match.end() :]) if match else (None, name)


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, and split the stacked matrices into views. BUFFERS have no name there: left out."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in BUFFERS:
            names = diffusers_names(name)
            renamed.update(zip(names, tensor.chunk(len(names)), strict=True))
    return renamed


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of to_diffusers. Unknown names stay; an incomplete stack is left out."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        official = official_name(name)
        if name == PUBLISHED_NULL_CAPTION:
            renamed[NULL_CAPTION] = tensor
        elif official is None:
            renamed[name] = tensor
        # q, k and v lead to one matrix, which the first of them makes.
        elif official not in renamed:
            parts = diffusers_names(official)
            if all(part in tensors for part in parts):
                renamed[official] = tensor if len(parts) == 1 else _stack(tensors, parts)
    return renamed


def _stack(tensors: Mapping[str, Tensor], parts: tuple[str, ...]) -> Tensor:
    sizes = {tensors[part].shape for part in parts}
    if len(sizes) > 1:
        raise ValueError(f"{', '.join(parts)} must have one shape, got {_as_text(sizes)}")
    return cat([tensors[part] for part in parts])


def recognise(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str, list[str]]:
    """The transformer's tensors without the prefixes of wrappers, the naming, "official" or "diffusers",
    and a note on what else the file holds."""
    plain = {INSIDE_NAMES.sub("", name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise ValueError(f"holds a tensor twice, with and without a wrapper: {listed(tensors)}")
    if scaled := [name for name in plain if _SCALED.fullmatch(name)]:
        raise ValueError(
            f"holds fp8 weights with scales of their own ({listed(scaled)}), which are not read; "
            "give the file in fp16, bf16 or plain fp8"
        )
    plain, control = _without_control(plain)
    for naming, markers in _MARKERS.items():
        found = _prefixes(plain, markers)
        if len(found) > 1:
            raise ValueError(f"holds {len(found)} transformers, under {listed(found)}; give one")
        if found:
            stripped, notes = _without(found[0], plain)
            return stripped, naming, notes + control
    if any(re.search(r"lora[_.]", name, re.IGNORECASE) for name in tensors):
        raise ValueError(f"holds a LoRA ({listed(tensors)}); give the transformer it belongs to")
    if control:
        raise ValueError(
            f"holds a ControlNet ({listed(tensors)}) and no transformer; give that, and the ControlNet "
            "as control"
        )
    raise ValueError(f"holds no PixArt transformer, its tensors are {listed(tensors) or 'none'}")


def _without_control(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Without the ControlNet that an official file holds beside its base, and a note on it."""
    kept = {name: tensor for name, tensor in tensors.items() if not _CONTROL.fullmatch(name)}
    if len(kept) == len(tensors):
        return tensors, []
    note = f"holds a ControlNet of {len(tensors) - len(kept)} tensors too, which was left out"
    return {re.sub(r"(^|\.)base_model\.", r"\1", name): t for name, t in kept.items()}, [note]


def _prefixes(names: Iterable[str], markers: tuple[str, ...]) -> list[str]:
    """Of wrappers, those under which a transformer lies."""
    ends = [n.removesuffix(marker) for marker in markers for n in names if n.endswith(marker)]
    # Two of three: a file that lacks one is known still, and the error names what it lacks.
    return [p for p in dict.fromkeys(ends) if ends.count(p) >= 2 and _WRAPPED.fullmatch(p)]


def _without(prefix: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    beside = [name for name in tensors if _BESIDE.fullmatch(name)]
    kept = [name for name in tensors if not _BESIDE.fullmatch(name)]
    stripped = {name.removeprefix(prefix): tensors[name] for name in kept}
    if len(stripped) < len(kept):
        twice = [
            name for name in kept if name.startswith(prefix) and name[len(prefix) :] in tensors
        ]
        raise ValueError(f"holds a tensor twice, with and without {prefix}: {listed(twice)}")
    roots = ", ".join(dict.fromkeys(name.partition(".")[0] for name in beside))
    note = f"holds {len(beside)} tensors of other models ({roots}), which were left out"
    return stripped, [note] if beside else []


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Size], present: Iterable[str], naming: str
) -> None:
    """Raise ValueError unless tensors are the expected ones (BUFFERS may be absent).

    present: the names in the file, in its own naming, which the error uses.
    """
    absent = [name for name in expected if name not in tensors and name not in BUFFERS]
    extra = [name for name in tensors if name not in expected]
    misshapen = [
        f"{as_in_file(name, naming)} must be {tuple(expected[name])}, "
        f"got {tuple(tensors[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name]
    ]
    in_file = set(present)
    missing = [
        part for name in absent for part in _names_in_file(name, naming) if part not in in_file
    ]
    unexpected = [part for name in extra for part in _names_in_file(name, naming)]
    problems = [
        f"{what} {', '.join(names)}"  # all of them: which ones are gone shows what went wrong
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape:", misshapen),
        )
        if names
    ]
    if problems:
        raise ValueError("; ".join(problems))


def check_depth(depth: int, tensors: Iterable[str], naming: str) -> None:
    """Raise ValueError if whole blocks are missing, before so many are built to compare with."""
    found = {
        match[1] for match in (re.match(r"blocks\.(\d+)\.", name) for name in tensors) if match
    }
    absent = [str(block) for block in range(depth) if str(block) not in found]
    if absent:
        blocks = "transformer_blocks" if naming == "diffusers" else "blocks"
        names = listed(f"{blocks}.{block}" for block in absent)
        raise ValueError(f"missing {names}: its configuration says {depth} blocks")


def as_in_file(name: str, naming: str) -> str:
    """What the file calls a tensor, or the parts of one."""
    return " + ".join(_names_in_file(name, naming))


def _names_in_file(name: str, naming: str) -> tuple[str, ...]:
    return (naming == "diffusers" and diffusers_names(name)) or (name,)


def _as_text(sizes: Iterable[Size]) -> str:
    return ", ".join(str(tuple(size)) for size in sizes)
