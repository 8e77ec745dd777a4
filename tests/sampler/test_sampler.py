import itertools
import math
import threading

import pytest
import torch

from pixart.sampler.loop import Cancelled, initial_noise, sample, seed_generators
from pixart.sampler.schedulers import SCHEDULERS, make_scheduler

LEVELS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
MEAN, DEVIATION = 0.7, 0.5
# dmd jumps from 400 in one; a solver with other noise levels is the same solver.
STEPPING = [name for name in SCHEDULERS if name != "dmd" and not name.endswith("-karras")]
SHAPE = (4, 6, 7)  # odd sizes: nothing may depend on how the batch fills vector registers


def alpha_sigma(timesteps):
    """Noise levels of fractional timesteps, sigma / alpha linear between whole ones."""
    below = timesteps.long().clamp(max=998)
    ratios = (1 / LEVELS - 1).sqrt()
    ratio = torch.lerp(ratios[below], ratios[below + 1], timesteps.double() - below)
    alpha = (1 + ratio**2).rsqrt().view(-1, 1, 1, 1)
    return alpha, alpha * ratio.view(-1, 1, 1, 1)


def gaussian_epsilon(latents, timesteps, captions=None):
    """The exact noise prediction for independent values N(MEAN, DEVIATION²), and junk variances."""
    alpha, sigma = alpha_sigma(timesteps)
    marginal = alpha**2 * DEVIATION**2 + sigma**2
    epsilon = sigma * (latents.double() - alpha * MEAN) / marginal
    return torch.cat([epsilon, torch.full_like(epsilon, 1e6)], dim=1).float()


def flow_end(latents, timesteps):
    """Where the probability flow of that Gaussian ends: a fixed quantile is a trajectory."""
    alpha, sigma = alpha_sigma(timesteps)
    marginal = alpha**2 * DEVIATION**2 + sigma**2
    return MEAN + DEVIATION * (latents.double() - alpha * MEAN) / marginal.sqrt()


def consistency_epsilon(latents, timesteps, captions=None):
    """What a distilled model predicts: the noise that leads straight to the end of the flow."""
    alpha, sigma = alpha_sigma(timesteps)
    return ((latents.double() - alpha * flow_end(latents, timesteps)) / sigma).float()


def two_gaussians(latents, timesteps, captions):
    """A prediction that captions move: by 0.1 in conditional rows, by nothing in the others."""
    rows, half = len(latents), len(latents) // 2
    shares = {
        "conditional": [1] * rows,
        "unconditional": [0] * rows,
        "both": [0] * half + [1] * half,
    }
    epsilon = gaussian_epsilon(latents, timesteps)[:, : latents.shape[1]]
    return epsilon + 0.1 * torch.tensor(shares[captions]).view(-1, 1, 1, 1)


class Recorder:
    """A denoiser that keeps what it was asked."""

    def __init__(self, denoise=two_gaussians):
        self.denoise, self.calls, self.timesteps = denoise, [], []

    def __call__(self, latents, timesteps, captions):
        assert latents.dtype == timesteps.dtype == torch.float32
        assert timesteps.shape == (len(latents),)
        self.calls.append((captions, len(latents)))
        if not timesteps.is_meta:
            self.timesteps.append(timesteps[0].item())
        return self.denoise(latents, timesteps, captions)


def flow_error(name, steps, generators):
    noise = initial_noise(SHAPE, generators)
    exact = flow_end(noise, torch.tensor([999.0]))
    latents = sample(gaussian_epsilon, noise, make_scheduler(name), steps, guidance=1.0)
    return (latents - exact).abs().max().item()


# Past 100 steps the second-order solvers only see the rounding of their timesteps to integers.
@pytest.mark.parametrize(
    ("name", "order", "coarse", "fine"),
    [
        ("dpm-solver++", 2, 10, 80),
        ("unipc", 2, 10, 80),
        ("ddim", 1, 20, 160),
        ("euler", 1, 20, 160),
    ],
)
def test_deterministic_solvers_converge_to_the_exact_flow_at_their_order(name, order, coarse, fine):
    errors = [flow_error(name, steps, seed_generators(range(8))) for steps in (coarse, fine)]
    measured = math.log(errors[0] / errors[1]) / math.log(fine / coarse)
    assert order - 0.2 < measured < order + 0.6
    assert errors[1] < 0.01 if order == 2 else errors[1] < 0.06


@pytest.mark.parametrize("name", STEPPING)
def test_samples_have_the_mean_and_spread_of_the_data(name):
    generators = seed_generators(range(100))
    noise = initial_noise((4, 8, 8), generators)
    denoise = consistency_epsilon if name == "lcm" else gaussian_epsilon
    scheduler = make_scheduler(name)
    # Ancestral steps are of first order and longer than they look: they go down further, and up again.
    steps = {"lcm": 4, "euler-a": 120}.get(name, 50)
    latents = sample(denoise, noise, scheduler, steps, guidance=1.0, generators=generators)
    # 25 600 values: the mean is known to 0.003. First-order solvers at 50 steps shrink by 6 %.
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.012)
    assert latents.std().item() == pytest.approx(DEVIATION, rel=0.07)


@pytest.mark.parametrize("steps", [30, 60, 300, 700])
def test_ddim_leaves_no_noise_when_its_steps_do_not_divide_the_training_steps(steps):
    assert flow_error("ddim", steps, seed_generators([0])) < 6 / steps + 0.005


@pytest.mark.parametrize("steps", [1, 20, 50])
def test_ddim_equals_the_ddim_of_diffusers_on_the_same_timesteps(steps):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    options = {"timestep_spacing": "trailing"}  # the one spacing that both of them have
    theirs = DDIMScheduler(clip_sample=False, **options)
    ours = DPMSolverMultistepScheduler.from_config(make_scheduler("ddim").config, **options)
    noise = initial_noise(SHAPE, seed_generators([0, 1]))
    latents = [
        sample(gaussian_epsilon, noise, each, steps, guidance=1.0) for each in (ours, theirs)
    ]
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["dpm-solver++", "euler"])
def test_prediction_type_of_the_config_is_honoured(name, kind):
    def denoise(latents, timesteps, captions):
        epsilon = gaussian_epsilon(latents, timesteps)[:, :4]
        alpha, sigma = alpha_sigma(timesteps)
        clean = (latents - sigma * epsilon) / alpha
        velocity = alpha * epsilon - sigma * clean
        return {"epsilon": epsilon, "v_prediction": velocity, "sample": clean}[kind].float()

    noise = initial_noise(SHAPE, seed_generators([0]))
    scheduler = make_scheduler(name, {"prediction_type": kind})
    seen = []
    latents = sample(denoise, noise, scheduler, 20, guidance=1.0, callback=seen.append)
    expected = sample(gaussian_epsilon, noise, make_scheduler(name), 20, guidance=1.0)
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)
    # The last step leaves no noise, so the clean latents implied by it are the result.
    torch.testing.assert_close(seen[-1].predicted, latents, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", STEPPING)
def test_an_image_is_the_same_bits_in_any_batch(name):
    def draw(seeds):
        generators = seed_generators(seeds)
        noise = initial_noise(SHAPE, generators)
        scheduler = make_scheduler(name)
        return sample(two_gaussians, noise, scheduler, 8, guidance=3.0, generators=generators)

    batch = draw([7, 2**63, 5])
    for index, seed in enumerate([7, 2**63, 5]):
        assert torch.equal(batch[index], draw([seed])[0])
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("name", ["sa-solver", "lcm"])
def test_stochastic_schedulers_draw_from_the_generators_only(name):
    def draw(global_seed, seed):
        torch.manual_seed(global_seed)
        scheduler = make_scheduler(name)
        noise = torch.zeros(1, *SHAPE)
        return sample(two_gaussians, noise, scheduler, 6, generators=seed_generators([seed]))

    assert torch.equal(draw(0, 1), draw(1, 1))
    assert not torch.equal(draw(0, 1), draw(0, 2))


@pytest.mark.parametrize("name", STEPPING)
def test_a_scheduler_carries_nothing_from_one_call_to_the_next(name):
    scheduler = make_scheduler(name)

    def draw(steps):
        generators = seed_generators([1])
        noise = initial_noise(SHAPE, generators)
        return sample(two_gaussians, noise, scheduler, steps, generators=generators)

    first = draw(6)
    draw(9)
    assert torch.equal(first, draw(6))


@pytest.mark.parametrize("name", STEPPING)
def test_latents_stay_on_their_device_and_are_never_read_back(name):
    # A meta tensor stands for an accelerator: reading a value from it raises an error.
    generators = seed_generators([0, 1])
    noise = initial_noise(SHAPE, generators, "meta")
    options = {"generators": generators, "callback": lambda progress: None, "guidance": 2.0}
    recorder = Recorder(lambda latents, timesteps, captions: latents + timesteps.view(-1, 1, 1, 1))
    latents = sample(recorder, noise, make_scheduler(name), 5, **options)
    assert latents.device.type == "meta" and latents.shape == noise.shape


@pytest.mark.parametrize("name", STEPPING)
def test_one_scheduler_serves_calls_that_overlap(name):
    scheduler, noise = make_scheduler(name), initial_noise(SHAPE, seed_generators([1]))

    def draw(callback=None):
        options = {"generators": seed_generators([2]), "callback": callback}
        return sample(two_gaussians, noise, scheduler, 5, **options)

    inner = []
    outer = draw(lambda progress: inner.append(draw()))
    assert all(torch.equal(outer, each) for each in inner)


def test_initial_noise_is_unit_normal_and_what_diffusers_draws_from_the_same_generators():
    from diffusers.utils.torch_utils import randn_tensor

    noise = initial_noise((4, 32, 32), seed_generators([1, 2, 3]))
    theirs = randn_tensor((3, 4, 32, 32), generator=seed_generators([1, 2, 3]))
    assert torch.equal(noise, theirs) and noise.dtype == torch.float32
    assert noise.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", STEPPING)
def test_guidance_in_two_calls_equals_guidance_in_one(name):
    results = []
    for batched in (True, False):
        recorder, generators = Recorder(), seed_generators([0, 1])
        noise = initial_noise(SHAPE, generators)
        options = {"guidance": 4.5, "batched": batched, "generators": generators}
        results.append(sample(recorder, noise, make_scheduler(name), 4, **options))
        evaluations = 7 if name == "heun" else 4  # two for every step but the last
        one = [("both", 4)] * evaluations
        two = [("unconditional", 2), ("conditional", 2)] * evaluations
        assert recorder.calls == (one if batched else two)
    assert torch.equal(*results)


def test_guidance_extrapolates_from_unconditional_to_conditional():
    # The two predictions differ by 0.1, so at one step from x = 0 the result tells the scale.
    noise = torch.zeros(1, *SHAPE)
    unguided, guided = (
        sample(two_gaussians, noise, make_scheduler(), 1, guidance=scale) for scale in (1.0, 4.5)
    )
    per_unit = 0.1 * ((1 - LEVELS[999]) / LEVELS[999]).sqrt()
    torch.testing.assert_close(unguided - guided, (3.5 * per_unit).expand_as(guided).float())


@pytest.mark.parametrize("guidance", [0, 0.5, 1.0])
def test_guidance_of_at_most_one_never_evaluates_the_unconditional(guidance):
    recorder = Recorder()
    sample(recorder, torch.zeros(2, *SHAPE), make_scheduler(), 3, guidance=guidance)
    assert recorder.calls == [("conditional", 2)] * 3


def test_consistency_models_are_not_guided_unless_asked():
    for guidance, captions in [(None, "conditional"), (3.0, "both")]:
        recorder = Recorder()
        sample(recorder, torch.zeros(1, *SHAPE), make_scheduler("lcm"), 1, guidance=guidance)
        assert [asked for asked, _ in recorder.calls] == [captions]


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0.0, 1.0), range(10)),
        ((0.0, 0.5), range(5)),
        ((0.3, 0.7), range(3, 7)),
        ((0.25, 1.0), range(3, 10)),
        ((0.4, 0.4), range(0)),
    ],
)
def test_guidance_interval_is_the_guided_part_of_the_trajectory(interval, guided):
    recorder = Recorder()
    sample(recorder, torch.zeros(1, *SHAPE), make_scheduler(), 10, guidance_interval=interval)
    assert [captions == "both" for captions, _ in recorder.calls] == [
        i in guided for i in range(10)
    ]


def test_callback_reports_every_step_with_the_clean_latents_it_implies():
    seen = []
    noise = initial_noise(SHAPE, seed_generators([0]))
    latents = sample(
        gaussian_epsilon, noise, make_scheduler("euler"), 40, guidance=1, callback=seen.append
    )
    assert [(each.step, each.total) for each in seen] == [(i, 40) for i in range(1, 41)]
    assert seen[0].timestep == 999 and seen[-1].latents is latents
    # At t = 999 the latents say nothing, and the best guess is the mean.
    torch.testing.assert_close(seen[0].predicted, torch.full_like(latents, MEAN), rtol=0, atol=0.02)
    assert (seen[-1].predicted - latents).abs().max() < 0.01


def test_cancelling_stops_before_the_next_call_of_the_denoiser():
    event, recorder = threading.Event(), Recorder()

    def stop_at_second(progress):
        if progress.step == 2:
            event.set()

    options = {"callback": stop_at_second, "cancel": event.is_set, "batched": False}
    with pytest.raises(Cancelled, match="timestep 799"):
        sample(recorder, torch.zeros(1, *SHAPE), make_scheduler(), 10, **options)
    assert len(recorder.calls) == 4
    # Between the two halves of a guided step as well: 5 answers False, then True.
    asked = itertools.chain([False] * 5, itertools.repeat(True))
    with pytest.raises(Cancelled):
        sample(
            recorder,
            torch.zeros(1, *SHAPE),
            make_scheduler(),
            10,
            cancel=lambda: next(asked),
            batched=False,
        )
    assert len(recorder.calls) == 4 + 5


def test_low_precision_is_left_to_the_denoiser():
    def draw(dtype_out, dtype_noise):
        def denoise(latents, timesteps, captions):
            assert latents.dtype == torch.float32
            return two_gaussians(latents, timesteps, captions).bfloat16().to(dtype_out)

        noise = initial_noise(SHAPE, seed_generators([0])).bfloat16().to(dtype_noise)
        return sample(denoise, noise, make_scheduler(), 5)

    latents = draw(torch.bfloat16, torch.bfloat16)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, draw(torch.float32, torch.float32))


def test_sampling_builds_no_graph():
    weight = torch.ones((), requires_grad=True)

    def denoise(latents, timesteps, captions):
        return weight * two_gaussians(latents, timesteps, captions)

    assert not sample(denoise, torch.zeros(1, *SHAPE), make_scheduler(), 2).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": -1.0}, "guidance must be a finite number from 0 up, got -1.0"),
        ({"guidance": math.nan}, "guidance must be a finite number from 0 up, got nan"),
        ({"guidance_interval": (0.6, 0.4)}, "guidance_interval must be 0 <= start <= end <= 1"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval must be .* got \\(0.0, 1.5\\)"),
        ({"generators": []}, "generators must be one per image, got 0 for 2 images"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(two_gaussians, torch.zeros(2, *SHAPE), make_scheduler(), 2, **options)


def test_a_prediction_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"denoise must return the shape \(2, 4, 6, 7\) or twice"):
        sample(lambda x, t, c: x[:, :3], torch.zeros(1, *SHAPE), make_scheduler(), 2)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1"])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="seed must be an integer from 0 to"):
        seed_generators([0, seed])
