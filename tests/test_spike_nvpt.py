"Spike-NVPT: its units, its four interpretations of time, what is deployed; and its controls."

from copy import deepcopy

import pytest
import timm
import torch

from spikeprompt.backbones.loader import Backbone, create_backbone
from spikeprompt.config import ConfigError, parse_config
from spikeprompt.controls.spike_nvpt import (
    StraightThrough,
    StraightThroughConfig,
    VPTNoise,
    VPTNoiseConfig,
)
from spikeprompt.methods.spike_nvpt import (
    VARIANTS,
    SpikeNVPT,
    SpikeNVPTConfig,
    init_latent,
    signal_filtering_layer,
    spike_discretization_unit,
)
from spikeprompt.prompts.base import create_prompt, num_parameters
from spikeprompt.prompts.tokens import token_statistics

SCALINGS = ["matched", "fixed", "raw", "learned"]
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def spiking(name="pocket_vit", **settings):
    "An uncalibrated prompt for a pocket model."
    torch.manual_seed(0)
    return SpikeNVPT(SpikeNVPTConfig(**settings), create_backbone(name))


def draw_latents(prompt, scale=1.0):
    "As if it had trained."
    with torch.no_grad():
        for latent in prompt.latents:
            latent.latent.add_(scale * torch.randn_like(latent.latent))


@pytest.mark.parametrize(
    "T, kappa, min_latent", [(1, 0.5, 1.0), (3, 0.5, 2 / 3), (4, 0.5, 0.5), (4, 0.6, 0.75), (16, 0.5, 0.5), (4, 1.0, 1.0)]
)
def test_under_a_constant_current_time_is_one_threshold_on_the_latent(T, kappa, min_latent):
    prompt = spiking(variant="constant", timesteps=T, kappa=kappa, bit_density=0.3)
    draw_latents(prompt)
    assert prompt.latents[0].min_latent == pytest.approx(min_latent)
    assert torch.equal(prompt.bits(0) == 1, prompt.latents[0].latent >= min_latent - 1e-6)
    torch.manual_seed(0)
    drawn = init_latent((100, 1000), 0.3, min_latent).expand(T, -1, -1)
    assert spike_discretization_unit(signal_filtering_layer(drawn), kappa).mean().item() == pytest.approx(0.3, abs=0.01)


def test_bits_are_exact_and_straight_through():
    rate = torch.linspace(-3, 3, 1001, requires_grad=True)
    bits = spike_discretization_unit(rate, 1 / 3)
    assert torch.equal(bits.unique(), torch.tensor([0.0, 1.0]))
    bits.sum().backward()
    assert (rate.grad == 1).all()


def test_vpts_own_start_would_never_fire():
    prompt = spiking()
    for latent in prompt.latents:
        torch.nn.init.uniform_(latent.latent, -0.0625, 0.0625)
    assert prompt.measures(None)["bit_density"] == prompt.measures(None)["firing_rate"] == 0


def test_after_a_layernorm_density_sets_the_amplitude_and_zeros_are_not_silent():
    bits = (torch.arange(1000) < 200).float()
    normed = torch.nn.functional.layer_norm(bits, (1000,))
    assert normed[0].item() == pytest.approx((0.8 / 0.2) ** 0.5, rel=1e-3)
    assert normed[-1].item() == pytest.approx(-((0.2 / 0.8) ** 0.5), rel=1e-3)


@every_variant
@pytest.mark.parametrize(
    "name, depth, scaling",
    [
        *[(name, depth, scaling) for name, depth in (("pocket_vit", "shallow"), ("pocket_swin", "deep")) for scaling in SCALINGS],
        ("pocket_resnet", "deep", "raw"),  # a padding has colours of its own
    ],
)
def test_every_variant_and_scaling_learns_and_deploys_to_the_bit(name, depth, variant, scaling, prompted, images):
    settings = {"variant": variant, "scaling": scaling, "depth": depth, "rate_penalty": 1.0}
    model = prompted(name, "spike_nvpt", **settings).train()
    logits, penalty = model(images[:4], return_penalty=True)
    (logits.square().sum() + penalty).backward()
    assert all((p.grad != 0).any() for p in model.prompt.parameters())
    draw_latents(model.prompt, 0.3)
    model.prompt.on_step(0.5)
    copy = deepcopy(model)
    state = {name: tensor.clone() for name, tensor in model.prompt.deployed_state().items()}
    assert state["bits"].dtype == torch.uint8 and not any("latent" in name or "kept" in name or "noise" in name for name in state)
    draw_latents(copy.prompt, 5.0)
    with torch.no_grad():
        expected = model.eval()(images)
        assert not torch.equal(copy.eval()(images), expected)
        copy.prompt.load_deployed_state(state)
        assert torch.equal(copy(images), expected)
    assert torch.equal(copy.prompt.discrete_state(), model.prompt.discrete_state())
    copy.prompt.on_step(1.0)
    assert torch.equal(copy.prompt.discrete_state(), model.prompt.discrete_state())


@every_variant
def test_queries_are_those_of_the_deployed_prompt_and_draw_no_noise(variant, images):
    prompt = spiking(variant=variant).train()
    state, noise = {name: tensor.clone() for name, tensor in prompt.state_dict().items()}, torch.get_rng_state()
    bits, measures = prompt.discrete_state(), prompt.measures(images)
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(torch.equal(prompt.state_dict()[name], tensor) for name, tensor in state.items())
    assert measures["bit_density"] == pytest.approx(0.2, abs=0.02) and 0 <= measures["firing_rate"] <= 1
    prompt.eval()
    assert torch.equal(bits, prompt.discrete_state()) and measures == prompt.measures(images)


def test_noise_follows_its_schedule_in_the_state_dict():
    prompt, other = spiking(noise_std=0.8).train(), spiking(noise_std=0.8).train()
    differ = lambda prompt: (prompt.prompt_tokens(0) != prompt.prompt_tokens(0)).float().mean().item()
    shares = []
    for progress, noise_std in (0.0, 0.8), (0.5, 0.4), (1.0, 0.0):
        prompt.on_step(progress)
        assert prompt.latents[0].noise_std.item() == pytest.approx(noise_std)
        shares.append(differ(prompt))
    assert shares[0] > shares[1] > shares[2] == 0
    assert differ(other) > 0
    other.load_state_dict(prompt.state_dict())
    assert differ(other) == 0


def test_a_membrane_flips_its_bit_beyond_the_margin_alone():
    prompt = spiking(variant="membrane", margin=0.2).train()
    for value, expected in (0.0, 0), (0.69, 0), (0.71, 1), (0.31, 1), (0.29, 0):
        for latent in prompt.latents:
            torch.nn.init.constant_(latent.latent, value)
        assert (prompt.discrete_state() == expected).all(), value
        prompt.on_step(0.5)
    kept = prompt.latents[0].kept_bits.clone()
    torch.nn.init.constant_(prompt.latents[0].latent, 5.0)
    prompt.prompt_tokens(0), prompt.discrete_state()  # neither a forward pass nor a query changes what is kept
    assert torch.equal(prompt.latents[0].kept_bits, kept)
    with pytest.raises(ConfigError, match="here.margin = 1.0: input should be less than 1"):
        parse_config(SpikeNVPTConfig, {"margin": 1.0}, "here")


def test_a_series_has_more_parameters_and_the_same_bytes():
    one, four = spiking(variant="constant"), spiking(variant="series", timesteps=4)
    assert num_parameters(four) == 4 * num_parameters(one)
    assert four.deployed_state()["bits"].nbytes == one.deployed_state()["bits"].nbytes


def test_the_rate_penalty_pulls_the_density_back(images):
    prompt = spiking(rate_penalty=10.0).train()
    draw_latents(prompt, 2.0)
    optimizer = torch.optim.Adam(prompt.parameters(), 0.05)
    first = prompt.measures(None)["bit_density"]
    for _ in range(20):
        optimizer.zero_grad()
        prompt(images[:1])[1].backward()
        optimizer.step()
    assert first > 0.3 and abs(prompt.measures(None)["bit_density"] - 0.2) < 0.5 * (first - 0.2)
    deepcopy(prompt)
    assert prompt.eval()(images[:1])[1] == 0.0 and spiking().train()(images[:1])[1] == 0.0


@pytest.mark.parametrize("name", ["pocket_vit", "pocket_swin"])
def test_matched_bits_start_with_the_statistics_of_patch_tokens(name, images):
    prompt, backbone = spiking(name, num_tokens=2000, scaling="matched").eval(), create_backbone(name)
    tokens = prompt.prompt_tokens(0)
    assert abs(tokens.mean().item()) < 0.02 and tokens.std().item() == pytest.approx(1, abs=0.02)  # before it is calibrated
    prompt.calibrate(images, backbone)
    for layer, (mean, std) in enumerate(token_statistics(backbone, images)):
        tokens = prompt.prompt_tokens(layer).detach()
        assert ((tokens.mean(0) - mean).abs() < 0.15 * std + 1e-6).all()
        assert (tokens.std(0) / std).sub(1).abs().max() < 0.15


def test_fixed_and_raw_tokens_are_sparse_and_matched_ones_are_not(images):
    zeros = {}
    for scaling in "matched", "fixed", "raw":
        prompt = spiking(scaling=scaling).eval()
        prompt.calibrate(images, create_backbone("pocket_vit"))
        zeros[scaling] = (prompt.concat_layers(prompt.prompt_tokens) == 0).float().mean().item()
    assert zeros["matched"] == 0 and zeros["fixed"] == zeros["raw"] == pytest.approx(0.8, abs=0.02)


def test_duplicate_tokens():
    prompt = spiking(num_tokens=4)
    assert prompt.measures(None)["duplicate_tokens"] == 0
    with torch.no_grad():
        for latent in prompt.latents:
            latent.latent[1:] = latent.latent[:1]
    assert prompt.measures(None)["duplicate_tokens"] == 0.75
    assert "duplicate_tokens" not in spiking("pocket_resnet").measures(None)


@pytest.mark.parametrize("depth, kilobytes", [("shallow", 0.94), ("deep", 11.25)])
def test_packed_sizes_in_a_vit_b(depth, kilobytes):
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    prompt = SpikeNVPT(SpikeNVPTConfig(depth=depth, scaling="fixed"), Backbone(vit))
    state = prompt.deployed_state()
    assert state["bits"].nbytes / 1024 == pytest.approx(kilobytes, abs=0.005)
    assert sum(tensor.nbytes for name, tensor in state.items() if name != "bits") <= 12 * 12


def test_contrast_scales_the_colours_of_a_padding_and_their_gradients():
    one, tenth = spiking("pocket_resnet"), spiking("pocket_resnet", contrast=0.1)
    torch.testing.assert_close(tenth.eval().prompt_tokens(0), 0.1 * one.eval().prompt_tokens(0))
    for prompt in one, tenth:
        prompt.prompt_tokens(0).sum().backward()
    torch.testing.assert_close(tenth.scales[0].alpha.grad, 0.1 * one.scales[0].alpha.grad)


def test_straight_through_bits_are_those_of_a_constant_current():
    torch.manual_seed(0)
    control = StraightThrough(StraightThroughConfig(), create_backbone("pocket_vit"))
    draw_latents(control)
    constant = spiking(variant="constant")
    constant.load_state_dict(control.state_dict())
    assert torch.equal(control.discrete_state(), constant.discrete_state())
    control.bits(0).sum().backward()
    assert (control.latents[0].latent.grad == 1).all()


@pytest.mark.parametrize("name", ["pocket_vit", "pocket_resnet"])
def test_random_bits_are_the_untrained_prompt(name):
    torch.manual_seed(0)
    random = create_prompt(SpikeNVPTConfig(trainable=False, variant="constant"), create_backbone(name)).train()
    assert torch.equal(random.discrete_state(), spiking(name, variant="constant").discrete_state())
    assert not random.prompt_tokens(0).requires_grad and torch.equal(random.prompt_tokens(0), random.eval().prompt_tokens(0))


def test_noise_on_dense_prompts_is_relative_to_them_and_falls_to_zero():
    torch.manual_seed(0)
    prompt = VPTNoise(VPTNoiseConfig(num_tokens=200, noise_std=0.5), create_backbone("pocket_vit")).train()
    rms = prompt.values[0].square().mean().sqrt().item()
    for progress in 0.0, 0.5, 1.0:
        prompt.on_step(progress)
        noise = (prompt.prompt_tokens(0) - prompt.values[0]).std().item()
        assert noise == pytest.approx(0.5 * (1 - progress) * rms, rel=0.05)
    assert set(prompt.deployed_state()) == {f"values.{layer}" for layer in range(4)}
