"Integrate-and-fire neurons: what they count, and what gradient passes through their spikes and through time."

import pytest
import torch

from spikeprompt.prompts.neurons import (
    SURROGATES,
    calibrated_thresholds,
    constant_current_rate,
    integrate_and_fire,
    signed_integrate_and_fire,
)

surrogates = pytest.mark.parametrize("name", SURROGATES)


@pytest.mark.parametrize("timesteps", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("v_threshold", [0.5, 1.0, 2.0])
def test_rate_of_a_constant_current_is_its_quantised_value(timesteps, v_threshold):
    current = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 6 - 2
    rate = integrate_and_fire(current.expand(timesteps, -1), v_threshold).mean(0)
    assert torch.equal(rate, constant_current_rate(current, timesteps, v_threshold))
    assert rate.min() == 0 and rate.max() == 1


@surrogates
@pytest.mark.parametrize("v_threshold", [0.5, 2.0])
def test_both_neurons_agree_where_no_current_is_negative(name, v_threshold):
    current = v_threshold * torch.rand(6, 500, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(6, 500, generator=torch.Generator().manual_seed(1))
    grads = []
    for neuron in (
        lambda current: integrate_and_fire(current, v_threshold, SURROGATES[name]),
        lambda current: signed_integrate_and_fire(current, torch.full((6, 1), v_threshold), SURROGATES[name]),
    ):
        leaf = current.clone().requires_grad_()
        spikes = neuron(leaf)
        (weights * spikes).sum().backward()
        grads.append((spikes.detach(), leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-5)


def test_the_signed_neuron_is_odd():
    current = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(signed_integrate_and_fire(current, torch.ones(5, 1)), signed_integrate_and_fire(-current, torch.ones(5, 1)))


def carry(potential, name, v_threshold=1.0):
    "∂u₁⁺/∂u₁ of signed neurons, read from the gradients of the second spike."
    after = potential - potential.sign() * v_threshold * (potential.abs() >= v_threshold)
    current = torch.stack([potential, 0.8 * v_threshold - after]).requires_grad_()
    signed_integrate_and_fire(current, torch.full((2, 1), v_threshold), SURROGATES[name])[1].sum().backward()
    return current.grad[0] / current.grad[1]


@surrogates
@pytest.mark.parametrize("v_threshold", [0.3, 1.0, 2.0])
def test_gradient_through_time_is_that_of_the_smoothed_neuron(name, v_threshold):
    surrogate = SURROGATES[name]
    smoothed = lambda u: u - u.sign() * v_threshold * surrogate.primitive_function(u.abs() / v_threshold - 1, surrogate.alpha)
    u = v_threshold * torch.tensor([-2.6, -1.3, -0.7, -0.1, 0.05, 0.3, 0.6, 0.95, 1.2, 1.9, 3.0], dtype=torch.float64)
    step = 1e-5
    expected = (smoothed(u + step) - smoothed(u - step)) / (2 * step)
    found = carry(u.float(), name, v_threshold)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    assert found.min() >= -1e-5 and found.max() <= 1 + 1e-5


@surrogates
def test_a_silent_neuron_carries_its_potential_over_and_one_at_the_threshold_does_not(name):
    assert carry(torch.tensor([0.01]), name) > 0.9
    assert carry(torch.tensor([1.0]), name).abs() < 1e-5
    assert carry(torch.tensor([5.0]), name) > 0.97


@surrogates
def test_an_early_current_reaches_a_late_spike_through_silent_steps(name):
    current = torch.tensor([0.2, 0.02, 0.02, 0.02, 0.6])[:, None].requires_grad_()
    signed_integrate_and_fire(current, torch.ones(5, 1), SURROGATES[name])[-1].sum().backward()
    early, last = current.grad[0], current.grad[-1]
    assert 0.1 * last < early < last


@surrogates
def test_gradients_of_the_smoothed_neuron_over_all_steps_agree_with_finite_differences(name):
    smooth = type(SURROGATES[name])(alpha=SURROGATES[name].alpha, spiking=False)
    current = torch.tensor([0.6, 0.9, 0.5, 0.7])[:, None] * torch.tensor([1.0, -0.7, 0.8])
    threshold = torch.tensor([1.0, 1.2, 0.8, 1.1])[:, None]
    weights = torch.tensor([0.3, -1.0, 0.7, 1.0])[:, None]
    loss = lambda current, threshold: (weights * signed_integrate_and_fire(current, threshold, smooth)).sum()
    arguments = [current, threshold]
    grads = torch.autograd.grad(loss(*[x.requires_grad_() for x in arguments]), arguments)
    for which, grad in enumerate(grads):
        for entry in range(grad.numel()):
            values = []
            for sign in 1, -1:
                moved = [x.detach().clone() for x in arguments]
                moved[which].view(-1)[entry] += sign * 5e-3
                values.append(loss(*moved).item())
            assert (values[0] - values[1]) / 1e-2 == pytest.approx(grad.view(-1)[entry].item(), abs=3e-3)


@surrogates
def test_spikes_and_relative_gradients_do_not_depend_on_the_scale(name):
    current = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    found = []
    for scale in 1.0, 8.0:
        leaf = (scale * current).requires_grad_()
        spikes = signed_integrate_and_fire(leaf, torch.full((4, 1), scale), SURROGATES[name])
        spikes.sum().backward()
        found.append((spikes.detach(), scale * leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_higher_threshold_means_fewer_spikes_to_the_gradient_too():
    threshold = torch.ones(1, 1, requires_grad=True)
    signed_integrate_and_fire(torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)), threshold).sum().backward()
    assert threshold.grad < 0


@pytest.mark.parametrize("firing_rate", [0.05, 0.3, 0.8])
def test_calibrated_populations_fire_at_the_target_rate_at_every_step(firing_rate):
    draw = torch.Generator().manual_seed(0)
    current = torch.randn(6, 3, 20_000, generator=draw) * torch.tensor([0.1, 1.0, 5.0])[:, None] + torch.tensor([0.0, 0.5, -3.0])[:, None]
    thresholds = calibrated_thresholds(current, firing_rate)
    rates = signed_integrate_and_fire(current, thresholds[..., None]).mean(-1)
    assert thresholds.shape == (6, 3)
    torch.testing.assert_close(rates, torch.full((6, 3), firing_rate), atol=2e-3, rtol=0)


def test_membrane_potentials_are_fp32_under_autocast():
    current = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        low = integrate_and_fire(current), signed_integrate_and_fire(current, torch.ones(8, 1))
    high = integrate_and_fire(current), signed_integrate_and_fire(current, torch.ones(8, 1))
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(low, high))
