import pytest
import torch

from pixart.sampler.loop import initial_noise, sample, seed_generators
from pixart.sampler.schedulers import SCHEDULERS, default_guidance, default_steps, make_scheduler

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


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("lcm", "dmd")])
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
        assert not scheduler.config.get("use_karras_sigmas")
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
        assert got == expected.get(name, (20, 4.5))


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
