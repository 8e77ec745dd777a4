"""What the node pack sees of ComfyUI, written anew after ComfyUI 0.3.64 (commit a125cd8): modules, names,
arguments, and the ways of its PixArt that matter here. New layers hold NaN, so that a weight that nobody
loads is seen; each is cast to its input where it is used, as ComfyUI's layers do.
"""

import math
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart.tensors import read_safetensors

chosen = types.SimpleNamespace(dtype=None)  # what unet_dtype answers; None: as stored


class _Casting(nn.Module):
    """Of ComfyUI's operations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)

    def forward(self, x: Tensor) -> Tensor:
        cast = {name: p.to(x.dtype) for name, p in self.named_parameters()}
        return (
            torch.func.functional_call(self, cast, (x,)) if self._is_cast(x) else super().forward(x)
        )

    def _is_cast(self, x: Tensor) -> bool:
        return any(p.dtype != x.dtype for p in self.parameters())


class Linear(_Casting, nn.Linear):
    pass


class Conv2d(_Casting, nn.Conv2d):
    pass


class LayerNorm(_Casting, nn.LayerNorm):
    pass


operations = types.SimpleNamespace(Linear=Linear, Conv2d=Conv2d, LayerNorm=LayerNorm)


def optimized_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, skip_reshape: bool = False
) -> Tensor:
    if not skip_reshape:
        q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class AttentionKVCompress(nn.Module):
    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, sampling: Any = "conv",
        sr_ratio: int = 1, qk_norm: bool = False, dtype: Any = None, device: Any = None,
        operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.num_heads, self.sampling, self.sr_ratio = num_heads, sampling, sr_ratio
        self.qkv = operations.Linear(dim, 3 * dim, bias=qkv_bias, **place)
        self.proj = operations.Linear(dim, dim, **place)
        if sr_ratio > 1 and sampling == "conv":
            self.sr = operations.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, groups=dim, **place)
            self.norm = operations.LayerNorm(dim, **place)
        self.q_norm = operations.LayerNorm(dim, **place) if qk_norm else nn.Identity()
        self.k_norm = operations.LayerNorm(dim, **place) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, mask: Any = None, HW: Any = None, block_id: Any = None) -> Tensor:
        assert self.sr_ratio == 1  # ComfyUI's own fails here: it is given the latents' size as HW
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(optimized_attention(self.q_norm(q), self.k_norm(k), v, self.num_heads))


class MultiHeadCrossAttention(nn.Module):
    def __init__(self, d_model: int, num_heads: int, operations: Any, **place: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = operations.Linear(d_model, d_model, **place)
        self.kv_linear = operations.Linear(d_model, 2 * d_model, **place)
        self.proj = operations.Linear(d_model, d_model, **place)

    def forward(self, x: Tensor, cond: Tensor, mask: Any = None) -> Tensor:
        assert mask is None and cond.shape[0] == 1
        k, v = self.kv_linear(cond).view(len(x), -1, 2 * x.shape[2]).chunk(2, dim=-1)
        return self.proj(optimized_attention(self.q_linear(x), k, v, self.num_heads))


class Mlp(nn.Module):
    def __init__(self, sizes: tuple[int, int, int], operations: Any, **place: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(sizes[0], sizes[1], **place)
        self.fc2 = operations.Linear(sizes[1], sizes[2], **place)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PixArtMSBlock(nn.Module):
    def __init__(self, width: int, heads: int, ratio: float, **settings: Any) -> None:
        super().__init__()
        place = {key: settings[key] for key in ("dtype", "device", "operations")}
        self.attn = AttentionKVCompress(width, heads, **settings)
        self.cross_attn = MultiHeadCrossAttention(width, heads, **place)
        self.mlp = Mlp((width, int(width * ratio), width), **place)
        self.scale_shift_table = nn.Parameter(torch.full((6, width), math.nan))

    def forward(
        self, x: Tensor, y: Tensor, t: Tensor, mask: Any = None, HW: Any = None, **_: Any
    ) -> Tensor:
        rows = self.scale_shift_table.to(x) + t.unflatten(1, (6, -1))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = rows.unsqueeze(2).unbind(1)
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        x = x + gate * self.attn(normed * (1 + scale) + shift, HW=HW)
        x = x + self.cross_attn(x, y, mask)
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return x + gate_mlp * self.mlp(normed * (1 + scale_mlp) + shift_mlp)


class Embedder(nn.Module):
    """Of timesteps, or of several sizes a sample."""

    def __init__(self, width: int, operations: Any, **place: Any) -> None:
        super().__init__()
        first = operations.Linear(256, width, **place)
        self.mlp = nn.Sequential(first, nn.SiLU(), operations.Linear(width, width, **place))

    def forward(self, numbers: Tensor, how: Any) -> Tensor:
        if numbers.ndim == 2:  # sizes, and the batch
            numbers, dtype = numbers.repeat(how // len(numbers), 1), numbers.dtype
        else:
            dtype = how
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = numbers.float().flatten()[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(waves.to(dtype)).view(len(numbers), -1)


class CaptionEmbedder(nn.Module):
    def __init__(self, channels: int, width: int, length: int, **place: Any) -> None:
        super().__init__()
        self.y_proj = Mlp((channels, width, width), **place)
        self.register_buffer("y_embedding", torch.full((length, channels), math.nan))

    def forward(self, caption: Tensor, train: bool) -> Tensor:
        return self.y_proj(caption)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, side: int, operations: Any, **place: Any) -> None:
        super().__init__()
        self.patch_size = (side, side)
        self.proj = operations.Conv2d(channels, width, side, stride=side, **place)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int, operations: Any, **place: Any) -> None:
        super().__init__()
        self.linear = operations.Linear(width, outputs, **place)
        self.scale_shift_table = nn.Parameter(torch.full((2, width), math.nan))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table.to(x) + t[:, None]).chunk(2, dim=1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class PixArtMS(nn.Module):
    def __init__(
        self, input_size: int = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152,
        depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0, pred_sigma: bool = True,
        caption_channels: int = 4096, pe_interpolation: Any = None, model_max_length: int = 120,
        micro_condition: bool = True, qk_norm: bool = False, kv_compress_config: Any = None,
        dtype: Any = None, device: Any = None, operations: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        place: Any = {"dtype": dtype, "device": device, "operations": operations}
        self.dtype, self.pred_sigma, self.in_channels = dtype, pred_sigma, in_channels
        self.out_channels = 2 * in_channels if pred_sigma else in_channels
        self.patch_size, self.hidden_size, self.depth = patch_size, hidden_size, depth
        self.pe_interpolation, self.micro_conditioning = pe_interpolation, micro_condition
        rows = operations.Linear(hidden_size, 6 * hidden_size, dtype=dtype, device=device)
        self.t_block = nn.Sequential(nn.SiLU(), rows)
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size, **place)
        self.t_embedder = Embedder(hidden_size, **place)
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length, **place)
        if micro_condition:
            self.csize_embedder = Embedder(hidden_size // 3, **place)
            self.ar_embedder = Embedder(hidden_size // 3, **place)
        self.blocks = nn.ModuleList(
            PixArtMSBlock(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, **place)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels, **place)

    def forward_orig(
        self, x: Tensor, timestep: Tensor, y: Tensor, mask: Any = None, c_size: Any = None,
        c_ar: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        raise NotImplementedError  # ComfyUI's own positions, of which no test here speaks

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, c_size: Any = None, c_ar: Any = None,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        batch, _, height, width = x.shape
        if self.micro_conditioning and c_size is None:
            c_size = torch.tensor([[height * 8, width * 8]], dtype=x.dtype).repeat(batch, 1)
            c_ar = torch.tensor([[height / width]], dtype=x.dtype).repeat(batch, 1)
        context = context if context.ndim == 4 else context.unsqueeze(1)
        out = self.forward_orig(x, timesteps, context, c_size=c_size, c_ar=c_ar)
        return out[:, : self.in_channels] if self.pred_sigma else out

    def unpatchify(self, x: Tensor, h: int, w: int) -> Tensor:
        side = self.patch_size
        image = x.view(len(x), h // side, w // side, side, side, -1)
        return image.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, h, w)


class _SupportedModel:
    supported_inference_dtypes = [torch.float16, torch.bfloat16, torch.float32]
    latent_format = "SDXL"

    def __init__(self, unet_config: dict[str, Any]) -> None:
        self.unet_config, self.manual_cast_dtype = dict(unet_config), None

    def set_inference_dtype(self, dtype: Any, manual_cast_dtype: Any) -> None:
        self.unet_config["dtype"], self.manual_cast_dtype = dtype, manual_cast_dtype


class PixArtSigma(_SupportedModel):
    pass


class PixArtAlpha(_SupportedModel):
    latent_format = "SD15"


class BaseModel(nn.Module):
    def __init__(
        self, model_config: Any, model_type: Any = "EPS", device: Any = None, unet_model: Any = None
    ) -> None:
        super().__init__()
        self.model_config, self.model_type = model_config, model_type
        self.latent_format, self.manual_cast_dtype = (
            model_config.latent_format, model_config.manual_cast_dtype,
        )  # fmt: skip
        settings = model_config.unet_config
        self.diffusion_model = unet_model(**settings, device=device, operations=operations)

    def load_model_weights(self, sd: dict[str, Tensor], unet_prefix: str = "") -> "BaseModel":
        self.left = self.diffusion_model.load_state_dict(sd, strict=False)  # ComfyUI logs these
        return self


class PixArt(BaseModel):
    def __init__(self, model_config: Any, model_type: Any = "EPS", device: Any = None) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=PixArtMS)


class ModelPatcher:
    def __init__(self, model: Any, load_device: Any, offload_device: Any) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.object_patches: dict[str, Any] = {}
        self._backup: dict[str, Any] = {}

    def clone(self) -> "ModelPatcher":
        clone = ModelPatcher(self.model, self.load_device, self.offload_device)
        clone.object_patches = dict(self.object_patches)
        return clone

    def add_object_patch(self, name: str, obj: Any) -> None:
        self.object_patches[name] = obj

    def patch_model(self) -> None:
        self._backup = {n: self._set(n, patch) for n, patch in self.object_patches.items()}

    def unpatch_model(self) -> None:
        for name, before in self._backup.items():
            self._set(name, before)

    def _set(self, name: str, value: Any) -> Any:
        place: Any = self.model
        *parents, last = name.split(".")
        for parent in parents:
            place = getattr(place, parent)
        before = getattr(place, last)
        setattr(place, last, value)
        return before


def detect_unet_config(names: Iterable[str], tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """What ComfyUI takes a file of these tensors for; None: no PixArt."""
    if "t_block.1.weight" not in names:
        return None
    found: dict[str, Any] = {
        "num_heads": 16,
        "patch_size": 2,
        "hidden_size": 1152,
        "in_channels": 4,
    }
    found["depth"] = len({n.split(".")[1] for n in names if n.startswith("blocks.")})
    if "y_embedder.y_embedding" in names:
        found["model_max_length"] = len(tensors["y_embedder.y_embedding"])
    if "pos_embed" in names:
        found["input_size"] = int(math.sqrt(tensors["pos_embed"].shape[1])) * 2
        found["pe_interpolation"] = found["input_size"] // 64
    found["micro_condition"] = "ar_embedder.mlp.0.weight" in names
    found["image_model"] = "pixart_alpha" if found["micro_condition"] else "pixart_sigma"
    return found


def load_diffusion_model(path: Path) -> PixArt:
    """As comfy.sd's of that name, up to the ModelPatcher. RuntimeError for what it does not know."""
    tensors = dict(read_safetensors(path)[0])
    prefixes = ("model.diffusion_model.", "model.model.", "net.", "model.")
    prefix = next((p for p in prefixes if sum(n.startswith(p) for n in tensors) > 5), "")
    tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    found = detect_unet_config(list(tensors), tensors)
    if found is None:
        raise RuntimeError(f"ERROR: Could not detect model type of: {path}")
    family = PixArtAlpha if found["image_model"] == "pixart_alpha" else PixArtSigma
    model = PixArt(family(found))
    model.load_model_weights(tensors)
    return model


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put the modules where `import comfy...` and `import folder_paths` find them. folder: its
    models/diffusion_models."""
    monkeypatch.setattr(chosen, "dtype", None)
    cpu = torch.device("cpu")
    modules: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.ldm": {},
        "comfy.ldm.modules": {},
        "comfy.ldm.pixart": {},
        "comfy.ldm.modules.attention": {"optimized_attention": optimized_attention},
        "comfy.ldm.pixart.blocks": {"AttentionKVCompress": AttentionKVCompress},
        "comfy.ldm.pixart.pixartms": {"PixArtMS": PixArtMS},
        "comfy.model_base": {"BaseModel": BaseModel, "PixArt": PixArt},
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.supported_models": {"PixArtAlpha": PixArtAlpha, "PixArtSigma": PixArtSigma},
        "comfy.model_management": {
            "get_torch_device": lambda: cpu,
            "unet_offload_device": lambda: cpu,
            "unet_dtype": lambda model_params, supported_dtypes, weight_dtype: (
                chosen.dtype or weight_dtype
            ),
            "unet_manual_cast": lambda dtype, device, supported_dtypes: None,
        },
        "folder_paths": {
            "get_filename_list": lambda kind: sorted(p.name for p in folder.iterdir()),
            "get_full_path_or_raise": lambda kind, name: str(folder / name),
        },
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
