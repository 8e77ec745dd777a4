"""The losses of few steps, by what is known of them: closed forms, and diffusers' schedulers."""

import pytest
import torch
from torch import Tensor

from pixart.diffusion import add_noise, alphas_cumprod
from pixart.sampler import make_scheduler, sample
from pixart.training.distillation import (
    CLEAN,
    between,
    consistency,
    ddim,
    even_timesteps,
    fake_loss,
    grid_pair,
    grid_timesteps,
    guided,
    huber,
    matching_loss,
    noise_on,
)

SHAPE = (3, 4, 4, 4)


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def at(*timesteps: int) -> Tensor:
    return torch.tensor(timesteps * (1 if len(timesteps) == 3 else 3))


def levels(t: int) -> tuple[float, float]:
    level = alphas_cumprod()[t].item()
    return level**0.5, (1 - level) ** 0.5


def gaussian(x_t: Tensor, t: int, mean: float, deviation: float) -> Tensor:
    """The best prediction of x0 for data that are normal, value by value."""
    alpha, sigma = levels(t)
    gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
    return mean + gain * (x_t - alpha * mean)


def test_the_walk_is_the_one_that_is_drawn() -> None:
    walk = even_timesteps(4)
    assert walk == (999, 749, 499, 249) and even_timesteps(2) == (999, 499)
    assert even_timesteps(1) == (999,) and even_timesteps(3) == (999, 666, 333)

    def predict(x: Tensor, t: int) -> Tensor:  # the noise, for normal data
        alpha, sigma = levels(t)
        return (x - alpha * gaussian(x, t, 0.3, 0.7)) / sigma

    x_t = draw(0)
    for t, s in zip(walk, (*walk[1:], CLEAN), strict=True):
        x_t = ddim(gaussian(x_t, t, 0.3, 0.7), x_t, at(t), at(s))
    drawn = sample(
        lambda x, t, _: predict(x, int(t[0])), draw(0), make_scheduler("ddim"), walk, guidance=1.0
    )
    torch.testing.assert_close(x_t, drawn, atol=1e-4, rtol=1e-4)


def test_noise_that_is_added_on_makes_the_state_of_the_later_timestep() -> None:
    x0, noise = draw(0), draw(1)
    t = at(500, 900, 999)
    torch.testing.assert_close(noise_on(x0, noise, at(CLEAN), t), add_noise(x0, noise, t))
    x_s = add_noise(x0, draw(2), at(400))
    torch.testing.assert_close(noise_on(x_s, noise, at(400), at(400)), x_s)
    (alpha, sigma), (_, before) = levels(800), levels(400)
    zero = torch.zeros(SHAPE)
    of_picture = noise_on(add_noise(torch.ones(SHAPE), zero, at(400)), zero, at(400), at(800))
    of_state = noise_on(torch.full(SHAPE, before), zero, at(400), at(800))
    of_noise = noise_on(zero, torch.ones(SHAPE), at(400), at(800))
    torch.testing.assert_close(of_picture, torch.full(SHAPE, alpha))
    torch.testing.assert_close(of_state**2 + of_noise**2, torch.full(SHAPE, sigma**2))


def test_timesteps_lie_between_two_of_the_walk() -> None:
    every = torch.arange(1000)
    for s, t in ((499, 999), (CLEAN, 249)):
        found = between(torch.full((1000,), s), torch.full((1000,), t), every)
        assert found.min() == max(s, 0) and found.max() == t - 1


def test_the_student_is_left_alone_where_its_pictures_are_the_teachers() -> None:
    x0 = draw(0).mul(0.7).add(0.3).requires_grad_()
    x_tau = add_noise(x0.detach(), draw(1), at(600))
    real = gaussian(x_tau, 600, 0.3, 0.7)
    matching_loss(x0, real, real.clone()).sum().backward()
    assert x0.grad is not None and not x0.grad.any()


def test_the_student_is_moved_to_the_teachers_distribution() -> None:
    """Data are normal around 0.3, what the student draws around 1.3."""
    x0 = draw(0).mul(0.7).add(1.3).requires_grad_()
    x_tau = add_noise(x0.detach(), draw(1), at(600))
    real, fake = (gaussian(x_tau, 600, mean, 0.7) for mean in (0.3, 1.3))
    matching_loss(x0, real, fake).sum().backward()
    size = (x0 - real).abs().mean((1, 2, 3), keepdim=True)
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, ((fake - real) / size / x0[0].numel()).detach())
    assert (x0.grad > 0).all()  # down, to the lower mean, in every value


def test_a_fake_that_knows_the_students_pictures_has_the_least_loss() -> None:
    x0 = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.3
    t = torch.full((64,), 400)
    x_t = add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)), t)
    options = {"prediction_type": "v_prediction", "min_snr": 5.0}
    right, *wrong = (
        fake_loss(gaussian(x_t, 400, *normal), x0, t, **options).mean()  # type: ignore[arg-type]
        for normal in ((0.3, 0.7), (0.5, 0.7), (0.3, 1.2))
    )
    assert all(right < other for other in wrong)
    # And it is the squared error of the prediction itself where nothing is clamped.
    alpha, sigma = levels(400)
    error = (gaussian(x_t, 400, 0.3, 0.7) - x0).square().mean((1, 2, 3))
    for kind, weight in (("epsilon", alpha**2 / sigma**2), ("v_prediction", 1 / sigma**2)):
        found = fake_loss(gaussian(x_t, 400, 0.3, 0.7), x0, t, prediction_type=kind, min_snr=None)
        torch.testing.assert_close(found, error * weight)


def test_consistency_is_that_of_diffusers_and_the_identity_at_the_end() -> None:
    scheduler = make_scheduler("lcm")
    scheduler.set_timesteps(4)
    assert tuple(scheduler.timesteps.tolist()) == grid_timesteps(4, 50) == (999, 759, 499, 259)
    x0, x_t = draw(0), draw(1)
    for t in (19, 999):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t)  # type: ignore[attr-defined]
        torch.testing.assert_close(consistency(x0, x_t, at(t)), skip * x_t + out * x0)
    assert torch.equal(consistency(x0, x_t, at(0)), x_t)


def test_neighbours_of_the_grid() -> None:
    t, s = grid_pair(torch.tensor([0, 19, 20, 999]), 50)
    assert t.tolist() == [19, 19, 39, 999] and s.tolist() == [0, 0, 19, 979]


def test_guidance_counts_from_none_at_one() -> None:
    """As everywhere here: LCM's code has c + w (c - u), whose 3.5 is our 4.5."""
    without, with_caption = draw(0), draw(1)
    torch.testing.assert_close(guided(without, with_caption, 1.0), with_caption)
    published = with_caption + 3.5 * (with_caption - without)
    torch.testing.assert_close(guided(without, with_caption, 4.5), published)


@pytest.mark.parametrize(("distance", "expected"), [(0.0, 0.0), (1.0, 2**0.5 - 1)])
def test_huber(distance: float, expected: float) -> None:
    found = huber(torch.full(SHAPE, distance), torch.zeros(SHAPE), 1.0)
    torch.testing.assert_close(found, torch.full((3,), expected))
