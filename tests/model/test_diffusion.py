import math

import pytest
import torch
from torch import Tensor

from pixart.diffusion import add_noise, alphas_cumprod, training_loss, velocity

TIMESTEPS = torch.tensor([0, 1, 250, 999])


def batch(channels: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, len(TIMESTEPS), channels, 6, 5, generator=generator)
    return x0, noise


def test_the_schedule_has_the_published_values() -> None:
    cumulative = alphas_cumprod()
    assert cumulative[0].item() == pytest.approx(0.9999)
    assert cumulative[249].item() == pytest.approx(0.52409, abs=5e-6)
    assert cumulative[999].item() == pytest.approx(4.0358e-5, abs=5e-10)


def test_noising_keeps_unit_variance_and_velocity_is_its_rotation() -> None:
    x0, noise = batch()
    x_t, v = add_noise(x0, noise, TIMESTEPS), velocity(x0, noise, TIMESTEPS)
    alpha = alphas_cumprod()[TIMESTEPS].view(-1, 1, 1, 1).sqrt().float()
    sigma = (1 - alphas_cumprod()[TIMESTEPS]).view(-1, 1, 1, 1).sqrt().float()
    assert torch.allclose(alpha * x_t - sigma * v, x0, atol=1e-6)
    assert torch.allclose(sigma * x_t + alpha * v, noise, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_has_no_loss(prediction_type: str) -> None:
    x0, noise = batch()
    target = noise if prediction_type == "epsilon" else velocity(x0, noise, TIMESTEPS)
    # -1 asks for the true variance of the step, so that nothing is left to lose but at t = 0.
    output = torch.cat([target, -torch.ones_like(target)], dim=1)
    terms = training_loss(lambda *_: output, x0, TIMESTEPS, noise, prediction_type=prediction_type)
    assert terms.mse.abs().max() == 0
    assert terms.vb[1:].abs().max() < 1e-6
    assert torch.equal(terms.loss, terms.mse + terms.vb)


def test_vb_is_the_kl_divergence_between_steps_in_bits() -> None:
    x0, noise = batch()
    prediction, variance = batch(seed=1)
    output = torch.cat([prediction, variance.tanh()], dim=1)
    vb = training_loss(lambda *_: output, x0, TIMESTEPS, noise).vb
    for index in (1, 2, 3):
        t = int(TIMESTEPS[index])
        expected = kl_in_bits(x0[index], noise[index], prediction[index], variance[index], t)
        assert vb[index].item() == pytest.approx(expected, rel=1e-4)


def kl_in_bits(x0: Tensor, noise: Tensor, prediction: Tensor, variance: Tensor, t: int) -> float:
    """From the definition of q(x_{t-1} | x_t, x_0) by Bayes' rule, in fp64."""
    x0, noise, prediction = x0.double(), noise.double(), prediction.double()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    cumulative = (1 - betas).cumprod(0)
    beta, alpha, before, now = betas[t], 1 - betas[t], cumulative[t - 1], cumulative[t]
    x_t = now.sqrt() * x0 + (1 - now).sqrt() * noise
    true_precision = alpha / beta + 1 / (1 - before)

    def mean(start: Tensor) -> Tensor:
        return (alpha.sqrt() / beta * x_t + before.sqrt() / (1 - before) * start) / true_precision

    predicted_x0 = (x_t - (1 - now).sqrt() * prediction) / now.sqrt()
    fraction = (variance.double().tanh() + 1) / 2
    log_variance = fraction * beta.log() - (1 - fraction) * true_precision.log()
    true = torch.distributions.Normal(mean(x0), true_precision.rsqrt())
    model = torch.distributions.Normal(mean(predicted_x0), (log_variance / 2).exp())
    return torch.distributions.kl_divergence(true, model).mean().item() / math.log(2)


def test_vb_at_the_first_step_is_the_likelihood_of_a_bin() -> None:
    timesteps = torch.zeros(3, dtype=torch.long)
    # Inside, below and above the range whose ends are open, predicted half a bin too high.
    x0 = torch.tensor([0.1, -1.2, 1.3]).view(3, 1, 1, 1)
    noise = torch.full_like(x0, 0.3)
    cumulative = alphas_cumprod()[0]
    x_t = add_noise(x0, noise, timesteps).double()
    predicted_x0 = x0.double() + 1 / 255
    prediction = (x_t - cumulative.sqrt() * predicted_x0) / (1 - cumulative).sqrt()
    output = torch.cat([prediction, torch.ones_like(prediction)], dim=1)
    vb = training_loss(lambda *_: output, x0, timesteps, noise).vb
    normal = torch.distributions.Normal(0, 1e-2)  # 1 asks for a variance of β_0 = 1e-4
    below, upper = (normal.cdf(torch.tensor(edge)) for edge in (-2 / 255, 0.0))
    expected = -torch.stack([upper - below, upper, 1 - below]).log2()
    assert torch.allclose(vb, expected, atol=0.005)  # the published tanh approximation


def test_vb_trains_the_variance_alone() -> None:
    x0, noise = batch()
    output = torch.cat(batch(seed=1), dim=1).requires_grad_()
    terms = training_loss(lambda *_: output, x0, TIMESTEPS, noise)
    from_vb = torch.autograd.grad(terms.vb.sum(), output, retain_graph=True)[0]
    from_mse = torch.autograd.grad(terms.mse.sum(), output)[0]
    assert from_vb[:, :4].count_nonzero() == 0
    assert from_vb[:, 4:].abs().amax(dim=(1, 2, 3)).min() > 0
    assert from_mse[:, 4:].count_nonzero() == 0


def test_the_same_prediction_as_noise_or_velocity_has_the_same_vb() -> None:
    x0, noise = batch()
    prediction, variance = batch(seed=1)
    cumulative = alphas_cumprod()[TIMESTEPS].float().view(-1, 1, 1, 1)
    x_t = add_noise(x0, noise, TIMESTEPS)
    predicted_x0 = (x_t - (1 - cumulative).sqrt() * prediction) / cumulative.sqrt()
    as_velocity = cumulative.sqrt() * prediction - (1 - cumulative).sqrt() * predicted_x0
    outputs = {"epsilon": prediction, "v_prediction": as_velocity}
    vb = {}
    for name, output in outputs.items():
        both = torch.cat([output, variance], dim=1)
        terms = training_loss(lambda *_, o=both: o, x0, TIMESTEPS, noise, prediction_type=name)
        vb[name] = terms.vb
    assert torch.allclose(vb["epsilon"], vb["v_prediction"], rtol=1e-3)


def test_without_learned_variance_the_loss_is_the_error() -> None:
    x0, noise = batch()
    terms = training_loss(lambda *_: torch.zeros_like(x0), x0, TIMESTEPS, noise)
    assert torch.equal(terms.loss, noise.square().mean(dim=(1, 2, 3)))
    assert terms.vb.count_nonzero() == 0


def test_the_network_sees_noised_latents_and_a_bf16_answer_is_enough() -> None:
    x0, noise = batch()
    seen = []

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        seen.append((x_t, timesteps))
        return torch.zeros(4, 8, 6, 5, dtype=torch.bfloat16)

    terms = training_loss(denoise, x0.bfloat16(), TIMESTEPS, noise)
    assert torch.equal(seen[0][0], add_noise(x0.bfloat16().float(), noise, TIMESTEPS))
    assert torch.equal(seen[0][1], TIMESTEPS)
    assert {values.dtype for values in terms} == {torch.float32}


def test_what_the_loss_cannot_use_is_refused() -> None:
    x0, noise = batch()
    with pytest.raises(ValueError, match="prediction_type must be .* got 'sample'"):
        training_loss(lambda *_: x0, x0, TIMESTEPS, noise, prediction_type="sample")
    with pytest.raises(
        ValueError, match=r"denoise must return 4 or 8 channels, got \(4, 5, 6, 5\)"
    ):
        training_loss(lambda *_: torch.zeros(4, 5, 6, 5), x0, TIMESTEPS, noise)
    with pytest.raises(
        ValueError, match=r"timesteps must be 4 integers, got \(4,\) of torch.float"
    ):
        add_noise(x0, noise, TIMESTEPS.float())
    with pytest.raises(ValueError, match=r"timesteps must be 4 integers, got \(3,\)"):
        add_noise(x0, noise, TIMESTEPS[:3])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_errors_of_x0_by_the_clamped_ratio(kind: str) -> None:
    timesteps = torch.tensor([0, 50, 300, 700, 999])
    x0, noise = torch.randn(2, 5, 4, 4, 4).unbind(0)
    alphas = alphas_cumprod()[timesteps]
    snr = alphas / (1 - alphas)
    error = 0.1

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        target = noise if kind == "epsilon" else velocity(x0, noise, t)
        return target + error

    terms = training_loss(denoise, x0, timesteps, noise, prediction_type=kind, min_snr=5.0)
    # How far off the x_0 is that such an error implies.
    off = error / snr.sqrt() if kind == "epsilon" else error * (1 - alphas).sqrt()
    assert torch.allclose(terms.loss.double(), off.square() * snr.clamp(max=5.0), rtol=1e-3)
    assert torch.allclose(terms.mse, torch.full((5,), error**2), rtol=1e-3)
