from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda
from small_model import KEPT, build, inputs, mask_of, relative_error, sizes

from pixart.config import KVCompression
from pixart.sampler.cuda_graphs import CudaGraphs
from pixart.sampler.denoiser import PictureDenoiser
from pixart.text.encoder import PromptEmbeddings

CPU = torch.device("cpu")


def prompts(*kept: list[int]) -> PromptEmbeddings:
    _, _, caption = inputs(batch=len(kept))
    return PromptEmbeddings(caption, mask_of(list(kept)).bool())


@pytest.mark.parametrize("masked", [True, False])
def test_an_encoded_caption_gives_the_output_of_the_caption_itself(masked: bool) -> None:
    model = build(kv_compression=KVCompression((1,), 2))
    latents, timesteps, caption = inputs()
    mask = mask_of(KEPT[:2]) if masked else None
    encoded = model.encode_caption(caption, mask)
    expected = model(latents, timesteps, caption, mask)
    assert torch.equal(model(latents, timesteps, encoded), expected)
    padded = encoded.pad(12)
    assert padded.keys_values[0][0].shape[1] == 12 and padded.lengths is not None
    assert relative_error(model(latents, timesteps, padded), expected) < 1e-6


def test_an_encoded_caption_carries_gradients_to_its_weights() -> None:
    model = build()
    latents, timesteps, caption = inputs()
    model(latents, timesteps, model.encode_caption(caption)).square().sum().backward()
    got = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(latents, timesteps, caption).square().sum().backward()
    for a, parameter in zip(got, model.parameters(), strict=True):
        assert a is not None and torch.allclose(a, parameter.grad, rtol=1e-4, atol=1e-5)


def test_an_encoded_caption_takes_no_mask_and_no_other_batch() -> None:
    model = build()
    latents, timesteps, caption = inputs()
    encoded = model.encode_caption(caption)
    with pytest.raises(ValueError, match="caption_mask must be None"):
        model(latents, timesteps, encoded, mask_of(KEPT[:2]))
    with pytest.raises(ValueError, match="caption must be encoded for 1, got 2"):
        model(latents[:1], timesteps[:1], encoded)


def test_captions_are_encoded_once_for_all_steps(monkeypatch: Any) -> None:
    model = build()
    calls = []
    encode = model.encode_caption
    monkeypatch.setattr(model, "encode_caption", lambda *a: calls.append(a) or encode(*a))
    one, two = prompts([0, 1, 2]), prompts([11], [0, 1, 2])
    denoise = PictureDenoiser(model, {"conditional": one, "both": two}, 80, 112, CPU)
    latents, timesteps, _ = inputs()
    for _ in range(3):
        both = denoise(latents, timesteps, "both")
        alone = denoise(latents[:1], timesteps[:1], "conditional")
    assert len(calls) == 2
    assert torch.equal(both, model(latents, timesteps, two.features, two.mask))
    assert torch.equal(alone, model(latents[:1], timesteps[:1], one.features, one.mask))


@pytest.mark.parametrize("micro_condition", [False, True])
def test_one_recording_serves_every_step_and_prompt_of_a_size(
    micro_condition: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, graphs = fake_cuda(monkeypatch), CudaGraphs()
    model = build(micro_condition=micro_condition, kv_compression=KVCompression((1,), 2))
    latents, timesteps, _ = inputs(batch=1)
    extra = sizes(1) if micro_condition else {}
    outputs, expected = [], []
    for kept in ([0, 1, 2, 3], [5], list(range(12))):
        prompt = prompts(kept)
        denoise = PictureDenoiser(model, {"conditional": prompt}, 80, 112, CPU, graphs)
        for t in (900.0, 13.5):
            step = torch.full_like(timesteps, t)
            outputs.append(denoise(latents + t, step, "conditional"))
            expected.append(model(latents + t, step, prompt.features, prompt.mask, **extra))
    assert (cuda.recorded, cuda.replayed) == (1, 5)
    for a, b in zip(outputs, expected, strict=True):
        assert relative_error(a, b) < 1e-6


def test_guidance_in_one_call_and_in_two_has_the_captions_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, graphs, model = fake_cuda(monkeypatch), CudaGraphs(), build()
    latents, timesteps, _ = inputs()
    given: dict[Any, PromptEmbeddings] = {
        "unconditional": prompts([11]), "conditional": prompts([0, 1, 2]), "both": prompts([11], [0, 1, 2]),
    }  # fmt: skip
    replayed = PictureDenoiser(model, given, 80, 112, CPU, graphs)
    for _ in range(3):
        for captions, prompt in given.items():
            rows = len(prompt.mask)
            got = replayed(latents[:rows], timesteps[:rows], captions)
            expected = model(latents[:rows], timesteps[:rows], prompt.features, prompt.mask)
            assert relative_error(got, expected) < 1e-6
    assert cuda.recorded == 2, "one caption has the sizes of another"


def test_weights_of_another_layer_are_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the first: an adapter that is swapped touches some layers of the model."""
    cuda, graphs, model = fake_cuda(monkeypatch), CudaGraphs(), build()
    latents, timesteps, _ = inputs(batch=1)
    prompt = prompts([0, 1, 2])

    def check() -> None:
        denoise = PictureDenoiser(model, {"conditional": prompt}, 80, 112, CPU, graphs)
        got = denoise(latents, timesteps, "conditional")
        expected = model(latents, timesteps, prompt.features, prompt.mask)
        assert relative_error(got, expected) < 1e-6

    check(), check()
    for name in ("qkv", "proj"):
        layer = model.blocks[1].attn.get_submodule(name)
        layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight) / 10)
        check(), check()
    model.load_state_dict(build(seed=1).state_dict(), assign=True)
    check(), check(), check()
    assert cuda.recorded == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_replays_what_would_have_been_launched() -> None:
    device = torch.device("cuda")
    model = build(kv_compression=KVCompression((1,), 2)).to(device)
    latents, timesteps, _ = (x.to(device) for x in inputs(batch=1))
    graphs, prompt = CudaGraphs(), prompts([0, 1, 2])
    captions: dict[Any, PromptEmbeddings] = {"conditional": prompt}
    replayed = PictureDenoiser(model, captions, 80, 112, device, graphs)
    launched = PictureDenoiser(model, captions, 80, 112, device)
    for t in (900.0, 450.0, 13.5):
        step = torch.full_like(timesteps, t)
        a = replayed(latents * t, step, "conditional")
        assert relative_error(a, launched(latents * t, step, "conditional")) < 1e-5
