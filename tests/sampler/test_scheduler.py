import inspect
import math

import pytest
import torch

from pixart.sampler.loop import check_sampling, initial_noise, sample, seed_generators
from pixart.sampler.schedulers import (
    OWN,
    SCHEDULERS,
    default_guidance,
    default_steps,
    make_scheduler,
)

# As the scheduler_config.json of the released PixArt pipelines reads.
PUBLISHED = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.27.0",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "euler_at_final": False,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_karras_sigmas": False,
    "variance_type": None,
}
SHAPE = (4, 6, 7)


def damp(latents, timesteps, captions):
    return 0.1 * latents


def walk(scheduler, steps=None):
    """The timesteps at which a denoiser is asked."""
    timesteps = []

    def denoise(latents, at, captions):
        timesteps.append(at[0].item())
        return damp(latents, at, captions)

    sample(denoise, torch.zeros(1, *SHAPE), scheduler, steps)
    return timesteps


@pytest.mark.parametrize("steps", [1, 4, 14, 20, 50])
def test_published_config_walks_the_timesteps_of_the_pipeline_in_diffusers(steps):
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler.from_config(PUBLISHED)
    theirs.set_timesteps(steps)
    for scheduler in (make_scheduler(None, PUBLISHED), make_scheduler("dpm-solver++", PUBLISHED)):
        assert walk(scheduler, steps) == theirs.timesteps.tolist()
    assert make_scheduler().config == make_scheduler("dpm-solver++").config


def test_released_pipelines_and_the_plain_name_sample_alike():
    noise = initial_noise(SHAPE, seed_generators([3]))
    plain, published = make_scheduler(), make_scheduler(None, PUBLISHED)
    assert torch.equal(sample(damp, noise, plain), sample(damp, noise, published))


def test_timesteps_of_dpm_solver_are_the_ones_of_the_paper():
    timesteps = walk(make_scheduler(), 20)
    assert timesteps[:3] == [999, 949, 899] and timesteps[-1] == 50


def test_fractional_timesteps_reach_the_denoiser_unrounded():
    assert walk(make_scheduler("euler"), 20)[1] == pytest.approx(999 - 999 / 19, abs=1e-3)


def test_lcm_walks_timesteps_of_its_distillation():
    # On the distilled grid 19, 39, ..., 999. PixArt's own code takes 519 and 279 from it instead.
    assert walk(make_scheduler("lcm", PUBLISHED)) == [999, 759, 499, 259]


# SA-Solver takes seconds for as many steps, and Heun twice as many evaluations.
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in SCHEDULERS
        if name not in ("lcm", "dmd", "sa-solver-karras", "heun", "heun-karras")
    ],
)
def test_as_many_steps_as_a_scheduler_can_tell_apart(name):
    noise = initial_noise((1, 2, 2), seed_generators([0]))
    assert sample(damp, noise, make_scheduler(name), 999).isfinite().all()


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("dpm-solver++", 0, "steps must be an integer from 1 to 1000, got 0"),
        ("dpm-solver++", -3, "steps must be an integer from 1 to 1000, got -3"),
        ("dpm-solver++", 1001, "steps must be an integer from 1 to 1000, got 1001"),
        ("dpm-solver++", 2.5, "steps must be an integer from 1 to 1000, got 2.5"),
        ("dpm-solver++", True, "steps must be an integer from 1 to 1000, got True"),
        ("dpm-solver++", 1000, "steps must be fewer for this scheduler, got 1000"),
        ("sa-solver", 1000, "steps must be fewer for this scheduler, got 1000"),
        ("unipc", 1000, "steps must be fewer for this scheduler, got 1000"),
        ("lcm", 51, "steps must be an integer from 1 to 50, got 51"),
        ("dmd", 2, "steps must be an integer from 1 to 1, got 2"),
        ("euler", 1, "steps must be at least 2 for this scheduler, got 1"),
    ],
)
def test_impossible_steps_are_refused(name, steps, message):
    with pytest.raises(ValueError, match=message):
        walk(make_scheduler(name), steps)


def test_a_name_takes_only_the_training_facts_of_the_pipeline():
    tuned = {**PUBLISHED, "beta_end": 0.03, "use_karras_sigmas": True, "solver_order": 3}
    own = make_scheduler(None, tuned)
    assert own.config.use_karras_sigmas and own.config.solver_order == 3
    for name in SCHEDULERS:
        scheduler = make_scheduler(name, tuned)
        assert type(scheduler).__name__ == SCHEDULERS[name].class_name
        assert scheduler.betas[-1].item() == pytest.approx(0.03)
        assert bool(scheduler.config.get("use_karras_sigmas")) == name.endswith("-karras")
        assert scheduler.config.get("solver_order", 2) == (1 if name == "ddim" else 2)


def test_betas_that_a_config_leaves_out_are_those_of_its_own_class():
    # LCMScheduler and LCM pipelines default to Stable Diffusion's betas; without a config, ours.
    assert make_scheduler("euler", {"_class_name": "LCMScheduler"}).config.beta_end == 0.012
    assert make_scheduler("lcm").config.beta_end == 0.02
    assert make_scheduler("lcm").config.beta_schedule == "linear"


def test_steps_of_a_distilled_model_are_kept():
    config = {"_class_name": "LCMScheduler", "original_inference_steps": 25}
    assert make_scheduler("lcm", config).config.original_inference_steps == 25
    with pytest.raises(ValueError, match="steps must be an integer from 1 to 25, got 26"):
        walk(make_scheduler(None, config), 26)


def test_defaults_follow_the_scheduler():
    expected = {"lcm": (4, 1.0), "sa-solver": (25, 4.5), "dmd": (1, 1.0)}
    for name in SCHEDULERS:
        scheduler = make_scheduler(name)
        got = default_steps(scheduler), default_guidance(scheduler)
        assert got == expected.get(name.removesuffix("-karras"), (20, 4.5))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("dpm", None, "scheduler must be one of dpm-solver.*, dmd, got 'dpm'"),
        (None, {"_class_name": "Nonesuch"}, "own Nonesuch is not supported"),
        (None, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "own FlowMatch.* not supported"),
        (None, {**PUBLISHED, "prediction_type": "flow"}, "prediction_type must be .* got 'flow'"),
        ("sa-solver", {"rescale_betas_zero_snr": True}, "model's rescale_betas_zero_snr=True"),
        ("dmd", {"prediction_type": "sample"}, "dmd must have linear betas and predict epsilon"),
    ],
)
def test_schedulers_that_cannot_be_honoured_are_refused(name, config, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(name, config)


def test_dmd_takes_noise_for_the_state_at_timestep_400_and_ends_in_one_prediction():
    noise = initial_noise(SHAPE, seed_generators([5]))
    asked = []

    def denoise(latents, at, captions):
        asked.append((at.tolist(), captions))
        return torch.cat([damp(latents, at, captions), latents], dim=1)  # and a variance

    clean = sample(denoise, noise, make_scheduler("dmd", PUBLISHED))
    level = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[400]
    expected = (noise - (1 - level).sqrt() * 0.1 * noise) / level.sqrt()
    assert asked == [([400.0], "conditional")]
    assert torch.allclose(clean, expected.float(), atol=1e-5)


def classes_of_diffusers():
    """All schedulers, those whose libraries are not installed too."""
    from diffusers import schedulers

    return sorted(
        name for name in dir(schedulers) if name.endswith("Scheduler") and name[0].isupper()
    )


def draw_as_diffusers(scheduler, noise, steps, generators):
    """The loop of diffusers' PixArtSigmaPipeline without guidance."""
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    taken = inspect.signature(scheduler.step).parameters
    options = {"eta": 0.0, "generator": generators}
    options = {name: value for name, value in options.items() if name in taken}
    for timestep in scheduler.timesteps:
        output = damp(scheduler.scale_model_input(latents, timestep), timestep, "conditional")
        latents = scheduler.step(output, timestep, latents, **options, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("class_name", classes_of_diffusers())
@pytest.mark.parametrize("options", [{}, {"skip_prk_steps": True, "timestep_spacing": "trailing"}])
def test_every_scheduler_of_diffusers_draws_the_same_or_is_refused_by_name(class_name, options):
    from diffusers import schedulers

    config = {"_class_name": class_name, **options}
    try:
        own = make_scheduler(None, config)
        check_sampling(own, 4, 1.0, (0.0, 1.0))
    except ValueError as error:
        assert class_name in str(error) and "\n" not in str(error)
        missing = "was not found in your environment" in str(error)
        assert class_name not in OWN or missing
        return
    generators = seed_generators([1, 2])
    noise = initial_noise(SHAPE, generators)
    seen = []
    drawn = sample(damp, noise, own, 4, guidance=1.0, generators=generators, callback=seen.append)
    theirs = getattr(schedulers, class_name).from_config(config)
    generators = seed_generators([1, 2])
    noise = initial_noise(SHAPE, generators)
    assert torch.equal(drawn, draw_as_diffusers(theirs, noise, 4, generators))
    assert drawn.isfinite().all() and seen[-1].predicted.isfinite().all()
    assert class_name in OWN


@pytest.mark.parametrize(
    ("name", "class_name", "options"),
    [
        ("euler-a", "EulerAncestralDiscreteScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("dpm-solver++-karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("sa-solver-karras", "SASolverScheduler", {"use_karras_sigmas": True}),
        ("euler-karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("heun-karras", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("unipc-karras", "UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    ],
)
@pytest.mark.parametrize("steps", [2, 7])
def test_a_name_draws_what_its_class_of_diffusers_does(name, class_name, options, steps):
    from diffusers import schedulers

    facts = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    theirs = getattr(schedulers, class_name)(**facts, **options)
    drawn = []
    for draw in (
        lambda noise, generators: sample(
            damp, noise, make_scheduler(name, PUBLISHED), steps, guidance=1.0, generators=generators
        ),
        lambda noise, generators: draw_as_diffusers(theirs, noise, steps, generators),
    ):
        generators = seed_generators([1, 2])
        drawn.append(draw(initial_noise(SHAPE, generators), generators))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("steps", [2, 3, 20, 100])
def test_pndm_draws_with_and_without_its_first_steps_of_another_kind(steps):
    noise = initial_noise(SHAPE, seed_generators([0]))
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    assert sample(damp, noise, make_scheduler(None, config), steps).isfinite().all()
    whole = make_scheduler(None, {"_class_name": "PNDMScheduler"})
    if steps < 4:
        with pytest.raises(ValueError, match="PNDMScheduler can make as it is configured, got"):
            check_sampling(whole, steps, 1.0, (0.0, 1.0))
    else:
        assert sample(damp, noise, whole, steps).isfinite().all()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *[({"num_train_timesteps": n}, "num_train_timesteps") for n in (0, -1, 10**9, 1e3, None)],
        *[({"beta_start": b}, "beta_start") for b in (0, -0.1, math.nan, math.inf, 1, "x", True)],
        *[({"beta_end": b}, "beta_end") for b in (0, 2.0, math.nan, None)],
        ({"beta_start": 0.02, "beta_end": 0.01}, "beta_end"),
        ({"beta_start": 0.5, "beta_end": 0.9}, "beta_start"),
        *[({"flow_shift": s}, "flow_shift") for s in (0, -3, math.nan, 1e9, None)],
        ({"shift": math.nan}, "shift"),
        *[
            ({"trained_betas": b}, "trained_betas")
            for b in ([0.1], [0.0] * 1000, 3, [math.nan] * 1000)
        ],
        ({"solver_order": 0}, "solver_order"),
        ({"sigma_max": -1.0}, "sigma_max"),
        *[
            ({"lambda_min_clipped": x}, "lambda_min_clipped")
            for x in (math.nan, math.inf, "x", None, [1], True)
        ],
        ({"something_new": math.inf}, "something_new"),
    ],
)
def test_numbers_that_no_scheduler_can_draw_with_are_refused_by_name(config, name):
    for own in ({}, PUBLISHED, {"_class_name": "UniPCMultistepScheduler"}):
        with pytest.raises(ValueError, match=f"{name}.* must") as raised:
            make_scheduler(None, {**own, **config})
        assert "\n" not in str(raised.value)


# Class, options, steps. What one channel, two steps or the mere absence of an error do not show.
CANNOT_DRAW = [
    ("DDPMScheduler", {"variance_type": "learned_range"}, 4),
    ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, 8),  # takes 3 channels
    ("SASolverScheduler", {"variance_type": "learned_range"}, 4),
    ("TCDScheduler", {"rescale_betas_zero_snr": True}, 4),  # divides by an alpha of 0
    ("EulerAncestralDiscreteScheduler", {"beta_schedule": "squaredcos_cap_v2"}, 4),
    ("UniPCMultistepScheduler", {"lower_order_final": False}, 5),  # NaN in the last step
]


@pytest.mark.parametrize(("class_name", "options", "steps"), CANNOT_DRAW)
def test_a_configuration_that_fails_at_any_step_is_refused_before_anything_is_drawn(
    class_name, options, steps
):
    state = torch.get_rng_state()
    scheduler = make_scheduler(None, {**options, "_class_name": class_name})
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{class_name} cannot draw in {steps} steps") as one:
            check_sampling(scheduler, steps, 1.0, (0.0, 1.0))
        assert "\n" not in str(one.value)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("class_name", ["UniPCMultistepScheduler", "DDPMScheduler"])
def test_timesteps_beyond_those_of_training_are_refused(class_name):
    facts = {"_class_name": class_name, "timestep_spacing": "leading", "steps_offset": 1000}
    message = f"{class_name} must walk timesteps from 0 to 999, got 1[0-9]+ to 1[0-9]+ at 2 steps"
    with pytest.raises(ValueError, match=message):
        check_sampling(make_scheduler(None, facts), 2, 1.0, (0.0, 1.0))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_name_can_be_checked(name):
    check_sampling(make_scheduler(name), None, None, (0.0, 1.0))


def test_nothing_left_of_the_picture_is_drawn_where_the_solver_clips_it():
    config = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "clip_sample": True}
    config["timestep_spacing"] = "trailing"
    scheduler = make_scheduler(None, config)
    check_sampling(scheduler, 3, 1.0, (0.0, 1.0))
    noise = initial_noise(SHAPE, seed_generators([0]))
    assert sample(damp, noise, scheduler, 3).isfinite().all()


def test_the_help_of_the_option_names_every_scheduler():
    from pixart.pipeline.request import Request

    help = Request.__dataclass_fields__["scheduler"].metadata["help"]
    plain, suffixed = help.split("; with -karras after ")
    for name in SCHEDULERS:
        assert name.removesuffix("-karras") in (suffixed if name.endswith("-karras") else plain)
