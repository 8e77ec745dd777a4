"""Files of adapters as other programs write them, and such as are meant to do harm."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_model import diffusers_model
from safetensors.torch import save_file
from small_model import build, relative_error
from torch import Tensor

from pixart.checkpoint.names import diffusers_names
from pixart.files import CheckpointError
from pixart.lora.adapters import load_lora, merge_lora, save_lora
from pixart.lora.files import _Pattern, read_adapter
from pixart.model.transformer import PixArt
from pixart.weights import NotFiniteError

pytest.importorskip("peft")
QKV, KV = "blocks.0.attn.qkv", "blocks.1.cross_attn.kv_linear"


def sizes(model: PixArt) -> dict[str, torch.Size]:
    return {
        name: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


SIZES = sizes(build())


def pair(layer: str, rank: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = SIZES[layer]
    a = torch.randn(rank, columns, generator=generator)
    return a, torch.randn(rows, rank, generator=generator)


def product(path: Path, layer: str) -> Tensor:
    adapter = read_adapter(path, SIZES)
    a, b = adapter.factors[layer]
    return adapter.scales[layer] * b.double() @ a.double()


def kohya(folder: Path, name: str, alpha: Tensor, a: Tensor, b: Tensor) -> Path:
    tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": alpha}
    save_file(tensors, folder / "l.safetensors")
    return folder / "l.safetensors"


ALPHAS = [
    torch.tensor(6, dtype=dtype).reshape(shape)
    for dtype, shape in (
        (torch.int64, ()), (torch.int32, (1,)), (torch.uint8, (1, 1)), (torch.float64, (1,)),
        (torch.bfloat16, (1, 1)), (torch.float16, ()), (torch.float8_e4m3fn, ()),
        (torch.float8_e5m2, (1,)),
    )
]  # fmt: skip


@pytest.mark.parametrize("alpha", ALPHAS, ids=lambda a: f"{a.dtype} {tuple(a.shape)}")
def test_an_alpha_may_have_any_real_dtype(tmp_path: Path, alpha: Tensor) -> None:
    a, b = pair(QKV)
    path = kohya(tmp_path, "lora_unet_blocks_0_attn_qkv", alpha, a, b)
    assert relative_error(product(path, QKV), 2 * b.double() @ a.double()) < 1e-6


@pytest.mark.parametrize(
    "alpha",
    [torch.ones(2), torch.zeros(0), torch.tensor(True), torch.tensor(1j), torch.tensor(math.nan)],
    ids=str,
)
def test_what_is_not_one_number_is_no_alpha(tmp_path: Path, alpha: Tensor) -> None:
    path = kohya(tmp_path, "lora_unet_blocks_0_attn_qkv", alpha, *pair(QKV))
    with pytest.raises(
        CheckpointError, match=r"l.safetensors: lora_unet.*alpha must be (one|a) num"
    ):
        read_adapter(path, SIZES)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_an_adapter_in_fp8_is_opened_as_the_numbers_it_has(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    a, b = (half.to(dtype) for half in pair(QKV))
    path = kohya(tmp_path, "lora_unet_blocks_0_attn_qkv", torch.tensor(3.0), a, b)
    expected = b.double() @ a.double()
    assert relative_error(product(path, QKV), expected) < 1e-6
    model = merge_lora(load_lora(build(), [(path, 1.0)]))
    change = model.get_submodule(QKV).weight - build().get_submodule(QKV).weight
    assert relative_error(change.detach(), expected) < 1e-5


PREFIXES = (
    "", "lora_", "lora_unet_", "lora_transformer_", "base_model_model_", "transformer_", "module_",
    "base_model_model_transformer_", "lora_unet_transformer_", "_orig_mod_module_", "model.",
    "base_model.model.", "base_model.model._orig_mod.", "module.transformer.",
    "model.diffusion_model.", "diffusion_model.",
)  # fmt: skip
NAMES = {QKV: "transformer_blocks.0.attn1.to_qkv", KV: "transformer_blocks.1.attn2.to_kv"}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_come_off_and_fused_layers_are_ours(tmp_path: Path, prefix: str) -> None:
    for layer, fused in NAMES.items():
        a, b = pair(layer)
        for name in (layer, fused):
            flat = name if prefix.endswith(".") else name.replace(".", "_")
            path = kohya(tmp_path, prefix + flat, torch.tensor(3), a, b)
            assert relative_error(product(path, layer), b.double() @ a.double()) < 1e-6


def test_fused_layers_are_stacked_as_diffusers_stacks_them(tmp_path: Path) -> None:
    """B's rows in the order in which fuse_projections puts q, k and v."""
    attention = diffusers_model().transformer_blocks[0].attn1
    attention.fuse_projections()
    parts = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
    assert torch.equal(attention.to_qkv.weight, torch.cat(parts))
    assert diffusers_names(f"{QKV}.weight") == tuple(
        f"transformer_blocks.0.attn1.to_{part}.weight" for part in "qkv"
    )


def test_diffusers_export_for_kohya_is_read(tmp_path: Path) -> None:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    state = get_peft_model_state_dict(get_peft_model(diffusers_model(), config))
    for name, ours in (
        ("base_model.model.", "base_model.model."),
        ("", "base_model.model."),
        ("transformer.", "base_model.model."),
    ):
        named = {key.replace(ours, name): tensor for key, tensor in state.items()}
        exported = convert_state_dict_to_kohya(named)
        assert any(t.dtype == torch.int64 for t in exported.values())
        save_file(exported, tmp_path / "k.safetensors")
        theirs = "base_model.model.transformer_blocks.0.attn1.to_q.lora_"
        rows = SIZES[QKV][0] // 3
        q = state[f"{theirs}B.weight"].double() @ state[f"{theirs}A.weight"].double()
        assert relative_error(product(tmp_path / "k.safetensors", QKV)[:rows], q) < 1e-6


PATTERNS = {
    "blocks.0.attn.qkv": True, "attn.qkv": True, "qkv": True, "blocksX0.attn.qkv": False,
    "blocks_0_attn.qkv": False, r"blocks\.0\.attn\.qkv": True, r"attn\.qkv$": True, "kv": False,
    "^blocks.0.attn.qkv": True, "^attn.qkv": False, ".*kv": True, "^.*kv": True, "attn-qkv": False,
    r"attn\-qkv": False, "b.ocks.0.attn.qkv": True, "x.blocks.0.attn.qkv": False,
}  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_names_mean_what_peft_takes_them_for(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    theirs = get_pattern_key([pattern], QKV) == pattern
    assert _Pattern.parse(pattern).fits(QKV) == theirs == PATTERNS[pattern]


def peft_folder(folder: Path, tensors: Mapping[str, Tensor], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "lora_alpha": 3} | settings
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def plain(folder: Path, **settings: Any) -> Path:
    a, b = pair(QKV)
    name = f"base_model.model.{QKV}.lora_"
    return peft_folder(folder / "l", {f"{name}A.weight": a, f"{name}B.weight": b}, **settings)


def _single(name: str, tensors: Mapping[str, Tensor] | None = None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        a, b = pair(QKV)
        own = {f"{QKV}.lora_A.weight": a, f"{QKV}.lora_B.weight": b, name: torch.ones(1)}
        save_file(own, folder / "l.safetensors")
        return folder / "l.safetensors"

    return make


def _metadata(text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        a, b = pair(QKV)
        tensors = {f"{QKV}.lora_A.weight": a, f"{QKV}.lora_B.weight": b}
        save_file(tensors, folder / "l.safetensors", {"lora_adapter_metadata": text})
        return folder / "l.safetensors"

    return make


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "runs for ever": (
        lambda f: plain(f, alpha_pattern={"([a-z0-9_.]+)+!": 1}),
        r"alpha_pattern must name layers .* got '\(\[a-z0-9_",
    ),
    "stars": (lambda f: plain(f, alpha_pattern={".*" * 30 + "x": 1}), "must name layers"),
    "no expression": (lambda f: plain(f, alpha_pattern={"(": 1}), "must name layers"),
    "long": (lambda f: plain(f, alpha_pattern={"a" * 9999: 1}), "must name layers"),
    "many": (
        lambda f: plain(f, alpha_pattern={f"a{i}": 1 for i in range(99_999)}),
        "at most 1024 layers, got 99999",
    ),
    "true": (lambda f: plain(f, alpha_pattern=True), "must be numbers, got 3, True"),
    "zero": (lambda f: plain(f, alpha_pattern=0), "must be numbers, got 3, 0"),
    "true alphas": (lambda f: plain(f, alpha_pattern={"qkv": True}), "must be numbers"),
    "huge": (lambda f: plain(f, lora_alpha=10**400), "must be numbers, got inf"),
    "large": (lambda f: plain(f, lora_alpha=1e38), r"must be up to 1e\+06, got 1e\+38"),
    "a number": (
        _metadata('{"transformer.alpha_pattern": 1e-320}'),
        "must be numbers, got None, 1e-320",
    ),
    "deep": (_metadata('{"a":' * 900 + "1" + "}" * 900), "lora_adapter_metadata: must be nested"),
    "a list": (_metadata("[]"), "must say in lora_adapter_metadata"),
    "deep file": (
        lambda f: (
            (plain(f, a=1), (f / "l" / "adapter_config.json").write_text("[" * 9999)) and f / "l"
        ),
        "adapter_config.json: must be nested at most 64 deep",
    ),
    "another method": (lambda f: plain(f, use_dora=True), "a plain LoRA, got use_dora True"),
    "after words": (
        lambda f: plain(f, alora_invocation_tokens=[1]),
        r"a plain LoRA, got alora_invocation_tokens \[1\]",
    ),
    "rslora": (lambda f: plain(f, use_rslora="no"), "use_rslora must be true or false, got 'no'"),
    "embeddings": (
        _single("bundle_emb.cat.string_to_param.*"),
        r"embeddings of new words \(bundle_emb.cat.string_to_param",
    ),
    "an alpha alone": (_single("blocks.1.mlp.fc1.alpha"), "an alpha alone: blocks.1.mlp.fc1$"),
    "fused twice": (
        lambda f: kohya(f, "transformer_blocks_0_attn2_to_qkv", torch.ones(()), *pair(QKV)),
        "layers that this model does not have: transformer_blocks_0_attn2_to_qkv",
    ),
    "many wrappers": (
        lambda f: kohya(f, "lora_" * 100_000 + "blocks_0_attn_qkv", torch.ones(()), *pair(QKV)),
        "layers that this model does not have",
    ),
}


@pytest.mark.parametrize(("make", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_adapter_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], Path], reason: str
) -> None:
    path = make(tmp_path)
    began = time.process_time()
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_adapter(path, SIZES)
    assert time.process_time() - began < 2
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 20_000


def test_adapters_that_are_not_finite_are_neither_loaded_nor_saved(tmp_path: Path) -> None:
    a, b = pair(QKV)
    b[1, 1] = math.inf
    path = kohya(tmp_path, "lora_unet_blocks_0_attn_qkv", torch.tensor(3), a, b)
    with pytest.raises(NotFiniteError, match="l.safetensors: must be finite, .*qkv.lora_up.weight"):
        load_lora(build(), [(path, 1.0)])
    model = load_lora(build(), [(plain(tmp_path), 1.0)])
    parameters = dict(model.named_parameters())
    parameters[f"{QKV}.lora_B.lora0.weight"].data[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="the adapter to be saved as .*lora_B.weight"):
        save_lora(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_sum_that_the_weights_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = load_lora(build().half(), [(plain(tmp_path), 1e6)])
    with pytest.raises(ValueError, match=f"{QKV} with its adapters must fit into float16"):
        merge_lora(model)
    model = load_lora(build(), [(plain(tmp_path), 1e39)])
    with pytest.raises(ValueError, match=f"{QKV} with its adapters must be finite, got NaN"):
        merge_lora(model)
