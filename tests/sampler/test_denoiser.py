from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_model import KEPT, build, inputs, mask_of, relative_error, sizes
from torch import Tensor

from pixart.config import KVCompression
from pixart.sampler.cuda_graphs import MAX_GRAPHS, CudaGraphs
from pixart.sampler.denoiser import PictureDenoiser
from pixart.text.encoder import PromptEmbeddings

CPU = torch.device("cpu")


def prompts(*kept: list[int]) -> PromptEmbeddings:
    _, _, caption = inputs(batch=len(kept))
    return PromptEmbeddings(caption, mask_of(list(kept)).bool())


class Tape(CudaGraphs):
    """Records on a CPU as a CUDA graph does: replaying reads the buffers that were recorded, and
    writes where the recording wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = 0

    def _capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        output = step()
        self.recorded += 1
        return lambda: output.copy_(step()), output.fill_(torch.nan)


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
def test_one_recording_serves_every_step_and_prompt_of_a_size(micro_condition: bool) -> None:
    model, graphs = build(micro_condition=micro_condition), Tape()
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
    assert graphs.recorded == 1
    for a, b in zip(outputs, expected, strict=True):
        assert relative_error(a, b) < 1e-6


def test_other_shapes_and_other_weights_are_recorded_anew_and_the_oldest_forgotten() -> None:
    graphs = Tape()

    def draw(model: Any, side: int) -> None:
        denoise = PictureDenoiser(model, {"conditional": prompts([0])}, 80, 112, CPU, graphs)
        denoise(torch.zeros(1, 4, side, side), torch.ones(1), "conditional")

    first, other = build(), build(seed=1)
    draw(first, 4), draw(other, 4), draw(first, 4)
    assert graphs.recorded == 2
    for side in range(6, 6 + 2 * MAX_GRAPHS, 2):
        draw(first, side)
    draw(first, 6 + 2 * MAX_GRAPHS - 2)
    assert graphs.recorded == 2 + MAX_GRAPHS
    draw(first, 4)
    assert graphs.recorded == 3 + MAX_GRAPHS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_replays_what_would_have_been_launched() -> None:
    device = torch.device("cuda")
    model = build(kv_compression=KVCompression((1,), 2)).to(device)
    latents, timesteps, _ = (x.to(device) for x in inputs(batch=1))
    graphs, prompt = CudaGraphs(), prompts([0, 1, 2])
    captions: dict[Any, PromptEmbeddings] = {"conditional": prompt}
    replayed = PictureDenoiser(model, captions, 80, 112, device, graphs)
    launched = PictureDenoiser(model, captions, 80, 112, device)
    for t in (900.0, 13.5):
        step = torch.full_like(timesteps, t)
        a = replayed(latents * t, step, "conditional")
        assert relative_error(a, launched(latents * t, step, "conditional")) < 1e-5
