"""Guidance against its formulas, written here a second time, image by image and in float64."""

import math

import pytest
import torch

from pixart.sampler.guidance import APG, Guidance, Guide
from pixart.sampler.loop import check_sampling, initial_noise, sample, seed_generators
from pixart.sampler.schedulers import PREDICTIONS, SCHEDULERS, make_scheduler

SHAPE = (4, 6, 7)
# Of the scheduler's own rounding, which at timestep 0 makes 3e-4 of the noise.
LEVELS = make_scheduler("euler").alphas_cumprod.double()
TIMESTEPS = (999.0, 700.25, 399.0, 120.5, 0.0)
OFF = APG(eta=1.0, momentum=0.0, norm=0.0)


def predictions(timestep):
    """What is given, and c, u and p, of two images of different size of values."""
    parts = (
        initial_noise(SHAPE, seed_generators(range(8))).roll(int(timestep), -1).view(4, 2, *SHAPE)
    )
    inputs, conditional, unconditional, perturbed = parts
    scale = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    return inputs, scale * conditional, scale * unconditional, perturbed + 0.3


def guided(guide, timestep, share=0.5, asked=None):
    inputs, conditional, unconditional, perturbed = predictions(timestep)
    answers = {
        "both": torch.cat([unconditional, conditional]),
        "conditional": conditional,
        "unconditional": unconditional,
        "perturbed": perturbed,
    }

    def evaluate(captions):
        if asked is not None:
            asked.append(captions)
        return answers[captions]

    return guide(evaluate, inputs, timestep, share)


def level(timestep):
    below = int(timestep)
    above = min(below + 1, 999)
    share = LEVELS[below] + (timestep - below) * (LEVELS[above] - LEVELS[below])
    return share.sqrt().item(), (1 - share).sqrt().item()


def to_clean(kind, inputs, output, timestep):
    alpha, sigma = level(timestep)
    velocity = alpha * inputs - sigma * output
    return {
        "epsilon": (inputs - sigma * output) / alpha, "v_prediction": velocity, "sample": output
    }[kind]  # fmt: skip


def from_clean(kind, inputs, clean, timestep):
    alpha, sigma = level(timestep)
    epsilon = (inputs - alpha * clean) / sigma
    velocity = alpha * epsilon - sigma * clean
    return {"epsilon": epsilon, "v_prediction": velocity, "sample": clean}[kind]


def projected(kind, scale, apg, running, timestep, image):
    """Algorithm 1 of arXiv:2410.02416 for one image; running is changed in place."""
    inputs, conditional, unconditional, _ = (each[image].double() for each in predictions(timestep))
    clean, without = (
        to_clean(kind, inputs, each, timestep) for each in (conditional, unconditional)
    )
    difference = clean - without + apg.momentum * running
    running.copy_(difference)
    length = math.sqrt((difference**2).sum())
    if 0 < apg.norm < length:
        difference = difference * apg.norm / length
    direction = clean / math.sqrt((clean**2).sum())
    parallel = (difference * direction).sum() * direction
    update = difference - parallel + apg.eta * parallel
    return from_clean(kind, inputs, clean + (scale - 1) * update, timestep)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize(
    "apg",
    [APG(), APG(0.3, 0.0, 4.0), APG(1.0, 0.5, 0.0), APG(0.0, -0.75, 2.5), APG(-0.5, 1.0, 0.1)],
)
def test_apg_is_its_formula_with_a_momentum_for_every_image(kind, apg):
    guide = Guide(Guidance(7.0, apg=apg), make_scheduler("euler", {"prediction_type": kind}), True)
    running = torch.zeros(2, *SHAPE, dtype=torch.float64)
    for timestep in (*TIMESTEPS, TIMESTEPS[-1]):  # one twice, as both halves of Heun's steps may be
        output = guided(guide, timestep)
        for image in range(2):
            expected = projected(kind, 7.0, apg, running[image], timestep, image)
            error = (output[image] - expected).abs().max() / expected.abs().max()
            assert error < 2e-5


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_apg_with_all_parts_off_is_classifier_free_guidance(kind, timestep):
    scheduler = make_scheduler("euler", {"prediction_type": kind})
    plain, off = (Guide(Guidance(4.5, apg=apg), scheduler, True) for apg in (None, OFF))
    expected = guided(plain, timestep)
    assert (guided(off, timestep) - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_whole_run_of_apg_with_all_parts_off_draws_the_picture_of_classifier_free_guidance():
    def draw(guidance):
        noise = initial_noise(SHAPE, seed_generators([0, 1]))
        return sample(shift, noise, make_scheduler(), 8, guidance=guidance)

    torch.testing.assert_close(draw(Guidance(3.0, apg=OFF)), draw(3.0), rtol=1e-5, atol=1e-5)
    assert (draw(Guidance(3.0, apg=APG())) - draw(3.0)).abs().max() > 0.1


def shift(latents, timesteps, captions):
    half = len(latents) // 2
    return 0.3 * latents + torch.tensor([0.0] * half + [0.1] * half).view(-1, 1, 1, 1)


def wave(latents, timesteps, captions):
    """Predictions that captions move, of images that do not see each other."""
    half = len(latents) // 2
    sizes = {
        "conditional": [0.5] * len(latents),
        "unconditional": [0.3] * len(latents),
        "perturbed": [0.4] * len(latents),
        "both": [0.3] * half + [0.5] * half,
    }
    size = torch.tensor(sizes[captions]).view(-1, 1, 1, 1)
    return torch.sin(latents.roll(1, -1) * 3 * size) * size + 0.2 * latents


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("pag", [0.0, 3.0])
def test_pag_and_rescaling_are_their_formulas(scale, pag, share):
    if scale <= 1 and not pag:
        pytest.skip("refused: nothing would be rescaled")
    guide = Guide(Guidance(scale, rescale=share, pag=pag), make_scheduler(), True)
    output = guided(guide, 500.0)
    _, *parts = predictions(500.0)
    for image in range(2):
        conditional, unconditional, perturbed = (each[image].double() for each in parts)
        # arXiv:2403.17377, equation 16; with a scale of at most 1 the unconditional has no part in it.
        expected = conditional + pag * (conditional - perturbed)
        if scale > 1:
            expected += (scale - 1) * (conditional - unconditional)
        # arXiv:2305.08891, equations 15 and 16.
        brought = expected * conditional.std() / expected.std()
        expected = share * brought + (1 - share) * expected
        torch.testing.assert_close(output[image], expected.float(), rtol=1e-5, atol=1e-5)
        if share == 1:
            assert output[image].std().item() == pytest.approx(conditional.std().item(), rel=1e-5)


def test_apg_pag_and_rescaling_go_together():
    apg, scheduler = APG(0.2, -0.5, 3.0), make_scheduler()
    output = guided(Guide(Guidance(5.0, (0, 1), 0.7, apg, 2.0), scheduler, True), 500.0)
    alone = guided(Guide(Guidance(5.0, apg=apg), scheduler, True), 500.0)
    _, conditional, _, perturbed = predictions(500.0)
    both = alone + 2 * (conditional - perturbed)
    for image in range(2):
        ratio = conditional[image].std() / both[image].std()
        expected = both[image] * (0.7 * ratio + 0.3)
        torch.testing.assert_close(output[image], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("guidance", "batched", "asked"),
    [
        (Guidance(1.0), True, ["conditional"]),
        (Guidance(4.5), True, ["both"]),
        (Guidance(4.5), False, ["unconditional", "conditional"]),
        (Guidance(4.5, apg=APG(), rescale=0.5), True, ["both"]),
        (Guidance(4.5, pag=3.0), True, ["both", "perturbed"]),
        (Guidance(4.5, pag=3.0), False, ["unconditional", "conditional", "perturbed"]),
        (Guidance(1.0, pag=3.0), True, ["conditional", "perturbed"]),
        (Guidance(0.0, pag=3.0, rescale=1.0), False, ["conditional", "perturbed"]),
    ],
)
def test_what_each_guidance_evaluates_in_a_step_and_outside_of_its_interval(
    guidance, batched, asked
):
    within, outside = [], []
    guide = Guide(guidance, make_scheduler(), batched)
    guided(guide, 500.0, 0.5, within)
    assert within == asked
    output = guided(guide, 500.0, 1.0, outside)
    assert outside == ["conditional"] and torch.equal(output, predictions(500.0)[1])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_guidance_with_all_of_it_off_has_the_bits_of_a_scale_alone(name):
    def draw(**options):
        generators = seed_generators([0, 1])
        noise = initial_noise(SHAPE, generators)
        steps = 1 if name == "dmd" else 5
        return sample(wave, noise, make_scheduler(name), steps, generators=generators, **options)

    plain = draw(guidance=3.0, guidance_interval=(0.0, 0.7))
    assert torch.equal(plain, draw(guidance=Guidance(3.0, (0.0, 0.7))))


def test_the_momentum_of_one_run_is_not_that_of_the_next():
    def draw():
        noise = initial_noise(SHAPE, seed_generators([0]))
        return sample(wave, noise, scheduler, 5, guidance=guidance)

    scheduler, guidance = make_scheduler("heun"), Guidance(5.0, apg=APG(momentum=-0.9))
    assert torch.equal(draw(), draw())


@pytest.mark.parametrize(
    "guidance", [Guidance(3.0, (0, 1), 1.0, APG()), Guidance(0.0, pag=2.0, rescale=1.0)]
)
def test_predictions_of_nothing_come_to_nothing(guidance):
    output = Guide(guidance, make_scheduler(), True)(
        lambda captions: torch.zeros(2 if captions == "both" else 1, *SHAPE),
        torch.zeros(1, *SHAPE), 500.0, 0.0,
    )  # fmt: skip
    assert torch.equal(output, torch.zeros(1, *SHAPE))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1.0}, "guidance must be a finite number from 0 up, got -1.0"),
        (
            {"scale": 2.0, "interval": (0.6, 0.4)},
            "guidance_interval must be 0 <= start <= end <= 1",
        ),
        ({"scale": 2.0, "rescale": 1.5}, "guidance_rescale must be from 0 to 1, got 1.5"),
        ({"scale": 2.0, "pag": math.inf}, "pag must be a finite number from 0 up, got inf"),
        ({"scale": 1.0, "apg": APG()}, "apg must be given with guidance above 1, got 1.0"),
        ({"scale": 1.0, "rescale": 0.5}, "guidance_rescale must be given with guidance above 1 or"),
    ],
)
def test_guidance_that_is_impossible_or_would_do_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 1.5}, "apg_eta must be from -1 to 1, got 1.5"),
        ({"momentum": math.nan}, "apg_momentum must be from -1 to 1, got nan"),
        ({"norm": -1.0}, "apg_norm must be a finite number from 0 up, got -1.0"),
    ],
)
def test_impossible_numbers_of_apg_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        APG(**settings)


def test_apg_is_refused_where_a_prediction_of_noise_says_nothing_of_the_picture():
    config = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "clip_sample": True}
    config["timestep_spacing"] = "trailing"
    for kind in ("epsilon", "v_prediction"):
        scheduler = make_scheduler(None, {**config, "prediction_type": kind})
        check_sampling(scheduler, 4, 4.5)
        if kind == "epsilon":
            with pytest.raises(
                ValueError, match="apg must be left out for DDIMScheduler with resc"
            ):
                check_sampling(scheduler, 4, Guidance(4.5, apg=APG()))
        else:
            check_sampling(scheduler, 4, Guidance(4.5, apg=APG()))


def test_an_interval_is_given_once():
    with pytest.raises(ValueError, match="guidance_interval must be within guidance, got"):
        check_sampling(make_scheduler(), 4, Guidance(2.0), (0.0, 0.5))
