"""Pictures to begin with: SDEdit and masked sampling, for every scheduler there is."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from gaussian import DEVIATION, FACTS, MEAN, GaussianDenoiser, alpha_sigma, spread

from pixart.sampler.guidance import APG, Guidance
from pixart.sampler.loop import Start, check_sampling, initial_noise, sample, seed_generators
from pixart.sampler.schedulers import OWN, SCHEDULERS, make_scheduler
from pixart.sampler.walk import timesteps_within

KEPT = 2.0  # far from the mean, so that what remains of a picture shows
EVERY = (*SCHEDULERS, *OWN)
# As many as leave little error; distilled models walk few.
STEPS = {"lcm": 4, "LCMScheduler": 4, "dmd": 1}
# Ancestral steps draw all their noise anew and are of first order: at 50 they shrink by 11 %.
ANCESTRAL = {
    "euler-a": 120, "EulerAncestralDiscreteScheduler": 120, "KDPM2AncestralDiscreteScheduler": 120,
    "DDPMScheduler": 120, "DDPMParallelScheduler": 120, "UnCLIPScheduler": 120,
}  # fmt: skip
FIRST_ORDER = ("ddim", "euler", "euler-karras", "EulerDiscreteScheduler", "DDIMScheduler", "TCDScheduler",
               "DDIMParallelScheduler", "CogVideoXDDIMScheduler")  # fmt: skip
# Their walks repeat timesteps: so many evaluations for a step.
SECOND_ORDER = ("heun", "heun-karras", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
                "KDPM2AncestralDiscreteScheduler")  # fmt: skip


def make(name, **options):
    if name in SCHEDULERS:
        return make_scheduler(name, options or None)
    from diffusers import schedulers

    accepted = inspect.signature(getattr(schedulers, name).__init__).parameters
    facts = {key: value for key, value in (FACTS | options).items() if key in accepted}
    if name == "UnCLIPScheduler":  # has no other
        facts.pop("beta_schedule", None)
    return make_scheduler(None, {"_class_name": name, **facts})


def is_distilled(name):
    return name in STEPS


def draw(name, strength, redraw=None, images=100, steps=None, **options):
    """The latents, what the denoiser was asked, and what the callback was told."""
    scheduler, generators, seen = make(name), seed_generators(range(images)), []
    noise = initial_noise((4, 8, 8), generators)
    start = Start(torch.full_like(noise, KEPT), strength, redraw)
    is_pure = name == "dmd" and strength == 1
    denoise = GaussianDenoiser(scheduler, is_distilled(name), is_pure)
    latents = sample(
        denoise,
        noise,
        scheduler,
        steps or STEPS.get(name) or ANCESTRAL.get(name, 50),
        guidance=1.0,
        start=start,
        generators=generators,
        callback=seen.append,
        **options,
    )
    return latents, denoise, seen


def half(value=1.0):
    redraw = torch.zeros(1, 1, 8, 8)
    redraw[..., :4] = value
    return redraw


def kept_correlation(name, scheduler, timesteps):
    """How far the end is still the one that the first state leads to: 1 along the probability flow, and
    where noise is drawn anew, the correlation of two noised states of one picture."""

    def between(high, low):
        ratio = alpha_sigma(scheduler, high)[0] / alpha_sigma(scheduler, low)[0]
        return ratio * spread(scheduler, low) / spread(scheduler, high)

    if name in ANCESTRAL:
        return between(timesteps[0], 0)
    if name.startswith(("sa-solver", "SASolver")):  # stochastic between 200 and 800
        low = next(each for each in timesteps if each < 200)
        return between(min(timesteps[0], 800), low)
    if is_distilled(name):  # each prediction is noised anew
        return math.prod(
            alpha_sigma(scheduler, each)[0] * DEVIATION / spread(scheduler, each)
            for each in timesteps[1:]
        )
    return 1.0


@pytest.mark.parametrize("name", EVERY)
def test_a_picture_begun_with_is_where_the_noise_of_its_level_leads(name):
    latents, denoise, _ = draw(name, 0.6)
    first = denoise.timesteps[0]
    alpha, sigma = alpha_sigma(denoise.scheduler, first)
    deviation = spread(denoise.scheduler, first)
    # In units of the noised data's deviation from its mean, which the flow leaves as they are.
    mean, variance = alpha * (KEPT - MEAN) / deviation, (sigma / deviation) ** 2
    kept = kept_correlation(name, denoise.scheduler, denoise.timesteps)
    expected = DEVIATION * math.sqrt(kept**2 * variance + 1 - kept**2)
    # 25 600 values: the mean is known to 0.003. First-order solvers at 50 steps shrink by 6 %.
    assert latents.mean().item() == pytest.approx(MEAN + DEVIATION * kept * mean, abs=0.013)
    assert latents.std().item() == pytest.approx(expected, rel=0.07)
    if kept == 1 and not is_distilled(name):
        # Value by value: a solver of several steps begins with what it has, not with what it would have.
        flow = (denoise.inputs[0].double() - alpha * MEAN) / deviation * DEVIATION + MEAN
        error = (latents - flow).square().mean().sqrt() / DEVIATION
        assert error < (0.07 if name in FIRST_ORDER else 0.03)


@pytest.mark.parametrize("name", EVERY)
def test_what_a_mask_keeps_is_kept_to_the_bit_and_the_rest_has_the_mean_and_spread_of_the_data(
    name,
):
    latents, _, seen = draw(name, 1.0, half())
    assert (latents[..., 4:] == KEPT).all()
    # Where the walk ends, and what a preview shows at every step.
    assert all((each.predicted[..., 4:] == KEPT).all() for each in seen)
    assert seen[-1].latents is latents
    free = latents[..., :4]  # 12 800 values: the mean is known to 0.0045
    assert free.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert free.std().item() == pytest.approx(DEVIATION, rel=0.07)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", EVERY)
def test_the_denoiser_sees_what_is_kept_with_the_same_noise_at_the_level_of_every_call(
    name, strength
):
    steps = STEPS.get(name, 7)
    _, denoise, _ = draw(name, strength, torch.zeros(1, 1, 8, 8), images=2, steps=steps)
    noise = initial_noise((4, 8, 8), seed_generators(range(2)))
    for timestep, inputs in zip(denoise.timesteps, denoise.inputs, strict=True):
        alpha, sigma = alpha_sigma(denoise.scheduler, timestep)
        # Karras' levels have timesteps rounded to whole ones: by half a step, 0.5 % of the noise.
        torch.testing.assert_close(inputs, alpha * KEPT + sigma * noise, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", EVERY)
def test_a_strength_walks_the_last_steps_of_the_whole_walk(name):
    steps = STEPS.get(name, 10)

    def walk(strength):
        denoise = draw(name, strength, half(), images=1, steps=steps)[1]
        return denoise.timesteps

    whole = walk(1.0)
    for strength in (0.99, 0.56, 0.51 / steps):
        skipped, walked = round(steps * (1 - strength)), walk(strength)
        if name == "PNDMScheduler" and skipped:
            # Without Runge-Kutta steps, which are at other timesteps between.
            every = list(range(1000 // steps * (steps - 1), -1, -(1000 // steps)))[skipped:]
            assert walked == [*every[:2], *every[1:]]
        else:
            assert walked == whole[skipped * (2 if name in SECOND_ORDER else 1) :]


@pytest.mark.parametrize("name", EVERY)
def test_all_of_a_picture_drawn_anew_is_drawn_from_pure_noise_with_the_same_bits(name):
    def bits(**options):
        generators = seed_generators([3, 4])
        noise = initial_noise((4, 6, 7), generators)
        scheduler = make(name)
        denoise = GaussianDenoiser(scheduler)
        steps = STEPS.get(name, 5)
        return sample(denoise, noise, scheduler, steps, generators=generators, **options)

    assert torch.equal(bits(), bits(start=Start(torch.full((2, 4, 6, 7), KEPT))))


@pytest.mark.parametrize("name", EVERY)
def test_a_picture_begun_with_is_the_same_bits_in_any_batch(name):
    guidance = Guidance(1.0, pag=2.0, rescale=0.5) if is_distilled(name) else None
    guidance = guidance or Guidance(3.0, (0.0, 0.9), 0.5, APG(0.5, -0.4, 2.0), 1.5)
    redraw = torch.rand(3, 1, 8, 8, generator=seed_generators([0])[0])
    known = initial_noise((4, 8, 8), seed_generators([8, 9, 10]))

    def denoise(latents, timesteps, captions):
        return torch.roll(latents, 1, -1) * (0.6 if captions == "perturbed" else 0.9)

    def bits(places):
        generators = seed_generators(places)
        start = Start(known[places], 0.7, redraw[places])
        noise, steps = initial_noise((4, 8, 8), generators), STEPS.get(name, 6)
        options = {"guidance": guidance, "start": start, "generators": generators}
        return sample(denoise, noise, make(name), steps, **options)

    batch = bits([0, 1, 2])
    assert batch.isfinite().all()
    for place in range(3):
        assert torch.equal(batch[place], bits([place])[0])


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize(
    "name", ["dpm-solver++", "unipc", "euler", "euler-a", "heun", "DDIMScheduler", "LCMScheduler"]
)
def test_other_predictions_begin_and_keep_alike(name, kind):
    def latents(**options):
        scheduler, generators = make(name, **options), seed_generators([0, 1])
        noise = initial_noise((4, 8, 8), generators)
        start = Start(torch.full_like(noise, KEPT), 0.7, half())
        denoise = GaussianDenoiser(scheduler, is_distilled(name))
        options = {"guidance": 1.0, "start": start, "generators": generators}
        return sample(denoise, noise, scheduler, 4, **options)

    if name in ("euler-a", "heun") and kind == "sample":
        pytest.skip("diffusers has no prediction of the clean picture for it")
    torch.testing.assert_close(latents(prediction_type=kind), latents(), rtol=1e-3, atol=1e-3)


# What is kept and what is drawn, correlated by R: the mean of one given the other is R times it.
R = 0.8


def joint(scheduler):
    covariance = torch.tensor([[1, R], [R, 1]], dtype=torch.float64)

    def denoise(latents, timesteps, captions):
        alpha, sigma = alpha_sigma(scheduler, timesteps[0].item())
        noised = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        clean = alpha * latents.double() @ torch.linalg.solve(noised, covariance)
        return ((latents - alpha * clean) / sigma).float()

    return denoise


@pytest.mark.parametrize(("name", "is_stochastic"), [("dpm-solver++", False), ("euler-a", True)])
def test_what_is_drawn_follows_what_is_kept_as_far_as_replacing_can_make_it(name, is_stochastic):
    scheduler, generators = make(name), seed_generators(range(4))
    noise = initial_noise((100, 50, 2), generators)
    start = Start(torch.full_like(noise, KEPT), 1.0, torch.tensor([1.0, 0.0]).expand(1, 1, 50, 2))
    latents = sample(
        joint(scheduler), noise, scheduler, 200, guidance=1.0, start=start, generators=generators
    )
    # With u = 1 + sigma² the mean m of what is drawn obeys, for a kept y, along the probability flow
    # 2 dm/du = (u m - R y) / (u² - R²), and twice that with all noise drawn anew. So it ends at
    # y R / 2 (1 - R²)^(1/4) times the integral of (u² - R²)^(-5/4) from 1 on, or at y (1 - sqrt(1 - R²)) / R.
    u = torch.logspace(0, 5, 100_001, dtype=torch.float64)
    flow = R / 2 * (1 - R**2) ** 0.25 * torch.trapezoid((u**2 - R**2) ** -1.25, u).item()
    expected = (1 - math.sqrt(1 - R**2)) / R if is_stochastic else flow
    assert 0.3 * R < expected < R
    # 20 000 values of deviation below 1: the mean is known to 0.007; the solver adds 1 %.
    assert latents[..., 0].mean().item() == pytest.approx(KEPT * expected, abs=0.03)
    assert (latents[..., 1] == KEPT).all()


@pytest.mark.parametrize("name", ["unipc", "sa-solver"])
def test_correctors_do_not_go_back_behind_what_a_half_open_mask_mixes(name):
    # Mixed 20 times by 0.9, most of the picture is kept by every solver. Those that step from the state
    # before the last one again would forget it: UniPC came to 1.01 then.
    redraw = torch.full((1, 1, 8, 8), 0.9)
    means = [draw(each, 1.0, redraw, steps=20)[0].mean().item() for each in ("ddim", name)]
    assert means[1] == pytest.approx(means[0], abs=0.1)


def test_the_interval_of_guidance_counts_from_pure_noise_for_a_picture_too():
    asked = []

    def denoise(latents, timesteps, captions):
        asked.append((timesteps[0].item(), captions))
        return latents

    known = torch.zeros(1, 4, 8, 8)
    guidance = Guidance(4.5, (0.0, 0.5))
    sample(denoise, known, make("ddim"), 10, guidance=guidance, start=Start(known, 0.7))
    assert [captions for _, captions in asked] == ["both"] * 2 + ["conditional"] * 5


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.25, 0.8), (0.5, 0.5)])
def test_timesteps_within_an_interval_are_those_that_guidance_counts(name, interval):
    steps = STEPS.get(name, 9)
    asked = {}

    def denoise(latents, timesteps, captions):
        asked.setdefault(timesteps[0].item(), captions == "both")  # the first of each timestep
        return latents[: len(timesteps)] * 0.1

    options = {"guidance": 2.0, "guidance_interval": interval}
    sample(denoise, torch.zeros(1, 4, 8, 8), make(name), steps, **options)
    high, low = timesteps_within(make(name), steps, interval)
    assert {each: high >= each >= low for each in asked} == asked


@pytest.mark.parametrize(
    ("name", "steps", "strength", "message"),
    [
        ("dpm-solver++", 20, 0.0, "strength must be above 0 and at most 1, got 0.0"),
        ("dpm-solver++", 20, 2.0, "strength must be above 0 and at most 1, got 2.0"),
        ("dpm-solver++", 20, math.nan, "strength must be above 0 and at most 1, got nan"),
        ("heun", 20, 0.02, "strength must be above 0.025 to leave one of 20 steps, got 0.02; "
         "take more strength, or 26 steps"),
        ("dmd", 1, 0.3, "strength must be above 0.5 to leave one of 1 steps, got 0.3; "
         "take more strength$"),
    ],
)  # fmt: skip
def test_a_strength_that_draws_nothing_is_refused_before_anything_is_computed(
    name, steps, strength, message
):
    known = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match=message):
        check_sampling(make(name), steps, None, strength=strength)
    with pytest.raises(ValueError, match=message):
        sample(GaussianDenoiser(make(name)), known, make(name), steps, start=Start(known, strength))


@pytest.mark.parametrize("name", EVERY)
def test_every_scheduler_can_begin_with_a_picture(name):
    for strength in (1.0, 0.6):
        check_sampling(make(name), STEPS.get(name, 6), None, strength=strength, is_masked=True)


def test_a_scheduler_that_comes_to_no_end_from_a_later_step_is_refused_by_name():
    class Broken(type(make("ddim"))):
        def set_begin_index(self, begin_index=0):
            super().set_begin_index(begin_index + 1)

    scheduler = Broken.from_config(make("ddim").config)
    check_sampling(scheduler, 6, 1.0)
    with pytest.raises(ValueError, match="^Broken cannot draw in 6 steps from strength 0.5 on as "):
        check_sampling(scheduler, 6, 1.0, strength=0.5)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            Start(torch.zeros(1, 4, 6, 8)),
            r"start.latents must have the shape of the noise, \(2, 4, 8",
        ),
        (
            Start(torch.zeros(2, 4, 8, 8), 1.0, torch.zeros(3, 1, 8, 8)),
            r"start.redraw .* got \(3, 1, ",
        ),
        (
            Start(torch.zeros(2, 4, 8, 8), 1.0, torch.full((1, 1, 8, 8), 1.5)),
            "redraw must be from 0",
        ),
        (Start(torch.zeros(2, 4, 8, 8), 1.0, torch.full((1, 1, 8, 8), math.nan)), "must be from 0"),
    ],
)
def test_starts_of_another_shape_or_range_are_refused(start, message):
    with pytest.raises(ValueError, match=message):
        sample(GaussianDenoiser(make("ddim")), torch.zeros(2, 4, 8, 8), make("ddim"), start=start)


def test_a_start_stays_on_its_device_and_is_never_read_back():
    noise = initial_noise((4, 8, 8), seed_generators([0]), "meta")
    start = Start(
        torch.zeros(1, 4, 8, 8, device="meta"), 0.5, torch.ones(1, 1, 8, 8, device="meta")
    )
    guidance = Guidance(3.0, rescale=0.5, apg=APG(), pag=1.0)
    latents = sample(lambda x, t, c: x, noise, make("heun"), 5, guidance=guidance, start=start)
    assert latents.device.type == "meta"


def test_only_what_is_finer_than_the_coarse_part_is_drawn_anew() -> None:
    """A denoiser of white pictures, held by the coarse part of a chequered one with a gradient."""
    noise = initial_noise((4, 16, 16), seed_generators([3]))
    slope = torch.linspace(-2, 2, 16).expand(1, 4, 16, 16)
    fine = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    known = slope + fine

    def white(latents, timesteps, captions):  # of the predictions, which are of clean latents
        return torch.ones_like(latents)

    scheduler = make_scheduler("dpm-solver++", {"prediction_type": "sample"})
    free = sample(white, noise, scheduler, 20, guidance=1.0, start=Start(known, 0.5))
    held = sample(white, noise, scheduler, 20, guidance=1.0, start=Start(known, 0.5, coarse=2))
    assert (free - 1).abs().max() < 1e-5
    means, wanted = F.avg_pool2d(held, 2), F.avg_pool2d(known, 2)
    assert (means - wanted).abs().max() < 0.1 < (F.avg_pool2d(free, 2) - wanted).abs().max()
    # The chequers are finer than the cells: the denoiser has none, and none are drawn.
    assert (held * fine).mean().abs() < 0.05 < (known * fine).mean()
    with pytest.raises(ValueError, match="start.coarse must be from 1 to 16, got 17"):
        sample(white, noise, scheduler, 4, guidance=1.0, start=Start(known, 0.5, coarse=17))
