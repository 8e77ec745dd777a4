"""Adapters on a small model: what they add, the files that hold them, and what is refused."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_model import diffusers_model
from diffusers_model import run as run_diffusers
from safetensors.torch import load_file, save_file
from small_model import PARITY_TOLERANCE, build, inputs, relative_error
from torch import Tensor, nn

from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.config import KVCompression
from pixart.files import CheckpointError, CheckpointWriteError
from pixart.lora.adapters import TARGETS, add_lora, load_lora, merge_lora, parse_lora, save_lora
from pixart.model.transformer import PixArt

pytest.importorskip("peft")
# Drawing, K and V of such a block are one product with their merging.
FOLDED: dict[str, Any] = {"kv_compression": KVCompression((1,), 2)}
EVERYWHERE = (*TARGETS, "x_embedder.proj", "t_block.1", "t_embedder.mlp.0", "y_proj.fc1")


def adapted(targets: tuple[str, ...] = EVERYWHERE, seed: int = 3, **changes: Any) -> PixArt:
    """A small model with an adapter that changes what it computes."""
    model = add_lora(build(**changes), 4, 6.0, targets)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


@pytest.fixture(autouse=True)
def few_tokens_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixart.model.folding.FOLDED_TOKENS", 1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_lora(adapted(), tmp_path / "lora")
    return tmp_path / "lora"


@torch.no_grad()
def run(model: PixArt) -> Tensor:
    """Without a gradient, as pictures are drawn: where folded products and fused GELU are taken."""
    return model(*inputs(height=12, width=16))


def weight(model: PixArt, layer: str) -> Tensor:
    module: Any = model.get_submodule(layer)
    return module.weight.detach()


def update(folder: Path, layer: str) -> Tensor:
    """What the adapter adds to a weight, from the definition."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{layer}.lora_{kind}.weight"] for kind in "AB")
    return 6 / 4 * (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])


def test_a_new_adapter_changes_nothing_and_alone_trains() -> None:
    model, x = build(), inputs()
    before = model(*x)
    add_lora(model, 4)
    assert torch.equal(model(*x), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(TARGETS) * 2 and all(".lora_" in name for name in trained)
    model(*x).sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("changes", [{}, FOLDED], ids=["dense", "compressed"])
def test_unmerged_and_merged_compute_what_the_changed_weights_do(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    save_lora(adapted(**changes), tmp_path / "lora")
    base, expected = build(**changes), build(**changes)
    before = run(base)  # folds the weights as they are
    for name, _ in expected.named_modules():
        if any(f".{name}".endswith(f".{target}") for target in EVERYWHERE):
            weight(expected, name).add_(update(tmp_path / "lora", name))
    wanted = run(expected)
    assert relative_error(wanted, before) > 0.1
    load_lora(base, [(tmp_path / "lora", 1.0)])
    assert relative_error(run(base), wanted) < PARITY_TOLERANCE
    merge_lora(base)
    assert relative_error(run(base), wanted) < PARITY_TOLERANCE
    assert all(p.requires_grad for p in base.parameters())
    assert list(base.state_dict()) == list(expected.state_dict())


def test_weight_0_is_the_model_itself_bit_for_bit(saved: Path) -> None:
    model = build(**FOLDED)
    before = run(model)
    load_lora(model, [(saved, 0.0)])
    assert torch.equal(run(model), before)
    assert torch.equal(run(merge_lora(model)), before)


def test_adapters_add_up_by_their_weights(tmp_path: Path, saved: Path) -> None:
    save_lora(adapted(("mlp.fc2", "attn.proj"), seed=5), tmp_path / "other")
    model = merge_lora(load_lora(build(), [(saved, 0.5), (tmp_path / "other", -2.0)]))
    plain = build()
    for layer, both in (("blocks.0.attn.qkv", False), ("blocks.1.mlp.fc2", True)):
        wanted = weight(plain, layer) + 0.5 * update(saved, layer)
        if both:
            wanted = wanted - 2 * update(tmp_path / "other", layer)
        assert relative_error(weight(model, layer), wanted) < 1e-6
    gone = load_lora(build(), [(saved, 1.0)])
    load_lora(gone, [(saved, -1.0)])  # one after the other is the same as at once
    assert relative_error(run(gone), run(plain)) < PARITY_TOLERANCE


def test_merging_into_16_bits_rounds_once(saved: Path) -> None:
    model = build().bfloat16()
    exact = weight(model, "blocks.0.attn.qkv").double()
    exact = exact + 2 * update(saved, "blocks.0.attn.qkv").double()
    merge_lora(load_lora(model, [(saved, 1.0), (saved, 1.0)]))
    merged = weight(model, "blocks.0.attn.qkv")
    assert merged.dtype == torch.bfloat16
    half_a_step = 2**-8 * 1.001 * exact.abs() + 1e-7  # of bf16, and rounding of the sum in fp32
    assert ((merged - exact).abs() <= half_a_step).all()


def test_merging_again_before_the_next_picture_renews_what_was_folded(saved: Path) -> None:
    model = build(**FOLDED)
    before = run(model)
    held = model.get_submodule("blocks.1.attn.qkv").weight
    for share in (0.5, 0.5):  # the second sum may come to lie where the first weights lay
        merge_lora(load_lora(model, [(saved, share)]))
    assert model.get_submodule("blocks.1.attn.qkv").weight is not held
    with torch.enable_grad():  # where nothing is folded
        wanted = model(*inputs(height=12, width=16))
    assert relative_error(run(model), wanted.detach()) < PARITY_TOLERANCE
    assert relative_error(before, wanted.detach()) > 0.1


def test_a_saved_adapter_computes_the_same_here_and_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted()
    save_lora(model, tmp_path / "lora")
    save_lora(model, tmp_path / "lora")  # over its own
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "adapter_config.json", "adapter_model.safetensors", "lora",
    ]  # fmt: skip
    assert torch.equal(run(load_lora(build(), [(tmp_path / "lora", 1.0)])), run(model))
    assert torch.equal(
        run(PeftModel.from_pretrained(build(), tmp_path / "lora").eval()), run(model)
    )


# The last are those of the published LoRA script; its "proj" adapts the patch embedding as well.
THEIRS = {
    "q alone": ["attn1.to_q"],
    "q and v": ["to_q", "to_v"],
    "all": [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj",
        "linear",
        "linear_1",
        "linear_2",
        "ff.net.2",
    ],
}


def theirs(tmp_path: Path, targets: list[str], **settings: Any) -> tuple[PixArt, Tensor]:
    """Our model of a diffusers model, and what that computes with an adapter, saved in "theirs"."""
    from peft import LoraConfig, get_peft_model

    model = diffusers_model()
    model.save_pretrained(tmp_path / "base")
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | settings
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(target_modules=targets, **options))
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    with torch.no_grad():
        return load_transformer(tmp_path / "base"), run_diffusers(model)


@torch.no_grad()
def ours(model: PixArt) -> Tensor:
    return model(*inputs())


@pytest.mark.parametrize("targets", THEIRS.values(), ids=THEIRS)
def test_adapters_of_diffusers_models_are_taken_exactly(tmp_path: Path, targets: list[str]) -> None:
    model, wanted = theirs(tmp_path, targets, alpha_pattern={"attn1.to_q": 3})
    before = ours(model)
    load_lora(model, [(tmp_path / "theirs", 1.0)])
    assert relative_error(ours(model), wanted) < PARITY_TOLERANCE < relative_error(before, wanted)
    assert relative_error(ours(merge_lora(model)), wanted) < PARITY_TOLERANCE


def test_an_alpha_over_the_root_of_the_rank_is_taken(tmp_path: Path) -> None:
    model, wanted = theirs(tmp_path, THEIRS["q and v"], use_rslora=True)
    assert relative_error(ours(load_lora(model, [(tmp_path / "theirs", 1.0)])), wanted) < 1e-5


def _as_diffusers(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name.replace("base_model.model", "transformer"): tensor}


def _as_kohya(name: str, tensor: Tensor) -> dict[str, Tensor]:
    layer, kind, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
    flat = "lora_transformer_" + layer.replace(".", "_")
    half = {"lora_A": "lora_down", "lora_B": "lora_up"}[kind]
    return {f"{flat}.{half}.weight": tensor, f"{flat}.alpha": torch.tensor(6.0)}


@pytest.mark.parametrize("write", [_as_diffusers, _as_kohya])
def test_single_files_are_taken_with_their_own_alpha(
    tmp_path: Path, write: Callable[[str, Tensor], dict[str, Tensor]]
) -> None:
    model, wanted = theirs(tmp_path, THEIRS["all"])
    written: dict[str, Tensor] = {}
    for name, tensor in load_file(tmp_path / "theirs" / "adapter_model.safetensors").items():
        written |= write(name, tensor)
    stored = {"transformer.r": 4, "transformer.lora_alpha": 6}
    metadata = {"lora_adapter_metadata": json.dumps(stored)} if write is _as_diffusers else None
    (tmp_path / "one").mkdir()
    file = tmp_path / "one" / "pytorch_lora_weights.safetensors"
    save_file(written, file, metadata)
    for place in (file, file.parent):
        opened = load_lora(load_transformer(tmp_path / "base"), [(place, 1.0)])
        assert relative_error(ours(opened), wanted) < PARITY_TOLERANCE


def _edit(folder: Path, **changes: Any) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def _change(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


QKV = "base_model.model.blocks.0.attn.qkv"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no LoRA"),
    "no configuration": (
        lambda f: (f / "adapter_config.json").unlink(),
        "lacks the adapter_config",
    ),
    "cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{"),
        "truncated or damaged",
    ),
    "a pickle": (
        lambda f: torch.save({}, f / "adapter_model.safetensors"),
        "must be a safetensors",
    ),
    "another method": (
        lambda f: _edit(f, peft_type="LOHA"),
        "must be a LoRA, got peft_type 'LOHA'",
    ),
    "changed weights": (
        lambda f: _edit(f, init_lora_weights="pissa"),
        "got init_lora_weights 'pissa'",
    ),
    "alpha a word": (lambda f: _edit(f, lora_alpha="two"), "must be numbers, got 'two'"),
    "alpha no number": (lambda f: _edit(f, lora_alpha=math.nan), "must be numbers, got nan"),
    "patterns a list": (lambda f: _edit(f, alpha_pattern=["x"]), "must be numbers, got"),
    "DoRA": (
        lambda f: _change(f, lambda t: t.update({f"{QKV}.lora_magnitude_vector": torch.ones(432)})),
        "nothing but pairs of A and B, got .*lora_magnitude_vector",
    ),
    "half a pair": (
        lambda f: _change(f, lambda t: t.pop(f"{QKV}.lora_B.weight")),
        r"attn.qkv must have A and B, got no B",
    ),
    "not a number": (
        lambda f: _change(f, lambda t: t[f"{QKV}.lora_B.weight"].fill_(torch.nan)),
        "must be finite, got NaN or infinity in .*qkv.lora_B.weight;",
    ),
    "a text encoder": (
        lambda f: _change(f, lambda t: t.update({"encoder.q.lora_A.weight": torch.ones(4, 8)})),
        "layers that this model does not have: encoder.q$",
    ),
    "twice": (
        lambda f: _change(f, lambda t: t.update({f"transformer.{k}": v + 0 for k, v in t.items()})),
        "has several adapters for",
    ),
    "nothing": (lambda f: _change(f, lambda t: t.clear()), "got no tensors"),
}


@pytest.mark.parametrize(("damage", "reason"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_plain_lora_is_refused_in_one_line_and_the_model_stays(
    saved: Path, tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    save_lora(adapted(), tmp_path / "good")
    damage(saved)
    model = build()
    names = list(model.state_dict())
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_lora(model, [(tmp_path / "good", 1.0), (saved, 1.0)])
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)
    assert list(model.state_dict()) == names


def test_an_adapter_for_another_model_is_refused_also_at_weight_0(saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"must fit weights of \(72, .*made for another model"
    ):
        load_lora(build(hidden_size=72, num_heads=1), [(saved, 0.0)])
    with pytest.raises(CheckpointError, match=r"does not have: .*blocks\.1\.attn\.qkv"):
        load_lora(build(depth=1), [(saved, 1.0)])
    with pytest.raises(CheckpointError, match="absent: no such file or directory"):
        load_lora(build(), [(saved, 1.0), ("absent", 1.0)])
    with pytest.raises(ValueError, match="weight of .* must be a finite number, got nan"):
        load_lora(build(), [(saved, float("nan"))])


def test_adapters_that_cannot_be_made_are_refused() -> None:
    model = build()
    for options, reason in (
        (
            {"targets": ["attn.qkv", "to_q"]},
            "targets must be among .*attn.qkv, .*mlp.fc2.*, got to_q$",
        ),
        ({"targets": []}, "targets must be among .*, got none$"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be a positive number, got 0.0"),
    ):
        with pytest.raises(ValueError, match=reason):
            add_lora(model, **({"rank": 4} | options))  # type: ignore[arg-type]
    add_lora(model, 4)
    with pytest.raises(ValueError, match="model must have no adapter yet"):
        add_lora(model, 4)


def test_only_a_whole_model_is_saved_as_one(tmp_path: Path, saved: Path) -> None:
    model = load_lora(build(), [(saved, 1.0)])
    with pytest.raises(ValueError, match="model must be plain, got 1 LoRA"):
        save_transformer(model, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
    save_transformer(merge_lora(model), tmp_path / "m.safetensors")
    assert torch.equal(run(load_transformer(tmp_path / "m.safetensors")), run(model))
    with pytest.raises(ValueError, match="one adapter to save, got 0"):
        save_lora(model, tmp_path / "none")


def test_an_adapter_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other files .notes.txt"):
        save_lora(adapted(), tmp_path / "full")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pixart.lora.adapters.write_safetensors", full)
    with pytest.raises(CheckpointWriteError, match="No space left on device"):
        save_lora(adapted(), tmp_path / "new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "notes.txt"]


def test_without_peft_the_extra_is_named(saved: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for use in (lambda: add_lora(build(), 4), lambda: load_lora(build(), [(saved, 1.0)])):
        with pytest.raises(ValueError, match=r"pip install 'pixart-fast\[lora\]'"):
            use()
    assert (
        merge_lora(load_lora(build(), [])).config == build().config
    )  # nothing to do needs nothing


def test_a_path_is_told_from_its_weight(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd:0.5").mkdir()
    assert parse_lora("a/b") == ("a/b", 1.0)
    assert parse_lora("a/b:0.5") == ("a/b", 0.5)
    assert parse_lora("owner/name:-1") == ("owner/name", -1.0)
    assert parse_lora("odd:0.5") == ("odd:0.5", 1.0) and parse_lora("odd:0.5:2") == ("odd:0.5", 2.0)
    for wrong in ("a:half", "a:nan", "a:inf", "a:", ":1", ""):
        with pytest.raises(ValueError, match="--lora must be PATH or PATH:WEIGHT"):
            parse_lora(wrong)
