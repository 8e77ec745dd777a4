"""accelerate() and restore() on diffusers' own model: what they change, and what they must not."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_model import (
    TOLERANCE,
    arguments,
    count_calls,
    diffusers_model,
    in_float64,
    masks,
    run,
    snapshot,
)
from diffusers_model import kernels_can_run as kernels_can_run  # a fixture
from small_model import build, inputs, relative_error
from torch import Tensor, nn

import pixart.patch
from pixart.config import KVCompression
from pixart.patch import accelerate, restore

OBSTACLE = "the kernels need a GPU"


@pytest.mark.parametrize("micro_condition", [False, True])
@pytest.mark.parametrize("mask", masks())
def test_an_accelerated_model_computes_what_it_did_before(
    mask: str, micro_condition: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = diffusers_model(micro_condition)
    exact = in_float64(model, masks()[mask])
    error = relative_error(run(model, masks()[mask]), exact)
    assert accelerate(model) is model
    attention = count_calls(monkeypatch, "flash_attention")
    passes = count_calls(monkeypatch, "gate_add_modulate")
    actual = run(model, masks()[mask])
    assert relative_error(actual, exact) <= 2 * error + torch.finfo(torch.float32).eps
    assert len(passes) == 2
    assert len(attention) == (2 if mask == "bias" else 4)  # self-attention, and captions


def test_a_model_without_a_caption_projection_is_taken_as_it_is() -> None:
    model = diffusers_model(caption_channels=None)
    values = {"encoder_hidden_states": torch.randn(2, 12, 144)}
    before = run(model, masks()["prefix"], **values)
    assert relative_error(run(accelerate(model), masks()["prefix"], **values), before) < TOLERANCE


@pytest.mark.parametrize("mask", ["prefix", "scattered", "bias"])
def test_gradients_are_those_of_before(mask: str) -> None:
    model = diffusers_model()

    def gradients() -> list[Tensor]:
        latents, _, caption = (tensor.requires_grad_() for tensor in inputs())
        out = run(model, masks()[mask], hidden_states=latents, encoder_hidden_states=caption)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        model.zero_grad()
        return list(
            torch.autograd.grad((out * weights).sum(), [latents, caption, *model.parameters()])
        )

    expected = gradients()
    accelerate(model)
    names = ["latents", "caption", *(name for name, _ in model.named_parameters())]
    for name, actual, wanted in zip(names, gradients(), expected, strict=True):
        # Absolute too: a key's bias shifts all logits alike, so that its true gradient is zero.
        close = torch.allclose(actual, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
        assert close or (actual - wanted).abs().max() < 1e-3, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_error_is_at_most_twice_that_of_diffusers(dtype: torch.dtype) -> None:
    model, mask = diffusers_model().to(dtype), masks()["scattered"]
    latents, timesteps, caption = (tensor.to(dtype) for tensor in inputs())
    given = {"hidden_states": latents, "encoder_hidden_states": caption, "timestep": timesteps}
    with torch.no_grad():
        exact = in_float64(model, mask, **given)
        error = relative_error(run(model, mask, **given), exact)
        accelerated = run(accelerate(model), mask, **given)
    assert accelerated.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2
    assert relative_error(accelerated, exact) <= 2 * error + rounding


def test_autocast_keeps_the_residual_stream_in_the_dtype_that_diffusers_gives_it() -> None:
    model = diffusers_model()
    exact = run(model, masks()["prefix"])
    outputs = []
    for change in (lambda model: model, accelerate):
        change(model)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(run(model, masks()["prefix"]))
    assert outputs[0].dtype == outputs[1].dtype
    assert relative_error(outputs[1], exact) <= 1.5 * relative_error(outputs[0], exact)
    streams: list[torch.dtype] = []
    block = model.transformer_blocks[0]
    block.register_forward_hook(lambda module, args, output: streams.append(output.dtype))
    for change in (restore, accelerate):
        change(model)
        with torch.autocast("cpu", torch.bfloat16):
            run(model)
    assert streams == [torch.float32, torch.float32]


def test_arguments_may_be_positional() -> None:
    model = diffusers_model()
    expected = run(model, masks()["prefix"])
    accelerate(model)
    values = arguments()
    actual = model(
        values["hidden_states"],
        values["encoder_hidden_states"],
        values["timestep"],
        values["added_cond_kwargs"],
        None,
        None,
        masks()["prefix"],
    ).sample
    assert relative_error(actual, expected) < TOLERANCE


def test_a_mask_of_the_image_tokens_is_honoured() -> None:
    model = diffusers_model()
    mask = torch.ones(2, 35)
    mask[0, 20:] = 0
    expected = run(model, masks()["prefix"], attention_mask=mask)
    accelerate(model)
    actual = run(model, masks()["prefix"], attention_mask=mask)
    assert relative_error(actual, expected) < TOLERANCE
    assert relative_error(actual, run(model, masks()["prefix"])) > 1e-3


def test_a_block_can_be_called_by_itself() -> None:
    block = (model := diffusers_model()).transformer_blocks[1]
    x, caption = torch.randn(2, 35, 144), torch.randn(2, 12, 144)
    bias = (1 - masks()["prefix"])[:, None] * -10000.0  # type: ignore[operator]
    values = {"encoder_hidden_states": caption, "encoder_attention_mask": bias}
    values["timestep"] = torch.randn(2, 6 * 144)
    expected = block(x, **values)
    accelerate(model)
    assert relative_error(block(x, **values), expected) < TOLERANCE


@pytest.mark.parametrize("kv_compression", [None, KVCompression([1])])
def test_restore_gives_back_the_original_bit_for_bit(kv_compression: KVCompression | None) -> None:
    model = diffusers_model()
    before, expected = snapshot(model), run(model, masks()["scattered"])
    accelerate(model, kv_compression=kv_compression)
    assert snapshot(model) != before
    run(model, masks()["scattered"])
    assert restore(model) is model
    after = snapshot(model)
    assert list(after) == list(before)
    for name, value in before.items():
        assert after[name] is value or after[name] == value, name
    assert torch.equal(run(model, masks()["scattered"]), expected)
    accelerate(restore(accelerate(model)))


def test_accelerate_changes_no_name_and_no_weight() -> None:
    model = diffusers_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = accelerate(model).state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_a_copy_of_an_accelerated_model_stands_by_itself() -> None:
    model = accelerate(diffusers_model(), kv_compression=KVCompression([1]))
    expected = run(model)
    other = copy.deepcopy(model)
    nn.init.normal_(other.transformer_blocks[1].attn1.sr.weight)
    assert torch.equal(run(model), expected) and not torch.equal(run(other), expected)
    restore(other)
    assert torch.equal(run(model), expected)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, kernels_can_run: None) -> None:
    monkeypatch.setattr(pixart.patch, "_obstacle", lambda: OBSTACLE)


def test_without_a_gpu_nothing_changes_and_a_warning_says_why(no_gpu: None) -> None:
    model = diffusers_model()
    before, expected = snapshot(model), run(model)
    with pytest.warns(UserWarning, match=f"changes nothing: {OBSTACLE}") as caught:
        assert accelerate(model) is model
    assert caught[0].filename == __file__
    assert snapshot(model) == before and torch.equal(run(model), expected)
    with pytest.raises(ValueError, match="must be restored first"):
        accelerate(model)
    assert restore(model) is model and snapshot(model) == before
    with pytest.raises(ValueError, match="must be accelerated"):
        restore(model)


def test_without_a_gpu_compression_works_and_does_not_warn(no_gpu: None) -> None:
    model = diffusers_model()
    expected = run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model, kv_compression=KVCompression([1]))
    assert relative_error(run(model), expected) > 1e-3
    assert torch.equal(run(restore(model)), expected)


@pytest.mark.parametrize(
    ("interpreted", "capability", "triton", "obstacle"),
    [
        (False, None, True, "torch.cuda.is_available"),
        (False, (9, 0), False, "pip install triton"),
        (False, (7, 5), True, "compute capability 8.0, Tesla T4 has less"),
        (False, (8, 0), True, None),
        (True, None, True, None),
    ],
)
def test_the_obstacle_is_the_first_thing_that_is_missing(
    interpreted: bool,
    capability: tuple[int, int] | None,
    triton: bool,
    obstacle: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # the real one
    monkeypatch.setattr(pixart.patch, "INTERPRETED", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
    found = pixart.patch._obstacle()
    assert found is None if obstacle is None else obstacle in str(found)


def test_only_diffusers_pixart_is_taken() -> None:
    class Pipeline:
        transformer: Any = None

    for wrong in (nn.Linear(2, 2), build(), Pipeline(), None):
        for function in (accelerate, restore):
            with pytest.raises(ValueError, match=f"got {type(wrong).__name__}"):
                function(wrong)
    pipe = Pipeline()
    pipe.transformer = diffusers_model()
    assert accelerate(pipe) is pipe
    assert restore(pipe) is pipe
    with pytest.raises(ValueError, match="must be accelerated"):
        restore(pipe)


def test_accelerating_twice_is_an_error() -> None:
    model = accelerate(diffusers_model())
    for compression in (None, KVCompression([1])):
        with pytest.raises(ValueError, match="must be restored first"):
            accelerate(model, kv_compression=compression)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine must be False, got True"),
        ({"attention_type": "gated"}, "attention_type must be \"default\", got 'gated'"),
        ({"cross_attention_dim": None}, "cross_attention_dim must be a width, got None"),
        (
            {"attention_head_dim": 144, "num_attention_heads": 1},
            "attention_head_dim must be at most 128, got 144",
        ),
    ],
)
def test_another_network_in_pixarts_class_is_refused(changes: dict[str, Any], message: str) -> None:
    model = diffusers_model(**changes)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        accelerate(model)
    assert str(error.value) == message
    assert snapshot(model) == before


@pytest.mark.parametrize("family", ["sigma", "alpha"])
def test_a_pipeline_draws_the_same_picture(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    import published

    name = {"sigma": "PixArtSigmaPipeline", "alpha": "PixArtAlphaPipeline"}[family]
    source = getattr(published, f"build_{family}")(tmp_path, sample_size=8)
    pipe = getattr(diffusers, name).from_pretrained(source, tokenizer=None, text_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    length = {"sigma": 300, "alpha": 120}[family]
    embeds = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(0))

    def draw() -> Tensor:
        return pipe(
            negative_prompt=None,
            prompt_embeds=embeds,
            prompt_attention_mask=torch.arange(length)[None] < 9,
            negative_prompt_embeds=embeds.flip(1),
            negative_prompt_attention_mask=torch.arange(length)[None] < 1,
            height=64,
            width=96,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
            use_resolution_binning=False,
        ).images

    expected = draw()
    assert accelerate(pipe) is pipe
    passes = count_calls(monkeypatch, "gate_add_modulate")
    assert relative_error(draw(), expected) < TOLERANCE
    assert len(passes) == 4  # blocks times steps
    assert torch.equal((restore(pipe), draw())[1], expected)
