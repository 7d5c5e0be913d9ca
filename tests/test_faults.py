"What each fault does to a stored prompt, and that the prompt comes back whole."
import pytest
import torch

from spikeprompt.backbones import create_backbone, fingerprint
from spikeprompt.faults import FAULTS, faulty, gaussian, quantise
from spikeprompt.methods.linear_probe import LinearProbe, LinearProbeConfig
from spikeprompt.methods.lorsp import LoRSP, LoRSPConfig
from spikeprompt.methods.spike_nvpt import SpikeNVPT, SpikeNVPTConfig
from spikeprompt.prompts import Head, PromptedModel
from spikeprompt.settings import SettingsError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def prompted(method, config, backbone="pocket_vit"):
    "An untrained prompt on its backbone."
    torch.manual_seed(0)
    frozen = create_backbone(backbone)
    D = frozen.num_features
    head = Head(torch.zeros(D), torch.ones(D), torch.randn(10, D), torch.zeros(10))
    return PromptedModel(frozen, method(config, frozen), head).eval()


@pytest.fixture(params=["pocket_vit", "pocket_resnet"])
def spiking(request):
    return prompted(SpikeNVPT, SpikeNVPTConfig(), request.param)


@pytest.fixture(scope="module")
def lorsp():
    return prompted(LoRSP, LoRSPConfig(pooled=8))


def all_bits(prompt):
    return torch.cat([prompt.bits(layer).detach().flatten() for layer in range(len(prompt.latents))])


def all_latents(prompt):
    return torch.cat([latent.detach().flatten() for latent in prompt.latents])


@pytest.mark.parametrize("share", [0, 0.05, 0.5, 1])
def test_flips_have_their_share_and_touch_nothing_else(spiking, share):
    prompt = spiking.prompt
    bits, latents = all_bits(prompt), all_latents(prompt)
    others = {name: p.detach().clone() for name, p in prompt.named_parameters() if "latents" not in name}
    with faulty(prompt.train(), "bit_flips", share, seeded()):
        flipped, moved = all_bits(prompt) != bits, all_latents(prompt)
        assert all(torch.equal(p, others[name]) for name, p in prompt.named_parameters() if name in others)
    error = (share * (1 - share) / len(bits)) ** 0.5
    assert abs(flipped.float().mean() - share) <= 4 * error + 1e-6
    assert torch.equal(moved[~flipped], latents[~flipped])
    assert torch.equal(moved[flipped], 1 - 2 * bits[flipped])


@pytest.mark.parametrize("current", ["constant", "separate", "carried"])
def test_a_bit_flips_whole_however_time_is_read(current):
    prompt = prompted(SpikeNVPT, SpikeNVPTConfig(current=current)).prompt
    bits = all_bits(prompt)
    with faulty(prompt, "bit_flips", 1, seeded()):
        assert torch.equal(all_bits(prompt), 1 - bits)
    with faulty(prompt, "bit_flips", 0.5, seeded()):
        assert (all_bits(prompt) != bits).float().mean() == pytest.approx(0.5, abs=4 * 0.5 / len(bits) ** 0.5)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_quantised_values_lie_on_a_few_levels_nearby(bits):
    values = torch.randn(1000, generator=seeded())
    found = quantise(values, bits)
    step = values.abs().max() / (2 ** (bits - 1) - 1)
    assert len(found.unique()) <= 2**bits - 1
    assert (found - values).abs().max() <= step / 2 + 1e-6
    torch.testing.assert_close(quantise(-values, bits), -found)


def test_sixteen_bits_are_enough(lorsp):
    images = torch.rand(8, 3, 32, 32, generator=seeded())
    with torch.no_grad():
        whole = lorsp(images)
        with faulty(lorsp.prompt, "quantise", 16):
            fine = lorsp(images)
        with faulty(lorsp.prompt, "quantise", 2):
            coarse = lorsp(images)
            assert all(len(p.unique()) <= 3 for p in lorsp.prompt.parameters())
    assert (fine - whole).abs().max() < 0.05 * (coarse - whole).abs().max()
    assert torch.equal(quantise(torch.zeros(3), 4), torch.zeros(3))


@pytest.mark.parametrize("level", [0, 0.1, 2.0])
def test_noise_is_measured_against_each_tensor(level):
    values = 5 + torch.randn(20_000, generator=seeded())
    noise = gaussian(values, level, seeded(1)) - values
    rms = values.square().mean().sqrt()
    assert noise.square().mean().sqrt() == pytest.approx((level * rms).item(), rel=0.03)
    assert noise.mean().abs() <= 4 * level * rms / 20_000**0.5


@pytest.mark.parametrize("fault, level", [("quantise", 3), ("gaussian", 0.5), ("bit_flips", 0.3)])
def test_the_prompt_comes_back_whole(spiking, fault, level):
    prompt, images = spiking.prompt.train(), torch.rand(4, 3, 32, 32, generator=seeded())
    before, learned = fingerprint(spiking), [p.requires_grad for p in prompt.parameters()]
    with torch.no_grad():
        with faulty(prompt, fault, level, seeded()):
            damaged, bad = fingerprint(spiking), spiking(images)
        good = spiking(images)
    assert damaged != before and not torch.allclose(bad, good)
    assert fingerprint(spiking) == before
    with pytest.raises(ZeroDivisionError):
        with faulty(prompt, fault, level, seeded()):
            1 / 0
    assert fingerprint(spiking) == before
    assert any(learned) and [p.requires_grad for p in prompt.parameters()] == learned
    assert all(p.grad is None for p in prompt.parameters())


def test_the_generator_fixes_chance(lorsp):
    def noisy(seed):
        with faulty(lorsp.prompt, "gaussian", 0.1, seeded(seed)):
            return fingerprint(lorsp.prompt)
    assert noisy(0) == noisy(0) != noisy(1)


def test_a_constant_stays_whole():
    model = prompted(LoRSP, LoRSPConfig(), "pocket_resnet")
    with faulty(model.prompt, "gaussian", 1.0, seeded()):
        assert model.prompt.gain == 0.5 and (model.prompt.alpha == model.prompt.config.alpha).all()


def test_no_prompt_has_no_faults():
    prompt = LinearProbe(LinearProbeConfig(), None)
    for fault, level in (("quantise", 2), ("gaussian", 1.0)):
        with faulty(prompt, fault, level, seeded()):
            assert not [*prompt.parameters()]


@pytest.mark.parametrize("fault, level, said", [
    ("rot", 1, f"fault = 'rot': allowed are {', '.join(FAULTS)}"), ("quantise", 1, "bits = 1: allowed"),
    ("quantise", 4.5, "bits = 4.5: allowed"), ("gaussian", -1, "level = -1: allowed are 0 and more"),
    ("gaussian", float("inf"), "level = inf: allowed"), ("bit_flips", 0.1, "bit_flips' on LoRSP: allowed are prompts of bits")])
def test_what_cannot_be_is_named(lorsp, fault, level, said):
    before = fingerprint(lorsp)
    with pytest.raises(SettingsError, match=said) as caught:
        with faulty(lorsp.prompt, fault, level, seeded()):
            pass
    assert "\n" not in str(caught.value)
    assert fingerprint(lorsp) == before


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_wrong_share_is_named(spiking, share):
    with pytest.raises(SettingsError, match=f"level = {share}: allowed are 0 to 1"):
        with faulty(spiking.prompt, "bit_flips", share, seeded()):
            pass
