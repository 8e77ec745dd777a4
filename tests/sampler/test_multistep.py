"""Our DPM-Solver++ against diffusers', to the bit, and what is left to it."""

import itertools
from typing import Any

import pytest
import torch

from pixart.sampler.multistep import DPMSolverMultistepScheduler
from pixart.sampler.schedulers import make_scheduler

OPTIONS = {
    "solver_order": (1, 2),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "beta_schedule": ("linear", "scaled_linear"),
    "lower_order_final": (True, False),
    "euler_at_final": (True, False),
}
WALKS = [1, 2, 5, 14, 15, 20, 37, (999, 749, 499, 249), (800, 400)]


def theirs(**options: Any) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(**options)


def begin(scheduler: Any, steps: int | tuple[int, ...], first: int) -> None:
    if isinstance(steps, int):
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=list(steps))
    if first:
        scheduler.set_begin_index(first)


def drawn(scheduler: Any, steps: int | tuple[int, ...], first: int) -> list[torch.Tensor]:
    begin(scheduler, steps, first)
    states = [torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))]
    for timestep in scheduler.timesteps[first:]:
        output = torch.tanh(1.3 * states[-1] + timestep / 1000)
        states += scheduler.step(output, timestep, states[-1], return_dict=False)[:1]
    return states


@pytest.mark.parametrize("values", list(itertools.product(*OPTIONS.values())), ids=str)
def test_every_state_has_the_bits_of_diffusers(values):
    options = dict(zip(OPTIONS, values, strict=True))
    for steps, share in itertools.product(WALKS, (0, 3)):
        first = (steps if isinstance(steps, int) else len(steps)) // share if share else 0
        ours = drawn(DPMSolverMultistepScheduler(**options), steps, first)
        for a, b in zip(ours, drawn(theirs(**options), steps, first), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("count", [7, 250, 1000])
def test_timesteps_and_noise_levels_are_those_of_diffusers_for_every_number_of_steps(count):
    ours = DPMSolverMultistepScheduler(num_train_timesteps=count)
    other = theirs(num_train_timesteps=count)
    assert torch.equal(ours.alphas_cumprod, other.alphas_cumprod)
    assert torch.equal(ours.sigmas, other.sigmas) and torch.equal(ours.timesteps, other.timesteps)
    for steps in range(1, count + 1, 1 if count < 1000 else 7):
        begin(ours, steps, 0), begin(other, steps, 0)
        assert torch.equal(ours.timesteps, other.timesteps) and ours.timesteps.dtype == torch.int64
        assert torch.equal(ours.sigmas, other.sigmas)


def test_a_configuration_is_that_of_diffusers():
    assert DPMSolverMultistepScheduler().config == {
        name: value for name, value in theirs().config.items() if not name.startswith("_")
    }
    again = theirs().from_config(DPMSolverMultistepScheduler(solver_order=1).config)
    assert again.config.solver_order == 1


@pytest.mark.parametrize(
    "options",
    [
        {"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}, {"solver_type": "heun"},
        {"thresholding": True}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"},
        {"trained_betas": [0.01] * 1000}, {"rescale_betas_zero_snr": True},
        {"final_sigmas_type": "sigma_min"}, {"beta_schedule": "squaredcos_cap_v2"},
        {"variance_type": "learned"}, {"lambda_min_clipped": -5.1}, {"prediction_type": "nothing"},
        {"lower_order_final": "yes"}, {"thresholding": 0}, {"of_tomorrow": 1},
        {"solver_order": 1, "_use_default_values": ["solver_order"]},
    ],
    ids=str,
)  # fmt: skip
def test_what_it_does_not_compute_is_left_to_diffusers(options):
    assert not DPMSolverMultistepScheduler.takes(options)


def test_names_and_configurations_find_it():
    own = {"_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.42.1"}
    for made in (make_scheduler(), make_scheduler("ddim"), make_scheduler(None, own)):
        assert isinstance(made, DPMSolverMultistepScheduler)
    assert type(make_scheduler("dpm-solver++-karras")).__module__.startswith("diffusers")
    with pytest.raises(AttributeError):
        _ = make_scheduler().config.nothing
