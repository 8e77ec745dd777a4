import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pixart.config import KVCompression, PixArtConfig
from pixart.model import PixArt

SMALL = {
    "input_size": 16,
    "hidden_size": 144,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": 48,
    "model_max_length": 12,
}
PARITY_TOLERANCE = 1e-5  # of the norm, in fp32


def build(seed: int = 0, **changes: Any) -> PixArt:
    """A small model in eval mode, whose output depends on all of its parameters."""
    model = PixArt(PixArtConfig(**(SMALL | changes)))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def inputs(batch: int = 2, height: int = 10, width: int = 14, length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, height, width, generator=generator)
    caption = torch.randn(batch, length, 48, generator=generator)
    return [latents, torch.linspace(13.5, 999, batch), caption]


def sizes(batch: int = 2) -> dict[str, Tensor]:
    return {
        "image_size": torch.tensor([[80.0, 112.0]]).repeat(batch, 1),
        "aspect_ratio": torch.full((batch, 1), 80 / 112),
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("micro_condition", [False, True])
def test_the_model_equals_diffusers(micro_condition: bool) -> None:
    from diffusers import PixArtTransformer2DModel

    from pixart.checkpoint_names import to_diffusers

    model = build(micro_condition=micro_condition, pe_interpolation=2.0, depth=3)
    theirs = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=3,
        attention_head_dim=72,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=144,
        caption_channels=48,
        interpolation_scale=2,
        use_additional_conditions=micro_condition,
    ).eval()
    state = {name: t for name, t in model.state_dict().items() if "y_embedding" not in name}
    theirs.load_state_dict(to_diffusers(state))
    latents, timesteps, caption = inputs()
    mask = torch.arange(12) < torch.tensor([[7], [3]])
    conditions = sizes() if micro_condition else {"image_size": None, "aspect_ratio": None}
    # diffusers takes timesteps of any shape but embeds them as they come, so fractions too.
    expected = theirs(
        latents,
        encoder_hidden_states=caption,
        timestep=timesteps,
        added_cond_kwargs={
            "resolution": conditions["image_size"],
            "aspect_ratio": conditions["aspect_ratio"],
        },
        encoder_attention_mask=mask.float(),
    ).sample
    actual = model(latents, timesteps, caption, mask, **conditions)
    assert relative_error(actual, expected) < PARITY_TOLERANCE


def test_a_new_model_returns_zeros_of_the_published_shape() -> None:
    model = PixArt(PixArtConfig(**SMALL))
    assert model(*inputs()).shape == (2, 8, 10, 14)
    assert model(*inputs()).count_nonzero() == 0
    assert PixArt(PixArtConfig(**SMALL, pred_sigma=False))(*inputs()).shape == (2, 4, 10, 14)


def test_the_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    compression = KVCompression((1,), 2)
    wide = {"hidden_size": 288, "num_heads": 4, "caption_channels": 256, "micro_condition": True}
    model = PixArt(PixArtConfig(**(SMALL | wide), kv_compression=compression))
    state = model.state_dict()
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1", "csize_embedder.mlp.2"):
        assert state[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "ar_embedder.mlp.0"):
        assert state[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    for name, fans in (
        ("attn.qkv", 4),
        ("attn.proj", 2),
        ("cross_attn.kv_linear", 3),
        ("mlp.fc2", 5),
    ):
        bound = (6 / (fans * 288)) ** 0.5  # xavier, over the fused matrix as a whole
        weight = state[f"blocks.0.{name}.weight"]
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    patch = state["x_embedder.proj.weight"]
    assert patch.abs().max().item() == pytest.approx((6 / (288 + 16)) ** 0.5, rel=0.01)
    assert state["x_embedder.proj.bias"].abs().max().item() == pytest.approx(0.25, rel=0.05)
    for name in ("blocks.0.scale_shift_table", "final_layer.scale_shift_table"):
        assert state[name].std().item() == pytest.approx(288**-0.5, rel=0.1)
    assert state["y_embedder.y_embedding"].std().item() == pytest.approx(1 / 16, rel=0.05)
    assert (state["blocks.1.attn.sr.weight"] == 0.25).all()
    zeros = (
        "blocks.1.attn.sr.bias",
        "blocks.0.cross_attn.proj.weight",
        "final_layer.linear.weight",
    )
    assert all(state[name].count_nonzero() == 0 for name in zeros)


def test_a_model_made_without_memory_can_be_initialised_later() -> None:
    config = PixArtConfig(**SMALL, qk_norm=True, kv_compression=KVCompression((0,), 2))
    with torch.device("meta"):
        model = PixArt(config)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    model.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert model(*inputs()).count_nonzero() == 0


@pytest.mark.parametrize(
    ("changes", "parameters", "tensors"),
    [
        ({}, 610_856_096, 436),
        ({"micro_condition": True, "model_max_length": 120}, 611_349_152, 444),
        ({"kv_compression": KVCompression(range(14, 28))}, 610_968_992, 492),
    ],
)
def test_the_full_model_has_the_published_tensors(
    changes: dict[str, Any], parameters: int, tensors: int
) -> None:
    with torch.device("meta"):
        model = PixArt(PixArtConfig(**changes))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors  # published files also hold pos_embed


KEPT = [[0, 1, 2, 3, 4], [1, 3, 4, 9], [11], list(range(12))]


def mask_of(kept: list[list[int]]) -> Tensor:
    mask = torch.zeros(len(kept), 12, dtype=torch.int64)
    for row, tokens in zip(mask, kept, strict=True):
        row[tokens] = 1
    return mask


def test_masked_caption_tokens_do_not_matter_wherever_they_are() -> None:
    model = build()
    latents, timesteps, caption = inputs(batch=4)
    mask = mask_of(KEPT)
    expected = model(latents, timesteps, caption, mask)
    spoiled = caption.masked_fill(mask.unsqueeze(2) == 0, 1e3)
    assert torch.equal(model(latents, timesteps, spoiled, mask), expected)
    for index, tokens in enumerate(KEPT):
        one = slice(index, index + 1)
        alone = model(latents[one], timesteps[one], caption[one, tokens])
        assert relative_error(alone, expected[one]) < PARITY_TOLERANCE


def test_masks_of_every_accepted_form_mean_the_same() -> None:
    model = build()
    latents, timesteps, caption = inputs()
    mask = mask_of(KEPT[:2])
    expected = model(latents, timesteps, caption, mask)
    for form in (mask.bool(), mask.float(), mask[:, None, None], mask[:, None].to(torch.int16)):
        assert torch.equal(model(latents, timesteps, caption, form), expected)
    assert torch.equal(model(latents, timesteps, caption.unsqueeze(1), mask), expected)
    every = model(latents, timesteps, caption, torch.ones(2, 12))
    assert torch.equal(every, model(latents, timesteps, caption))


def test_a_caption_without_tokens_adds_only_a_bias() -> None:
    model = build()
    latents, timesteps, caption = inputs()
    nothing = torch.zeros(2, 12)
    expected = model(latents, timesteps, caption, nothing)
    assert expected.isfinite().all()
    assert torch.equal(model(latents, timesteps, caption + 1, nothing), expected)
    one_of_two = model(latents, timesteps, caption, mask_of([[], [0, 1]]))
    assert relative_error(one_of_two[:1], expected[:1]) < PARITY_TOLERANCE


def test_a_mask_with_fewer_rows_is_repeated_in_turn() -> None:
    model = build()
    arguments = inputs(batch=4)
    mask = mask_of(KEPT[:2])
    assert torch.equal(model(*arguments, mask), model(*arguments, mask.repeat(2, 1)))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = build(kv_compression=KVCompression((0, 1), 2), qk_norm=True)
    latents, timesteps, caption = inputs(batch=3)
    mask = mask_of(KEPT[:3])
    together = model(latents, timesteps, caption, mask)
    for index in range(3):
        one = slice(index, index + 1)
        alone = model(latents[one], timesteps[one], caption[one], mask[one])
        assert relative_error(alone, together[one]) < PARITY_TOLERANCE


def test_one_timestep_serves_the_whole_batch() -> None:
    model = build()
    latents, _, caption = inputs()
    expected = model(latents, torch.tensor([500.0, 500.0]), caption)
    for timestep in (torch.tensor(500), torch.tensor([500.0]), torch.tensor([500, 500])):
        assert torch.equal(model(latents, timestep, caption), expected)


def test_timesteps_are_not_rounded_to_the_models_dtype() -> None:
    model = build().bfloat16()
    latents, _, caption = inputs(batch=1)
    seen = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, waves: seen.append(waves[0]))
    for timestep in (999.0, 1000.0, 949.05, 949.0):
        model(latents, torch.tensor([timestep]), caption)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[2], seen[3])
    assert seen[0].dtype == torch.bfloat16


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
    import pixart.model

    seen = []
    attention = pixart.model.flash_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q.shape[1], k.shape[1]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(pixart.model, "flash_attention", spy)
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


def test_a_new_learned_merge_is_the_average() -> None:
    average = build(kv_compression=KVCompression((0, 1), 2, "average"))
    conv = PixArt(
        average.config.__class__(**SMALL, kv_compression=KVCompression((0, 1), 2, norm="none"))
    )
    conv.load_state_dict(average.state_dict(), strict=False)
    assert relative_error(average(*inputs()), conv.eval()(*inputs())) < PARITY_TOLERANCE


def test_caption_dropout_gives_the_null_caption_under_the_same_mask() -> None:
    model = build(class_dropout_prob=1.0)
    latents, timesteps, caption = inputs(length=9)
    mask = mask_of(KEPT[:2])[:, :9]
    null = model.y_embedder.y_embedding[:9].expand(2, -1, -1)
    expected = model(latents, timesteps, null, mask)
    assert not torch.equal(model(latents, timesteps, caption, mask), expected)
    assert torch.equal(model.train()(latents, timesteps, caption, mask), expected)


def test_caption_dropout_is_drawn_for_each_sample() -> None:
    model = build(class_dropout_prob=0.5)
    latents, timesteps, caption = (x[:1].expand(64, *x.shape[1:]) for x in inputs(batch=1))
    torch.manual_seed(0)
    outputs = model.train()(latents[..., :2, :2], timesteps, caption)
    dropped = (outputs - outputs[0]).flatten(1).norm(dim=1) > 1e-3
    assert 10 < dropped.sum() < 54
    model = build(class_dropout_prob=0.0).train()
    assert torch.equal(model(*inputs()), model.eval()(*inputs()))


def test_position_tables_are_built_once_per_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    import pixart.embedders

    built = []
    table = pixart.embedders.position_embedding

    def spy(dim: int, grid: tuple[int, int], *rest: Any) -> Tensor:
        built.append(grid)
        return table(dim, grid, *rest)

    monkeypatch.setattr(pixart.embedders, "position_embedding", spy)
    model = build()
    for _ in range(2):
        model(*inputs())
        model(*inputs(height=14, width=10))
    assert built == [(5, 7), (7, 5)]
    for width in range(2, 40, 2):
        model(*inputs(height=4, width=width))
    assert len(model.position_tables.tables) == 8


def test_copies_and_files_carry_no_position_table() -> None:
    model = build()
    expected = model(*inputs())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.position_tables.tables
        assert torch.equal(twin(*inputs()), expected)
    assert not any("pos" in name for name in model.state_dict())


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_no_gradient(every: int) -> None:
    gradients = []
    for checkpointed in (0, every):
        model = build(depth=3, class_dropout_prob=0.0).train()
        model.gradient_checkpointing = checkpointed
        model(*inputs(), mask_of(KEPT[:2])).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_every_parameter_gets_a_finite_gradient_under_autocast() -> None:
    model = build(kv_compression=KVCompression((1,), 2), qk_norm=True, micro_condition=True)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = model(*inputs(), mask_of(KEPT[:2]), **sizes())
    lowered.float().square().mean().backward()
    assert lowered.dtype == torch.bfloat16
    full = model(*inputs(), mask_of(KEPT[:2]), **sizes())
    assert relative_error(lowered, full) < 0.03
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("masked", [True, False])
def test_the_model_compiles_into_one_graph(masked: bool) -> None:
    model = build(kv_compression=KVCompression((1,), 2), qk_norm=True)
    mask = mask_of(KEPT[:2]) if masked else None
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(*inputs(), mask)
    assert relative_error(compiled(*inputs(), mask), expected) < PARITY_TOLERANCE


def test_loading_needs_neither_positions_nor_null_caption() -> None:
    model, other = build(seed=0), build(seed=1)
    state = model.state_dict() | {"pos_embed": torch.zeros(1, 9, 144)}
    null = other.y_embedder.y_embedding.clone()
    del state["y_embedder.y_embedding"]
    other.load_official(state)
    assert torch.equal(other(*inputs()), model(*inputs()))
    assert torch.equal(other.y_embedder.y_embedding, null)


def test_loading_lists_every_tensor_that_does_not_fit_and_loads_none() -> None:
    model = build(seed=1)
    before = copy.deepcopy(model.state_dict())
    state = build(seed=0).state_dict()
    del state["t_block.1.bias"]
    state["blocks.0.attn.sr.weight"] = torch.zeros(144, 1, 2, 2)
    state["final_layer.linear.bias"] = torch.zeros(16)
    with pytest.raises(ValueError) as error:
        model.load_official(state)
    assert "missing t_block.1.bias" in str(error.value)
    assert "unexpected blocks.0.attn.sr.weight" in str(error.value)
    assert "final_layer.linear.bias of shape (16,) for (32,)" in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


LATENTS, TIMESTEPS, CAPTION = inputs()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LATENTS[:, :3], TIMESTEPS, CAPTION), r"latents must be \(B, 4, h, w\), got \(2, 3"),
        ((LATENTS[0], TIMESTEPS, CAPTION), "latents must be"),
        ((LATENTS[..., :13], TIMESTEPS, CAPTION), r"multiples of patch_size 2, got \(10, 13\)"),
        ((LATENTS[..., :0], TIMESTEPS, CAPTION), "multiples of patch_size 2"),
        ((LATENTS, TIMESTEPS[:0], CAPTION), r"timesteps must be one or 2, got \(0,\)"),
        ((LATENTS, TIMESTEPS, CAPTION[..., :40]), r"caption must be \(2, L, 48\), got \(2, 12, 40"),
        ((LATENTS, TIMESTEPS, CAPTION[:1]), r"caption must be \(2, L, 48\), got \(1"),
        ((LATENTS, TIMESTEPS, CAPTION, torch.ones(2, 11)), r"caption_mask must be \(2, 12\), got"),
        ((LATENTS, TIMESTEPS, CAPTION, torch.ones(24)), r"caption_mask must be \(2, 12\), got"),
        ((LATENTS, TIMESTEPS, CAPTION, torch.ones(3, 12)), "must divide the batch 2, got 3"),
        ((LATENTS, TIMESTEPS, CAPTION, None, torch.ones(2, 2)), "image_size must be None for"),
        (
            (LATENTS, TIMESTEPS, CAPTION, None, None, torch.ones(2, 1)),
            "aspect_ratio must be None for",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(*arguments)


def test_a_micro_conditioned_model_needs_both_sizes_and_uses_them() -> None:
    model = build(micro_condition=True)
    both = sizes()
    expected = model(*inputs(), **both)
    for name, rows in both.items():
        with pytest.raises(ValueError, match=f"{name} must be given to"):
            model(*inputs(), **(both | {name: None}))
        with pytest.raises(ValueError, match=rf"{name} must be \(2, {rows.shape[1]}\), got"):
            model(*inputs(), **(both | {name: rows.repeat(1, 2)}))
        assert relative_error(model(*inputs(), **(both | {name: rows * 2})), expected) > 1e-3
        assert torch.equal(model(*inputs(), **(both | {name: rows[:1]})), expected)
    swapped = {**both, "image_size": both["image_size"].flip(1)}
    assert relative_error(model(*inputs(), **swapped), expected) > 1e-3


def test_a_training_caption_longer_than_the_null_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="caption must have at most 12 tokens to train, got 13"):
        build().train()(*inputs(length=13))
    assert build()(*inputs(length=13)).isfinite().all()


FULL_SIZE_STEP = """
import resource, sys, torch
from pixart.config import KVCompression, PixArtConfig
from pixart.model import PixArt
height, width, compressed = (int(argument) for argument in sys.argv[1:])
compression = KVCompression(range(14, 28)) if compressed else None
with torch.device("meta"):
    model = PixArt(PixArtConfig(pe_interpolation=2.0, kv_compression=compression)).bfloat16()
model.to_empty(device="cpu").eval()
for tensor in model.state_dict().values():
    torch.nn.init.uniform_(tensor, -0.03, 0.03)
mask = torch.arange(300) < 120
with torch.inference_mode():
    latents, caption = torch.randn(1, 4, height // 8, width // 8), torch.randn(1, 300, 4096)
    out = model(latents, torch.tensor([500.0]), caption, mask[None])
assert out.shape == (1, 8, height // 8, width // 8) and out.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(
    ("height", "width", "compressed"), [(1024, 1024, False), (2160, 3840, True)]
)
def test_a_step_of_the_full_model_fits_in_memory(height: int, width: int, compressed: bool) -> None:
    arguments = [str(height), str(width), str(int(compressed))]
    command = [sys.executable, "-c", FULL_SIZE_STEP, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Weights are 1.2 GB. 32,400² scores of one head would be 2 GB.
    assert float(done.stdout) < 4
