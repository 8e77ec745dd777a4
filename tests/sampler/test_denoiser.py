from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda
from small_model import KEPT, build, inputs, mask_of, relative_error, sizes

from pixart.config import KVCompression
from pixart.model.control import Control
from pixart.model.transformer import PixArt
from pixart.plans.schedule import KVSchedule
from pixart.sampler.cuda_graphs import CudaGraphs
from pixart.sampler.denoiser import PictureControl, PictureDenoiser, StepReuse
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


def controlled(base: PixArt, *scales: float) -> list[PictureControl]:
    """Controls that change what the base draws, each with a hint of its own."""
    found = []
    for seed, scale in enumerate(scales):
        generator = torch.Generator().manual_seed(seed)
        network = base.new_control(2).eval()
        for parameter in network.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 10)
        hint = torch.randn(1, 4, 10, 14, generator=generator)
        found.append(PictureControl(network, hint, scale))
    return found


def steered(base: PixArt, controls: list[PictureControl], prompt: PromptEmbeddings) -> Any:
    latents, timesteps, _ = inputs(batch=len(prompt.mask))
    given = [Control(one.network, one.hint, one.scale) for one in controls]
    return base(latents, timesteps, prompt.features, prompt.mask, controls=given)


@torch.no_grad()
def test_a_picture_is_steered_by_its_controls_with_the_captions_of_each_call() -> None:
    base, two = build(depth=4), prompts([11], [0, 1, 2])
    controls = controlled(base, 0.7, 1.3)
    denoise = PictureDenoiser(base, {"both": two}, 80, 112, CPU, controls=controls)
    latents, timesteps, _ = inputs()
    for _ in range(2):
        assert torch.equal(denoise(latents, timesteps, "both"), steered(base, controls, two))


@torch.no_grad()
def test_a_control_is_evaluated_between_its_timesteps_and_nowhere_else() -> None:
    base, prompt = build(depth=4), prompts([0, 1, 2])
    [control] = controlled(base, 1.0)
    control = replace(control, timesteps=(700.0, 300.5))
    met: list[object] = []
    control.network.controlnet[0].copied_block.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda *given: met.append(given)
    )
    denoise = PictureDenoiser(base, {"conditional": prompt}, 80, 112, CPU, controls=[control])
    latents, timesteps, _ = inputs(batch=1)
    for now, count in ((900.0, 0), (700.0, 1), (300.5, 2), (300.0, 2)):
        denoise(latents, torch.full_like(timesteps, now), "conditional")
        assert len(met) == count
    off = PictureDenoiser(
        base, {"conditional": prompt}, 80, 112, CPU, controls=[replace(control, scale=0.0)]
    )
    assert torch.equal(
        off(latents, timesteps, "conditional"),
        base(latents, timesteps, prompt.features, prompt.mask),
    )


@torch.no_grad()
def test_perturbed_captions_are_the_conditional_ones_in_perturbed_blocks() -> None:
    base, prompt = build(depth=4), prompts([0, 1, 2])
    denoise = PictureDenoiser(base, {"conditional": prompt}, 80, 112, CPU, perturbed=[2, 1, 2])
    latents, timesteps, _ = inputs(batch=1)
    given = (latents, timesteps, prompt.features, prompt.mask)
    assert torch.equal(denoise(latents, timesteps, "perturbed"), base(*given, perturbed=[1, 2]))
    assert torch.equal(denoise(latents, timesteps, "conditional"), base(*given))


@torch.no_grad()
def test_a_part_of_a_picture_has_its_part_of_the_hint_and_its_own_size() -> None:
    base, prompt = build(depth=4, micro_condition=True), prompts([0, 1, 2])
    [control] = controlled(base, 1.0)
    denoise = PictureDenoiser(base, {"conditional": prompt}, 80, 112, CPU, controls=[control])
    latents, timesteps, _ = inputs(batch=1)
    rows, columns = slice(2, 8), slice(4, 12)
    part = denoise.crop(rows, columns, (10, 14))
    window = latents[..., rows, columns]
    expected = base(
        window, timesteps, prompt.features, prompt.mask,
        torch.tensor([[48.0, 64.0]]), torch.tensor([[0.75]]),
        controls=[Control(control.network, control.hint[..., rows, columns])],
    )  # fmt: skip
    assert torch.equal(part(window, timesteps, "conditional"), expected)
    assert denoise.crop(rows, columns, (10, 14)) is part


@torch.no_grad()
def test_controls_and_perturbed_blocks_are_replayed_each_from_its_own_recording(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, graphs, base = fake_cuda(monkeypatch), CudaGraphs(), build(depth=3)
    latents, timesteps, _ = inputs(batch=1)
    plain, strong = controlled(base, 0.5), controlled(base, 2.0)
    other = [replace(plain[0], hint=plain[0].hint * 2)]  # another picture's, of one recording
    for controls in ([], plain, strong, other):
        for kept in ([0, 1, 2], [5]):
            prompt = prompts(kept)
            denoise = PictureDenoiser(
                base,
                {"conditional": prompt},
                80,
                112,
                CPU,
                graphs,
                controls=controls,
                perturbed=[1],
            )
            got = denoise(latents, timesteps, "conditional")
            assert relative_error(got, steered(base, controls, prompt)) < 1e-6
            denoise(latents, timesteps, "perturbed")
    assert cuda.recorded == 6, "another hint, of the same strength, is no other recording"
    steering = {"conditional": prompt}, 80, 112, CPU
    replayed = PictureDenoiser(base, *steering, graphs, controls=plain, perturbed=[1])
    launched = PictureDenoiser(base, *steering, controls=plain, perturbed=[1])
    given = (latents, timesteps, "perturbed")
    assert relative_error(replayed(*given), launched(*given)) < 1e-6


@torch.no_grad()
def test_weights_of_a_control_that_are_replaced_are_not_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, graphs, base = fake_cuda(monkeypatch), CudaGraphs(), build(depth=4)
    latents, timesteps, _ = inputs(batch=1)
    prompt, controls = prompts([0, 1, 2]), controlled(base, 1.0)
    for number in (1, 2):
        for _ in range(2):
            denoise = PictureDenoiser(
                base, {"conditional": prompt}, 80, 112, CPU, graphs, controls=controls
            )
            got = denoise(latents, timesteps, "conditional")
            assert relative_error(got, steered(base, controls, prompt)) < 1e-6
        assert cuda.recorded == number
        layer = controls[0].network.control_blocks[1].after_proj
        layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight) / 10)


@torch.no_grad()
def test_a_schedule_is_recorded_once_for_each_way_to_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs, model = fake_cuda(monkeypatch), CudaGraphs(), build()
    latents, timesteps, _ = inputs(batch=1)
    prompt = prompts([0, 1, 2])
    schedule = KVSchedule.parse("0-1:2@1000-600; 1:4@600-300; 0:1@1000-0")
    denoise = PictureDenoiser(
        model, {"conditional": prompt}, 80, 112, CPU, graphs, kv_schedule=schedule
    )
    ways = {950.0: (1, 2), 700.0: (1, 2), 500.0: (1, 4), 400.0: (1, 4), 100.0: (), 20.0: ()}
    for _ in range(2):
        for t, ratios in ways.items():
            step = torch.full_like(timesteps, t)
            got = denoise(latents, step, "conditional")
            given = (latents, step, prompt.features, prompt.mask)
            assert relative_error(got, model(*given, kv_ratios=ratios)) < 1e-6
            if ratios:
                assert relative_error(got, model(*given)) > 1e-5
    assert (cuda.recorded, cuda.replayed) == (3, 9)
    part = denoise.crop(slice(0, 6), slice(0, 8), (10, 14))
    assert part.kv_schedule is schedule


@torch.no_grad()
def test_steps_that_reuse_blocks_are_recordings_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, graphs, model = fake_cuda(monkeypatch), CudaGraphs(), build(depth=3)
    latents, timesteps, _ = inputs(batch=1)
    choices: dict[Any, Any] = {"conditional": prompts([0, 1, 2])}
    reuse = StepReuse(1, frozenset({700.0, 500.0, 400.0, 100.0}))
    replayed, launched = (
        PictureDenoiser(model, choices, 80, 112, CPU, one, reuse=reuse) for one in (graphs, None)
    )
    for number, t in enumerate((950.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0, 100.0)):
        given = (latents + number, torch.full_like(timesteps, t), "conditional")
        assert relative_error(replayed(*given), launched(*given)) < 1e-6
    assert (cuda.recorded, cuda.replayed) == (2, 6)
    part = replayed.crop(slice(0, 6), slice(0, 8), (10, 14))
    assert part.reuse is reuse and not part._changes


def test_processes_that_share_a_picture_reuse_nothing() -> None:
    mesh: Any = object()
    with pytest.raises(ValueError, match="reuse must be None with a mesh"):
        PictureDenoiser(build(), {}, 80, 112, CPU, mesh=mesh, reuse=StepReuse(1, frozenset()))
